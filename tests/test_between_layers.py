"""Sequence and loss parallelism and expert axes: the closed form against torch's own styles and exchanges, divided by hand."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import groundplan as gp
from groundplan.planner.experts import expert_modules
from groundplan.planner.verdict import MARGIN, Room

from . import expert_mixtures, hand_divided, jobs
from .closed_form import _LLAMA_RULES, DEEP, inputs_of
from .expert_mixtures import Experts
from .hand_divided import Divided, errors
from .measured_steps import plain_kernels


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


Case = Divided | Experts


def by_hand(case: Case) -> dict[str, int]:
    return hand_divided.peaks_by_hand(case) if isinstance(case, Divided) else expert_mixtures.peaks_by_hand(case)


def compared(case: Case) -> dict[str, float]:
    """By how much of each phase the closed form is off; nothing that it says "fits" of does not."""
    closed, real = case.plan().memory(case.workload()), by_hand(case)
    assert "activations" not in closed.left_out, closed.notes
    check_no_wrong_fits(closed, real, random.Random(str(case)))
    return errors(closed, real)


def check_no_wrong_fits(closed: gp.Memory, real: Mapping[str, int], source: random.Random) -> None:
    peak = max(real.values())
    for usable in (int(peak * source.uniform(0.8, 1.6)) for _ in range(50)):
        room = Room("", closed.binding.phase, closed.peak, {}, int(MARGIN * closed.peak) + 1, usable)
        assert room.verdict != "fits" or max(peak, *closed.by_device["checkpoint"].values()) <= usable


SAMPLE: list[Case] = [*hand_divided.CONFIGURATIONS[1:5], *expert_mixtures.CONFIGURATIONS[1:3]]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_the_closed_form_is_what_torch_takes(case: Case) -> None:
    worst = 0.03 if isinstance(case, Divided) else 0.10
    assert all(abs(error) <= worst for error in compared(case).values()), compared(case)


@pytest.mark.conformance
@pytest.mark.parametrize("family", [hand_divided.CONFIGURATIONS, expert_mixtures.CONFIGURATIONS], ids=["between", "experts"])
def test_so_it_is_in_all_configurations(family: list[Case]) -> None:
    found = [abs(error) for case in family for error in compared(case).values()]
    assert statistics.median(found) <= 0.03 and max(found) <= 0.10, (statistics.median(found), max(found))


# -- what they are for --------------------------------------------------------------------------------------------------

RULES = _LLAMA_RULES | {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}


def step(rules: dict[str, str] = RULES, **options: Any) -> gp.Memory:
    plan = gp.trace(DEEP["Llama"]).shard({"tp": 2}, tensor=rules, **options)
    return plan.memory(gp.Training("sgd", inputs=inputs_of("Llama", 4, 64)))


def test_both_save_memory_and_say_so() -> None:
    usual, sequence, loss = step(), step(sequence_parallel=True), step(loss_parallel=True)
    both = step(sequence_parallel=True, loss_parallel=True)
    peaks = [each.phases["step"] for each in (usual, sequence, loss, both)]
    assert peaks[3] < peaks[1] < peaks[0] and peaks[3] < peaks[2] < peaks[0]
    assert any("along the sequence" in note for note in sequence.notes) and any("vocabulary" in note for note in loss.notes)
    assert not any("along the sequence" in note or "vocabulary" in note for note in usual.notes)


def test_without_a_divided_head_there_is_no_loss_parallelism() -> None:
    found = step(_LLAMA_RULES, loss_parallel=True)
    assert "activations" in found.left_out
    assert any('{"lm_head": "colwise_gather_output"}' in note for note in found.notes), found.notes


def test_what_no_rule_divides_is_given_the_whole_sequence() -> None:
    """A head without a rule, whose embeddings are divided along the sequence all the same."""
    rules = {"layers.*.feed.up": "colwise", "layers.*.feed.down": "rowwise"}
    training = Divided("feeds", "cpu", {"tp": 2}, True, False, {}, {"optimizer": "sgd"}, 4, 64).workload()
    plans = [gp.trace(hand_divided.Feeds).shard({"tp": 2}, tensor=rules, sequence_parallel=each) for each in (False, True)]
    usual, divided = (plan.memory(training) for plan in plans)
    assert not divided.left_out and divided.phases["step"] < usual.phases["step"]


@pytest.mark.parametrize("model", ["nn.Transformer"])
def test_torchs_own_attention_is_given_the_whole_sequence(model: str) -> None:
    rules = {"*coder.layers.*.linear1": "colwise", "*coder.layers.*.linear2": "rowwise"}
    plan = gp.trace(DEEP[model]).shard({"tp": 2}, tensor=rules, sequence_parallel=True)
    found = plan.memory(gp.Training("sgd", inputs=inputs_of(model, 4, 32)))
    assert not found.left_out, found.notes


# -- experts ------------------------------------------------------------------------------------------------------------


def mixtral(implementation: str = "batched_mm") -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 6}
    config = transformers.MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=8, **sizes)
    config._experts_implementation = implementation
    return transformers.MixtralForCausalLM(config)


def mixtral_step(axes: dict[str, int], **options: Any) -> gp.Memory:
    plan = gp.trace(mixtral).shard(axes, **options)
    return plan.memory(gp.Training("adamw", inputs=inputs_of("Mixtral", 2, 32)))


def test_fsdp_gathers_fewer_experts_along_an_expert_axis() -> None:
    usual, divided = mixtral_step({"dp": 8}), mixtral_step({"dp": 8, "ep": 8})
    assert not divided.left_out, divided.notes
    assert divided.phases["step"] < usual.phases["step"]
    assert divided.phases["optimizer"] == pytest.approx(usual.phases["optimizer"], rel=0.01)
    assert any("evenly" in note for note in divided.notes) and not any("evenly" in note for note in usual.notes)


@pytest.mark.parametrize("sequence", [False, True])
def test_experts_take_the_ranks_of_a_tensor_axis(sequence: bool) -> None:
    rules = {name: style for name, style in RULES.items() if "mlp" not in name}
    axes = {"dp": 2, "tp": 2}
    found = mixtral_step(axes | {"ep": 4}, tensor=rules, sequence_parallel=sequence)
    assert not found.left_out, found.notes
    assert found.phases["step"] < mixtral_step(axes, tensor=rules).phases["step"]


def test_units_that_hold_experts_are_their_own() -> None:
    plan = gp.trace(expert_mixtures.Model, True).shard({"dp": 4, "ep": 2})
    assert plan.decisions.sharding is not None
    names = expert_modules(plan.decisions.sharding.experts, plan.graph)
    assert len(names) == expert_mixtures.LAYERS * expert_mixtures.EXPERTS
    assert set(names) < set(plan.decisions.sharding.unit_names(plan.graph))
    without = gp.trace(expert_mixtures.Model, True).shard({"dp": 4})
    assert without.decisions.sharding is not None
    assert without.decisions.sharding.unit_names(without.graph) == [f"layers.{n}" for n in range(expert_mixtures.LAYERS)]


# -- real ranks ---------------------------------------------------------------------------------------------------------


@pytest.mark.conformance
def test_real_ranks_take_what_is_reckoned(tmp_path: Path) -> None:
    """Four gloo ranks, under torch's own styles and with a real exchange."""
    for found in zip(*jobs.launch("tests.between_ranks", tmp_path, world=4), strict=True):
        real = {phase: max(each["real"][phase] for each in found) for phase in found[0]["real"]}
        assert "activations" not in found[0]["left_out"], found[0]
        for phase, nbytes in real.items():
            assert found[0]["reckoned"][phase] == pytest.approx(nbytes, rel=0.10), (found[0]["case"], phase)


# -- a pipeline's inputs ------------------------------------------------------------------------------------------------

MADE: list[Callable[[], Any]] = [
    lambda: gp.Training("sgd", batch_size=8, seq_len=16),
    lambda: gp.Training("sgd", inputs=inputs_of("Llama", 8, 16)),
]


@pytest.mark.parametrize("training", MADE, ids=["made", "given"])
def test_the_ends_of_a_pipeline_hold_the_whole_batch(training: Callable[[], gp.Training]) -> None:
    plan = gp.trace(DEEP["Llama"]).shard({"pp": 3}, microbatches=4)
    memory = plan.memory(training())
    found = [{each.tensor: each.nbytes for each in memory.rank(rank).changes["step"]} for rank in range(3)]
    batch = 8 * 16 * torch.int64.itemsize
    assert [(each["input_ids"], each["labels"]) for each in found] == [(batch, batch), (batch // 4, batch // 4), (batch, batch)]
