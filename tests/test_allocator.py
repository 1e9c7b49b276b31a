"""The caching allocator's rules, one by one, by hand; sizes are those of torch's source and of its documentation."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundplan.planner.allocator import CachingAllocator, replay
from groundplan.planner.allocator_config import AllocatorConfig, AllocatorError
from groundplan.planner.allocator_driver import Device
from groundplan.planner.allocator_events import Allocate, EmptyCache, Event, Free, OutOfMemory, RecordStream, Synchronize
from groundplan.planner.allocator_snapshot import from_snapshot
from groundplan.planner.changes import Change
from groundplan.planner.decisions import default_decisions
from groundplan.planner.estimate import memory
from groundplan.planner.memory import RankError
from groundplan.planner.overheads import OVERHEADS, cublas_workspace
from groundplan.planner.reserved import replay_timeline, reserved
from groundplan.planner.workload import Training

from .graphs import fingerprinted, graph_of, tensor

KIB, MIB, GIB = 2**10, 2**20, 2**30
SNAPSHOT = Path(__file__).parent / "memory_snapshot.json"


def allocator(text: str = "", total: int | None = None, taken: int = 0) -> CachingAllocator:
    return CachingAllocator(AllocatorConfig.parse(text), Device(total, taken))


def filled(*sizes: int, text: str = "", total: int | None = None) -> CachingAllocator:
    """Allocations 0, 1, ... of these sizes."""
    found = allocator(text, total)
    for id, size in enumerate(sizes):
        assert found.allocate(id, size) is None
    return found


# -- rounding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (512, 512), (513, 1024), (MIB - 1, MIB), (MIB + 1, MIB + 512)])
def test_sizes_are_multiples_of_512(asked: int, block: int) -> None:
    found = filled(asked)
    assert (found.usage.requested, found.usage.allocated, found.usage.active) == (asked, block, block)


def test_no_bytes_are_no_allocation() -> None:
    found = filled(0)
    assert found.usage == (0, 0, 0, 0, 0)
    assert found.address(0) is None
    found.record_stream(0, 1)
    found.free(0)


@pytest.mark.parametrize(
    ("divisions", "asked", "block"),
    [
        ("4", 1200, 1536),  # not more than 512 * 4: rounded as ever
        ("4", 1200 * KIB, 1280 * KIB),  # the example in the source's comment and in the documentation, in KiB
        ("4", 1024 * KIB, 1024 * KIB),
        ("4", 1281 * KIB, 1536 * KIB),
        ("4", 1793 * KIB, 2048 * KIB),
        ("[256:1,512:2,1024:4,>:8]", 300 * MIB + 1, 300 * MIB + 512),  # the example of the documentation: 1 is none
        ("[256:1,512:2,1024:4,>:8]", 513 * MIB, 768 * MIB),
        ("[256:1,512:2,1024:4,>:8]", 1025 * MIB, 1280 * MIB),
        ("[256:1,512:2,1024:4,>:8]", 2049 * MIB, 2304 * MIB),
    ],
)
def test_roundup_power2_divisions(divisions: str, asked: int, block: int) -> None:
    assert AllocatorConfig.parse(f"roundup_power2_divisions:{divisions}").round_size(asked) == block


# -- segments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB - 511, 10 * MIB),  # rounded to 10 MiB, so it has its own segment
        (10 * MIB, 10 * MIB),
        (10 * MIB + 1, 12 * MIB),
        (GIB, GIB),
    ],
)
def test_segments(asked: int, segment: int) -> None:
    found = filled(asked)
    assert (found.reserved, found.segments) == (segment, 1)


def test_small_and_large_are_in_pools_of_their_own() -> None:
    found = filled(MIB, MIB + 1)
    assert (found.reserved, found.segments) == (22 * MIB, 2)
    found.free(1)
    found.allocate("small", MIB)
    found.allocate("another", 512)  # the first segment of 2 MiB is full: 18 free MiB of the large pool do not serve it
    assert found.reserved == 24 * MIB


def test_segments_are_shared() -> None:
    assert filled(*[MIB] * 4).reserved == 4 * MIB
    assert filled(*[5 * MIB] * 4).reserved == 20 * MIB
    assert filled(*[5 * MIB] * 5).reserved == 40 * MIB


def test_streams_share_nothing() -> None:
    found = allocator()
    found.allocate("a", 100, stream=0)
    found.free("a")
    found.allocate("b", 100, stream=1)
    assert (found.reserved, found.active) == (4 * MIB, 512)


# -- which block, and how much of it ------------------------------------------------------------------------------------


def test_the_smallest_block_that_fits_then_the_lowest_address() -> None:
    found = filled(40 * MIB, 30 * MIB, 50 * MIB, 30 * MIB)
    places = {id: found.address(id) for id in range(4)}
    for id in range(4):
        found.free(id)
    found.allocate("a", 30 * MIB)
    found.allocate("b", 29 * MIB + 1)
    found.allocate("c", 31 * MIB)
    assert [found.address(id) for id in "abc"] == [places[1], places[3], places[0]]


@pytest.mark.parametrize(("rest", "split"), [(512, True), (0, False)])
def test_the_small_pool_splits_off_512_bytes(rest: int, split: bool) -> None:
    found = filled(MIB, MIB - rest)
    assert found.allocated == 2 * MIB - rest
    found.allocate("next", 512)
    assert found.reserved == (2 if split else 4) * MIB


@pytest.mark.parametrize(("asked", "allocated"), [(19 * MIB, 20 * MIB), (19 * MIB - 512, 19 * MIB - 512)])
def test_the_large_pool_splits_off_more_than_1_mib(asked: int, allocated: int) -> None:
    found = filled(20 * MIB)
    found.free(0)
    found.allocate("a", asked)
    assert found.allocated == allocated
    assert found.requested == asked


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_free_neighbors_become_one(order: Sequence[int]) -> None:
    found = filled(6 * MIB, 6 * MIB, 6 * MIB)
    for id in order:
        found.free(id)
    found.allocate("whole", 20 * MIB)
    assert found.reserved == 20 * MIB


def test_blocks_in_use_keep_neighbors_apart() -> None:
    found = filled(6 * MIB, 6 * MIB, 8 * MIB)
    found.free(0)
    found.free(2)
    found.allocate("larger", 9 * MIB)
    assert found.reserved == 40 * MIB


# -- max_split_size -----------------------------------------------------------------------------------------------------


def test_oversize_blocks_are_kept_for_oversize_requests() -> None:
    found = filled(100 * MIB, text="max_split_size_mb:50")
    found.free(0)
    found.allocate("a", 30 * MIB)
    assert found.reserved == 130 * MIB
    found.allocate("b", 81 * MIB)  # within 20 MiB, and not split
    assert (found.reserved, found.allocated) == (130 * MIB, 130 * MIB)
    found.free("b")
    found.allocate("c", 80 * MIB)
    assert found.reserved == 210 * MIB


def test_oversize_blocks_are_freed_first() -> None:
    found = filled(60 * MIB, 70 * MIB, 40 * MIB, text="max_split_size_mb:50", total=190 * MIB)
    for id in range(3):
        found.free(id)
    assert found.allocate("a", 90 * MIB) is None  # frees 70 and, as that is not enough, 60
    assert (found.reserved, found.retries) == (130 * MIB, 0)


# -- when memory is short -----------------------------------------------------------------------------------------------


def test_cached_memory_is_freed_before_an_allocation_fails() -> None:
    found = filled(60 * MIB, MIB, total=100 * MIB)
    found.free(0)
    assert found.allocate("a", 80 * MIB) is None
    assert (found.reserved, found.retries, found.peak.reserved) == (82 * MIB, 1, 82 * MIB)


def test_out_of_memory_says_what_was_there() -> None:
    found = filled(6 * MIB, 6 * MIB, 6 * MIB, total=100 * MIB)
    found.free(1)
    failed = found.allocate("a", 90 * MIB)
    assert failed == OutOfMemory("a", 90 * MIB, 90 * MIB, 80 * MIB, None, found.usage, 6 * MIB)
    assert failed.cached == 8 * MIB
    assert str(failed) == (
        "out of memory: 'a' needs 94371840 bytes, asked of the driver as 94371840 (83886080 free on the device); "
        "12582912 allocated, 8388608 reserved but unallocated, the largest piece 6291456"
    )
    assert found.allocate("b", 6 * MIB) is None  # it goes on as before


def test_what_others_hold_is_not_free() -> None:
    assert allocator(total=100 * MIB, taken=11 * MIB).allocate("a", 90 * MIB) is not None
    assert allocator(total=100 * MIB, taken=10 * MIB).allocate("a", 90 * MIB) is None


def test_the_process_can_be_limited() -> None:
    found = allocator("per_process_memory_fraction:0.5", total=100 * MIB)
    assert found.allocate("a", 40 * MIB) is None
    failed = found.allocate("b", 12 * MIB)
    assert failed is not None
    assert (failed.free, failed.allowed) == (60 * MIB, 50 * MIB)
    assert "52428800 allowed" in str(failed)


def test_with_expandable_segments_the_process_limit_counts_segments() -> None:
    """`alloc_block` compares `alloc_size` before it looks whether segments are expandable: 3 MiB count as 20."""
    found = allocator("per_process_memory_fraction:0.5,expandable_segments:True", total=100 * MIB)
    assert found.allocate("a", 35 * MIB) is None  # two pages: 40 MiB
    assert found.allocate("b", 5 * MIB) is None
    assert found.allocate("c", 3 * MIB) is not None


def test_garbage_is_collected_by_age() -> None:
    found = allocator("garbage_collection_threshold:0.5,per_process_memory_fraction:0.8", total=200 * MIB)
    for id, size in enumerate((20 * MIB, 30 * MIB, 40 * MIB)):
        found.allocate(id, size)
    found.free(0)
    found.allocate("a", 32 * MIB)  # 90 of 80 MiB: the only free block goes
    assert (found.reserved, found.segments) == (102 * MIB, 3)
    found.free(1)
    found.allocate("b", 40 * MIB)
    found.free(2)
    found.allocate("c", 41 * MIB)  # 30 MiB went as soon as it was missed by "b"
    assert found.retries == 0


@pytest.mark.parametrize(("threshold", "reserved"), [(0.5, 120 * MIB), (0.4, 90 * MIB)])
def test_the_oldest_garbage_goes_first(threshold: float, reserved: int) -> None:
    found = allocator(f"garbage_collection_threshold:{threshold},per_process_memory_fraction:0.8", total=200 * MIB)
    for id, size in enumerate((20 * MIB, 30 * MIB, 40 * MIB)):
        found.allocate(id, size)
    found.free(0)
    found.free(1)
    found.allocate("again", 30 * MIB)  # a search that the first one does not serve
    found.free("again")
    found.allocate("a", 50 * MIB)  # two searches and one ago: above 80 MiB the first goes, above 64 MiB both
    assert found.reserved == reserved


def test_a_threshold_without_a_limit_collects_nothing() -> None:
    found = filled(20 * MIB, text="garbage_collection_threshold:0.1", total=100 * MIB)
    found.free(0)
    found.allocate("a", 60 * MIB)
    assert found.reserved == 80 * MIB


# -- giving back --------------------------------------------------------------------------------------------------------


def test_empty_cache_gives_back_whole_segments() -> None:
    found = filled(5 * MIB, 5 * MIB, 30 * MIB)
    found.free(0)
    found.free(2)
    found.empty_cache()
    assert (found.reserved, found.segments) == (20 * MIB, 1)
    found.free(1)
    found.empty_cache()
    assert found.usage == (0, 0, 0, 0, 0)
    assert found.peak == (40 * MIB, 40 * MIB, 40 * MIB, 50 * MIB, 2)


# -- other streams ------------------------------------------------------------------------------------------------------


def test_a_recorded_stream_keeps_memory_active() -> None:
    found = filled(100)
    found.record_stream(0, 1)
    found.free(0)
    assert (found.allocated, found.active, found.requested) == (0, 512, 100)
    found.allocate("a", 100)
    assert found.active == 1024
    found.synchronize(2)
    found.synchronize(1)
    assert found.active == 1024  # noticed with the next allocation
    found.allocate("b", 200)
    assert (found.active, found.requested) == (1024, 300)


def test_its_own_stream_needs_no_recording() -> None:
    found = filled(100)
    found.record_stream(0, 0)
    found.free(0)
    assert found.active == 0


def test_every_recorded_stream_is_waited_for() -> None:
    found = filled(100)
    found.record_stream(0, 1)
    found.record_stream(0, 2)
    found.free(0)
    found.synchronize(1)
    found.allocate("a", 1)
    assert found.active == 1024
    found.synchronize()
    found.allocate("b", 1)
    assert found.active == 1024


def test_memory_that_is_short_is_waited_for() -> None:
    found = filled(60 * MIB, total=100 * MIB)
    found.record_stream(0, 1)
    found.free(0)
    assert found.allocate("a", 50 * MIB) is None
    assert (found.active, found.reserved) == (50 * MIB, 50 * MIB)


# -- expandable segments ------------------------------------------------------------------------------------------------


def test_pages() -> None:
    found = filled(100, 3 * MIB, text="expandable_segments:True")
    assert (found.reserved, found.segments) == (22 * MIB, 0)
    found.allocate("a", 30 * MIB)
    assert found.reserved == 42 * MIB
    found.allocate("b", 7 * MIB)
    assert found.reserved == 42 * MIB
    found.allocate("c", 512)  # of the small pool
    assert found.reserved == 42 * MIB


def test_a_larger_page() -> None:
    assert filled(3 * MIB, text="expandable_segments:True,large_segment_size_mb:32").reserved == 32 * MIB


def test_an_expandable_segment_grows_behind_free_memory() -> None:
    """The case of the source's note: a little more than before takes a page more, not a segment more."""
    found, plain = filled(30 * MIB, text="expandable_segments:True"), filled(30 * MIB)
    for each in (found, plain):
        each.free(0)
        each.allocate("a", 41 * MIB)
    assert (found.reserved, plain.reserved) == (60 * MIB, 30 * MIB + 42 * MIB)


