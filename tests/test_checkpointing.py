"""What a plan checkpoints runs again in the backward, and nothing else of the module changes; what it takes is known before."""

from __future__ import annotations

import copy
import gc
import io
import random
import statistics
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.checkpointing import CheckpointRule, checkpoint_rules, levels_of
from groundplan.planner.plan_file import load_decisions
from groundplan.planner.profile import Profile
from groundplan.planner.sharding import matches, repeated_layers
from groundplan.runtime.profiles import profile_of

from . import checkpointing_ranks, jobs
from .checkpointed import MODELS, different, encoder, llama, step, tokens, values
from .closed_form import DEEP, errors, inputs_of
from .measured_steps import measured_peaks, plain_kernels

BF16 = torch.bfloat16
Levels = dict[str, Any]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


def planned(model: str, levels: Levels | None = None) -> gp.Plan:
    plan = gp.trace(MODELS[model].build)
    return plan if levels is None else plan.checkpoint_activations(levels)


def training(model: str, **options: Any) -> gp.Training:
    return gp.Training(**{"optimizer": "sgd", "inputs": MODELS[model].inputs, "implementation": "for-loop", **options})


# -- what is built ------------------------------------------------------------------------------------------------------

MIXED: dict[str, Levels] = {
    "Llama": {"model.layers.0-1": "full", "model.layers.2": "selective"},
    "T5": {"decoder.block.0-1": "full", "decoder.block.2": "selective", "encoder.block.*": "selective"},
    "encoder": {"layers.1": "none", "layers.0-2": "full"},
}
RUNS = {"Llama": [2, 2, 2, 1], "T5": [2, 2, 2, 1], "encoder": [2, 1, 2, 1]}


@pytest.mark.parametrize("model", MIXED)
def test_the_layers_run_again_and_nothing_else_changes(model: str) -> None:
    """Losses, gradients, names and the random stream, with dropout.

    Of T5's encoder, whose output all decoder layers take, autograd adds gradients up in another order, as it does with
    transformers' own switch.
    """
    plain = step(planned(model).materialize(seed=0), MODELS[model])
    found = step(planned(model, MIXED[model]).materialize(seed=0), MODELS[model])
    assert plain["runs"] == [1, 1, 1, 1] and found["runs"] == RUNS[model]
    assert not different(plain, found, rounding=1e-5 if model == "T5" else 0.0)


@pytest.mark.parametrize("door", ["keyed", "checkpoint", "meta module", "copy", "pickle"])
@pytest.mark.parametrize("model", ["Llama", "encoder"])
def test_every_door_leads_there(model: str, door: str, tmp_path: Path) -> None:
    plan, plain = planned(model, MIXED[model]), step(planned(model).materialize(seed=0), MODELS[model])
    found: Any
    if door == "keyed":
        found = plan.materialize(seed=0, rng="keyed")
        plain = step(planned(model).materialize(seed=0, rng="keyed"), MODELS[model])
    elif door == "checkpoint":
        planned(model).save_checkpoint(0, tmp_path / "initial.safetensors")
        found = plan.materialize(checkpoint=tmp_path / "initial.safetensors")
    elif door == "meta module":
        found = gp.materialize(plan.meta_module(), seed=0)
    else:
        found = _again(plan.materialize(seed=0), door)
    stepped = step(found, MODELS[model])
    assert stepped["runs"] == RUNS[model] and not different(plain, stepped)


def _again(module: nn.Module, door: str) -> Any:
    """A copy, after which the original is of no use."""
    if door == "copy":
        found = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        found = torch.load(file, weights_only=False)
    for parameter in module.parameters():
        parameter.data = torch.full_like(parameter, torch.nan)
    return found


def test_parts_of_layers_and_a_whole_model_run_again() -> None:
    plain = step(planned("Llama").materialize(seed=0), MODELS["Llama"])
    for levels in ({"model.layers.*.self_attn": "selective", "model.layers.*.mlp": "full"}, {"model": "full", "lm_head": "full"}):
        found = step(planned("Llama", levels).materialize(seed=0), MODELS["Llama"])
        assert found["runs"] == [2, 2, 2, 2]
        assert not different(plain, found)


def test_what_returns_several_modules_is_checkpointed_by_their_names() -> None:
    plan = gp.trace(lambda: {"one": encoder(), "other": encoder()}).checkpoint_activations({"other.layers.*": "full"})
    built = plan.materialize(seed=0)
    assert step(built["one"], MODELS["encoder"])["runs"] == [1, 1, 1, 1]
    assert step(built["other"], MODELS["encoder"])["runs"] == [2, 2, 2, 2]


def test_a_module_that_nobody_holds_is_gone_at_once() -> None:
    module = planned("encoder", {"layers.*": "full"}).materialize(seed=0)
    layer = weakref.ref(module.layers[0])
    gc.disable()
    try:
        del module
        assert layer() is None
    finally:
        gc.enable()


