"""Blocks of device memory and the two ordered sets of a pool: free blocks by size, unmapped address space by address.

A segment (one `cudaMalloc`, or the address space of an expandable segment) is a chain of blocks without gaps. Neighbors that are
both free, or both unmapped, are always one block. Names and rules: `Block` and `BlockPool` in c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from itertools import chain


class Block:
    """A piece of a segment. `base` is the address of the expandable segment that it is in, if it is.

    Compared by identity; address and size change while blocks are split and merged.
    """

    __slots__ = (
        "address", "after", "age", "allocated", "base", "before", "mapped",
        "pending", "pool", "requested", "size", "stream", "uses",
    )  # fmt: skip

    def __init__(self, pool: Pool, stream: Hashable, address: int, size: int, base: int = 0) -> None:
        self.pool = pool
        self.stream = stream
        self.address = address
        self.size = size
        self.base = base
        self.mapped = True
        self.allocated = False
        self.requested = 0
        self.before: Block | None = None
        self.after: Block | None = None
        self.uses: set[Hashable] | None = None  # other streams that use it
        self.pending = 0  # those of them whose work was not done when it was freed
        self.age = 0  # the pool's count of searches when it became free

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its segment."""
        return self.before is None and self.after is None

    @property
    def is_idle(self) -> bool:
        """Whether it is nobody's: free, or not even mapped."""
        return not (self.allocated or self.pending or self.uses)

    def insert_after(self, before: Block) -> None:
        """Takes a place in the chain, behind `before`."""
        self.before, self.after = before, before.after
        before.after = self
        if self.after is not None:
            self.after.before = self

    def insert_before(self, after: Block) -> None:
        """Takes a place in the chain, in front of `after`."""
        self.before, self.after = after.before, after
        after.before = self
        if self.before is not None:
            self.before.after = self

    def piece(self, address: int, size: int) -> Block:
        """A new block of the same segment, not yet in the chain."""
        return Block(self.pool, self.stream, address, size, self.base)


Free = tuple[int, int, Block]
Unmapped = tuple[int, Block]


class Pool:
    """The free blocks for small allocations, or for large ones, by stream: memory never changes streams while it is cached."""

    def __init__(self, small: bool, page: int) -> None:
        self.small = small
        self.page = page
        self.searches = 0
        self._free: dict[Hashable, list[Free]] = {}
        self._unmapped: dict[Hashable, list[Unmapped]] = {}

    def free_of(self, stream: Hashable) -> list[Free]:
        """The free blocks of a stream as (size, address, block), smallest first, then by address. Not to be changed."""
        found = self._free.get(stream)
        if found is None:
            found = self._free[stream] = []
        return found

    def unmapped_of(self, stream: Hashable) -> list[Unmapped]:
        """The unmapped blocks of a stream as (address, block), by address. Not to be changed."""
        return self._unmapped.setdefault(stream, [])

    def blocks(self) -> Iterator[Block]:
        """All free blocks."""
        return (block for _, _, block in chain.from_iterable(self._free.values()))

    def add(self, block: Block) -> None:
        """A block becomes free."""
        block.age = self.searches
        insort(self.free_of(block.stream), (block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """A free block is no longer free."""
        found = self._free[block.stream]
        del found[bisect_left(found, (block.size, block.address))]

    def add_unmapped(self, block: Block) -> None:
        """A block becomes unmapped address space."""
        insort(self.unmapped_of(block.stream), (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Address space is mapped, or given up."""
        found = self._unmapped[block.stream]
        del found[bisect_left(found, (block.address,))]

    def merge_neighbors(self, block: Block) -> None:
        """`try_merge_blocks` in both directions: `block`, itself in no set, takes in idle neighbors of its kind."""
        before, after = block.before, block.after
        if before is not None and before.mapped == block.mapped and before.is_idle:
            self._drop(before)
            block.address, block.before = before.address, before.before
            if block.before is not None:
                block.before.after = block
            block.size += before.size
        if after is not None and after.mapped == block.mapped and after.is_idle:
            self._drop(after)
            block.after = after.after
            if block.after is not None:
                block.after.before = block
            block.size += after.size

    def _drop(self, block: Block) -> None:
        if block.mapped:
            self.remove(block)
        else:
            self.remove_unmapped(block)