def test_expandable_blocks_split_off_512_bytes() -> None:
    found = filled(20 * MIB - 512, text="expandable_segments:True")
    assert found.allocated == 20 * MIB - 512


def test_emptying_unmaps_whole_pages_only() -> None:
    found = filled(25 * MIB, 50 * MIB, 4 * MIB, text="expandable_segments:True")
    assert found.reserved == 80 * MIB
    found.free(1)  # from 25 to 75 MiB: the page from 40 to 60
    found.empty_cache()
    assert found.reserved == 60 * MIB
    start = found.address(0) or 0
    found.allocate("a", 15 * MIB)  # there are 15 MiB on both sides of the hole; those before it could grow
    assert (found.reserved, found.address("a")) == (60 * MIB, start + 60 * MIB)
    found.allocate("b", 25 * MIB)  # the hole is mapped again
    assert (found.reserved, found.address("b")) == (80 * MIB, start + 25 * MIB)


def test_pages_are_taken_back_when_memory_is_short() -> None:
    found = filled(60 * MIB, 100, text="expandable_segments:True", total=70 * MIB)
    found.free(0)
    assert found.allocate("a", 1 * MIB, stream=1) is None
    assert (found.reserved, found.retries) == (64 * MIB, 0)
    assert found.allocate("b", 40 * MIB, stream=1) is None
    assert (found.reserved, found.retries) == (44 * MIB, 1)