def test_a_compiled_module_runs_again_as_well() -> None:
    module = planned("encoder", {"layers.*": "full"}).materialize(seed=0)
    plain = planned("encoder").materialize(seed=0).eval()
    compiled = torch.compile(module.eval(), backend="eager")
    for each in (compiled, plain):
        each(values()).square().mean().backward()
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (module, plain)]
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True) if one is not None)


# -- transformers -------------------------------------------------------------------------------------------------------


def test_a_layer_of_transformers_does_it_itself_and_trains_without_a_cache() -> None:
    plan = planned("Llama", {"model.layers.0": "full"})
    module = plan.materialize(seed=0)
    assert all("forward" not in vars(layer) for layer in module.model.layers)
    assert [layer.gradient_checkpointing for layer in module.model.layers] == [True, False, False, False]
    assert module.train()(input_ids=tokens()).cache is None
    plain = planned("Llama").materialize(seed=0)
    generated = [each.eval().generate(tokens(), max_new_tokens=4, do_sample=False) for each in (module, plain)]
    assert torch.equal(*generated) and module(input_ids=tokens()).cache is not None


def test_a_cache_that_would_be_written_to_twice_is_refused() -> None:
    import transformers

    module = planned("Llama", {"model.layers.*.self_attn": "full"}).materialize(seed=0).train()
    with pytest.raises(gp.GroundplanError, match=r"LlamaAttention is given a cache.*use_cache=False"):
        module(input_ids=tokens(), cache=transformers.DynamicCache())


# -- what it takes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "layers"), [("Llama", "model.layers"), ("encoder", "layers")])
def test_more_checkpointing_takes_less(model: str, layers: str) -> None:
    """By the profiler's memory events of real steps, which T1 knows to the byte and T0 within 3 %."""
    found: list[int] = []
    chosen: list[Levels | None] = [None, {f"{layers}.0": "full"}, {f"{layers}.*": "selective"}, {f"{layers}.*": "full"}]
    for levels in chosen:
        plan, workload = planned(model, levels), training(model)
        measured, run = measured_peaks(plan, workload), plan.memory(workload, tier="T1")
        assert all(measured[phase] == run.phases[phase] for phase in ("first_step", "step", "optimizer"))
        assert all(abs(error) < 0.03 for error in errors(plan.memory(workload), run).values())
        found.append(measured["step"])
    none, one, selective, full = found
    assert none > one > selective >= full
    assert selective > full or model == "encoder"  # whose products have biases, so that all of them run again


def test_a_verification_measures_what_the_plan_checkpoints() -> None:
    found = planned("encoder", {"layers.0-1": "full", "layers.2": "selective"}).verify(training("encoder"), seed=0)
    assert all(found.check(phase).difference == 0 for phase in ("first_step", "step", "optimizer"))


DEEP_RULES: list[tuple[str, Levels, dict[str, Any]]] = [
    ("deep Llama", {"model.layers.0-5": "full", "model.layers.7-11": "selective"}, {}),
    ("deep Llama", {"model.layers.6-11": "full"}, {"reshard": {"model.layers.0-5": False, "": False}, "compute_dtype": BF16}),
    ("deep encoder", {"layers.0-6": "selective"}, {"reshard": {"layers.7-11": 2, "*": False}}),
]


@pytest.mark.parametrize(("model", "levels", "options"), DEEP_RULES)
def test_layers_stand_for_those_that_are_treated_alike(model: str, levels: Levels, options: dict[str, Any]) -> None:
    plan, workload = gp.trace(MODELS[model].build), training(model)
    plan = plan.checkpoint_activations(levels) if levels else plan
    plan = plan.shard({"dp": 4}, **options) if options else plan
    found = profile_of(plan._bound, plan.decisions, workload)
    assert isinstance(found, Profile) and max(block.times for block in found.blocks) > 1 and len(found.repeated) > 1
    assert all(abs(error) < 0.01 for error in errors(plan.memory(workload), plan.memory(workload, tier="T1")).values())


def test_plans_share_a_profile_where_the_same_layers_are_treated_alike() -> None:
    plan, workload = gp.trace(MODELS["encoder"].build), training("encoder")

    def found(levels: Levels | None = None, **options: Any) -> Any:
        chosen = plan.checkpoint_activations(levels) if levels else plan
        chosen = chosen.shard({"dp": 4}, **options)
        return profile_of(chosen._bound, chosen.decisions, workload)

    first = found(reshard={"layers.0-1": False, "*": True})
    assert found(reshard={"layers.0-1": True, "*": 2}) is first and found(reshard={"layers.2-3": False}) is first
    assert found(reshard={"layers.0": False}) is not first and found() is found(reshard=False) is found(reshard={"": False})
    full = found({"layers.*": "full"})
    assert full is not found() and found({"layers.0-3": "full"}) is full and found({"layers.*": "selective"}) is not full
    assert found({"layers.*": "none"}) is found()


