"""What a training step allocates and releases, in order: the records that a fake run leaves (`runtime/fake_step.py`).

An `Allocation` is one storage, or memory that a kernel takes while it runs; a `Moment` is its coming or going in a phase. A
phase's peak on a device is the highest running sum within it, what was there when it began included. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import attrgetter
from typing import Any, Literal

from ..tracer.graph import Frame

Kind = Literal[
    "parameter",
    "buffer",
    "input",
    "gradient",
    "optimizer state",
    "activation",
    "KV cache",
    "gathered parameter",
    "communication buffer",
    "temporary",
]
"""What a piece of memory is for. *Gathered parameters* are whole ones that FSDP makes of the ranks' parts for a while; the *KV
cache* is all that a model keeps of the tokens before, states included."""

START, FIRST_STEP, FIRST_OPTIMIZER, STEP, OPTIMIZER = "start", "first_step", "first_optimizer", "step", "optimizer"
"""The phases of a run: what is there before it, then forward and backward, and the optimizer, twice."""

BETWEEN = "between"
"""In a run of serving, the tokens between the first and the last that is decoded; no phase of `Memory`."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """One piece of memory: what it is, its bytes, and where it comes from.

    `name` is that of a parameter, buffer or input, or of the parameter that a gradient or a state belongs to. `module` is the
    path of the module that ran, `op` the ATen operator, `source` the line outside torch that called it; those of a backward op
    are those of the forward op that it is the derivative of. `stream` is the CUDA stream whose pool it would come from, "" for
    the one that computes.
    """

    kind: Kind
    nbytes: int
    device: str
    name: str = ""
    module: str = ""
    op: str = ""
    source: Frame | None = None
    stream: str = ""

    def describe(self) -> str:
        """Its name, or module and op, with the source.

        >>> Allocation("activation", 24, "cpu", module="head", op="addmm", source=Frame("net.py", 3, "forward")).describe()
        'head: addmm at net.py:3 in forward'
        """
        if self.name:
            return self.name if self.kind in ("parameter", "buffer", "input") else f"{self.kind} of {self.name}"
        made = f"{self.module}: {self.op}" if self.module else self.op
        return f"{made} at {self.source}" if self.source else made

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        named = {"name": self.name, "module": self.module, "op": self.op, "source": str(self.source) if self.source else ""}
        return {"kind": self.kind, "bytes": self.nbytes, "device": self.device, **{k: v for k, v in named.items() if v}}


@dataclass(frozen=True, slots=True)
class Moment:
    """In `phase`, the allocation with this index came (`born`) or went."""

    phase: str
    allocation: int
    born: bool


@dataclass(frozen=True)
class Timeline:
    """All allocations of a run, and the moments at which they came and went.

    >>> weight, gradient = Allocation("parameter", 24, "cpu", "weight"), Allocation("gradient", 24, "cpu", "weight")
    >>> moments = (Moment(START, 0, True), Moment(FIRST_STEP, 1, True), Moment(OPTIMIZER, 1, False))
    >>> run = Timeline((weight, gradient), moments)
    >>> run.peaks
    {'start': {'cpu': 24}, 'first_step': {'cpu': 48}, 'optimizer': {'cpu': 48}}
    >>> [each.describe() for each in run.at_peak("optimizer", "cpu")]
    ['weight', 'gradient of weight']
    """

    allocations: tuple[Allocation, ...]
    moments: tuple[Moment, ...]

    @cached_property
    def peaks(self) -> Mapping[str, Mapping[str, int]]:
        """Bytes by phase and device."""
        found: dict[str, dict[str, int]] = {}
        for phase, device, _, before, now in self._sums():
            peaks = found.setdefault(phase, {})
            for known, held in before.items():
                peaks[known] = max(peaks.get(known, 0), held)
            peaks[device] = max(peaks.get(device, 0), now)
        return found

    def by_phase(self) -> Iterator[tuple[str, Iterator[Moment]]]:
        """The moments of one phase after the other, in order."""
        return groupby(self.moments, key=attrgetter("phase"))

    def at_peak(self, phase: str, device: str) -> list[Allocation]:
        """What is there when `phase` is at its peak on `device`, largest first."""
        position = self._peak_position(phase, device)
        held: dict[int, None] = {}
        for moment in self.moments[:position]:
            if moment.born:
                held[moment.allocation] = None
            else:
                del held[moment.allocation]
        found = [self.allocations[index] for index in held]
        return sorted((each for each in found if each.device == device), key=lambda each: -each.nbytes)

    def by_kind(self, phase: str, device: str) -> dict[str, int]:
        """Bytes of each kind when `phase` is at its peak on `device`."""
        found: dict[str, int] = {}
        for each in self.at_peak(phase, device):
            found[each.kind] = found.get(each.kind, 0) + each.nbytes
        return found

    def _peak_position(self, phase: str, device: str) -> int:
        """After how many moments the peak is reached first."""
        wanted = self.peaks[phase].get(device, 0)
        for position, (at, on, _, before, now) in enumerate(self._sums()):
            if at == phase and before.get(device, 0) == wanted:
                return position
            if at == phase and on == device and now == wanted:
                return position + 1
        return len(self.moments)

    def _sums(self) -> Iterator[tuple[str, str, int, dict[str, int], int]]:
        """Per moment: phase, device, allocation, the sums by device before it, and the device's sum after it."""
        sums: dict[str, int] = {}
        for moment in self.moments:
            each = self.allocations[moment.allocation]
            now = sums.get(each.device, 0) + (each.nbytes if moment.born else -each.nbytes)
            yield moment.phase, each.device, moment.allocation, sums, now
            sums[each.device] = now