def test_best_fit_counts_what_a_block_can_grow_by() -> None:
    """The block at the end, which can grow without end, is not split as long as another serves."""
    found = filled(10 * MIB, 5 * MIB, 5 * MIB, 14 * MIB, text="expandable_segments:True")
    start = found.address(0) or 0
    found.free(0)  # 10 MiB at the start; 6 MiB free at the end
    found.allocate("a", 4 * MIB)
    assert found.address("a") == start


def test_of_blocks_that_can_grow_as_far_the_first() -> None:
    found = filled(5 * MIB, 2 * MIB, 5 * MIB, 8 * MIB, text="expandable_segments:True")
    start = found.address(0)
    found.free(0)
    found.free(2)
    found.allocate("a", 5 * MIB)
    assert found.address("a") == start


# -- replaying ----------------------------------------------------------------------------------------------------------


def test_bytes_over_time() -> None:
    events: list[Event] = [
        Allocate("a", 100),
        RecordStream("a", 1),
        Free("a"),
        Synchronize(),
        EmptyCache(),
        Allocate("b", 3 * MIB),
    ]
    found = replay(events)
    assert list(found.allocated) == [512, 512, 0, 0, 0, 3 * MIB]
    assert list(found.active) == [512, 512, 512, 512, 0, 3 * MIB]
    assert list(found.reserved) == [2 * MIB] * 4 + [0, 20 * MIB]
    assert found.final == (3 * MIB, 3 * MIB, 3 * MIB, 20 * MIB, 1)
    assert found.out_of_memory is None


