"""The noun of what a plan takes: `Memory`, the peak bytes of every phase on each device, and what makes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..tracer.errors import GroundplanError
from .allocations import FIRST_OPTIMIZER, OPTIMIZER, Allocation, Timeline
from .allocator_events import Usage
from .calibration import Calibration
from .changes import Changes
from .cluster import Cluster, cluster_of
from .replayed_run import Allocator, ReplayedRun
from .series import Series, series_of_changes, series_of_run
from .verdict import MARGIN, Verdict, verdict


class RankError(GroundplanError, IndexError):
    """A rank that the plan does not have."""


@dataclass(frozen=True, slots=True)
class Binding:
    """What makes the peak: the phase, the device, its bytes, and the largest tensors there as (name, bytes), largest first.

    A tensor's bytes include what the phase holds because of it: its gradient, its optimizer state, the copy being converted. In
    tier T1 these have entries of their own, and an activation is named by its module, op and source line.
    """

    phase: str
    device: str
    bytes: int
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Memory:
    """The bytes that a plan takes, by phase and device.

    * `construct`: building the module, the steps included;
    * `load`: reading a checkpoint into it instead;
    * `first_step`: forward and backward of the first training step, before there is optimizer state;
    * `step`: forward and backward of every later one;
    * `optimizer`: inside `optimizer.step()`;
    * `checkpoint`: saving.

    The three in the middle are there with a `Training` workload only; with an `Inference` one, `first_step` reads the prompt,
    `step` decodes the last token, and there is no optimizer. Of a sharded plan with `ranks` ranks this is the memory of the
    worst one; `rank(i)` gives that of any. No rank takes more than one of `distinct` does: rank 0, or the first of each part
    of a pipeline. `left_out` is what takes memory in some phase and is not counted; `communicators` is how many groups of ranks
    talk to each other.

    `tier` says where the three in the middle come from: `T0` is the closed form, with activations where they could be traced (see
    `left_out`); `T1` is a run of the step on fake tensors, with all that it allocates. Then `run` has every allocation, and
    `closed_form` is what T0 says. In T1, `optimizer` includes the clipping of gradients, and the first `optimizer.step()` as well
    as later ones. `T2` is T1 with what the CUDA caching allocator's rules, set as `allocator` says, make of the run: `reserved`
    has the peaks by phase and CUDA device, as `torch.cuda.memory_stats` counts them. It is empty in the tiers below, unless they
    were asked for it.

    Of inference every tier is a run on fake tensors, with `reserved`. `certain` is how many bytes of a device need no margin in a
    verdict, as nothing about them is a guess: the weights, where what is reserved for them is known.

    `changes` are T0's allocations and releases in order; `series` is either tier over time, as the drawings show it.
    """

    by_device: Mapping[str, Mapping[str, int]]
    binding: Binding
    notes: tuple[str, ...]
    ranks: int = 1
    of_rank: Callable[[int], Memory] | None = field(default=None, repr=False, compare=False)
    left_out: tuple[str, ...] = ()
    communicators: int = 0
    tier: str = "T0"
    closed_form: Memory | None = field(default=None, repr=False)
    run: Timeline | None = field(default=None, repr=False)
    certain: Mapping[str, int] = field(default_factory=dict)
    reserved: Mapping[str, Mapping[str, Usage]] = field(default_factory=dict)
    allocator: Allocator | None = None
    replayed: ReplayedRun | None = field(default=None, repr=False, compare=False)
    changes: Mapping[str, Changes] = field(default_factory=dict, repr=False, compare=False)
    distinct: tuple[int, ...] = (0,)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase on its worst device."""
        return {phase: max(devices.values()) for phase, devices in self.by_device.items()}

    @property
    def peak(self) -> int:
        """Bytes over all phases, on the worst device."""
        return self.binding.bytes

    def rank(self, index: int) -> Memory:
        """The memory of one rank; raises `RankError` for one that the plan does not have."""
        check_rank(index, self.ranks)
        return self if self.of_rank is None else self.of_rank(index)

    @property
    def devices(self) -> list[str]:
        """The devices that anything is held on, by name."""
        return sorted({device for found in self.by_device.values() for device in found})

    def at_peak(self) -> list[Allocation]:
        """What is there at the peak, the largest first; nothing where the peak is in no phase of a run."""
        if self.run is None or self.binding.phase not in self.run.peaks:
            return []
        return self.run.at_peak(run_phase(self), self.binding.device)

    def series(self, device: str | None = None) -> Series | None:
        """What is held on a device over time, by kind, at the moments that a drawing needs; of the binding device if None.

        In tiers T1 and T2 these are the moments of the run, with reserved bytes in T2; in T0 every phase for itself, and all
        bytes of one kind. None where there is nothing.
        """
        device = self.binding.device if device is None else device
        if self.run is not None:
            held = self.replayed.reserved.get(device) if self.replayed is not None else None
            return series_of_run(self.run, device, held) if self.run.moments else None
        return series_of_changes(self.changes, device) if any(self.changes.values()) else None

    def fits(
        self,
        cluster: Cluster | str,
        margin: float | None = None,
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
    ) -> Verdict:
        """Whether this fits a cluster, a `gp.Cluster` or a string such as `"8xH100-80GB"`: "fits", "tight" or "does not fit".

        Besides the tensors there are the CUDA context, workspaces and communicators, which the verdict names, and `margin`, a
        share of all that (0.2 if None). "fits" leaves the margin free; "tight" has room for what is needed, but not for the
        margin, or the prediction leaves something out. As a condition, the verdict is true for "fits" only. Of a run on CUDA
        devices counts what is reserved, at torch's defaults if it was not asked for otherwise.

        With a `calibration`, or the path of one (`verification.save_calibration(path)`), what was measured takes the place of the
        named constants, and its error bar that of the margin, which stays for what was not measured.

        Raises `DecisionError` where the cluster cannot be, or has fewer devices than the plan uses; `CalibrationError` for a
        calibration of another kind of device or version of torch.

        >>> memory = Memory({"load": {"cuda:0": 16 * 10**9}}, Binding("load", "cuda:0", 16 * 10**9, ()), ())
        >>> memory.fits("24GB").verdict, memory.fits("20GB").verdict, memory.fits("16GB").verdict
        ('fits', 'tight', 'does not fit')
        """
        known = calibration if calibration is None or isinstance(calibration, Calibration) else Calibration.load(calibration)
        machine = cluster_of(cluster)
        return verdict(self._with_reserved(machine), machine, MARGIN if margin is None else margin, known)

    def _with_reserved(self, cluster: Cluster) -> Memory:
        """The same with what CUDA's caching allocator makes of a run at torch's defaults, where there is a run."""
        if self.run is None or self.allocator is not None or not any(each.startswith("cuda") for each in self.devices):
            return self
        from .reserved import with_reserved

        return with_reserved(self, Allocator.of(None, cluster))

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data; all sizes in bytes."""
        binding = self.binding
        found = {
            "tier": self.tier,
            "phases": self.phases,
            "by_device": {phase: dict(devices) for phase, devices in self.by_device.items()},
            "peak": self.peak,
            "binding": {
                "phase": binding.phase,
                "device": binding.device,
                "bytes": binding.bytes,
                "tensors": [{"name": name, "bytes": nbytes} for name, nbytes in binding.tensors],
            },
            "left_out": list(self.left_out),
            "notes": list(self.notes),
            "timeline": [found.to_json() for device in self.devices if (found := self.series(device)) is not None],
        }
        if self.allocator is not None:
            found["allocator"] = self.allocator.to_json()
            found["reserved"] = {
                phase: {device: usage._asdict() for device, usage in devices.items()} for phase, devices in self.reserved.items()
            }
        if self.closed_form is not None:
            found["closed_form"] = self.closed_form.to_json()
        if at_peak := self.at_peak():
            found["at_peak"] = [each.to_json() for each in at_peak]
        return found

    def columns(self) -> Iterator[tuple[str, dict[str, int]]]:
        """What tables of it show: a title, and bytes by phase."""
        for device in self.devices:
            yield device, {phase: found.get(device, 0) for phase, found in self.by_device.items()}
            usages = {phase: found[device] for phase, found in self.reserved.items() if device in found}
            for name in ("active", "reserved") if usages else ():
                yield f"{device}, {name}", {phase: getattr(usage, name) for phase, usage in usages.items()}
        closed = self.closed_form
        if closed is None:
            return
        for device in self.devices:
            yield f"{device}, {closed.tier}", {phase: found.get(device, 0) for phase, found in closed.by_device.items()}

    def __str__(self) -> str:
        columns = list(self.columns())
        rows = [["phase", *(title for title, _ in columns)]]
        for phase in self.by_device:
            rows.append([phase, *(human_bytes(found.get(phase, 0)) for _, found in columns)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [_aligned(row, widths) for row in rows]
        binding = self.binding
        largest = ", ".join(f"{name} ({human_bytes(nbytes)})" for name, nbytes in binding.tensors[:3])
        peak = f"peak: {human_bytes(binding.bytes)} in {binding.phase} on {binding.device}; largest: {largest or 'nothing'}"
        return "\n".join([*table, peak, *(f"note: {note}" for note in self.notes)])


def check_rank(index: int, ranks: int) -> None:
    """Raises `RankError` for a rank that a plan for so many ranks does not have."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < ranks:
        has = "is for one process" if ranks == 1 else f"has ranks 0 to {ranks - 1}"
        raise RankError(f"the plan {has}, so there is no rank {index!r}; ask for rank 0")


def human_bytes(nbytes: int) -> str:
    """Bytes in decimal units: GB is 10^9.

    >>> human_bytes(16_060_522_496), human_bytes(4_194_304), human_bytes(12)
    ('16.06 GB', '4.19 MB', '12 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


def run_phase(memory: Memory, run: Timeline | None = None) -> str:
    """The phase of the run that makes the peak: of the two in the optimizer the one that takes more."""
    run, binding = run or memory.run, memory.binding
    first = run is not None and run.peaks.get(FIRST_OPTIMIZER, {}).get(binding.device, 0) == binding.bytes
    return FIRST_OPTIMIZER if binding.phase == OPTIMIZER and first else binding.phase
