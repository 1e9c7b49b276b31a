"""Pipeline, expert and context axes: what is refused, what is found, what every rank holds, and what is kept and said."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.check_sharding import check_axes
from groundplan.planner.exchanges import ring_attention
from groundplan.planner.experts import Expert, experts_of, found_experts
from groundplan.planner.local_parts import LocalParts, chunk, coordinate_of, distinct_ranks, expert_shape
from groundplan.planner.sharding import Axis, Sharding
from groundplan.planner.stages import counts_of, stages_of

from . import layouts
from .test_shard import RULES, Net, untied

# -- models -------------------------------------------------------------------------------------------------------------


class Stacked(nn.Module):
    """Experts as parameters with a first dim for them, as torchtitan's."""

    def __init__(self, experts: int = 8) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, 24, 16))
        self.bias = nn.Parameter(torch.empty(experts, 24))
        self.down = nn.Parameter(torch.empty(experts, 16, 24))


class Listed(nn.Module):
    """An expert for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)


class Layer(nn.Module):
    """Attention's projection, a router and experts, stacked or listed."""

    def __init__(self, listed: bool, experts: int) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16, bias=False)
        self.conv = nn.Conv1d(16, 16, 3)
        self.moe = nn.Module()
        self.moe.gate = nn.Linear(16, experts, bias=False)
        self.moe.experts = nn.ModuleList(Listed() for _ in range(experts)) if listed else Stacked(experts)