def test_a_replay_ends_where_memory_does() -> None:
    found = replay([Allocate("a", 60 * MIB), Allocate("b", 60 * MIB), Free("a")], device=Device(100 * MIB))
    assert found.out_of_memory is not None
    assert found.out_of_memory.id == "b"
    assert (len(found.active), found.retries) == (2, 1)


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([Allocate("a", 1), Allocate("a", 1)], "'a' is allocated already; free it first"),
        ([Allocate("a", -1)], "'a' cannot have -1 bytes"),
        ([Free("a")], "cannot free 'a', which is not allocated"),
        ([Allocate("a", 1), Free("a"), Free("a")], "cannot free 'a', which is not allocated"),
        ([RecordStream("a", 1)], "cannot record a stream of 'a', which is not allocated"),
        ([("free", "a")], "none of an allocator's events: Allocate, Free, RecordStream, Synchronize, EmptyCache"),
    ],
)
def test_events_that_cannot_be(events: list[Any], message: str) -> None:
    with pytest.raises(AllocatorError, match=message):
        replay(events)


@pytest.mark.parametrize(("total", "taken"), [(0, 0), (-1, 0), (10, -1), (10, 11)])
def test_devices_that_cannot_be(total: int, taken: int) -> None:
    with pytest.raises(AllocatorError, match="cannot"):
        Device(total, taken)


