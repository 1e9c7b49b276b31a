"""The replay against the real allocator, on a GPU: every counter equal, for random programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from groundplan.planner.allocator import CachingAllocator
from groundplan.planner.allocator_config import AllocatorConfig
from groundplan.planner.allocator_driver import Device
from groundplan.planner.allocator_events import Allocate, EmptyCache, Event, Free, RecordStream, Synchronize
from groundplan.planner.allocator_snapshot import from_snapshot

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROGRAM = """
import json, random, sys, torch

seed, steps, largest = (int(each) for each in sys.argv[1:])
random = random.Random(seed)
torch.cuda.init()
torch.cuda.memory._record_memory_history(context=None, stacks="python", max_entries=10**6)
streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
live, events, failed = {}, [], False
for number in range(steps):
    chance = random.random()
    if not live or chance < 0.55:
        size = random.choice([random.randrange(1, 2**12), random.randrange(1, 2**21), random.randrange(1, largest)])
        stream = random.choice([0, 0, 0, 1])
        events.append(["Allocate", number, size, stream])
        try:
            with torch.cuda.stream(streams[stream]):
                live[number] = torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            failed = True
            break
    elif chance < 0.97:
        id = random.choice(list(live))
        events.append(["Free", id])
        del live[id]
        torch.cuda.synchronize()
        events.append(["Synchronize"])
    elif chance < 0.99:
        id, stream = random.choice(list(live)), random.choice([0, 1])
        events.append(["RecordStream", id, stream])
        live[id].record_stream(streams[stream])
    else:
        events.append(["EmptyCache"])
        torch.cuda.empty_cache()
snapshot = torch.cuda.memory._snapshot()
print(json.dumps({
    "events": events,
    "failed": failed,
    "stats": torch.cuda.memory_stats(),
    "addresses": {id: tensor.data_ptr() for id, tensor in live.items()},
    "total": torch.cuda.get_device_properties(0).total_memory,
    "traces": [[{key: value for key, value in entry.items() if key != "frames"} for entry in snapshot["device_traces"][0]]],
}))
"""

KINDS: dict[str, Any] = {each.__name__: each for each in (Allocate, Free, RecordStream, Synchronize, EmptyCache)}
COUNTERS = ("requested_bytes", "allocated_bytes", "active_bytes", "reserved_bytes", "segment")


def run(settings: str, seed: int, largest: int) -> dict[str, Any]:
    """What a random program did, in a process of its own, with the allocator set so."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("ALLOC_CONF")}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = settings
    command = [sys.executable, "-c", PROGRAM, str(seed), "600", str(largest)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check(real: dict[str, Any], allocator: CachingAllocator) -> None:
    assert allocator.retries == real["stats"]["num_alloc_retries"]
    for counter, now, peak in zip(COUNTERS, allocator.usage, allocator.peak, strict=True):
        assert real["stats"][f"{counter}.all.current"] == now, counter
        assert real["stats"][f"{counter}.all.peak"] == peak, counter


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        "expandable_segments:False",
        "expandable_segments:True",
        "expandable_segments:False,max_split_size_mb:32",
        "expandable_segments:False,roundup_power2_divisions:[1:4,>:8]",
        "expandable_segments:False,per_process_memory_fraction:{half_gib}",
        "expandable_segments:True,per_process_memory_fraction:{half_gib}",
        "expandable_segments:False,per_process_memory_fraction:{half_gib},garbage_collection_threshold:0.5",
        "expandable_segments:False,per_process_memory_fraction:{half_gib},max_split_size_mb:24",
    ],
)
def test_a_random_program(settings: str, seed: int) -> None:
    """Where the driver puts segments is read from the program's own history; all else has to come out by itself."""
    total = torch.cuda.get_device_properties(0).total_memory
    settings = settings.format(half_gib=2**29 / total)
    real = run(settings, seed, largest=2**25)
    history = from_snapshot({"device_traces": real["traces"]})
    allocator = CachingAllocator(AllocatorConfig.parse(settings), Device(real["total"]), history.addresses)
    failed = None
    for kind, *fields in real["events"]:
        failed = allocator.take(KINDS[kind](*fields))
    assert (failed is not None) == real["failed"]
    check(real, allocator)
    if not AllocatorConfig.parse(settings).expandable_segments:
        assert {id: allocator.address(int(id)) for id in real["addresses"]} == real["addresses"]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", ["expandable_segments:False", "expandable_segments:True"])
def test_a_recorded_history(settings: str) -> None:
    """The same from the history alone: frees that waited for another stream are in it as such."""
    real = run(settings, seed=3, largest=2**25)
    history = from_snapshot({"device_traces": real["traces"]})
    assert history.unknown_frees == 0
    allocator = CachingAllocator(AllocatorConfig.parse(settings), Device(real["total"]), history.addresses)
    events: tuple[Event, ...] = history.events
    for event in events:
        assert allocator.take(event) is None
    for counter, peak in zip(COUNTERS, allocator.peak, strict=True):
        assert real["stats"][f"{counter}.all.peak"] == peak, counter
