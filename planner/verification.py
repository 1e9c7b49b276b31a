"""Predicted against measured, phase by phase, and what the difference consists of: the records that a verification leaves.

A phase on a device has three peaks: *predicted*, the tensors that a tier says; *measured*, what torch's allocator had handed out;
and *whole*, what the device or the process holds besides. `Part`s add up to measured less predicted, exactly, and `beyond` to
whole less measured. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .allocations import Allocation, Timeline
from .changes import Change
from .tiers import Tier

KERNELS = "inside kernels"
"""Memory that an op takes and gives back while it runs, and no tensor shows: workspaces of oneDNN, cuBLAS, cuDNN."""

ROUNDING = "allocator rounding"
"""What blocks are larger than what was asked for: 512 bytes at least on CUDA, none on the CPU."""

WATCHING = "not seen again"
"""What the peak was off when the step ran a second time, to be looked at op by op."""

_SHOWN_LARGEST = 5


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of memory at the peak, predicted and measured; `largest` are the tensors or ops that differ most."""

    name: str
    predicted: int
    measured: int
    largest: tuple[tuple[str, int], ...] = ()

    @property
    def difference(self) -> int:
        """Measured less predicted."""
        return self.measured - self.predicted

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        largest = [{"what": what, "bytes": nbytes} for what, nbytes in self.largest]
        return {
            "name": self.name,
            "predicted": self.predicted,
            "measured": self.measured,
            "difference": self.difference,
            "largest": largest,
        }


@dataclass(frozen=True, slots=True)
class Check:
    """One phase on one device.

    `closed_form` is T0's peak, `run` is T1's where the step can be run on fake tensors. `measured` is the worst of `repeats`, the
    peaks of the steps that were taken. `parts` add up to `difference`, `beyond` to `whole` less `measured`.

    >>> parts = (Part("activation", 60, 60), Part(KERNELS, 0, 4))
    >>> check = Check("step", "cpu", 90, 100, 104, (104, 103), parts, 110, {"process": 6})
    >>> check.difference, check.percent, sum(part.difference for part in check.parts)
    (4, 4.0, 4)
    """

    phase: str
    device: str
    closed_form: int
    run: int | None
    measured: int
    repeats: tuple[int, ...]
    parts: tuple[Part, ...]
    whole: int
    beyond: Mapping[str, int]
    taken: int = 0
    """Bytes held outside the allocator: CUDA's context and libraries when the phase ended, or the process as it was before."""
    replayed: int | None = None
    """T2's reserved bytes on a CUDA device, which `reserved` are to be."""
    reserved: int | None = None

    @property
    def tiers(self) -> dict[Tier, int]:
        """What each tier predicted: T0 and T1 the tensors, T2 what the allocator reserves for them."""
        found: dict[Tier, int | None] = {"T0": self.closed_form, "T1": self.run, "T2": self.replayed}
        return {tier: nbytes for tier, nbytes in found.items() if nbytes is not None}

    @property
    def tier(self) -> Tier:
        """Of the prediction that is compared."""
        return "T0" if self.run is None else "T1"

    @property
    def predicted(self) -> int:
        """T1's where there is one, else T0's."""
        return self.closed_form if self.run is None else self.run

    @property
    def difference(self) -> int:
        """Measured less predicted: above zero where too little was predicted."""
        return self.measured - self.predicted

    @property
    def percent(self) -> float:
        """The same in percent of what was predicted."""
        return 100 * self.difference / max(1, self.predicted)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "phase": self.phase,
            "device": self.device,
            "tier": self.tier,
            "predicted": dict(self.tiers),
            "measured": self.measured,
            "repeats": list(self.repeats),
            "difference": self.difference,
            "percent": round(self.percent, 3),
            "parts": [part.to_json() for part in self.parts],
            "whole": self.whole,
            "beyond": dict(self.beyond),
            "taken": self.taken,
            "reserved": self.reserved,
        }