def test_a_part_of_no_limit_is_no_limit() -> None:
    with pytest.raises(AllocatorError, match=r"per_process_memory_fraction:0\.5 is a part of the device's memory"):
        allocator("per_process_memory_fraction:0.5")


@pytest.mark.parametrize("expandable", [False, True])
def test_a_hundred_thousand_events_take_seconds_at_most(expandable: bool) -> None:
    random, live = Random(0), list[int]()
    events: list[Event] = []
    for number in range(100_000):
        if live and (len(live) > 2000 or random.random() < 0.5):
            events.append(Free(live.pop(random.randrange(len(live)))))
        else:
            events.append(Allocate(number, random.choice([random.randrange(1, 2**12), random.randrange(1, 2**25)])))
            live.append(number)
    start = time.process_time()
    replay(events, AllocatorConfig(expandable_segments=expandable))
    assert time.process_time() - start < 5  # 0.3 on an idle machine


# -- settings -----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_torchs() -> None:
    assert AllocatorConfig.parse("") == AllocatorConfig()
    assert AllocatorConfig.from_environment({}) == AllocatorConfig()


def test_every_option() -> None:
    found = AllocatorConfig.parse(
        "backend:native, max_split_size_mb:64,max_non_split_rounding_mb:40,garbage_collection_threshold:0.8,"
        "expandable_segments:True,large_segment_size_mb:32,per_process_memory_fraction:0.9,pinned_num_register_threads:8,"
        "roundup_power2_divisions:[1:2,>:4],"
    )
    assert found == AllocatorConfig(64 * MIB, 40 * MIB, (2, *[4] * 15), 0.8, True, 32 * MIB, 0.9)


