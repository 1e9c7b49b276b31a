"""Reserved beside active bytes for the timelines of tier T0: their changes as an allocator's events, one device at a time.

T0 knows which tensors come and go, not the temporaries between them, so what this says of a phase is what its tensors alone
reserve: rounding, pools and segments, without the fragmentation that activations cause. All copies of a parameter
in the optimizer's state count as one allocation.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from ..tracer.graph import ParamGraph
from .allocator import replay
from .allocator_config import AllocatorConfig, AllocatorError
from .allocator_driver import Device
from .allocator_events import Allocate, Event, Free, Replayed, Usage
from .changes import Change
from .decisions import Decisions
from .memory import check_rank, timelines_of
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
    if not _is_cuda(device):
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
    timelines = timelines_of(graph, decisions, workload, rank)
    return {
        phase: {device: replay_timeline(changes, device, config).peak for device in _cuda_devices(changes)}
        for phase, changes in timelines.items()
    }


def _cuda_devices(changes: Iterable[Change]) -> list[str]:
    return sorted({change.device for change in changes if _is_cuda(change.device)})


def _is_cuda(device: str) -> bool:
    return device.partition(":")[0] == "cuda"


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
