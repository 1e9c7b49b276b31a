"""Events from the history that torch records itself: `torch.cuda.memory._record_memory_history()`, then `_snapshot()`.

A snapshot is plain data (dicts, lists, strings, numbers), so one that was written as JSON reads the same; nothing is unpickled
here. What each entry means: `TraceEntry::Action` in c10/core/CachingDeviceAllocator.h, torch 2.11 to 2.13.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .allocator_config import AllocatorError
from .allocator_events import Allocate, EmptyCache, Event, Free, RecordStream, Synchronize

_RETURNED = ("segment_free", "segment_unmap")
_KNOWN = frozenset({"alloc", "free_requested", "free_completed", "segment_alloc", "segment_map", "snapshot", "oom", *_RETURNED})


@dataclass(frozen=True, slots=True)
class History:
    """A recorded history: its events, the addresses that the driver gave to segments, and what the recording missed.

    `unknown_frees` counts frees of allocations from before the recording. If there are any, a replay starts from an emptier
    allocator than torch did; record from the first allocation on for equal bytes.
    """

    events: tuple[Event, ...]
    addresses: tuple[int, ...]
    unknown_frees: int


def from_snapshot(snapshot: Mapping[str, Any], device: int = 0) -> History:
    """The history of one device. Raises `AllocatorError` for what is not a snapshot, or holds no such device.

    An emptied cache is not recorded as such: it is taken from the first of the segments that were given back. So is a cache that
    was freed because memory ran short; a replay that frees it at the same place reserves the same, but for what
    `garbage_collection_threshold` and `max_split_size_mb` free in part.

    >>> actions = ("alloc", "free_requested", "free_completed")
    >>> trace = [{"action": action, "addr": 512, "size": 100, "stream": 0} for action in actions]
    >>> from_snapshot({"device_traces": [trace]}).events
    (Allocate(id=0, nbytes=100, stream=0), Free(id=0))
    """
    entries = _entries(snapshot, device)
    reader = _Reader()
    events = tuple(event for position, entry in enumerate(entries) for event in reader.read(entries, position, entry))
    addresses = tuple(entry["addr"] for entry in entries if entry["action"] == "segment_alloc")
    return History(events, addresses, reader.unknown_frees)


def _entries(snapshot: Mapping[str, Any], device: int) -> Sequence[Mapping[str, Any]]:
    traces = snapshot.get("device_traces")
    if not isinstance(traces, Sequence):
        raise AllocatorError("a memory snapshot has a list 'device_traces'; is this what torch.cuda.memory._snapshot() returned?")
    if not 0 <= device < len(traces):
        raise AllocatorError(f"the snapshot has traces of {len(traces)} devices, so there is none of device {device}")
    for position, entry in enumerate(traces[device]):
        missing = [key for key in ("action", "addr", "size", "stream") if key not in entry]
        if missing and entry.get("action") != "oom":  # that has device_free in addr's place
            raise AllocatorError(f"entry {position} of device {device} has no {missing[0]!r}: {entry!r}")
        if entry["action"] not in _KNOWN:
            raise AllocatorError(f"entry {position} of device {device} has the unknown action {entry['action']!r}")
    return list(traces[device])


class _Reader:
    """Gives every allocation a number, as addresses are used again, and knows which of them is at an address."""

    def __init__(self) -> None:
        self.unknown_frees = 0
        self._allocated = 0
        self._at: dict[int, int] = {}
        self._waiting: dict[int, Hashable] = {}

    def read(self, entries: Sequence[Mapping[str, Any]], position: int, entry: Mapping[str, Any]) -> Iterator[Event]:
        """The events of one entry."""
        action = entry["action"]
        if action == "alloc":
            self._at[entry["addr"]] = self._allocated
            yield Allocate(self._allocated, entry["size"], entry["stream"])
            self._allocated += 1
        elif action == "free_requested":
            yield from self._free(entry["addr"], at_once=_completes(entries, position))
        elif action == "free_completed" and entry["addr"] in self._waiting:
            yield Synchronize(self._waiting.pop(entry["addr"]))
        elif action in _RETURNED and (not position or entries[position - 1]["action"] not in _RETURNED):
            yield EmptyCache()

    def _free(self, address: int, at_once: bool) -> Iterator[Event]:
        id = self._at.pop(address, None)
        if id is None:
            self.unknown_frees += 1
            return
        if not at_once:  # which streams it waits for is not recorded: one of its own stands for them
            self._waiting[address] = ("waits", id)
            yield RecordStream(id, ("waits", id))
        yield Free(id)


def _completes(entries: Sequence[Mapping[str, Any]], position: int) -> bool:
    """Whether a free was completed at once: then nothing is recorded in between."""
    after = entries[position + 1] if position + 1 < len(entries) else None
    return after is not None and after["action"] == "free_completed" and after["addr"] == entries[position]["addr"]