def test_the_environment() -> None:
    old = {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64,per_process_memory_fraction:0.5"}
    assert AllocatorConfig.from_environment(old) == AllocatorConfig.parse(old["PYTORCH_CUDA_ALLOC_CONF"])
    both = AllocatorConfig.from_environment({**old, "PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert both == AllocatorConfig(expandable_segments=True, per_process_memory_fraction=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_split_size_mb:10", "max_split_size_mb:10 has to be at least 20, the large segment's size"),
        ("max_split_size_mb:15,large_segment_size_mb:16", "max_split_size_mb:15 has to be at least 16"),
        ("max_non_split_rounding_mb:19", "max_non_split_rounding_mb:19 has to be at least 20"),
        ("max_split_size_mb:abc", "max_split_size_mb:abc has to be a whole number"),
        ("max_split_size_mb:-5", "max_split_size_mb:-5 has to be a whole number"),
        ("large_segment_size_mb:10", "large_segment_size_mb:10 has to be more than 10"),
        ("large_segment_size_mb:512.5", "large_segment_size_mb:512.5 has to be a whole number"),
        ("garbage_collection_threshold:1.0", "garbage_collection_threshold:1.0 has to be between 0 and 1"),
        ("garbage_collection_threshold:0.8x", "garbage_collection_threshold:0.8x has to be a number"),
        ("per_process_memory_fraction:2", "per_process_memory_fraction:2 has to be from 0 to 1"),
        ("per_process_memory_fraction:nan", "per_process_memory_fraction:nan has to be from 0 to 1"),
        ("expandable_segments:true", "expandable_segments:true has to be True or False"),
        ("roundup_power2_divisions:3", "roundup_power2_divisions:3 has '3' where a power of two has to stand"),
        ("roundup_power2_divisions:0", "has '0' where a power of two has to stand"),
        ("roundup_power2_divisions:[3:4]", "has '3' where a power of two has to stand"),
        ("roundup_power2_divisions:[4]", "has '' where a power of two has to stand"),
        ("roundup_power2_divisions:[64:8", r"roundup_power2_divisions:\[64:8 has brackets that do not match"),
        ("backend:cudaMallocAsync", "backend:cudaMallocAsync is not modeled"),
        ("throw_on_cudamalloc_oom:True", "throw_on_cudamalloc_oom:True is not modeled"),
        ("max_split_mb:40", "no option 'max_split_mb' .set to '40'.; did you mean max_split_size_mb"),
        ("max_split_size_mb", "'max_split_size_mb' in the allocator's settings 'max_split_size_mb' is not option:value"),
        ("max_split_size_mb=40", "'max_split_size_mb=40' in .* is not option:value"),
        ("max_split_size_mb:40,max_split_size_mb:50", "max_split_size_mb stands twice"),
    ],
)
def test_bad_settings_name_option_and_value(text: str, message: str) -> None:
    with pytest.raises(AllocatorError, match=message):
        AllocatorConfig.parse(text)