class Mixture(nn.Module):
    """A model of layers with experts, the embedding tied to the head or not."""

    def __init__(self, listed: bool = False, layers: int = 5, experts: int = 8, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("angles", torch.ones(4))
        self.layers = nn.ModuleList(Layer(listed, experts) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def listed() -> nn.Module:
    return Mixture(listed=True)


def held(memory: gp.Memory) -> int:
    """The bytes of a rank's weights, buffers included."""
    return sum(memory.by_device["checkpoint"].values())


def whole(plan: gp.Plan, kind: str = "parameter") -> int:
    return sum(tensor.nbytes for tensor in plan.graph.tensors if tensor.kind == kind)


# -- the doors ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], list[str]]] = {
    "pipeline inside": (Net, {"dp": 2, "pp": 2}, {}, ["dp, pp", "pp, dp"]),
    "context after tensor": (Net, {"tp": 2, "cp": 2}, {"tensor": RULES}, ["tp, cp", "cp, tp"]),
    "two pipelines": (Net, {"pp": 2, "pipeline": 2}, {}, ["pp, pipeline"]),
    "experts of nothing": (Mixture, {"ep": 4}, {}, ["ep=4", "1, as there is none", '"dp_shard": 4']),
    "experts of copies": (Mixture, {"ddp": 4, "ep": 4}, {}, ["ep=4", '"dp_shard": 4']),
    "experts of too few": (Mixture, {"dp": 4, "ep": 8}, {}, ["ep=8", "dp = 4"]),
    "experts that do not divide": (Mixture, {"dp": 3, "ep": 3}, {}, ["layers.0.moe.experts.up", "8 experts", "3 ranks"]),
    "no experts": (Net, {"dp": 2, "ep": 2}, {}, ['"ep"', "experts=["]),
    "experts without match": (Mixture, {"dp": 2, "ep": 2}, {"experts": "layer.*"}, ["'layer.*' match no module"]),
    "experts without axis": (Mixture, {"dp": 2}, {"experts": "layers.*.moe.experts"}, ['"ep"', "dp=2"]),
    "experts that are none": (Mixture, {"dp": 2, "ep": 2}, {"experts": "layers.*.conv"}, ["layers.0.conv.bias", "[16]"]),
    "experts under a rule": (
        listed,
        {"dp": 2, "tp": 2, "ep": 2},
        {"tensor": {"layers.*.moe.experts.*.up": "colwise"}},
        ["layers.0.moe.experts.0.up", "leave out its rule"],
    ),
    "schedule without pipeline": (Net, {"dp": 2}, {"schedule": "1f1b"}, ["schedule='1f1b'", '"pp"']),
    "microbatches without pipeline": (Net, {"dp": 2}, {"microbatches": 4}, ["microbatches=4", '"pp"']),
    "unknown schedule": (Net, {"pp": 2}, {"schedule": "1f1"}, ["'1f1'", "did you mean 1f1b"]),
    "no microbatches": (Net, {"pp": 2}, {"microbatches": 0}, ["microbatches is 0"]),
    "microbatches a boolean": (Net, {"pp": 2}, {"microbatches": True}, ["microbatches is True"]),
    "fewer microbatches than stages": (Net, {"pp": 3}, {"microbatches": 2}, ["microbatches=2", "3 stages", "1f1b"]),
    "microbatches in no rounds": (
        Mixture,
        {"pp": 2},
        {"schedule": "interleaved1f1b", "microbatches": 5},
        ["microbatches=5", "2 rounds"],
    ),
    "more stages than layers": (Net, {"pp": 4}, {}, ["3 layers", "4 stages"]),
    "no stages": (Net, {"pp": 2}, {"stages": 0}, ["stages is 0"]),
    "stages a text": (Net, {"pp": 2}, {"stages": "two"}, ["stages='two'"]),
    "stages and ranks": (Net, {"pp": 2}, {"stages": 3}, ["3 stages", "2 ranks takes 2"]),
    "stages of a rank": (Mixture, {"pp": 2}, {"stages": 3, "schedule": "interleaved1f1b"}, ["3 stages", "a multiple of 2"]),
    "layers too many": (Net, {"pp": 2}, {"stages": [2, 2]}, ["stages=[2, 2] are 4", "there are 3"]),
    "a name too much": (
        untied,
        {"pp": 2},
        {"stages": [["embed", "layer.0"], ["layers", "head"]]},
        ["stage 0 names 'layer.0'", "did you mean layers.0"],
    ),
    "a name twice": (untied, {"pp": 2}, {"stages": [["embed", "layers"], ["layers", "head"]]}, ["layers is on stage 0 and on"]),
    "a name too few": (untied, {"pp": 2}, {"stages": [["embed", "layers.0"], ["layers.1", "head"]]}, ["layers.2", "on no stage"]),
    "two lists": (layouts.transformer, {"pp": 2}, {}, ["2 lists of layers (encoder.layers.*, decoder.layers.*)", "stages=[["]),
    "no layers": (lambda: nn.Linear(3, 3), {"pp": 2}, {}, ["no layers that repeat"]),
    "sequence parallel alone": (Net, {"dp": 2}, {"sequence_parallel": True}, ["sequence_parallel=True", '"tp"']),
    "loss parallel alone": (Net, {"dp": 2}, {"loss_parallel": True}, ["loss_parallel=True", '"tp"']),
}


@pytest.mark.parametrize("kind", [kind for kind, case in REFUSED.items() if case[3]])
def test_what_cannot_be_is_refused_with_its_values(kind: str) -> None:
    build, axes, options, said = REFUSED[kind]
    with pytest.raises(gp.DecisionError) as caught:
        gp.trace(build).shard(axes, **options)
    for each in said:
        assert each in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("axes", [{"pp": 2}, {"dp": 2, "ep": 2}, {"cp": 2}, {"cp": 1}])
def test_the_runtime_says_what_it_does_not_carry_out(axes: dict[str, int]) -> None:
    plan = gp.trace(Mixture).shard(axes)
    assert plan.memory().peak > 0
    name = list(axes)[-1]
    with pytest.raises(gp.MaterializeError, match=re.escape(f"{name}={axes[name]}")) as caught:
        plan.materialize(seed=0)
    assert "not executable yet" in str(caught.value) and "meta_module" in str(caught.value)
    assert all(each.is_meta for each in plan.meta_module().parameters())


def test_sequence_and_loss_parallelism_are_not_carried_out_either() -> None:
    for option in ("sequence_parallel", "loss_parallel"):
        chosen: Any = {option: True}
        plan = gp.trace(Net).shard({"tp": 2}, tensor=RULES, **chosen)
        with pytest.raises(gp.MaterializeError, match=f"{option}=True"):
            plan.materialize(seed=0)


@pytest.mark.parametrize("axes", [{"pp": 2}, {"dp": 2, "ep": 2}, {"cp": 2}])
def test_a_run_on_fake_tensors_says_so_too(axes: dict[str, int]) -> None:
    with pytest.raises(gp.DecisionError, match='tier="T0"'):
        gp.trace(Mixture).shard(axes).memory(gp.Training(), tier="T1")


# -- activations --------------------------------------------------------------------------------------------------------


def llama(layers: int = 6) -> nn.Module:
    import transformers

    small: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **small))


