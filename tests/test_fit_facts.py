"""plan.fit on models and machines of which it is known what has to come out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import groundplan as gp
from groundplan.planner.fitted import Fitted

transformers: Any = pytest.importorskip("transformers")

BF16, F32 = torch.bfloat16, torch.float32


def llama(**sizes: int) -> gp.Plan:
    config = transformers.LlamaConfig(num_key_value_heads=8, vocab_size=128_256, **sizes)
    return gp.trace(transformers.LlamaForCausalLM, config)


def of_8b() -> gp.Plan:
    return llama(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)


def fitted(plan: gp.Plan) -> Fitted:
    found = plan.decisions.fitted
    assert isinstance(found, Fitted)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"compute_dtype": BF16, "reduce_dtype": F32}, marks=pytest.mark.conformance)],
    ids=["as it is", "bfloat16"],
)
def test_8b_on_8x80gb_is_sharded_and_checkpointed_only_as_far_as_needed(options: dict[str, Any]) -> None:
    training = gp.Training("adamw", batch_size=1, seq_len=8192)
    plan = of_8b().fit("8x80GB", training, tier="T0", **options)
    sharding = plan.decisions.sharding
    assert sharding is not None and {axis.role for axis in sharding.axes} == {"shard"}
    assert plan.memory().fits("8x80GB")
    assert plan.decisions.checkpointing and fitted(plan).verdict == "fits"
    none = plan.decisions.model_copy(update={"checkpointing": ()})
    assert gp.Plan(none, plan._build).memory(training).fits("8x80GB").verdict != "fits"


@pytest.mark.slow
def test_405b_on_512x80gb_has_a_model_axis_besides_data() -> None:
    plan = llama(hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, intermediate_size=53248)
    training = gp.Training("adamw", batch_size=1, seq_len=8192)
    found = plan.fit("512x80GB", training, compute_dtype=BF16, reduce_dtype=F32, offload=False, tier="T0")
    sharding = found.decisions.sharding
    assert sharding is not None and {axis.role for axis in sharding.axes} >= {"tensor", "shard"} and not sharding.offload
    assert found.memory().fits("512x80GB").verdict == "fits"
    assert any("sequence_parallel" in each for each in fitted(found).would_help)


@pytest.mark.slow
def test_7b_on_24gb_and_64gb_of_host_memory_does_not_fit_in_float32_and_what_does_is_said() -> None:
    pytest.importorskip("torchao")
    plan = gp.trace(transformers.LlamaForCausalLM, transformers.LlamaConfig())
    training = gp.Training("adamw", batch_size=1, seq_len=2048)
    with pytest.raises(gp.FitError, match=r"26\.95 GB of float32 weights.*53\.91 GB of adamw state") as raised:
        plan.fit("1x24GB+64GB-cpu", training, tier="T0")
    said = str(raised.value)
    assert "host memory" in said and 'optimizer="adamw-8bit" and dtype=torch.bfloat16 for the weights' in said
    assert "offloaded" in said.partition("What fits")[2]
    smaller = gp.Training("adamw-8bit", batch_size=1, seq_len=2048)
    found = plan.fit("1x24GB+64GB-cpu", smaller, dtype=BF16, tier="T0")
    assert fitted(found).verdict == "fits"
    assert found.decisions.sharding is not None and found.decisions.sharding.offload