TORCH_READS = """
import ctypes, json, pathlib, sys, torch
lib = ctypes.CDLL(str(pathlib.Path(torch.__file__).parent / "lib" / "libc10.so"))
instance = lib._ZN3c1016CachingAllocator26AcceleratorAllocatorConfig8instanceEv
divisions = lib._ZN3c1016CachingAllocator26AcceleratorAllocatorConfig24roundup_power2_divisionsEm
instance.restype, divisions.restype, divisions.argtypes = ctypes.c_void_p, ctypes.c_size_t, [ctypes.c_size_t]
for text in sys.argv[1:]:
    torch._C._accelerator_setAllocatorSettings("large_segment_size_mb:20")  # the one that is not reset
    torch._C._accelerator_setAllocatorSettings(text)
    sizes = list((ctypes.c_uint64 * 3).from_address(instance()))  # large segment, max split, max rounding, as in the header
    print(json.dumps([sizes, [divisions(2 ** (20 + each)) for each in range(16)]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks torch's libc10.so")
def test_torch_itself_reads_the_same() -> None:
    texts = [
        "",
        "max_split_size_mb:64,roundup_power2_divisions:[64:8,256:4,1024:4,>:1]",
        "max_split_size_mb:15,large_segment_size_mb:12,roundup_power2_divisions:[>:4]",
        "max_non_split_rounding_mb:30,large_segment_size_mb:12,roundup_power2_divisions:[131072:4]",
        "roundup_power2_divisions:[1:4,2:8,>:0]",
        "roundup_power2_divisions:8",
    ]
    done = subprocess.run([sys.executable, "-c", TORCH_READS, *texts], capture_output=True, text=True)
    if "undefined symbol" in done.stderr:
        pytest.skip("this torch has no AcceleratorAllocatorConfig of that form")
    assert not done.returncode, done.stderr
    for text, line in zip(texts, done.stdout.splitlines(), strict=True):
        (segment, limit, rounding), divisions = json.loads(line)
        found = AllocatorConfig.parse(text)
        assert found.large_segment_size == segment, text
        assert (2**64 - 1 if found.max_split_size is None else found.max_split_size) == limit, text
        assert found.max_non_split_rounding == rounding, text
        assert list(found.roundup_power2_divisions) == divisions, text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 2**40), st.sampled_from([2, 4, 8, 64]))
def test_rounding_up_stays_close(nbytes: int, divisions: int) -> None:
    found = AllocatorConfig.parse(f"roundup_power2_divisions:{divisions}").round_size(nbytes)
    assert nbytes <= found <= max(nbytes + nbytes // divisions + 1, nbytes + 512)
    assert found % 512 == 0


# -- snapshots ----------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_replayed_at_the_drivers_addresses() -> None:
    snapshot = json.loads(SNAPSHOT.read_text())
    history = from_snapshot(snapshot)
    assert history.unknown_frees == 1
    assert history.addresses == (140000000000000, 139000000000000, 138000000000000)
    found = CachingAllocator(addresses=history.addresses)
    allocated = iter(entry["addr"] for entry in snapshot["device_traces"][0] if entry["action"] == "alloc")
    for event in history.events:
        found.take(event)
        if isinstance(event, Allocate):
            assert found.address(event.id) == next(allocated)
    assert found.usage == (18 * MIB, 18 * MIB, 18 * MIB, 20 * MIB, 1)
    assert found.peak.reserved == 42 * MIB
    assert found.peak.active == (3 + 9 + 9) * MIB + 1024


def test_the_drivers_addresses_decide_between_equals() -> None:
    found = CachingAllocator(addresses=[2 * GIB, GIB])
    for id in "ab":
        found.allocate(id, 30 * MIB)
    for id in "ab":
        found.free(id)
    found.allocate("c", 30 * MIB)
    assert found.address("c") == GIB


def test_a_device_without_history() -> None:
    assert from_snapshot(json.loads(SNAPSHOT.read_text()), device=1).events == ()


@pytest.mark.parametrize(
    ("snapshot", "device", "message"),
    [
        ({}, 0, "has a list 'device_traces'"),
        ({"device_traces": []}, 0, "traces of 0 devices, so there is none of device 0"),
        ({"device_traces": [[]]}, -1, "none of device -1"),
        ({"device_traces": [[{"action": "alloc", "addr": 1, "size": 2}]]}, 0, "entry 0 of device 0 has no 'stream'"),
        ({"device_traces": [[{"action": "grow", "addr": 1, "size": 2, "stream": 0}]]}, 0, "the unknown action 'grow'"),
    ],
)
def test_what_is_no_snapshot(snapshot: Any, device: int, message: str) -> None:
    with pytest.raises(AllocatorError, match=message):
        from_snapshot(snapshot, device)


# -- timelines of tier T0 -----------------------------------------------------------------------------------------------


def test_a_timeline_of_one_device() -> None:
    timeline = [Change("cuda:0", "a", 5 * MIB), Change("cuda:1", "b", 10), Change("cuda:0", "a", 3 * MIB)]
    timeline += [Change("cuda:0", "a", -5 * MIB), Change("cuda:0", "c", 0), Change("cpu", "c", 7)]
    found = replay_timeline(timeline, "cuda:0")
    assert (found.peak.active, found.final.active, found.peak.reserved) == (8 * MIB, 3 * MIB, 20 * MIB)
    assert replay_timeline(timeline, "cuda:1").peak == (10, 512, 512, 2 * MIB, 1)
    assert replay_timeline(timeline, "cuda:2").peak == (0, 0, 0, 0, 0)


def test_a_plans_phases() -> None:
    """On the meta-backed graph of a plan that is moved to a GPU; the peaks of `memory` are the requested bytes."""
    graph = fingerprinted(graph_of(tensor("a", size=(3 * MIB // 4,)), tensor("b", size=(3,))))
    decisions = default_decisions(graph, "model.Model").to("cuda")
    found = reserved(graph, decisions, Training(optimizer="sgd-momentum"))
    assert found["construct"] == {"cuda:0": (3 * MIB + 12, 3 * MIB + 512, 3 * MIB + 512, 22 * MIB, 2)}
    assert found["step"] == {"cuda:0": (3 * (3 * MIB + 12), 3 * (3 * MIB + 512), 3 * (3 * MIB + 512), 22 * MIB, 2)}
    predicted = memory(graph, decisions, Training(optimizer="sgd-momentum"))
    for phase, devices in found.items():
        assert {device: usage.requested for device, usage in devices.items()}.items() <= predicted.by_device[phase].items()


def test_a_rank_that_is_not_there() -> None:
    graph = fingerprinted(graph_of(tensor("a", size=(5, 3 * MIB // 4))))
    plan = default_decisions(graph, "model.Model").to("cuda")
    with pytest.raises(RankError, match="the plan is for one process, so there is no rank 1; ask for rank 0"):
        reserved(graph, plan, rank=1)


def test_timelines_that_cannot_be() -> None:
    with pytest.raises(AllocatorError, match="'a' releases 5 bytes on cuda:0 that it did not allocate"):
        replay_timeline([Change("cuda:0", "a", 4), Change("cuda:0", "a", -5)], "cuda:0")
    with pytest.raises(AllocatorError, match="'cpu' is no CUDA device"):
        replay_timeline([], "cpu")


# -- what is held beside ------------------------------------------------------------------------------------------------


def test_overheads_have_sources() -> None:
    assert all(0 <= each.low <= each.high and each.source and each.per for each in OVERHEADS.values())


def test_cublas_workspaces() -> None:
    assert cublas_workspace((8, 0)).high == 8_519_680  # :4096:2:16:8
    assert cublas_workspace((8, 0)).high == cublas_workspace((9, 0), ":4096:2:16:8").low
    assert cublas_workspace((9, 0)).low == 32 * MIB
    assert (cublas_workspace((10, 0)).low, cublas_workspace((12, 0)).high) == (8_519_680, 32 * MIB)
    with pytest.raises(AllocatorError, match="CUBLAS_WORKSPACE_CONFIG=4096 has no :KiB:count"):
        cublas_workspace((8, 0), "4096")


def test_an_nccl_buffer_takes_what_nccl_prints() -> None:
    """NVIDIA/nccl#1685: "two types of buffer being allocated, one type of size 10485760"."""
    assert OVERHEADS["nccl connection"].low == 9_633_792
    assert OVERHEADS["nccl connection"].high == 10_485_760 == 5 * 2 * MIB