def test_a_pipeline_holds_what_its_schedule_says() -> None:
    plan, training = gp.trace(llama), gp.Training("sgd", batch_size=12, seq_len=32)
    step = {
        schedule: [
            plan.shard({"pp": 2}, microbatches=6, schedule=schedule).memory(training).rank(rank).phases["step"] for rank in (0, 1)
        ]
        for schedule in ("gpipe", "1f1b", "interleaved1f1b")
    }
    whole = plan.memory(training).phases["step"]
    assert step["1f1b"][0] < step["gpipe"][0] < whole and step["1f1b"][1] < step["gpipe"][1] < whole
    assert step["1f1b"][0] < step["interleaved1f1b"][0]
    assert not plan.shard({"pp": 2}, microbatches=6).memory(training).left_out


def test_fsdp_in_a_pipeline_holds_whole_parameters_and_gradients() -> None:
    plan, training = gp.trace(llama), gp.Training("sgd", batch_size=12, seq_len=32)
    apart = plan.shard({"pp": 2, "dp": 2}, microbatches=6).memory(training).rank(0)
    alone = plan.shard({"pp": 2}, microbatches=6).memory(training).rank(0)
    held = held_weights(plan)
    assert apart.phases["construct"] < 0.6 * alone.phases["construct"]
    assert alone.phases["step"] < apart.phases["step"] < alone.phases["step"] + held


def test_a_context_axis_divides_activations_and_adds_a_ring() -> None:
    plan, training = gp.trace(llama), gp.Training("sgd", batch_size=4, seq_len=256)
    alone, divided = plan.shard({"dp": 4}).memory(training), plan.shard({"dp": 2, "cp": 2}).memory(training)
    assert divided.rank(0).phases["construct"] == alone.rank(0).phases["construct"]
    one = plan.shard({"dp": 4}).memory(gp.Training("sgd", batch_size=4, seq_len=128)).phases["step"]
    ring = max(ring_attention(2 * 4 * 128 * 32 * 4, 4 * 128 * 32 * 4, 4, 2))
    assert not divided.left_out and one + ring == divided.phases["step"] < alone.phases["step"]


def held_weights(plan: gp.Plan) -> int:
    return sum(tensor.nbytes for tensor in plan.graph.parameters)


@pytest.mark.parametrize(
    ("axes", "options", "said"),
    [
        ({"pp": 2}, {"microbatches": 8}, "batch_size=12 does not divide into 8 micro-batches; give a multiple of 8"),
        ({"cp": 5}, {}, "seq_len=32 does not divide into 5 parts"),
        ({"dp": 2, "ep": 2}, {"experts": "model.layers.*.mlp.gate_proj"}, "a trace of forward and backward fails"),
    ],
)
def test_what_is_not_known_of_activations_is_left_out_and_said(axes: Any, options: Any, said: str) -> None:
    memory = gp.trace(llama).to("cuda").shard(axes, **options).memory(gp.Training("sgd", batch_size=12, seq_len=32))
    assert "activations" in memory.left_out and any(said in note for note in memory.notes)
    assert memory.fits("8x1000GB").verdict != "fits"


# -- how the axes multiply ----------------------------------------------------------------------------------------------


def sharding_of(**sizes: int) -> Sharding:
    axes = tuple(Axis(name=name, size=size) for name, size in sizes.items())
    check_axes(sizes)
    return Sharding(axes=axes)


def test_experts_take_ranks_and_add_none() -> None:
    """As torchtitan's ParallelDims counts: efsdp = dp_shard * cp * tp / ep."""
    found = sharding_of(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=8)
    assert (found.ranks, found.shard_ranks, found.expert_shard_ranks) == (64, 8, 2)
    assert found.describe() == "pp=2 x dp_replicate=2 x dp_shard=4 x cp=2 x tp=2, ep=8 within"


