"""Tier T2: a run replayed through the caching allocator's rules, against a second model of them and against its own law."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, START, STEP, Allocation, Kind, Moment, Timeline
from groundplan.planner.allocator_config import AllocatorConfig, AllocatorError
from groundplan.planner.allocator_driver import Device
from groundplan.planner.allocator_events import Allocate, Free
from groundplan.planner.catalog import catalog, device_named
from groundplan.planner.memory import Memory
from groundplan.planner.replayed_run import HANDLES, MATRIX_PRODUCTS, Allocator, replay_run
from groundplan.tracer.errors import DecisionError

from .allocator_model import Model
from .measured_steps import MODELS

MIB = 2**20
PHASES = (START, FIRST_STEP, FIRST_OPTIMIZER, STEP, OPTIMIZER)
SETTINGS = ["", "expandable_segments:True", "max_split_size_mb:20", "roundup_power2_divisions:4"]


def net() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.GELU())), nn.Linear(512, 3))


def training() -> gp.Training:
    return gp.Training("adamw", inputs=lambda: (torch.ones(700, 512),), clip_grad_norm=1.0)


@cache
def memory(settings: str = "") -> Memory:
    return gp.trace(net).to("cuda").memory(training(), tier="T2", allocator=settings, cluster="A100-80GB")


def run_of(found: Memory) -> Timeline:
    assert found.run is not None
    return found.run


# -- against the second model -------------------------------------------------------------------------------------------


def on_two_streams(run: Timeline) -> Timeline:
    """The same, with every third allocation from another stream's pool, as all-gathered parameters are."""
    pieces = (replace(each, stream="ab"[n % 2] * (n % 3 == 0)) for n, each in enumerate(run.allocations))
    return replace(run, allocations=tuple(pieces))


@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "several"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_second_model_says_the_same_at_every_moment(setting: str, streams: bool) -> None:
    run = run_of(memory())
    run = on_two_streams(run) if streams else run
    allocator = Allocator.of(setting, "A100-80GB")
    found = replay_run(run, allocator)
    model, peaks = Model(allocator.config, Device()), dict.fromkeys(PHASES, [0] * 5)
    reserved = [0]
    pending = list(enumerate(allocator.workspaces))
    for moment in run.moments:
        piece = run.allocations[moment.allocation]
        before = model.usage()
        if piece.device == "cuda:0":
            model.take(Allocate(moment.allocation, piece.nbytes, piece.stream) if moment.born else Free(moment.allocation))
            while moment.born and piece.op in MATRIX_PRODUCTS and pending:
                number, nbytes = pending.pop(0)
                model.take(Allocate(("workspace", number), nbytes, piece.stream))
        reserved.append(model.usage()[3])
        peaks[moment.phase] = [max(each) for each in zip(peaks[moment.phase], before, model.usage(), strict=True)]
    assert not pending and len(run.moments) > 200
    assert list(found.reserved["cuda:0"]) == reserved
    assert {phase: list(devices["cuda:0"]) for phase, devices in found.peaks.items()} == peaks