def test_the_closed_form_says_where_it_does_not_know() -> None:
    plan = planned("Llama", {"model": "full"}).shard({"dp": 2})
    found = plan.memory(training("Llama"))
    assert "activations" in found.left_out and any("model runs again in the backward" in note for note in found.notes)


@pytest.mark.conformance
def test_so_it_is_in_any_mixture() -> None:
    source, found = random.Random(26), []
    for _ in range(60):
        plan, workload = _drawn(source)
        found.append(max(map(abs, errors(plan.memory(workload), plan.memory(workload, tier="T1")).values())))
    assert statistics.median(found) <= 0.03 and max(found) <= 0.10


def _drawn(source: random.Random) -> tuple[gp.Plan, gp.Training]:
    model = source.choice([each for each in DEEP if each != "LSTM"])
    plan = gp.trace(DEEP[model]).to(source.choice(["cpu", "cuda"]))
    levels: Levels = {}
    reshard: dict[str, Any] = {}
    for pattern in repeated_layers(plan.graph):
        parent, count = pattern.removesuffix("*"), sum(matches(pattern, each.name) for each in plan.graph.modules)
        for rules, known in ((levels, ["full", "selective"]), (reshard, [True, False, 2])):
            first = source.randrange(count)
            rules[f"{parent}{first}-{source.randrange(first, count)}"] = source.choice(known)
    sharded = plan.checkpoint_activations(levels).shard({"dp": 8}, reshard=reshard | {"": False}, compute_dtype=BF16)
    chosen = source.choice([plan.checkpoint_activations(levels), sharded])
    return chosen, gp.Training("adamw", inputs=inputs_of(model, 2, source.choice([8, 32])), accumulate=source.choice([1, 2]))


# -- ranks --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return jobs.launch("tests.checkpointing_ranks", tmp_path_factory.mktemp("ranks"), world=checkpointing_ranks.WORLD)


@pytest.mark.parametrize(
    ("case", "runs", "whole"),
    [
        ("Llama", [2, 2, 2, 1], ["2"]),
        ("encoder", [2, 2, 2, 1], ["0", "1"]),
        ("units inside", [2, 2, 2, 2], []),
        ("tensor", [2, 2, 2, 2], []),
        ("replicated", [1, 2, 2, 2], ["0", "1", "2", "3"]),
    ],
)
def test_real_ranks_do_what_the_plan_says(ranks: list[dict[str, Any]], case: str, runs: list[int], whole: list[str]) -> None:
    """Gradients are those of the plan without, to the bit; layers that are not resharded are whole after the forward."""
    for found in (each[case] for each in ranks):
        assert "error" not in found, found["error"]
        assert found["different"] == [] and found["runs"] == runs and found["whole"] == whole
        assert found.get("different by hand", []) == [] and found.get("runs by hand", runs) == runs


# -- the decision -------------------------------------------------------------------------------------------------------


def test_the_first_match_decides() -> None:
    graph = planned("encoder").graph
    rules = checkpoint_rules({"layers.1": "none", "layers.0-2": "full", "layers.*": "selective"}, graph)
    assert rules[1] == CheckpointRule(pattern="layers.0-2", level="full")
    assert levels_of(rules, graph) == {"layers.0": "full", "layers.2": "full", "layers.3": "selective"}
    assert planned("encoder", {"layers.0": "full"}).checkpoint_activations({"layers.1": "full"}).decisions.checkpointing == (
        CheckpointRule(pattern="layers.1", level="full"),
    )


def test_the_same_can_be_said_of_a_trace_again() -> None:
    plan = planned("encoder")
    one, other = (plan.checkpoint_activations({"layers.0-2": "full"}) for _ in range(2))
    assert one.decisions == other.decisions and "layers.{0-2}: keep" in str(other.explain())


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(4, 4)
        self.rest = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, value: torch.Tensor) -> Any:
        return self.rest(self.second(self.first(value)))


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ({}, "says nothing"),
        ({"first": "all"}, "known: none, selective, full"),
        ({3: "full"}, "3 is no pattern"),
        ({"frist": "full"}, "matches no module that holds parameters.*did you mean first"),
        ({"rest.1": "full"}, "matches no module that holds parameters"),
        ({"rest": "full", "rest.*": "full"}, "rest.0, by 'rest.\\*', lies within rest"),
        ({"rest.*": "full", "rest.0": "none"}, "decided by 'rest.\\*' before it"),
        ({"first": "full", "second": "selective"}, "shared module cannot be checkpointed by two levels"),
    ],
)
def test_rules_that_do_not_fit_are_refused(levels: Any, says: str) -> None:
    with pytest.raises(gp.GroundplanError, match=says):
        gp.trace(Shared).checkpoint_activations(levels)