def test_places_are_those_of_torchs_meshes() -> None:
    """The dense mesh and the sparse one are two views of the same ranks."""
    sharding = sharding_of(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=8)
    dense = torch.arange(64).view(2, 2, 4, 2, 2)
    sparse = torch.arange(64).view(2, 2, 2, 8)  # pp, dp_replicate, efsdp, ep
    for rank in range(64):
        at = coordinate_of(sharding, rank)
        assert dense[at["pipeline"], at["replicate"], at["shard"], at["context"], at["tensor"]] == rank
        assert rank in sparse[at["pipeline"], at["replicate"], :, at["expert"]]


sizes = st.builds(
    lambda *each: dict(zip(("dp_shard", "cp", "tp", "ep"), each, strict=True)),
    *map(st.sampled_from, ((1, 2, 3), (1, 2), (1, 2), (1, 2, 4))),
).filter(lambda each: each["dp_shard"] * each["cp"] * each["tp"] % each["ep"] == 0)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, shape=st.tuples(st.sampled_from((4, 8)), st.integers(1, 7), st.integers(1, 3)))
def test_the_parts_of_experts_are_the_whole(sizes: dict[str, int], shape: tuple[int, ...]) -> None:
    sharding = sharding_of(**sizes)
    places = [coordinate_of(sharding, rank) for rank in range(sharding.ranks)]
    stacked = [expert_shape(shape, Expert(shape[0]), True, sharding, place) for place in places]
    assert sum(math.prod(each or ()) for each in stacked) == math.prod(shape)
    for number in range(shape[0]):
        listed = [expert_shape(shape[1:], Expert(shape[0], number), True, sharding, place) for place in places]
        assert sum(math.prod(each) for each in listed if each is not None) == math.prod(shape[1:])


@given(total=st.integers(0, 50), parts=st.integers(1, 9))
def test_chunks_are_torchs(total: int, parts: int) -> None:
    found = [len(each) for each in torch.chunk(torch.empty(total), parts)] if total else []
    assert [chunk(total, parts, part) for part in range(parts)][: len(found)] == found
    assert sum(chunk(total, parts, part) for part in range(parts)) == total


# -- stages -------------------------------------------------------------------------------------------------------------


def stages(build: Callable[[], Any], ranks: int, **options: Any) -> tuple[tuple[str, ...], ...]:
    found = gp.trace(build).shard({"pp": ranks}, **options).decisions.sharding
    assert found is not None and found.pipeline is not None
    return found.pipeline.stages


def test_layers_are_divided_by_count_between_first_and_last() -> None:
    assert stages(Mixture, 2) == (
        ("embed", "scale", "layers.0", "layers.1", "layers.2"),
        ("layers.3", "layers.4", "norm", "head"),
    )
    llama = stages(layouts.MODELS["Llama"].build, 2)
    assert llama[0][0] == "model.embed_tokens" and llama[1][-2:] == ("model.norm", "lm_head")


def test_stages_are_what_is_said() -> None:
    assert [len(names) for names in stages(Mixture, 2, stages=[1, 4])] == [3, 6]
    named = (("embed", "scale", "layers.0", "layers.1"), ("layers.2", "layers.3", "layers.4", "norm", "head"))
    assert stages(Mixture, 2, stages=named) == named
    assert len(stages(Mixture, 2, schedule="interleaved1f1b")) == 4
    assert len(stages(lambda: Mixture(layers=6), 2, schedule="interleaved1f1b", stages=6)) == 6


def test_counts_are_torchtitans() -> None:
    assert counts_of(32, 4) == [8, 8, 8, 8] and counts_of(10, 4) == [3, 3, 2, 2]
    assert counts_of(32, 4, 1, 1) == [8, 9, 8, 7]  # its `_generate_llm_fqn_per_model_part(4, 32)`
    assert counts_of(6, 3, 2, 2) == [2, 3, 1]