# -- its law ------------------------------------------------------------------------------------------------------------


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Allocations of two devices and three streams, which come and go in any order, in the phases of a run."""
    kinds: tuple[Kind, ...] = ("parameter", "gradient", "activation", "temporary")
    sizes = st.one_of(st.integers(0, 3000), st.integers(0, 40 * MIB))
    allocations: list[Allocation] = []
    moments: list[Moment] = []
    living: list[int] = []
    for phase in PHASES:
        for _ in range(draw(st.integers(0, 12))):
            goes = draw(st.booleans())
            if living and goes:
                moments.append(Moment(phase, living.pop(draw(st.integers(0, len(living) - 1))), False))
                continue
            device, stream = draw(st.sampled_from(["cuda:0", "cuda:0", "cpu"])), draw(st.sampled_from(["", "", "gather"]))
            allocations.append(Allocation(draw(st.sampled_from(kinds)), draw(sizes), device, stream=stream))
            living.append(len(allocations) - 1)
            moments.append(Moment(phase, living[-1], True))
    return Timeline(tuple(allocations), tuple(moments))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(timelines(), st.sampled_from(SETTINGS))
def test_reserved_is_never_less_than_active_nor_active_than_requested(run: Timeline, setting: str) -> None:
    found = replay_run(run, Allocator.of(setting))
    highest = 0
    for phase, devices in found.peaks.items():
        for device, usage in devices.items():
            assert usage.reserved >= usage.active >= usage.requested == run.peaks[phase].get(device, 0)
            assert usage.reserved >= highest, "nothing goes back to the driver before memory is short"
            highest = usage.reserved
    assert all(len(series) == len(run.moments) + 1 for series in found.reserved.values())


@pytest.mark.parametrize("setting", SETTINGS)
def test_so_it_is_of_a_real_step(setting: str) -> None:
    found = memory(setting)
    assert found.tier == "T2" and set(found.reserved) == set(found.by_device)
    workspaces = sum(Allocator.of(setting, "A100-80GB").workspaces)
    for phase, devices in found.reserved.items():
        usage = devices["cuda:0"]
        assert usage.reserved >= usage.active >= usage.requested
        of_run = phase in ("first_step", "step", "optimizer")
        assert usage.requested == found.by_device[phase]["cuda:0"] + workspaces * of_run
    assert found.reserved["checkpoint"]["cuda:0"].reserved == found.reserved["optimizer"]["cuda:0"].reserved


def test_a_transformer_on_cuda() -> None:
    case = MODELS["Llama"]
    found = gp.trace(case.build).to("cuda").memory(gp.Training(inputs=case.inputs), tier="T2")
    usage = found.reserved["step"]["cuda:0"]
    assert usage.reserved >= usage.active >= usage.requested > found.by_device["step"]["cuda:0"]
    assert all(list(devices) == ["cuda:0"] for devices in found.reserved.values()), "Adam's step counts on the host are nobody's"


# -- workspaces ---------------------------------------------------------------------------------------------------------


def test_workspaces_are_taken_with_the_first_matrix_product_once() -> None:
    pieces = [Allocation("activation", 100, "cuda:0", op=op) for op in ("relu", "addmm", "mm")]
    run = Timeline(tuple(pieces), tuple(Moment(STEP, index, True) for index in range(3)))
    found = replay_run(run, Allocator.of(None, "A100-80GB"))
    first = found.reserved["cuda:0"]
    assert first[1] == 2 * MIB
    assert found.peaks[STEP]["cuda:0"].requested == 300 + HANDLES * (8_519_680 + MIB)
    assert first[2] == first[3] > first[1]


@pytest.mark.parametrize(("cluster", "mib"), [("8xA100-80GB", 8.125), ("8xH100-80GB", 32), (None, 32), ("24GB", 32)])
def test_workspaces_are_those_of_the_device(cluster: str | None, mib: float) -> None:
    assert Allocator.of(None, cluster).workspaces[0] == mib * MIB


def test_the_catalog_knows_compute_capabilities() -> None:
    wanted = {
        "T4": (7, 5),
        "A100-40GB": (8, 0),
        "L4": (8, 9),
        "H200": (9, 0),
        "B200": (10, 0),
        "RTX-5090": (12, 0),
        "MI300X": None,
    }
    assert {name: device_named(name, catalog()).capability for name in wanted} == wanted


# -- where it is asked for ----------------------------------------------------------------------------------------------


def test_what_is_on_the_cpu_is_not_reserved() -> None:
    found = gp.trace(net).memory(training(), tier="T2")
    assert found.reserved == {phase: {} for phase in found.by_device}
    assert any("nothing is on a CUDA device" in note for note in found.notes)
    assert "reserved" not in str(found).splitlines()[0]


def test_the_closed_form_says_it_too_where_it_is_asked_for() -> None:
    plan = gp.trace(net).to("cuda")
    assert plan.memory(training()).reserved == {} and plan.memory(training()).allocator is None
    found = plan.memory(training(), allocator="expandable_segments:True")
    assert found.tier == "T0" and found.reserved["step"]["cuda:0"].requested == found.by_device["step"]["cuda:0"]
    assert found.reserved["step"]["cuda:0"].reserved >= found.reserved["step"]["cuda:0"].active
    assert "cuda:0, reserved" in str(found)


def test_ranks_have_it_each() -> None:
    plan = gp.trace(net).to("cuda").shard({"dp": 3})
    found = plan.memory(training(), allocator="")
    sizes = [found.rank(rank).reserved["step"]["cuda:0"].requested for rank in range(3)]
    assert sizes == [found.rank(rank).by_device["step"]["cuda:0"] for rank in range(3)] and sizes[0] > sizes[2]


def test_ranks_that_run_have_it_each() -> None:
    plan = gp.trace(net).to("cuda").shard({"dp": 3})
    found = plan.memory(training(), tier="T2", cluster="A100-80GB")
    assert found.tier == found.rank(2).tier == "T2" and found.rank(2).run != found.run
    streams = {each.stream for each in run_of(found).allocations}
    assert len(streams) > 1, "what is gathered comes from another stream's pool"
    for rank in (0, 2):
        memory = found.rank(rank)
        usage = memory.reserved["step"]["cuda:0"]
        assert usage.requested == memory.by_device["step"]["cuda:0"] + sum(Allocator.of(None, "A100-80GB").workspaces)
    assert found.rank(2).reserved["step"]["cuda:0"].requested < found.reserved["step"]["cuda:0"].requested


def test_it_is_shown() -> None:
    found = memory()
    head, *rows = str(found).splitlines()
    assert "cuda:0, active" in head and "cuda:0, reserved" in head
    assert len({len(row) for row in rows[: len(found.phases)]}) == 1
    data = json.loads(json.dumps(found.to_json()))
    assert data["reserved"]["step"]["cuda:0"]["reserved"] == found.reserved["step"]["cuda:0"].reserved
    assert data["allocator"] == {"settings": "torch's defaults", "workspaces": [8_519_680, MIB] * HANDLES}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tier": "T3"}, ["tier='T3'", '"T2"']),
        ({"tier": "T2", "workload": None}, ['tier="T2"', "gp.Training"]),
        ({"tier": "T1", "allocator": "expandable_segments:True"}, ['tier="T2"', "expandable_segments"]),
        ({"tier": "T2", "allocator": "expandible_segments:True"}, ["expandible_segments", "expandable_segments"]),
        ({"tier": "T2", "cluster": "8xH10O"}, ["8xH10O"]),
        ({"tier": "T0", "cluster": "8xH10O"}, ["8xH10O"]),
    ],
)
def test_what_cannot_be_asked_for(arguments: dict[str, object], parts: list[str]) -> None:
    with pytest.raises((DecisionError, AllocatorError)) as raised:
        gp.trace(net).to("cuda").memory(**{"workload": training(), **arguments})  # type: ignore[arg-type]
    assert all(part in str(raised.value) for part in parts), raised.value


def test_serving_under_axes_that_are_not_carried_out_is_not_run() -> None:
    plan = gp.trace(net).to("cuda").shard({"pp": 2}, microbatches=2)
    with pytest.raises(DecisionError, match=r'not pp=2.*tier="T0"'):
        plan.memory(gp.Inference(inputs=(torch.ones(4, 512),)), tier="T1")


# -- whether it fits ----------------------------------------------------------------------------------------------------


def scaled(run: Timeline, factor: int) -> Timeline:
    return replace(run, allocations=tuple(replace(each, nbytes=each.nbytes * factor) for each in run.allocations))


@pytest.fixture(scope="module")
def large() -> Memory:
    """A run of gigabytes, of which the allocator reserves more than there is at any moment."""
    plan, run = gp.trace(net).to("cuda"), scaled(run_of(memory()), 400)
    from groundplan.planner.estimate import memory_of_run
    from groundplan.planner.reserved import with_reserved

    found = memory_of_run(plan.graph, plan.decisions, training(), run)
    return replace(with_reserved(found, Allocator()), left_out=())


def sizes(found: Memory) -> Iterator[int]:
    """Bytes of a device that is too small for what is reserved without a limit, one after the other."""
    most = max(devices["cuda:0"].reserved for devices in found.reserved.values() if "cuda:0" in devices)
    yield from range(most + 10**9, found.peak, -(200 * MIB))


def test_reserved_bytes_count_where_they_are_known(large: Memory) -> None:
    room = large.fits("80GB").binding
    most = max(devices["cuda:0"].reserved for devices in large.reserved.values())
    assert room.needed == most + room.added["CUDA context"] and "workspaces" not in room.added
    assert room.added["reserved beyond them"] == most - room.tensors > 0
    assert any("caching allocator reserves counts" in note for note in large.fits("80GB").notes)
    assert "reserved beyond them" in room.describe() and large.fits("80GB").verdict == "fits"


def test_a_cache_that_has_to_be_freed_is_tight_and_what_does_not_help_does_not_fit(large: Memory) -> None:
    words = []
    for usable in sizes(large):
        room = large.fits(gp.Cluster(devices=(catalog()["l4"].model_copy(update={"memory": usable}),)), margin=0).rooms[0]
        words.append((room.verdict, bool(room.retries)))
        if room.retries:
            assert room.left >= 0 and "is freed" in room.describe()
    assert words[0] == ("fits", False) and words[-1] == ("does not fit", False)
    assert ("tight", True) in words, "between, less is enough if what is cached is given back"
    order = ["fits", "tight", "does not fit"]
    assert [order.index(word) for word, _ in words] == sorted(order.index(word) for word, _ in words)


def test_a_replay_on_a_device_that_is_too_small_says_so() -> None:
    run = Timeline((Allocation("activation", 30 * MIB, "cuda:0"),), (Moment(STEP, 0, True),))
    found = replay_run(run, Allocator(AllocatorConfig()), Device(total=20 * MIB))
    assert found.out_of_memory is not None and found.out_of_memory.nbytes == 30 * MIB and found.retries == 1
