"""Rules of tensor parallelism that a traced forward shows: what is divided computes the same, and traps are left alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.runtime.tensor_rules import checked_rules, divisible, tensor_rules

from .jobs import launch
from .tensor_models import DIVIDED, HEADS, MORE, TRAPS, Attention, GatedBlocks, Pair, llama, titan

BLOCK = {"a": "colwise", "b": "colwise", "c": "rowwise"}
ATTENTION = {"q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}


def rules(build: Any, ranks: int = 2, workload: Any = None) -> dict[str, str]:
    plan = gp.trace(build).shard({"tp": ranks}, tensor="infer", workload=workload)
    assert plan.decisions.sharding is not None
    return {rule.pattern: rule.style for rule in plan.decisions.sharding.tensor}


def why(build: Any, ranks: int = 2) -> dict[str, str]:
    plan = gp.trace(build)
    return dict(checked_rules(plan._bound, plan.decisions, ranks).left_out)


# -- what is found ------------------------------------------------------------------------------------------------------


def test_a_gated_mlp_is_divided_whatever_its_layers_are_called() -> None:
    assert rules(GatedBlocks) == {f"blocks.*.{name}": style for name, style in BLOCK.items()}


def test_attention_by_heads_is_divided() -> None:
    assert rules(Attention) == ATTENTION


def test_llama_is_divided_as_its_own_plan_says() -> None:
    own = dict(llama().tp_plan)  # type: ignore[arg-type]
    assert rules(llama) == own | {"model.embed_tokens": "embedding_rowwise"}


def test_the_llama_of_torchtitan_is_divided_as_torchtitan_does() -> None:
    feed = {"feed_forward.w1": "colwise", "feed_forward.w2": "rowwise", "feed_forward.w3": "colwise"}
    layer = {f"attention.w{name}": style for name, style in ATTENTION.items()} | feed
    ends = {"tok_embeddings": "embedding_rowwise", "output": "colwise_gather_output"}
    assert rules(titan) == {f"layers.*.{name}": style for name, style in layer.items()} | ends


def test_what_cannot_be_divided_with_the_rest_stays_whole() -> None:
    found, reasons = rules(DIVIDED["t5"]), why(DIVIDED["t5"])
    assert {name.rpartition(".")[2] for name in found} == {"wi", "wo", "shared", "embed_tokens", "lm_head"}
    assert (
        "[1, 4, 8, 8]" in reasons["encoder.block.0.layer.0.SelfAttention.q"]
    )  # the bias of positions has a column for each head


@pytest.mark.parametrize("name", TRAPS)
def test_traps_are_not_divided(name: str) -> None:
    with pytest.raises(gp.GroundplanError, match="finds nothing"):
        rules(TRAPS[name])


def test_the_reason_names_the_op_and_its_place() -> None:
    assert why(TRAPS["norm"])["up"].startswith("reaches native_layer_norm in norm, which works along the divided dim")
    assert "head_dim" in why(TRAPS["heads"])["q"] and "view raises RuntimeError" in why(TRAPS["heads"])["q"]
    assert "view gives [2, 8, 4, 4] and not [2, 8, 2, 8]" in why(TRAPS["heads alone"])["q"]
    with pytest.raises(gp.GroundplanError, match=r"none is an nn\.Linear") as raised:
        rules(partial(nn.Conv1d, 4, 4, 1))
    assert "Conv1d" in str(raised.value)


def test_one_kind_of_layer_that_fails_does_not_take_the_others_along() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.feed = Attention(heads=HEADS), Pair()

        def forward(self, value: torch.Tensor) -> Any:
            return self.feed(self.attention(value))

    assert rules(Both) == {"feed.up": "colwise", "feed.down": "rowwise"}


def test_layers_in_one_row_are_told_apart_though_most_are_skipped() -> None:
    class Chain(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(each for _ in range(8) for each in (nn.Linear(16, 16), nn.ReLU())))

    styles = {str(2 * place): ("colwise", "rowwise")[place % 2] for place in range(8)}
    assert rules(Chain) == styles


# -- sizes --------------------------------------------------------------------------------------------------------------


def test_heads_and_dims_say_how_many_ranks_there_can_be() -> None:
    plan = gp.trace(Attention)
    assert divisible(plan._bound, plan.decisions).sizes(64) == (2, 4)
    assert divisible(plan._bound, plan.decisions).largest == HEADS
    with pytest.raises(gp.GroundplanError, match="8 ranks do not divide it evenly: its dims and heads have 4"):
        rules(Attention, 8)
    found = gp.trace(llama)
    assert divisible(found._bound, found.decisions).largest == 2  # heads of keys and values
    assert not any("self_attn" in name for name in rules(llama, 4))
    assert any("mlp" in name for name in rules(llama, 4))


def test_rules_are_found_once_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gp.trace(Attention)
    first = tensor_rules(plan._bound, plan.decisions)
    monkeypatch.setattr("groundplan.runtime.tensor_rules.trace_tensor_flow", None)
    monkeypatch.setattr("groundplan.runtime.tensor_rules.difference", None)
    assert tensor_rules(plan._bound, plan.decisions, ranks=HEADS) is first
    sharded = plan.shard({"dp": 2, "tp": HEADS}, tensor="infer")
    assert tensor_rules(sharded._bound, sharded.decisions) == ATTENTION


def test_nothing_to_divide_is_none() -> None:
    plan = gp.trace(TRAPS["softmax"])
    assert tensor_rules(plan._bound, plan.decisions) is None


# -- the surface --------------------------------------------------------------------------------------------------------


def test_the_plan_keeps_the_rules(tmp_path: Path) -> None:
    plan = gp.trace(Attention).shard({"dp": 2, "tp": 2}, tensor="infer")
    plan.save(tmp_path / "plan.json")
    again = gp.Plan.load(tmp_path / "plan.json").bind(Attention)
    assert again.decisions == plan.decisions
    assert plan.decisions.sharding is not None and plan.decisions.sharding.engine == "torch"


def test_the_inputs_are_those_of_the_workload() -> None:
    class Two(Pair):
        def forward(self, value: torch.Tensor, other: torch.Tensor) -> Any:  # type: ignore[override]
            return super().forward(value + other)

    with pytest.raises(gp.GroundplanError, match="inputs="):
        rules(Two)
    given = (torch.empty(2, 32), torch.empty(2, 32))
    for workload in (gp.Training(inputs=given), gp.Inference(inputs=given)):
        assert rules(Two, workload=workload) == {"up": "colwise", "down": "rowwise"}


def test_it_is_for_a_tensor_axis() -> None:
    with pytest.raises(gp.GroundplanError, match='add "tp"'):
        gp.trace(Attention).shard({"dp": 2}, tensor="infer")
    with pytest.raises(gp.GroundplanError, match='"auto" nor "infer"'):
        gp.trace(Attention).shard({"tp": 2}, tensor="inferred")


def test_the_surroundings_are_as_before() -> None:
    state, plan = torch.get_rng_state(), gp.trace(GatedBlocks)
    with torch.inference_mode():
        plan.shard({"tp": 2}, tensor="infer")
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.distributed.is_initialized()


def test_explain_says_what_is_left_whole(tmp_path: Path) -> None:
    plan = gp.trace(GatedBlocks).shard({"tp": 2}, tensor="infer")
    told = " ".join(str(plan.explain()).split())
    assert "first: reaches native_layer_norm in blocks.0.norm, which works along the divided dim" in told
    assert "left whole" not in str(gp.trace(GatedBlocks).shard({"tp": 2}, tensor={"first": "colwise_gather_output"}).explain())


# -- real ranks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("tests.tensor_rules_ranks", tmp_path_factory.mktemp("tensor_rules"))


@pytest.mark.parametrize("name", DIVIDED)
def test_what_is_divided_computes_the_same(name: str, ranks: list[Any]) -> None:
    for found in ranks:
        each = found["divided"][name]
        assert each["divided"] > 0
        assert max(each["outputs"], each["gradients"], each["after"]) < 1e-4


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_divided_as_it_looks_computes_something_else(name: str, ranks: list[Any]) -> None:
    each = ranks[1]["traps"][name]
    assert max(each["outputs"], each.get("gradients", 0.0)) > 1e-2


@pytest.mark.conformance
def test_many_more_models_compute_the_same(tmp_path: Path) -> None:
    for found in launch("tests.tensor_rules_ranks", tmp_path, "more"):
        apart = {name: max(each["outputs"], each["gradients"], each["after"]) for name, each in found.items()}
        assert all(each["divided"] > 0 for each in found.values())
        assert apart == {name: pytest.approx(0, abs=1e-4) for name in MORE}
