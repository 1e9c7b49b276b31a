"""The replay against a second, slow model of the allocator, and laws that hold for any sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundplan.planner.allocator import CachingAllocator
from groundplan.planner.allocator_config import AllocatorConfig
from groundplan.planner.allocator_driver import Device
from groundplan.planner.allocator_events import Allocate, EmptyCache, Event, Free, RecordStream, Synchronize

from .allocator_model import Model

MIB = 2**20
EDGES = [0, 1, 511, 512, 513, 4097, MIB - 512, MIB, MIB + 1, 2 * MIB, 9 * MIB, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1, 19 * MIB]
EDGES += [20 * MIB, 20 * MIB + 1, 24 * MIB, 25 * MIB, 40 * MIB, 47 * MIB]
SAME = [5 * MIB, 12 * MIB, 21 * MIB, 30 * MIB]  # so that blocks of equal size are free at once
SIZES = st.one_of(st.sampled_from(EDGES), st.sampled_from(SAME), st.integers(1, 3 * MIB), st.integers(1, 30 * MIB))


@st.composite
def sequences(draw: Callable[..., Any]) -> list[Event]:
    """Events that a program could cause: only what is allocated is freed."""
    live: list[int] = []
    events: list[Event] = []
    for number in range(draw(st.integers(1, 40))):
        kind = draw(st.sampled_from(["allocate"] * 6 + ["free"] * 5 + ["record", "synchronize", "empty"]))
        if kind == "allocate" or (kind in ("free", "record") and not live):
            live.append(number)
            events.append(Allocate(number, draw(SIZES), draw(st.sampled_from([0, 0, 0, 1]))))
        elif kind == "free":
            events.append(Free(live.pop(draw(st.integers(0, len(live) - 1)))))
        elif kind == "record":
            events.append(RecordStream(draw(st.sampled_from(live)), draw(st.integers(0, 2))))
        else:
            events.append(EmptyCache() if kind == "empty" else Synchronize(draw(st.sampled_from([None, 1, 2]))))
    return events


TEXTS = [
    "",
    "max_split_size_mb:20",
    "max_split_size_mb:24,max_non_split_rounding_mb:21",
    "roundup_power2_divisions:[1:4,2:8,4:2,>:4]",
    "large_segment_size_mb:12",
    "garbage_collection_threshold:0.5,per_process_memory_fraction:0.9",
    "garbage_collection_threshold:0.2,per_process_memory_fraction:0.8,max_split_size_mb:30",
]
CONFIGS = [AllocatorConfig.parse(text) for text in TEXTS]
ANY_CONFIG = st.builds(
    lambda config, expandable: replace(config, expandable_segments=expandable), st.sampled_from(CONFIGS), st.booleans()
)
ANY_DEVICE = st.sampled_from([Device(2**30), Device(120 * MIB), Device(80 * MIB, 9 * MIB)])


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(events=sequences(), config=ANY_CONFIG, device=ANY_DEVICE)
def test_against_the_slow_model(events: list[Event], config: AllocatorConfig, device: Device) -> None:
    allocator, model = CachingAllocator(config, device), Model(config, device)
    for event in events:
        failed = allocator.take(event)
        model.take(event)
        assert (failed is not None) == model.failed
        assert list(allocator.usage) == model.usage()
        assert list(allocator.peak) == model.peaks
        assert allocator.retries == model.retries
        if failed is not None:
            return
        assert {id: allocator.address(id) for id in model.live} == {id: each and each[1].start for id, each in model.live.items()}


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(events=sequences(), config=ANY_CONFIG, device=ANY_DEVICE)
def test_laws(events: list[Event], config: AllocatorConfig, device: Device) -> None:
    allocator = CachingAllocator(config, device)
    live: dict[Any, int] = {}
    peak = allocator.peak
    for event in events:
        if allocator.take(event) is not None:
            break
        if isinstance(event, Allocate):
            live[event.id] = event.nbytes
        elif isinstance(event, Free):
            del live[event.id]
        usage = allocator.usage
        assert sum(live.values()) <= usage.requested <= usage.active <= usage.reserved
        assert usage.allocated <= usage.active
        assert usage.reserved % (2 * MIB) == 0
        assert device.total is not None and usage.reserved <= device.total - device.taken
        assert all(now >= before for now, before in zip(allocator.peak, peak, strict=True))
        assert all(most >= now for most, now in zip(allocator.peak, usage, strict=True))
        peak = allocator.peak
        ranges = sorted((address, address + size) for id, size in live.items() if (address := allocator.address(id)) is not None)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges)), "two allocations overlap"
    for id in live:
        allocator.free(id)
    allocator.empty_cache()
    assert allocator.usage == (0, 0, 0, 0, 0)
