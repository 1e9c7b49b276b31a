"""The closed form with activations and communication: held against runs of the same step, and against itself by hand."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.activity import activity
from groundplan.planner.allocations import Allocation
from groundplan.planner.changes import Change, Changes
from groundplan.planner.estimate import RESERVED
from groundplan.planner.fsdp_form import Fsdp, Part, Unit, with_fsdp
from groundplan.planner.profile import Block, Event, Mark, Profile, Stretch, stretch
from groundplan.planner.step_form import Extra, Script, between, held_at, peak_of, plain
from groundplan.planner.verdict import MARGIN, Room
from groundplan.runtime import profiling
from groundplan.runtime.profiles import profile_of
from groundplan.runtime.skipped_layers import Run, flattened, rebuilt, runs_of

from .closed_form import CONFIGURATIONS, DEEP, PHASES, Configuration, errors, inputs_of
from .measured_steps import plain_kernels


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


def profile_for(plan: gp.Plan, training: gp.Training) -> Profile:
    found = profile_of(plan._bound, plan.decisions, training)
    assert isinstance(found, Profile), found
    return found


# -- against runs -------------------------------------------------------------------------------------------------------


def compared(configuration: Configuration) -> tuple[gp.Memory, gp.Memory]:
    plan, training = configuration.plan(), configuration.workload()
    closed = plan.memory(training)
    return closed, plan.memory(training, tier="T1")


def check_no_wrong_fits(closed: gp.Memory, run: gp.Memory, source: random.Random) -> None:
    """Where the closed form says "fits" of memory near the peak, the run has room."""
    said = set()
    for usable in (int(run.peak * source.uniform(0.8, 1.6)) for _ in range(50)):
        room = Room("", closed.binding.phase, closed.peak, {}, int(MARGIN * closed.peak) + 1, usable)
        said.add(room.verdict)
        assert room.verdict != "fits" or run.peak <= usable
    assert {"fits", "does not fit"} <= said


SAMPLE = CONFIGURATIONS[:10]


@pytest.mark.parametrize("configuration", SAMPLE, ids=str)
def test_the_closed_form_is_what_a_run_takes(configuration: Configuration) -> None:
    closed, run = compared(configuration)
    assert closed.left_out == tuple(each for each in run.left_out if each != RESERVED)
    assert all(abs(error) < 0.02 for error in errors(closed, run).values()), errors(closed, run)
    check_no_wrong_fits(closed, run, random.Random(str(configuration)))


@pytest.mark.conformance
def test_so_it_is_in_two_hundred_configurations() -> None:
    found = []
    for configuration in CONFIGURATIONS:
        closed, run = compared(configuration)
        found += [abs(error) for error in errors(closed, run).values()]
        check_no_wrong_fits(closed, run, random.Random(str(configuration)))
    assert statistics.median(found) <= 0.03 and max(found) <= 0.10


# -- layers that stand for others ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Llama", "T5", "Gemma 3", "nn.Transformer"])
def test_skipped_layers_take_what_they_take_when_they_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = gp.Training(inputs=inputs_of(model, 2, 16), checkpointing="none")
    skipping = profile_for(gp.trace(DEEP[model]), training)
    monkeypatch.setattr(profiling, "runs_of", lambda *_: [])
    running = profile_for(gp.trace(DEEP[model]), training)
    assert max(block.times for block in skipping.blocks) > 1 and max(block.times for block in running.blocks) == 1
    assert len(skipping.allocations) < len(running.allocations)
    assert peak_of(plain(skipping)).nbytes == peak_of(plain(running)).nbytes
    assert skipping.gradients == running.gradients
    for added in (False, True):
        held = [held_at(each, plain(each), peak_of(plain(each), added), added) for each in (skipping, running)]
        assert sum(each.nbytes for each in held[0]) == peak_of(plain(skipping), added).nbytes
        kinds = [{kind: sum(each.nbytes for each in found if each.kind == kind) for kind, _, _ in found} for found in held]
        assert kinds[0] == kinds[1]


class Glued(nn.Module):
    """Layers that a loop calls with what `between` makes of the state."""

    def __init__(self, between: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(8))
        self.between = between

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = self.between(layer(value))
        return value


BETWEEN: list[Any] = [torch.tanh, torch.relu_]


@pytest.mark.parametrize("between", BETWEEN, ids=["tanh", "relu_"])
def test_layers_that_cannot_be_skipped_are_run(between: Callable[[torch.Tensor], torch.Tensor]) -> None:
    plan, training = gp.trace(Glued, between), gp.Training("sgd", inputs=(torch.ones(64, 8),))
    assert plan.memory(training).phases["step"] == plan.memory(training, tier="T1").phases["step"]


def test_alike_are_layers_of_one_kind_in_a_row() -> None:
    layers = [nn.Linear(4, 4) for _ in range(9)]
    layers[4] = nn.Linear(4, 4, bias=False)
    assert runs_of(nn.Sequential(*layers)) == []
    assert runs_of(nn.Sequential(*layers[:3], *layers[5:])) == [Run(tuple(map(str, range(7))), 1)]
    mixed = [module for _ in range(6) for module in (nn.Linear(4, 4), nn.Dropout(0.1), nn.ReLU())]
    assert runs_of(nn.ModuleList(mixed)) == [Run(tuple(map(str, range(18))), 3)]


def test_what_is_taken_apart_is_put_together() -> None:
    value: Any = ("a", [1, {"b": None, "c": (2.0,)}], {})
    leaves, shape = flattened(value)
    assert leaves == ["a", 1, None, 2.0] and rebuilt(shape, iter(leaves)) == value


# -- one profile for many plans -----------------------------------------------------------------------------------------


def test_plans_that_do_the_same_share_a_profile() -> None:
    plan, inputs = gp.trace(DEEP["Llama"]), inputs_of("Llama", 2, 16)
    sharded = [plan.shard({"dp": size}, compute_dtype=torch.bfloat16, reshard=size > 2) for size in (2, 4, 64)]
    found = [profile_for(each, gp.Training(name, inputs=inputs)) for each in sharded for name in ("sgd", "adamw")]
    assert len({id(each) for each in found}) == 1
    others = [gp.Training(inputs=inputs, checkpointing="full"), gp.Training(inputs=inputs_of("Llama", 1, 16))]
    assert len({id(profile_for(sharded[0], each)) for each in (*others, gp.Training(inputs=inputs))}) == 3


# -- what cannot be known -----------------------------------------------------------------------------------------------


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: torch.Tensor) -> Any:
        found = self.linear(value)
        return found if found.sum() > 0 else -found


class Failing(Looking):
    def forward(self, value: torch.Tensor) -> Any:
        raise KeyError("mine")


@pytest.mark.parametrize(
    ("plan", "training", "reason"),
    [
        (lambda: gp.trace(DEEP["Llama"]), gp.Training(), "say how long: seq_len="),
        (lambda: gp.trace(nn.Bilinear, 2, 3, 4), gp.Training(), "say inputs="),
        (lambda: gp.trace(Looking), gp.Training(), "looks at values"),
        (lambda: gp.trace(Failing), gp.Training(), "KeyError: 'mine'"),
        (lambda: gp.trace(nn.Linear, 3, 4).place({"*": "cpu"}), gp.Training(), "places tensors"),
    ],
    ids=["length", "inputs", "values", "own", "placed"],
)
def test_without_a_profile_activations_are_left_out(plan: Callable[[], gp.Plan], training: gp.Training, reason: str) -> None:
    found = plan().memory(training)
    assert "activations" in found.left_out
    assert any("activations" in note and reason in note.replace("(", ".") for note in found.notes), found.notes
    assert found.phases["optimizer"] > 0


# -- by hand ------------------------------------------------------------------------------------------------------------

SAVED, GRADIENT, PASSING = (
    Allocation("activation", 100, "cpu", module="layers.1", op="mm"),
    Allocation("gradient", 7, "cpu", "layers.1.weight"),
    Allocation("temporary", 30, "cpu", op="add"),
)
ALL = (SAVED, GRADIENT, PASSING)


def one(*events: Event) -> Stretch:
    return stretch(list(events), ALL)


def test_a_peak_among_blocks_that_repeat() -> None:
    forward = Block(5, (one(Event(0, 1), Event(2, 1), Event(2, -1)),))
    backward = Block(5, (one(Event(1, 1), Event(2, 1), Event(2, -1), Event(0, -1)),))
    profile = Profile(ALL, (forward, backward), ())
    peak = peak_of(plain(profile))
    assert peak.nbytes == 5 * 100 + 7 + 30
    held = {each.kind: each.nbytes for each in held_at(profile, plain(profile), peak)}
    assert held == {"activation": 500, "gradient": 7, "temporary": 30}
    gradients = Changes.of([Change("cpu", "weight", 35)])
    changes = activity(profile, gradients, "cpu")
    assert sum(change.nbytes for change in changes) == 35


def test_gradients_that_are_added_go_at_once() -> None:
    profile = Profile(ALL, (Block(3, (one(Event(1, 1)),)),), ())
    assert peak_of(plain(profile)).nbytes == 21 and peak_of(plain(profile), added=True).nbytes == 7


Pairs = list[tuple[int, int]]
pairs = st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 2, -1])), max_size=4)
drawn_blocks = st.lists(st.tuples(st.integers(1, 4), st.lists(pairs, max_size=3)), max_size=4)


@settings(max_examples=200, deadline=None)
@given(drawn_blocks, st.booleans())
def test_sums_are_those_of_every_time_by_itself(drawn: list[tuple[int, list[Pairs]]], added: bool) -> None:
    blocks = tuple(Block(times, tuple(one(*(Event(*pair) for pair in events)) for events in parts)) for times, parts in drawn)
    profile = Profile(ALL, blocks, ())
    now = most = 0
    for block in blocks:
        for _ in range(block.times):
            for part in block.parts:
                for event in part.events:  # type: ignore[union-attr]
                    each = ALL[event.allocation]
                    now += event.count * each.nbytes
                    most = max(most, now)
                    now -= event.count * each.nbytes if added and each.kind == "gradient" else 0
    assert peak_of(plain(profile), added).nbytes == most


def test_extras_count_between_stretches() -> None:
    profile = Profile(ALL, (), ())
    come, go = Extra("communication buffer", "unit", 50), Extra("communication buffer", "unit", 50, -1)
    scripts = [Script(2, (between([come], profile), one(Event(2, 1), Event(2, -1)), between([go, come, go], profile)))]
    peak = peak_of(scripts)
    assert peak.nbytes == 80
    assert {each.kind: each.nbytes for each in held_at(profile, scripts, peak)} == {"communication buffer": 50, "temporary": 30}


def unit(name: str, numel: int, reshard: bool | int = True) -> Unit:
    return Unit(name, (Part(f"{name}.weight".lstrip("."), numel, 4, 2),), reshard)


def fsdp_step(
    reshard: bool | int = True, reduce_itemsize: int | None = 4, copies: int = 1, whole: bool | int | None = None
) -> list[str]:
    """What comes and goes in a step of a unit inside a whole, over 4 ranks: +- bytes with the first letters of their kinds.

    The whole reshards as the unit does, if `whole` is None.
    """
    around = reshard if whole is None else whole
    turns = [
        *(Mark("forward", ""), Mark("forward", "a"), Mark("forward ends", "a"), Mark("forward ends", "")),
        *(Mark("backward", ""), Mark("backward", "a"), Mark("backward ends", "a"), Mark("backward ends", "")),
    ]
    gradient = Allocation("gradient", 800, "cuda:0", "a.weight")
    parts: list[Mark | Stretch] = [*turns[:6], stretch([Event(0, 1)], (gradient,)), *turns[6:]]
    profile = Profile((gradient,), (Block(1, tuple(parts)),), (), early=frozenset({"a"}))
    fsdp = Fsdp({"": unit("", 10, around), "a": unit("a", 100, reshard)}, 4, reduce_itemsize, copies)
    (script,) = with_fsdp(profile, fsdp)
    steps = [step for part in script.parts if not isinstance(part, Stretch) for step in part.steps]
    return [f"{step.count * step.nbytes:+}{step.kind[0]}" if isinstance(step, Extra) else f"{step.count}g" for step in steps]


GATHERED = ["+20c", "+80c", "-20c", "+80g"]  # the part in the dtype that it is gathered in, the buffer, the whole parameters
FORWARD = ["+200c", "+800c", "-200c", "-80c", "+800g"]  # what the unit before was gathered into goes when this one is
BACKWARD = ["+200c", "+800c", "-200c", "+800g", "-800c"]
REDUCED = ["-800g", "+1600c", "-1g", "+400c", "-400c", "+400g"]


def test_fsdp_by_hand() -> None:
    again = ["-80g", "-800c", *GATHERED, "-80c"]  # the end of the forward of the whole, and its backward
    assert fsdp_step() == [*GATHERED, *FORWARD, "-800g", *again, *BACKWARD, *REDUCED, "-80g", "-1600c"]


def test_fsdp_keeps_what_it_is_told_to() -> None:
    assert fsdp_step(reshard=False) == [*GATHERED, *FORWARD, "-800c", *REDUCED, "-80g", "-1600c"]
    half = ["+40g", "-80g", "-800c", "+40c", "+80c", "-40c", "+80g", "-40g", "-80c", "+400c", "+800c", "-400c", "+800g", "-400g"]
    assert fsdp_step(reshard=2) == [*GATHERED, *FORWARD, "+400g", "-800g", *half, "-800c", *REDUCED, "-80g", "-1600c"]
    assert fsdp_step(False, whole=True) == [*GATHERED, *FORWARD, "-80g", "-800c", *GATHERED, "-80c", *REDUCED, "-80g", "-1600c"]
    assert fsdp_step(True, whole=False) == [*GATHERED, *FORWARD, "-800g", "-800c", *BACKWARD, *REDUCED, "-80g", "-1600c"]
    assert fsdp_step(copies=2, reduce_itemsize=2)[-6:] == ["+400c", "-400c", "+400g", "-80g", "-800c", "-200c"]


def test_the_phases_are_all_there() -> None:
    assert set(PHASES) <= set(gp.trace(nn.Linear, 3, 4).memory(gp.Training()).phases)


# -- several axes -------------------------------------------------------------------------------------------------------


class Spare(nn.Module):
    """Layers that are divided by columns and by rows, with a bias that is not, and a parameter that gets no gradient."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
            self.unused = nn.Parameter(torch.ones(5))

        def forward(self, value: torch.Tensor) -> Any:
            return self.down(torch.relu(self.up(value)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Spare.Layer() for _ in range(4))

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = layer(value)
        return value


SPARE_RULES = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
DIVIDED: list[tuple[dict[str, int], dict[str, Any]]] = [({"tp": 2}, {}), ({"pp": 2, "tp": 2}, {"microbatches": 2})]


@pytest.mark.parametrize(("axes", "options"), DIVIDED, ids=["tp", "pp and tp"])
def test_dtensors_beside_whole_tensors_are_stepped_one_by_one(axes: dict[str, int], options: dict[str, Any]) -> None:
    plan = gp.trace(Spare).to("cuda").shard(axes, tensor=SPARE_RULES, **options)

    def step(implementation: Any) -> gp.Memory:
        return plan.memory(gp.Training("adamw", inputs=(torch.ones(4, 8),), implementation=implementation))

    assert not step(None).left_out
    assert step(None).by_device == step("for-loop").by_device
    for implementation in ("foreach", "fused"):
        with pytest.raises(gp.DecisionError, match=f"implementation='{implementation}' .* say implementation=\"for-loop\""):
            step(implementation)


@pytest.mark.parametrize(("axes", "options"), [({"dp": 1}, {}), ({"pp": 2}, {"microbatches": 2})], ids=["dp", "pp"])
def test_what_gets_no_gradient_has_no_state(axes: dict[str, int], options: dict[str, Any]) -> None:
    plan = gp.trace(Spare).shard(axes, **options)
    found = plan.memory(gp.Training("adamw", inputs=(torch.ones(4, 8),)))
    assert not found.left_out
    layer = (8 * 16 + 16 + 16 * 8 + 8) * 8 + 4 * 4  # moments, and four counts of steps
    assert found.phases["step"] - found.phases["first_step"] == 4 // axes.get("pp", 1) * layer


def test_an_expert_axis_adds_no_ranks_to_look_at() -> None:
    plan = gp.trace(DEEP["Mixtral"]).shard({"dp": 64, "ep": 4})
    assert [each for found in plan.report().rank_classes for each in found.ranks] == [0, 63]
