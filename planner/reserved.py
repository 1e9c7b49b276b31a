"""Reserved beside active bytes: T0's changes as an allocator's events, one device at a time, and tier T2, which replays T1's run.

T0 knows what is there at a peak, not all that comes and goes before, so what this says of a phase is what that alone reserves:
rounding, pools and segments, without the fragmentation that temporaries cause. All copies of a parameter in the optimizer's state
count as one allocation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from ..tracer.graph import ParamGraph
from .allocations import FIRST_OPTIMIZER, OPTIMIZER
from .allocator import replay
from .allocator_config import AllocatorConfig, AllocatorError
from .allocator_driver import Device
from .allocator_events import Allocate, Event, Free, Replayed, Usage
from .changes import Change
from .decisions import Decisions
from .estimate import RESERVED, timelines_of
from .memory import Memory, check_rank, human_bytes
from .replayed_run import HANDLES, Allocator, ReplayedRun, is_cuda, replay_run
from .workload import Training


def replay_timeline(
    timeline: Iterable[Change], device: str, config: AllocatorConfig | None = None, memory: Device | None = None
) -> Replayed:
    """What a device's caching allocator does in one phase, all on one stream. Sizes are bytes.

    `device` is named as in the timeline (`cuda:0`). Raises `AllocatorError` where a change releases what was not allocated, or
    where `device` is no CUDA device: others have other allocators.

    >>> found = replay_timeline([Change("cuda:0", "a", 100), Change("cpu", "b", 8), Change("cuda:0", "a", -100)], "cuda:0")
    >>> found.peak.requested, found.peak.active, found.peak.reserved, found.final.active
    (100, 512, 2097152, 0)
    """
    if not is_cuda(device):
        raise AllocatorError(f"{device!r} is no CUDA device: its memory is not handed out by the CUDA caching allocator")
    return replay(events_of(timeline, device), config, memory)


def reserved(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training | None = None,
    rank: int = 0,
    config: AllocatorConfig | None = None,
) -> dict[str, dict[str, Usage]]:
    """The allocator's peaks in every phase of one rank, for each CUDA device that the phase uses; sizes are bytes.

    Each phase starts from an empty allocator, as it does in `memory`, and has a device without a limit. Raises `RankError` for a
    rank that the plan does not have.
    """
    check_rank(rank, 1 if decisions.sharding is None else decisions.sharding.ranks)
    return _of_changes(timelines_of(graph, decisions, workload, rank=rank), config)


def _of_changes(timelines: Mapping[str, Sequence[Change]], config: AllocatorConfig | None) -> dict[str, dict[str, Usage]]:
    return {
        phase: {device: replay_timeline(changes, device, config).peak for device in _cuda_devices(changes)}
        for phase, changes in timelines.items()
    }


# -- in a Memory --------------------------------------------------------------------------------------------------------


def with_reserved(found: Memory, allocator: Allocator) -> Memory:
    """The same memory with what is reserved beside it: of a run in tier T2, else of T0's changes.

    A run is replayed from its start to its end, which begins with the weights alone. The other phases begin with an empty
    allocator, but saving a checkpoint comes after the run: what training reserved stays reserved.
    """
    phases = _of_changes(found.changes, allocator.config)
    replayed = None
    if found.run is not None:
        replayed = replay_run(found.run, allocator)
        phases = {phase: _of_phase(phase, replayed, phases.get(phase, {})) for phase in found.by_device}

    def of_rank(index: int) -> Memory:
        return with_reserved(found.rank(index), allocator)

    return replace(
        found,
        tier="T2" if found.run is not None else found.tier,
        reserved=phases,
        allocator=allocator,
        replayed=replayed,
        of_rank=None if found.of_rank is None else of_rank,
        left_out=tuple(each for each in found.left_out if each != RESERVED),
        notes=(*found.notes, *_notes(found, allocator)),
    )


def _of_phase(phase: str, replayed: ReplayedRun, closed: Mapping[str, Usage]) -> dict[str, Usage]:
    """The peaks of one of a memory's phases: those of the run that it stands for, or in closed form."""
    names = (FIRST_OPTIMIZER, OPTIMIZER) if phase == OPTIMIZER else (phase,)
    found: dict[str, Usage] = {}
    for name in names:
        for device, usage in replayed.peaks.get(name, {}).items():
            found[device] = Usage(*map(max, usage, found.get(device, usage)))
    if found or phase != "checkpoint":
        return found or dict(closed)
    after = {device: held[-1] for device, held in replayed.reserved.items()}
    return {device: usage._replace(reserved=max(usage.reserved, after.get(device, 0))) for device, usage in closed.items()}


def _notes(found: Memory, allocator: Allocator) -> Iterator[str]:
    if not any(is_cuda(device) for device in found.devices):
        yield "nothing is on a CUDA device, so nothing is reserved"
        return
    yield f"reserved is what the rules of CUDA's caching allocator give ({allocator.describe()}), on a device without a limit"
    if found.run is not None:
        workspaces = sum(allocator.workspaces)
        yield f"active and reserved include {human_bytes(workspaces)} of cuBLAS's workspaces, those of {HANDLES} threads"
        yield "memory of other streams counts as free as soon as it is freed: nothing waits for an event of record_stream"


# -- devices ------------------------------------------------------------------------------------------------------------


def _cuda_devices(changes: Iterable[Change]) -> list[str]:
    return sorted({change.device for change in changes if is_cuda(change.device)})


def events_of(timeline: Iterable[Change], device: str) -> Iterator[Event]:
    """A device's changes as events: a release frees the latest allocation of that tensor and size."""
    held: dict[tuple[str, int], list[int]] = defaultdict(list)
    for number, change in enumerate(each for each in timeline if each.device == device):
        of_same = held[change.tensor, abs(change.nbytes)]
        if change.nbytes > 0:
            of_same.append(number)
            yield Allocate(number, change.nbytes)
        elif change.nbytes < 0:
            if not of_same:
                raise AllocatorError(f"{change.tensor!r} releases {-change.nbytes} bytes on {device} that it did not allocate")
            yield Free(of_same.pop())