@settings(max_examples=25, deadline=None)
@given(
    layers=st.integers(2, 9),
    ranks=st.integers(1, 4),
    shards=st.sampled_from((1, 2, 3)),
    tied=st.booleans(),
    listed=st.booleans(),
    interleaved=st.booleans(),
)
def test_the_stages_hold_everything_once(
    layers: int, ranks: int, shards: int, tied: bool, listed: bool, interleaved: bool
) -> None:
    """And tied parameters once on each of their stages, buffers on all ranks."""
    if layers < ranks * (2 if interleaved else 1):
        return
    plan = gp.trace(Mixture, layers=layers, experts=2, tied=tied, listed=listed)
    schedule = "interleaved1f1b" if interleaved else "gpipe"
    made = plan.shard({"pp": ranks, "dp_shard": shards}, schedule=schedule, microbatches=ranks)  # type: ignore[arg-type]
    memory = made.memory()
    total = sum(held(memory.rank(rank)) for rank in range(ranks * shards))
    twice = 20 * 16 * 4 if tied and ranks > 1 else 0
    assert total == whole(plan) + twice + ranks * shards * whole(plan, "buffer")
    assert memory.peak == max(memory.rank(rank).peak for rank in range(ranks * shards))


def test_the_worst_rank_is_the_one_with_most() -> None:
    plan = gp.trace(Mixture, layers=4).shard({"pp": 2, "dp": 2}, stages=[1, 3], experts=None)
    memory = plan.memory(gp.Training())
    assert memory.distinct == distinct_ranks(plan.decisions.sharding) == (0, 2)
    assert memory.peak == memory.rank(2).peak > memory.rank(0).peak
    assert any("of rank 2 of 4" in note for note in memory.notes)


def test_a_verdict_looks_at_every_stage() -> None:
    plan = gp.trace(Mixture, layers=4).to("cuda").shard({"pp": 2, "dp": 2}, stages=[1, 3])
    verdict = plan.memory().fits("4x24GB")
    assert {room.place.split(" on ")[0] for room in verdict.rooms} == {"rank 0", "rank 2"}


# -- experts ------------------------------------------------------------------------------------------------------------


def test_experts_are_found_beside_their_router() -> None:
    assert found_experts(gp.trace(Mixture).graph) == tuple(f"layers.*.moe.experts.{name}" for name in ("up", "bias", "down"))
    assert found_experts(gp.trace(listed).graph) == ("layers.*.moe.experts",)


def mixtral(model: str = "Mixtral", **more: Any) -> nn.Module:
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 96}
    config = getattr(transformers, f"{model}Config")(num_key_value_heads=2, **small, **more)
    made: nn.Module = getattr(transformers, f"{model}ForCausalLM")(config)
    return made


MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 8},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8},
    "Jamba": {"num_experts": 8},
}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_found_is_what_transformers_divides(model: str) -> None:
    """Its own expert parallel plan names the same parameters."""
    plan = gp.trace(mixtral, model, **MODELS[model])
    assert plan._own_experts({"ep": 2}) is not None
    sharding = plan.shard({"dp": 4, "ep": 4}).decisions.sharding
    assert sharding is not None
    assert set(experts_of(sharding.experts, plan.graph)) == set(experts_of(found_experts(plan.graph), plan.graph))


@pytest.mark.parametrize("patterns", ["layers.*.moe.experts", "layers.*.moe.experts.*"])
@pytest.mark.parametrize("build", [Mixture, listed])
def test_experts_may_be_named_as_a_whole_or_one_by_one(build: Callable[[], Any], patterns: str) -> None:
    plan = gp.trace(build)
    named = plan.shard({"dp": 4, "ep": 2}, experts=patterns).memory()
    found = plan.shard({"dp": 4, "ep": 2}).memory()
    assert [held(named.rank(rank)) for rank in range(4)] == [held(found.rank(rank)) for rank in range(4)]


@pytest.mark.parametrize("build", [Mixture, listed])
@pytest.mark.parametrize(
    "axes", [{"dp": 4, "ep": 4}, {"dp": 2, "cp": 2, "ep": 2}, {"dp": 16, "ep": 8}, {"pp": 2, "cp": 4, "ep": 4}]
)
def test_the_ranks_hold_the_experts_together(build: Callable[[], Any], axes: dict[str, int]) -> None:
    plan = gp.trace(build)
    made = plan.shard(axes)
    memory, ranks = made.memory(), made.decisions.sharding.ranks  # type: ignore[union-attr]
    each = [held(memory.rank(rank)) for rank in range(ranks)]
    assert sum(each) == whole(plan) + ranks * whole(plan, "buffer")
    assert memory.peak == max(memory.rank(rank).peak for rank in range(ranks))