def test_a_list_is_never_called() -> None:
    with pytest.raises(gp.GroundplanError, match=r"model.layers, a .*ModuleList.*say 'model.layers.\*'"):
        planned("Llama", {"model.layers": "full"})


def test_a_scripted_module_cannot_be_wrapped() -> None:
    plan = gp.trace(lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.Linear(4, 4)))
    with pytest.raises(gp.GroundplanError, match=r"0 is compiled by torch\.jit\.script"):
        plan.checkpoint_activations({"0": "full"}).materialize(seed=0)


def test_inference_has_no_backward() -> None:
    plan = gp.trace(nn.Linear, 3, 4)
    with pytest.raises(gp.GroundplanError, match=r"plan\.place builds for inference"):
        gp.trace(Shared).checkpoint_activations({"first": "full"}).place({"*": "cpu"})
    with pytest.raises(gp.GroundplanError, match=r"leave out \.place"):
        gp.trace(Shared).place({"*": "cpu"}).checkpoint_activations({"first": "full"})
    with pytest.raises(gp.GroundplanError, match="matches no module"):
        plan.checkpoint_activations({"weight": "full"})


def test_only_one_of_plan_and_workload_says_it() -> None:
    plan, workload = planned("encoder", {"layers.*": "full"}), training("encoder", checkpointing="full")
    for ask in (plan.memory, plan.report, plan.verify, lambda each: plan.memory(each, tier="T1")):
        with pytest.raises(gp.GroundplanError, match="leave one of the two out"):
            ask(workload)
    assert plan.memory(training("encoder")).phases == planned("encoder").memory(workload).phases


def test_the_plan_knows_and_says_it(tmp_path: Path) -> None:
    plan = planned("encoder", {"layers.0-2": "full", "layers.3": "selective"})
    plan = plan.shard({"dp": 4}, reshard={"layers.0": False, "": 2, "*": True})
    plan.save(tmp_path / "plan.json")
    bound = gp.Plan.load(tmp_path / "plan.json").bind(MODELS["encoder"].build)
    assert bound.decisions == plan.decisions
    for shown in (str(plan.explain()), str(bound.explain())):
        assert "layers.0-2: layers.{0-2}: keep their inputs alone" in shown and "you asked for it" in shown
        assert "kept until the backward pass: layers.0" in shown and "freed after the forward pass: layers.{1-3}" in shown
        assert "kept in shares of 2 ranks after the forward pass: all else together" in shown
    report = plan.report()
    assert "checkpoint activations of layers.0-2 full, layers.3 selective" in " ".join(str(report).split())
    assert report.to_json()["checkpointing"][1] == {"pattern": "layers.3", "level": "selective"}
    with pytest.raises(gp.GroundplanError, match="another constructor"):
        gp.Plan.load(tmp_path / "plan.json").bind(llama)


def test_a_file_from_before_there_was_any_of_it_loads() -> None:
    """Written by 0.1.0 before: by another fingerprint it is not believed, but it is read."""
    decisions = load_decisions(Path(__file__).parent / "data" / "plan_before_checkpointing.json")
    assert decisions.checkpointing == () and decisions.sharding is not None and decisions.sharding.reshard_rules == ()
    assert decisions.sharding.reshard_of("encoder.layers.0") == decisions.sharding.reshard_of("") == 2


# -- what each unit does after its forward ------------------------------------------------------------------------------


def test_the_rest_is_said_by_a_star() -> None:
    sharding = planned("encoder").shard({"dp": 4}, reshard={"layers.1-2": 2, "": True, "*": False}).decisions.sharding
    assert sharding is not None and sharding.reshard is False
    assert [sharding.reshard_of(name) for name in ("layers.0", "layers.1", "layers.2", "")] == [False, 2, 2, True]


@pytest.mark.parametrize(
    ("axes", "reshard", "says"),
    [
        ({"dp": 4}, {"layers.7": True}, "matches no unit"),
        ({"dp": 4}, {"layers.*": 3}, "reshard=3 ranks"),
        ({"dp": 4}, {"layers.*": "no"}, "True, False or a number of ranks"),
        ({"dp": 4}, {"*": True, "layers.0": False}, "put it last"),
        ({"dp": 4}, {"layers.*": True, "layers.0": False}, r"decided by 'layers.\*' before it"),
        ({"ddp": 4}, {"layers.*": True}, "no axis to shard along"),
    ],
)
def test_resharding_that_does_not_fit_is_refused(axes: dict[str, int], reshard: Any, says: str) -> None:
    with pytest.raises(gp.GroundplanError, match=says):
        planned("encoder").shard(axes, reshard=reshard)
