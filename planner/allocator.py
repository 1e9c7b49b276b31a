"""Tier T2: what PyTorch's CUDA caching allocator reserves for a sequence of allocations, without a GPU.

The rules are those of the native allocator in c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.13, under its names for them.
Not modeled: private pools (CUDA graphs, `MemPool`), sharing between processes, the `cudaMallocAsync` backend.

One thing the source does not say: which addresses the driver gives. They decide between free blocks of equal size. Here they
ascend, and none is given twice, unless the caller knows them (`allocator_snapshot`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterable

from .allocator_blocks import Block, Pool
from .allocator_config import K_MIN_BLOCK_SIZE, K_SMALL_BUFFER, K_SMALL_SIZE, AllocatorConfig, AllocatorError
from .allocator_driver import Device, Driver
from .allocator_events import Allocate, EmptyCache, Event, Free, OutOfMemory, RecordStream, Replayed, Synchronize, Usage
from .allocator_expandable import expand, least_room, unmap

# -- replaying ----------------------------------------------------------------------------------------------------------


def replay(
    events: Iterable[Event],
    config: AllocatorConfig | None = None,
    device: Device | None = None,
    addresses: Iterable[int] = (),
) -> Replayed:
    """Takes the events one after the other, as far as memory lasts.

    `addresses` are those that the driver gave, in order. Raises `AllocatorError` for an event that cannot be: an id that is
    allocated twice, or freed without being allocated.

    >>> found = replay([Allocate("a", 3 * 2**20), Allocate("b", 100), Free("a")])
    >>> found.final.active, found.peak.active, found.peak.reserved
    (512, 3146240, 23068672)
    """
    allocator = CachingAllocator(config, device, addresses)
    series = array("q"), array("q"), array("q")
    failed = None
    add_allocated, add_active, add_reserved = (each.append for each in series)
    for event in events:
        failed = allocator.take(event)
        add_allocated(allocator.allocated)
        add_active(allocator.active)
        add_reserved(allocator.reserved)
        if failed is not None:
            break
    return Replayed(*series, allocator.usage, allocator.peak, allocator.retries, failed)


class CachingAllocator:
    """The allocator of one device. Sizes are bytes; the counters are `torch.cuda.memory_stats`'s.

    >>> allocator = CachingAllocator(AllocatorConfig(expandable_segments=True))
    >>> allocator.allocate("a", 21 * 2**20)
    >>> allocator.reserved // 2**20, allocator.segments
    (40, 0)
    """

    def __init__(
        self, config: AllocatorConfig | None = None, device: Device | None = None, addresses: Iterable[int] = ()
    ) -> None:
        self.config = config or AllocatorConfig()
        self.driver = Driver(device or Device(), addresses)
        self.requested = self.allocated = self.active = self.segments = 0
        self.retries = 0
        self._peak_requested = self._peak_allocated = self._peak_active = self._peak_segments = 0
        self._allowed = _allowed(self.config, self.driver.device)
        self._collects = self._allowed is not None and self.config.garbage_collection_threshold > 0
        self._small = Pool(small=True, page=K_SMALL_BUFFER)
        self._large = Pool(small=False, page=self.config.large_segment_size)
        self._live: dict[Hashable, Block | None] = {}
        self._pending: dict[Hashable, deque[Block]] = {}
        self._done: dict[Hashable, int] = {}
        self._takers: dict[type, Callable[..., OutOfMemory | None]] = {
            Allocate: self.allocate,
            Free: self.free,
            RecordStream: self.record_stream,
            Synchronize: self.synchronize,
            EmptyCache: self.empty_cache,
        }

    @property
    def reserved(self) -> int:
        """Bytes that are taken from the driver."""
        return self.driver.reserved

    @property
    def usage(self) -> Usage:
        """The bytes of now."""
        return Usage(self.requested, self.allocated, self.active, self.reserved, self.segments)

    @property
    def peak(self) -> Usage:
        """The highest of each number so far; not all at the same time."""
        return Usage(self._peak_requested, self._peak_allocated, self._peak_active, self.driver.peak, self._peak_segments)

    def reset_peak(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`: peaks are counted anew, from what is there now."""
        self._peak_requested, self._peak_allocated, self._peak_active = self.requested, self.allocated, self.active
        self._peak_segments, self.driver.peak = self.segments, self.driver.reserved

    def address(self, id: Hashable) -> int | None:
        """Where an allocation is; None for one of no bytes. Raises `AllocatorError` for an id that is not allocated."""
        block = self._block(id, "there is no address of")
        return None if block is None else block.address

    # -- what the program does ------------------------------------------------------------------------------------------

    def take(self, event: Event) -> OutOfMemory | None:
        """One event; what an allocation ran out of, or None."""
        taker = self._takers.get(type(event))
        if taker is None:
            raise AllocatorError(
                f"{event!r} is none of an allocator's events: {', '.join(each.__name__ for each in self._takers)}"
            )
        return taker(*event)

    def allocate(self, id: Hashable, nbytes: int, stream: Hashable = 0) -> OutOfMemory | None:
        """`malloc`: a cached block, or memory of the driver's. An allocation that fails changes nothing but the cache."""
        if id in self._live:
            raise AllocatorError(f"{id!r} is allocated already; free it first")
        if nbytes < 0:
            raise AllocatorError(f"{id!r} cannot have {nbytes} bytes")
        if nbytes == 0:  # a null pointer, of which the allocator never hears
            self._live[id] = None
            return None
        self._free_done()
        size = self.config.round_size(nbytes)
        pool = self._small if size <= K_SMALL_SIZE else self._large
        block = self._cached(pool, stream, size) or self._from_driver(pool, stream, size)
        if block is None:
            return self._out_of_memory(id, nbytes, pool, stream, size)
        if self._should_split(block, size):
            _split(block, size)
        block.allocated, block.requested = True, nbytes
        self._live[id] = block
        self.requested += nbytes
        self.allocated += block.size
        self.active += block.size
        self._peak_requested = max(self._peak_requested, self.requested)
        self._peak_allocated = max(self._peak_allocated, self.allocated)
        self._peak_active = max(self._peak_active, self.active)
        return None

    def free(self, id: Hashable) -> None:
        """`free`: at once, or when the streams that use it are done."""
        block = self._block(id, "cannot free")
        del self._live[id]
        if block is None:
            return
        block.allocated = False
        self.allocated -= block.size
        if not block.uses:
            self._free_block(block)
            return
        for stream in block.uses:
            self._pending.setdefault(stream, deque()).append(block)
        block.pending, block.uses = len(block.uses), None

    def record_stream(self, id: Hashable, stream: Hashable) -> None:
        """`recordStream`: its own stream needs no recording."""
        block = self._block(id, "cannot record a stream of")
        if block is not None and stream != block.stream:
            block.uses = {*(block.uses or ()), stream}

    def synchronize(self, stream: Hashable | None = None) -> None:
        """The work of `stream`, or of all, is done; memory that waits for it is free from the next allocation on."""
        for each in self._pending if stream is None else (stream,):
            if each in self._pending:
                self._done[each] = len(self._pending[each])

    def empty_cache(self) -> None:
        """`release_cached_blocks`: waits for all streams, then gives back whole free segments, and free pages."""
        self.synchronize()
        self._free_done()
        for pool in (self._large, self._small):
            blocks = list(pool.blocks())
            for block in blocks:
                if self.config.expandable_segments:
                    unmap(block, self.driver)
                elif block.is_whole:
                    self._release(block)

    def _block(self, id: Hashable, failed: str) -> Block | None:
        try:
            return self._live[id]
        except KeyError:
            raise AllocatorError(f"{failed} {id!r}, which is not allocated") from None

    # -- free blocks ----------------------------------------------------------------------------------------------------

    def _cached(self, pool: Pool, stream: Hashable, size: int) -> Block | None:
        """`get_free_block`: the smallest that is large enough, of these the one with the lowest address."""
        if self._collects:
            pool.searches += 1
        found = pool.free_of(stream)
        position = bisect_left(found, (size,))
        if position == len(found):
            return None
        if self.config.expandable_segments:
            position = least_room(found, position)
        block, limit = found[position][2], self.config.max_split_size
        if limit is not None and size < limit <= block.size:
            return None  # large blocks are for large requests,
        if limit is not None and size >= limit and block.size >= size + self.config.max_non_split_rounding:
            return None  # and only a little too large for them, as they are not split
        pool.remove(block)
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        rest, limit = block.size - size, self.config.max_split_size
        if block.pool.small or self.config.expandable_segments:
            return rest >= K_MIN_BLOCK_SIZE
        return (limit is None or size < limit) and rest > K_SMALL_SIZE

    def _free_block(self, block: Block) -> None:
        self.active -= block.size
        self.requested -= block.requested
        block.pool.merge_neighbors(block)
        block.pool.add(block)

    def _free_done(self) -> None:
        """`process_events`: what the streams have done in the meantime."""
        if not self._done:
            return
        for stream, count in self._done.items():
            waiting = self._pending[stream]
            for _ in range(count):
                block = waiting.popleft()
                block.pending -= 1
                if not block.pending:
                    self._free_block(block)
            if not waiting:
                del self._pending[stream]
        self._done.clear()

    # -- the driver's memory --------------------------------------------------------------------------------------------

    def _from_driver(self, pool: Pool, stream: Hashable, size: int) -> Block | None:
        """What `malloc` tries when nothing cached fits: more memory; then, with ever more of the cache freed, again."""
        if self._collects:
            self._collect_garbage()
        block = self._grow(pool, stream, size)
        if block is None and self._release_oversize(pool, stream, size):
            block = self._grow(pool, stream, size)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._grow(pool, stream, size)
        return block

    def _grow(self, pool: Pool, stream: Hashable, size: int) -> Block | None:
        """`alloc_block`. Of an expandable segment as well, the process's limit counts what a segment of its own would take."""
        segment = self.config.segment_size(size)
        if self._allowed is not None and self.reserved + segment > self._allowed:
            return None
        if self.config.expandable_segments:
            return expand(pool, stream, size, self.driver)
        if not self.driver.reserve(segment):
            return None
        self.segments += 1
        self._peak_segments = max(self._peak_segments, self.segments)
        return Block(pool, stream, self.driver.address(segment), segment)

    def _release(self, block: Block) -> None:
        """`release_block`: a segment goes back."""
        block.pool.remove(block)
        self.driver.give_back(block.size)
        self.segments -= 1

    def _release_oversize(self, pool: Pool, stream: Hashable, size: int) -> bool:
        """`release_available_cached_blocks`: frees unsplit blocks of at least `max_split_size`, no more than are needed."""
        limit = self.config.max_split_size
        if limit is None or self.config.expandable_segments:
            return False
        needed, found = max(size, limit), pool.free_of(stream)
        position = bisect_left(found, (needed,))
        if position < len(found):
            self._release(found[position][2])
            return True
        released = 0
        while found and released < needed and found[-1][0] >= limit:
            released += found[-1][0]
            self._release(found[-1][2])
        return released >= needed

    def _collect_garbage(self) -> None:
        """`garbage_collect_cached_blocks`: above the threshold, frees the unsplit large blocks that went unused for longest."""
        if self.config.expandable_segments or self._allowed is None:
            return
        excess = self.reserved - int(self.config.garbage_collection_threshold * self._allowed)
        searches = self._large.searches
        blocks = [block for block in self._large.blocks() if block.is_whole]
        age = sum(searches - block.age for block in blocks)
        reclaimed, freed = 0, True
        while reclaimed < excess and freed and blocks:
            least = age / len(blocks)
            old = [block for block in blocks if searches - block.age >= least]
            blocks = [block for block in blocks if searches - block.age < least]
            freed = bool(old)
            for block in old:  # all of them, even if fewer were enough, so that this seldom happens
                reclaimed += block.size
                age -= searches - block.age
                self._release(block)

    # -- running out ----------------------------------------------------------------------------------------------------

    def _out_of_memory(self, id: Hashable, nbytes: int, pool: Pool, stream: Hashable, size: int) -> OutOfMemory:
        cached = pool.free_of(stream)
        largest = cached[-1][0] if cached else 0
        asked = self.config.segment_size(size)
        return OutOfMemory(id, nbytes, asked, self.driver.free, self._allowed, self.usage, largest)


# -- rules that look at nothing else ------------------------------------------------------------------------------------


def _allowed(config: AllocatorConfig, device: Device) -> int | None:
    """`setMemoryFraction`: a fraction of 1 is no limit."""
    fraction = config.per_process_memory_fraction
    if fraction == 1:
        return None
    if device.total is None:
        raise AllocatorError(f"per_process_memory_fraction:{fraction} is a part of the device's memory: say Device(total=...)")
    return int(fraction * device.total)


def _split(block: Block, size: int) -> None:
    """Leaves `block` with `size` bytes; the rest is a free block behind it."""
    rest = block.piece(block.address + size, block.size - size)
    rest.insert_after(block)
    block.size = size
    block.pool.add(rest)
