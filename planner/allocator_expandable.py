"""Expandable segments: address space of which pages are mapped as they are needed, one segment for each pool and stream.

See "Note [Expandable Segments]" in c10/cuda/CUDACachingAllocator.cpp. Pages are 2 MiB in the small pool, and as large as a large
segment (20 MiB) in the large one; a block that is free can span mapped pages, never unmapped ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from .allocator_blocks import Block, Free, Pool
from .allocator_driver import Driver


def expand(pool: Pool, stream: Hashable, size: int, driver: Driver) -> Block | None:
    """`try_allocate_expandable_block`: maps pages behind, and between, free blocks until one has `size` bytes.

    The block is in no set any more. None where the device has no more memory; what was mapped until then stays, as free blocks.
    """
    block = _room(pool, stream, size, driver)
    if not block.mapped and not _map(block, min(block.size, size), driver):
        return None
    while block.size < size:
        unmapped = block.after
        assert unmapped is not None and not unmapped.mapped, "the room that was found ends too early"
        if not _map(unmapped, min(size - block.size, unmapped.size), driver):
            return None
        block = unmapped  # it has taken in the one before
    pool.remove(block)
    return block


def unmap(block: Block, driver: Driver) -> None:
    """`unmap_block`: gives back the pages that lie in a free block as a whole, and an empty segment's address space."""
    pool, page = block.pool, block.pool.page
    start = block.base + -(-(block.address - block.base) // page) * page
    end = block.base + (block.address + block.size - block.base) // page * page
    if start >= end:
        return
    pool.remove(block)
    if start > block.address:
        first = block.piece(block.address, start - block.address)
        first.insert_before(block)
        pool.add(first)
    if block.address + block.size > end:
        last = block.piece(end, block.address + block.size - end)
        last.insert_after(block)
        pool.add(last)
    block.address, block.size, block.mapped = start, end - start, False
    driver.give_back(block.size)
    pool.merge_neighbors(block)
    if not block.is_whole:
        pool.add_unmapped(block)


def least_room(found: Sequence[Free], position: int) -> int:
    """Part of `get_free_block`: a block counts with what it can grow by, so look on while the next can grow to less."""
    while position + 1 < len(found) and _can_be(found[position + 1][2]) < _can_be(found[position][2]):
        position += 1
    return position


def _can_be(block: Block) -> int:
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)


def _room(pool: Pool, stream: Hashable, size: int, driver: Driver) -> Block:
    """`find_expandable_block`: the lowest address from which on there is room; a new segment if there is none."""
    for _, unmapped in pool.unmapped_of(stream):
        before = unmapped.before
        first = before if before is not None and before.is_idle else unmapped
        if _has_room(first, size):
            return first
    extent = -(-driver.device.address_space // pool.page) * pool.page
    base = driver.address(extent)
    block = Block(pool, stream, base, extent, base)
    block.mapped = False
    pool.add_unmapped(block)
    return block


def _has_room(block: Block | None, size: int) -> bool:
    room = 0
    while room < size and block is not None and block.is_idle:
        room += block.size
        block = block.after
    return room >= size


def _map(block: Block, size: int, driver: Driver) -> bool:
    """`map_block`: backs the start of an unmapped block with pages, and frees it; False where the device has no more."""
    pool = block.pool
    mapped = -(-size // pool.page) * pool.page
    if not driver.reserve(mapped):
        return False
    pool.remove_unmapped(block)
    block.mapped = True
    if mapped < block.size:
        rest = block.piece(block.address + mapped, block.size - mapped)
        rest.mapped = False
        rest.insert_after(block)
        pool.add_unmapped(rest)
        block.size = mapped
    pool.merge_neighbors(block)
    pool.add(block)
    return True