def test_one_rank_has_its_own_experts() -> None:
    plan = gp.trace(listed).shard({"dp": 4, "ep": 4})
    assert plan.decisions.sharding is not None
    up = plan.graph.tensor("layers.1.moe.experts.5.up.weight")
    shapes = [LocalParts.of_rank(plan.decisions.sharding, plan.graph, rank).shape(up) for rank in range(4)]
    assert shapes == [None, None, (24, 16), None]
    stacked = gp.trace(Mixture).shard({"dp": 8, "tp": 2, "ep": 4}, tensor={"layers.*.proj": "colwise"})
    assert stacked.decisions.sharding is not None
    parts = LocalParts.of_rank(stacked.decisions.sharding, stacked.graph, 5)
    assert parts.shape(stacked.graph.tensor("layers.0.moe.experts.up")) == (2, 6, 16)  # 4 x 4 ranks for 8 experts: along dim 1
    assert parts.shape(stacked.graph.tensor("layers.0.proj.weight")) == (1, 16)


def test_gradients_and_state_are_divided_with_the_experts() -> None:
    plan, workload = gp.trace(Mixture), gp.Training("adamw")
    alone, divided = (plan.shard(axes).memory(workload).by_device["step"]["cpu"] for axes in ({"ddp": 4}, {"dp": 4, "ep": 4}))
    assert divided < 0.3 * alone


# -- keeping and saying -------------------------------------------------------------------------------------------------


def test_all_of_it_survives_the_file(tmp_path: Path) -> None:
    plan = gp.trace(Mixture).shard(
        {"pp": 2, "dp_shard": 2, "cp": 2, "tp": 2, "ep": 4},
        tensor={"layers.*.proj": "colwise"},
        schedule="interleaved1f1b",
        microbatches=8,
        sequence_parallel=True,
        loss_parallel=True,
    )
    plan.save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json").bind(Mixture)
    assert loaded.decisions == plan.decisions and loaded.memory() == plan.memory()
    assert str(loaded.explain()) == str(plan.explain())


def test_a_plan_file_without_these_fields_still_loads(tmp_path: Path) -> None:
    """As an earlier version wrote it."""
    import json

    from groundplan.planner.plan_file import _checksum

    plan = gp.trace(Net).shard({"dp": 2})
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    for name in ("pipeline", "experts", "sequence_parallel", "loss_parallel"):
        del document["sharding"][name]
    document["checksum"] = _checksum(document)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert gp.Plan.load(tmp_path / "plan.json").decisions == plan.decisions


def test_axes_and_stages_are_explained() -> None:
    plan = gp.trace(Mixture, tied=True).shard({"pp": 2, "dp_shard": 4, "ep": 4}, microbatches=8)
    assert "shard between 8 ranks (pp=2 x dp_shard=4, ep=4 within)" in str(plan.report())
    said = " ".join(str(plan.explain()).split())
    for each in (
        "pp: 2 ranks, to have layers of their own",
        "1f1b: 8 micro-batches through 2 stages, 1 on a rank",
        "stage 0, on rank 0 of the pipeline: embed, scale, layers.{0-2}",
        "stage 1, on rank 1 of the pipeline: layers.{3-4}, norm, head",
        "experts divided between 4 ranks",
        "are tied, and on stages 0, 1",
    ):
        assert each in said, each
    up = " ".join(str(plan.explain("layers.4.moe.experts.up")).split())
    assert "on stage 1, divided along dim 0, 8 experts between 4 ranks" in up and "rank 4 holds [2, 24, 16]" in up
    assert "on every stage" in str(plan.explain("angles"))
    tied = plan.graph.tensor("embed.weight")
    assert plan.decisions.sharding is not None and plan.decisions.sharding.pipeline is not None
    assert stages_of(tied, plan.decisions.sharding.pipeline) == (0, 1)
