"""What happens to an allocator, and what it says of itself: the records that go into a replay and come out of it.

All sizes are bytes, all ids whatever the caller calls an allocation by, all streams whatever it calls a stream by.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

# -- what goes in -------------------------------------------------------------------------------------------------------


class Allocate(NamedTuple):
    """`torch.empty` of `nbytes` with `stream` as the current stream; the allocation is `id` until it is freed."""

    id: Hashable
    nbytes: int
    stream: Hashable = 0


class Free(NamedTuple):
    """The last reference to an allocation goes."""

    id: Hashable


class RecordStream(NamedTuple):
    """`tensor.record_stream(stream)`: a freed allocation stays active until what `stream` was given to do before is done."""

    id: Hashable
    stream: Hashable


class Synchronize(NamedTuple):
    """The work of `stream`, or of all, is done. The allocator notices when it is next asked for memory.

    Without this event work counts as never done, until memory is short or `EmptyCache` waits for it.
    """

    stream: Hashable | None = None


class EmptyCache(NamedTuple):
    """`torch.cuda.empty_cache()`: segments of which nothing is in use go back to the driver."""


Event = Allocate | Free | RecordStream | Synchronize | EmptyCache


# -- what comes out -----------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    """Bytes, as `torch.cuda.memory_stats` counts them.

    * `requested`: what was asked for, of the active blocks;
    * `allocated`: blocks in the program's hands, so rounded up, and whole where the rest was too small to split off;
    * `active`: these and blocks that were freed while another stream may still use them;
    * `reserved`: what was taken from the driver: the segments, or the mapped pages of expandable ones;
    * `segments`: a count, of `cudaMalloc`ed ones only, so 0 with expandable segments.
    """

    requested: int
    allocated: int
    active: int
    reserved: int
    segments: int


@dataclass(frozen=True, slots=True)
class OutOfMemory:
    """An allocation that failed after all cached memory was freed; what was there then.

    `asked` is what the driver was asked for, `free` what it had left (None: no limit but the process's own), `allowed` the
    process's limit (None: none), `largest` the largest cached block of the same pool and stream.
    """

    id: Hashable
    nbytes: int
    asked: int
    free: int | None
    allowed: int | None
    usage: Usage
    largest: int

    @property
    def cached(self) -> int:
        """Bytes that are reserved and not allocated: what fragmentation, and streams, keep from being used."""
        return self.usage.reserved - self.usage.allocated

    def __str__(self) -> str:
        limits = [f"{self.free} free on the device"] if self.free is not None else []
        limits += [f"{self.allowed} allowed"] if self.allowed is not None else []
        return (
            f"out of memory: {self.id!r} needs {self.nbytes} bytes, asked of the driver as {self.asked} ({', '.join(limits)}); "
            f"{self.usage.allocated} allocated, {self.cached} reserved but unallocated, the largest piece {self.largest}"
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay found: bytes after each event, the highest of each kind at any moment, and whether memory ran out.

    A peak can be higher than what stands after any event: memory that is mapped for an allocation that then fails counts.
    After `out_of_memory` no event was looked at any more. `retries`: how often all cached memory was freed for want of more.
    """

    allocated: array[int]
    active: array[int]
    reserved: array[int]
    final: Usage
    peak: Usage
    retries: int
    out_of_memory: OutOfMemory | None
