"""What torch's allocators hand out and take back, by `torch.profiler`'s memory events: each with its time, address and op.

The profiler sees what a dispatch mode does not: memory that a kernel takes and gives back while it runs. Sizes are bytes: on the
CPU those asked for, on CUDA those of the block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


class MemoryEvent(NamedTuple):
    """`nbytes` handed out at `address` (taken back, if negative), at `time` in ns since 1970, inside the op called `op`."""

    time: int
    address: int
    nbytes: int
    device: str
    op: str


def memory_profile() -> profile:
    """A profiler, to be entered, that notes memory events and nothing that is not needed for them."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def memory_events(profiler: profile) -> list[MemoryEvent]:
    """The memory events of a profiler that is done, in their order.

    `experimental_event_tree` is what torch's own memory timeline (torch/profiler/_memory_profiler.py) is made of.

    >>> import torch
    >>> with memory_profile() as profiler:
    ...     found = torch.ones(100)
    >>> [(event.nbytes, event.device) for event in memory_events(profiler)]
    [(400, 'cpu')]
    """
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    roots = profiler.profiler.kineto_results.experimental_event_tree()
    events = [_event(each) for each in _all(roots) if each.tag == _EventType.Allocation]
    return sorted(events, key=lambda each: each.time)  # a stable sort: events of one time keep their order


def _all(roots: Iterable[Any]) -> Iterator[Any]:
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        yield event
        waiting += event.children


_NO_OPS = ("PythonDispatchMode", "PythonSubclass")  # what calls an op where a dispatch mode looks on


def _event(each: Any) -> MemoryEvent:
    fields, parent, device = each.extra_fields, each.parent, str(each.extra_fields.device)
    while parent is not None and parent.name in _NO_OPS:
        parent = parent.parent
    op = "" if parent is None else str(parent.name).removeprefix("aten::")
    return MemoryEvent(each.start_time_ns, int(fields.ptr or 0), fields.alloc_size, "cuda:0" if device == "cuda" else device, op)


# -- peaks --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Peak:
    """The most bytes that were there at once in a span of time on a device, after `position` events; `living` handed them out."""

    nbytes: int
    position: int
    living: list[MemoryEvent] = field(default_factory=list)


def peaks_of(events: Sequence[MemoryEvent], starts: Sequence[int]) -> list[dict[str, Peak]]:
    """The peaks by device of each span: `starts` are the times at which spans begin, each lasting until the next.

    What was there when a span begins counts. Memory that was handed out before the first event, and is taken back now, is none
    of it.

    >>> events = [MemoryEvent(1, 8, 100, "cpu", "ones"), MemoryEvent(3, 8, -100, "cpu", ""), MemoryEvent(4, 8, 30, "cpu", "add")]
    >>> [peaks["cpu"].nbytes for peaks in peaks_of(events, [0, 2, 4])]
    [100, 100, 30]
    """
    found: list[dict[str, Peak]] = [{} for _ in starts]
    for span, position, sums in _running(events, starts):
        for device, nbytes in sums.items():
            known = found[span].get(device)
            if known is None or nbytes > known.nbytes:
                found[span][device] = Peak(nbytes, position)
    _add_living(events, [(device, peak) for peaks in found for device, peak in peaks.items()])
    return found


def _running(events: Sequence[MemoryEvent], starts: Sequence[int]) -> Iterator[tuple[int, int, Mapping[str, int]]]:
    """The span, how many events there have been, and the sums by device: as each span begins, and after every event in one."""
    sums: dict[str, int] = {}
    living: dict[int, MemoryEvent] = {}
    span = -1
    for position, event in enumerate(events):
        while span + 1 < len(starts) and starts[span + 1] <= event.time:
            span += 1
            yield span, position, sums
        gone = _apply(event, living)
        sums[event.device] = sums.get(event.device, 0) + max(0, event.nbytes) - (gone.nbytes if gone is not None else 0)
        if span >= 0:
            yield span, position + 1, sums
    for later in range(span + 1, len(starts)):
        yield later, len(events), sums


def _apply(event: MemoryEvent, living: dict[int, MemoryEvent]) -> MemoryEvent | None:
    """Take an event into account; what goes with it."""
    gone = living.pop(event.address, None)
    if event.nbytes > 0:
        living[event.address] = event
    return gone


def _add_living(events: Sequence[MemoryEvent], peaks: Iterable[tuple[str, Peak]]) -> None:
    """A second pass: a copy at every new record of the first would be many."""
    living: dict[int, MemoryEvent] = {}
    done = 0
    for device, peak in sorted(peaks, key=lambda each: each[1].position):
        for event in events[done : peak.position]:
            _apply(event, living)
        done = peak.position
        peak.living = [each for each in living.values() if each.device == device]


Lifetimes = Mapping[int, Sequence[tuple[MemoryEvent, int | None]]]
"""By address, every event that handed memory out and the time at which that was taken back, None where it was not."""


def lifetimes(events: Sequence[MemoryEvent]) -> Lifetimes:
    """The lifetimes of all that was handed out."""
    found: dict[int, list[tuple[MemoryEvent, int | None]]] = {}
    for event in events:
        spans = found.setdefault(event.address, [])
        if spans and spans[-1][1] is None:
            spans[-1] = (spans[-1][0], event.time)
        if event.nbytes > 0:
            spans.append((event, None))
    return found


def living_at(spans: Lifetimes, address: int, time: int) -> MemoryEvent | None:
    """The event that had handed out what lay at `address` at `time`."""
    for event, end in reversed(spans.get(address, ())):
        if event.time <= time:
            return event if end is None or time < end else None
    return None