@dataclass(frozen=True, slots=True)
class RankChecks:
    """All that one rank measured on `machine`, the name of its kind of device."""

    rank: int
    machine: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


# -- what is there at a peak --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """One piece of memory at a peak: its kind, what it is, and its bytes as asked for and as handed out."""

    kind: str
    what: str
    nbytes: int
    block: int


def predicted_at(run: Timeline, phase: str, device: str) -> list[Held]:
    """What a run on fake tensors has at its peak; memory that is inside kernels by its table of corrections counts as such."""
    return [held_of(each, each.nbytes) for each in run.at_peak(phase, device)]


def held_of(allocation: Allocation, block: int) -> Held:
    """An allocation, handed out as a block of so many bytes."""
    op, entry, _ = allocation.op.partition("'s ")
    if entry:
        return Held(KERNELS, op, allocation.nbytes, block)
    return Held(allocation.kind, allocation.describe(), allocation.nbytes, block)


def built_at(changes: Sequence[Change], device: str) -> list[Held]:
    """What the closed form of building has at its peak: of each tensor what stays, and what is there only meanwhile."""
    mine = [change for change in changes if change.device == device]
    held, stays = _sums(_until_peak(mine)), _sums(mine)
    found = []
    for name, nbytes in held.items():
        kept = min(nbytes, stays.get(name, 0))
        found += [Held("tensor", name, kept, kept), Held("temporary", f"{name}, being made", nbytes - kept, nbytes - kept)]
    return [each for each in found if each.nbytes]


def _until_peak(changes: Sequence[Change]) -> Iterator[Change]:
    sums = [0]
    for change in changes:
        sums.append(sums[-1] + change.nbytes)
    yield from changes[: sums.index(max(sums))]


def _sums(changes: Iterable[Change]) -> dict[str, int]:
    found: dict[str, int] = {}
    for change in changes:
        found[change.tensor] = found.get(change.tensor, 0) + change.nbytes
    return found


# -- the difference, apart ----------------------------------------------------------------------------------------------


def attributed(predicted: Sequence[Held], found: Sequence[Held], difference: int) -> tuple[Part, ...]:
    """The parts of `difference`, by kind; what the pieces do not say is a part of its own, so that they add up exactly.

    >>> guess, real = [Held("activation", "a", 8, 8)], [Held("activation", "a", 8, 512), Held(KERNELS, "conv", 64, 64)]
    >>> [(part.name, part.difference) for part in attributed(guess, real, 570)]
    [('activation', 0), ('inside kernels', 64), ('allocator rounding', 504), ('not seen again', 2)]
    """
    kinds = dict.fromkeys(each.kind for each in (*predicted, *found) if each.kind != KERNELS)
    parts = [_part(kind, predicted, found) for kind in (*kinds, KERNELS)]
    rounding = sum(each.block - each.nbytes for each in found)
    parts.append(Part(ROUNDING, 0, rounding))
    parts.append(Part(WATCHING, 0, difference - sum(part.difference for part in parts)))
    return tuple(part for part in parts if part.predicted or part.measured)


def _part(kind: str, predicted: Sequence[Held], found: Sequence[Held]) -> Part:
    before, after = _by_what(kind, predicted), _by_what(kind, found)
    off = {what: after.get(what, 0) - before.get(what, 0) for what in (*before, *after)}
    largest = sorted(((what, nbytes) for what, nbytes in off.items() if nbytes), key=lambda each: (-abs(each[1]), each[0]))
    return Part(kind, sum(before.values()), sum(after.values()), tuple(largest[:_SHOWN_LARGEST]))


def _by_what(kind: str, held: Iterable[Held]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in held:
        if each.kind == kind:
            found[each.what] = found.get(each.what, 0) + each.nbytes
    return found


def worst(checks: Iterable[Check]) -> Check | None:
    """The check that is off most in percent; of those that are alike, one that predicted too little."""
    return max(checks, key=lambda check: (round(abs(check.percent), 6), check.difference), default=None)
