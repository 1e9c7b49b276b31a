"""Plans: immutable, saved, loaded and bound in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import groundplan as gp

from . import zoo

CONFIG = "vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2"
SAVE = f"""
import sys, torch, transformers, groundplan as gp
config = transformers.LlamaConfig({CONFIG})
gp.trace(transformers.LlamaForCausalLM, config).cast(torch.bfloat16).save(sys.argv[1])
"""
BIND = f"""
import sys, torch, transformers, groundplan as gp
config = transformers.LlamaConfig({CONFIG})
model = gp.Plan.load(sys.argv[1]).bind(transformers.LlamaForCausalLM, config).materialize(seed=3)
torch.manual_seed(3)
expected = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
print("equal", len(expected))
"""


def run(program: str, *args: str) -> str:
    return subprocess.run([sys.executable, "-c", program, *args], check=True, capture_output=True, text=True).stdout.strip()


def test_a_plan_saved_in_one_process_is_built_in_another(tmp_path: Path) -> None:
    path = str(tmp_path / "model.plan.json")
    run(SAVE, path)
    assert run(BIND, path).startswith("equal ")


def test_a_plan_is_for_its_own_constructor_and_arguments(tmp_path: Path) -> None:
    gp.trace(nn.Linear, 3, 4).save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    with pytest.raises(gp.PlanFileError, match="for another constructor, or for other arguments"):
        loaded.bind(nn.Linear, 3, 5)
    with torch.no_grad(), pytest.raises(gp.PlanFileError, match="grad_enabled"):
        loaded.bind(nn.Linear, 3, 4)
    assert loaded.bind(nn.Linear, 3, 4).graph.tensor("weight").shape == (4, 3)


def test_an_unbound_plan_says_what_it_needs(tmp_path: Path) -> None:
    gp.trace(nn.Linear, 3, 4).save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    for use in (loaded.report, loaded.memory, loaded.explain, loaded.materialize, lambda: loaded.cast(torch.half)):
        with pytest.raises(gp.PlanFileError, match=r"plan.bind\(build, \*args, \*\*kwargs\).*torch.nn.modules.linear.Linear"):
            use()


def test_a_plan_that_depends_on_random_values_is_bound_to_their_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    plan = gp.trace(zoo.Decides)
    plan.save(tmp_path / "plan.json")
    torch.manual_seed(5)
    bound = gp.Plan.load(tmp_path / "plan.json").bind(zoo.Decides)
    assert len(bound.materialize(seed=5).layers) == len(plan.materialize(seed=5).layers)
    state = torch.Generator().manual_seed(5).get_state()
    for seed in range(6, 30):
        torch.manual_seed(seed)
        with pytest.raises(gp.PlanFileError):
            gp.Plan.load(tmp_path / "plan.json").bind(zoo.Decides)
    assert not torch.equal(torch.get_rng_state(), state)


def test_deciding_gives_a_new_plan() -> None:
    plan = gp.trace(nn.Linear, 3, 4)
    cast = plan.cast(torch.bfloat16).to("cpu")
    assert plan.decisions.steps == () and len(cast.decisions.steps) == 2 and cast.graph is plan.graph
    assert plan.materialize(seed=0).weight.dtype == torch.float32
    with pytest.raises(AttributeError):
        plan.decisions = cast.decisions


def test_memory_of_weights_and_of_training() -> None:
    plan = gp.trace(nn.Linear, 1000, 1000, bias=False)
    assert plan.memory().phases == {"construct": 4_000_000, "load": 4_000_000, "checkpoint": 4_000_000}
    training = plan.memory(gp.Training(optimizer="adamw"))
    assert training.phases["optimizer"] >= 16_000_000
    assert training.peak == max(training.phases.values())


def test_bad_arguments_name_the_way_out() -> None:
    plan = gp.trace(nn.Linear, 3, 4)
    with pytest.raises(gp.UnknownNameError, match="did you mean weight"):
        plan.materialize_state(["wieght"])
    with pytest.raises(gp.UnknownNameError, match="did you mean weight"):
        plan.explain("wieght")
    with pytest.raises(gp.MaterializeError, match='not one of "error", "zero", "empty"'):
        plan.materialize(uninitialized="nan")
    with pytest.raises(gp.DecisionError):
        plan.cast(torch.int8)
    with pytest.raises(gp.DecisionError):
        plan.to("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused_before_anything_is_built() -> None:
    calls: list[None] = []

    def build() -> nn.Module:
        calls.append(None)
        return nn.Linear(2, 2)

    plan = gp.trace(build).to("cuda")
    for use in (plan.materialize, lambda: plan.materialize_state(["bias"])):
        with pytest.raises(gp.MaterializeError, match="puts tensors on cuda, and this machine has no CUDA device"):
            use()
    assert len(calls) == 1
