"""Tier T2: a run of the training step replayed through the rules of CUDA's caching allocator, from its start to its end.

What is reserved in a phase depends on all that was before it, so one replay goes through the whole run and its peaks are read off
phase by phase. Each stream has its own pools, by `Allocation.stream`. cuBLAS's workspaces come from the same allocator, so they
are allocated as well: by the thread of the forward pass and by autograd's, which have handles of their own.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .allocations import Allocation, Moment, Timeline
from .allocator import CachingAllocator
from .allocator_config import AllocatorConfig
from .allocator_driver import Device
from .allocator_events import OutOfMemory, Usage
from .cluster import Cluster, cluster_of
from .overheads import OVERHEADS, Overhead, cublas_workspace

MATRIX_PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "_addmm_activation", "_scaled_mm"}
)
"""ATen's ops that ask for a cuBLAS handle (`getCurrentCUDABlasHandle` in aten/src/ATen/native/cuda), and so for its workspace."""

HANDLES = 2
"""cuBLAS handles belong to threads (CUDABlasHandlePool): the one that runs the forward, and autograd's for the device."""

_UNKNOWN = cublas_workspace((9, 0))  # the largest of the defaults


@dataclass(frozen=True, slots=True)
class Allocator:
    """How the caching allocator of a device is set, and what cuBLAS takes from it for each handle.

    >>> Allocator.of("expandable_segments:True", "8xA100-80GB").workspace.high
    8519680
    """

    config: AllocatorConfig = field(default_factory=AllocatorConfig)
    workspace: Overhead = _UNKNOWN

    @classmethod
    def of(cls, config: AllocatorConfig | str | None = None, cluster: Cluster | str | None = None) -> Allocator:
        """From settings as in `PYTORCH_ALLOC_CONF`, and the devices that it is for: where not known, the largest workspace.

        Raises `AllocatorError` for settings that torch does not take, `DecisionError` for a cluster that cannot be.
        """
        made = config if isinstance(config, AllocatorConfig) else AllocatorConfig.parse(config or "")
        return cls(made, _UNKNOWN if cluster is None else _workspace(cluster_of(cluster)))

    def describe(self) -> str:
        """The settings that differ from torch's.

        >>> Allocator.of("expandable_segments:True").describe(), Allocator().describe()
        ('expandable_segments=True', "torch's defaults")
        """
        default = AllocatorConfig()
        names = (each.name for each in fields(AllocatorConfig))
        changed = [f"{name}={value}" for name in names if (value := getattr(self.config, name)) != getattr(default, name)]
        return ", ".join(changed) or "torch's defaults"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {"settings": self.describe(), "workspaces": list(self.workspaces)}

    @property
    def workspaces(self) -> tuple[int, ...]:
        """Bytes of the workspaces of all handles, cuBLAS's and cuBLASLt's, at the upper end of what is known."""
        return (self.workspace.high, OVERHEADS["cublaslt workspace"].high) * HANDLES


def _workspace(cluster: Cluster) -> Overhead:
    """The largest of its devices'."""
    known = [_UNKNOWN if each.capability is None else cublas_workspace(each.capability) for each in cluster.devices]
    return max(known, key=lambda each: each.high, default=_UNKNOWN)


@dataclass(frozen=True)
class ReplayedRun:
    """What the allocators of a run's CUDA devices do. `peaks` are by phase of the run and device, bytes as in `Usage`.

    `reserved` has, by device, the bytes before the first moment and after each. Where memory ran out, `out_of_memory` says so,
    and what came after was not looked at. `retries` counts how often cached memory was freed for want of more.
    """

    peaks: Mapping[str, Mapping[str, Usage]]
    reserved: Mapping[str, array[int]]
    retries: int = 0
    out_of_memory: OutOfMemory | None = None


def replay_run(run: Timeline, allocator: Allocator | None = None, device: Device | None = None) -> ReplayedRun:
    """Replays all moments of a run, on devices as `device` is: without a limit, if it is None.

    >>> from .allocations import START, Allocation, Moment
    >>> run = Timeline((Allocation("parameter", 100, "cuda:0"),), (Moment(START, 0, True),))
    >>> replay_run(run).peaks["start"]["cuda:0"].reserved
    2097152
    """
    used = allocator or Allocator()
    devices = sorted({each.device for each in run.allocations if is_cuda(each.device)})
    replays = {name: _Replay(run, name, used, device) for name in devices}
    failed = [each.failed for each in replays.values() if each.failed is not None]
    phases = dict.fromkeys(moment.phase for moment in run.moments)
    return ReplayedRun(
        {phase: {name: each.peaks[phase] for name, each in replays.items() if phase in each.peaks} for phase in phases},
        {name: each.reserved for name, each in replays.items()},
        sum(each.allocator.retries for each in replays.values()),
        failed[0] if failed else None,
    )


def is_cuda(device: str) -> bool:
    """Whether memory there is handed out by the CUDA caching allocator."""
    return device.partition(":")[0] == "cuda"


# -- one device ---------------------------------------------------------------------------------------------------------


class _Replay:
    """The replay of one device: peaks by phase, and what is reserved before the first moment of the run and after each."""

    def __init__(self, run: Timeline, device: str, used: Allocator, limit: Device | None) -> None:
        self.allocator = CachingAllocator(used.config, limit)
        self.peaks: dict[str, Usage] = {}
        self.reserved = array("q", [0])
        self.failed: OutOfMemory | None = None
        self._allocations, self._device = run.allocations, device
        self._workspaces = enumerate(used.workspaces)
        for phase, moments in run.by_phase():
            self.allocator.reset_peak()
            self._take(moments)
            self._end(phase)
            if self.failed is not None:
                return

    def _take(self, moments: Iterator[Moment]) -> None:
        allocator, add, allocations, device = self.allocator, self.reserved.append, self._allocations, self._device
        for moment in moments:
            index = moment.allocation
            if allocations[index].device == device:
                if not moment.born:
                    allocator.free(index)
                elif not self._allocated(index, allocations[index]):
                    return
            add(allocator.reserved)

    def _allocated(self, index: int, piece: Allocation) -> bool:
        """Whether there was room, for both handles' workspaces as well once a matrix product is there.

        Autograd's handle gets its own a little later than here: nothing is freed in a forward that could hold it instead.
        """
        self.failed = self.allocator.allocate(index, piece.nbytes, piece.stream)
        if piece.op in MATRIX_PRODUCTS:
            for number, nbytes in self._workspaces:
                self.failed = self.failed or self.allocator.allocate(("workspace", number), nbytes, piece.stream)
        return self.failed is None

    def _end(self, phase: str) -> None:
        """The phase is over; one that comes again has the higher of its peaks."""
        peak = self.allocator.peak
        self.peaks[phase] = Usage(*map(max, peak, self.peaks.get(phase, peak)))
