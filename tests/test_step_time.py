"""How long a step takes by the closed form: laws of it, and what of it can be said exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.block_time import BlockTime, Talking, block_time
from groundplan.planner.catalog_speeds import MATMUL, MEMORY
from groundplan.planner.profile import Profile
from groundplan.planner.rank_memory import rank_parts
from groundplan.planner.speeds import Link, Rate, Speeds, Talk
from groundplan.planner.step_time import flops_of, human_seconds, step_time
from groundplan.planner.work_time import Group, talking
from groundplan.runtime.profiles import profile_of

from . import jobs

BF16 = torch.bfloat16
FAST = Speeds(
    device="made up",
    flops=(("float32", Rate.of(1e12)), ("bfloat16", Rate.of(4e12))),
    memory=Rate.of(1e11),
    launch=1e-6,
    node=8,
    within=Link(bandwidth=1e10),
    between=Link(bandwidth=1e9),
    host=1e10,
    host_memory=1e10,
)


@cache
def llama() -> gp.Plan:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2
    )
    return gp.trace(transformers.LlamaForCausalLM, config).to("cuda")


def training(**changes: Any) -> gp.Training:
    return gp.Training(**{"optimizer": "adamw", "batch_size": 2, "seq_len": 32, **changes})


def profile_for(plan: gp.Plan, workload: gp.Training) -> Profile:
    found = profile_of(plan._bound, plan.decisions, workload)
    assert isinstance(found, Profile), found
    return found


def blocks_of(plan: gp.Plan, workload: gp.Training, speeds: Speeds) -> list[tuple[int, BlockTime]]:
    profile, (fsdp, _) = profile_for(plan, workload), rank_parts(plan.graph, plan.decisions, workload)
    talks = Talking.of(plan.decisions.sharding, fsdp)
    return [(block.times, block_time(block, profile, talks, speeds)) for block in profile.blocks]


def beside(plan: gp.Plan, kind: str, speeds: Speeds = FAST, **changes: Any) -> float:
    """Seconds of a collective in forward and backward, hidden or not."""
    return sum(times * time.beside.get(kind, 0.0) for times, time in blocks_of(plan, training(**changes), speeds))


def weights(plan: gp.Plan, itemsize: int = 4) -> int:
    return sum(tensor.numel for tensor in plan.graph.parameters) * itemsize


# -- what is known exactly ----------------------------------------------------------------------------------------------


def test_a_step_without_overheads_is_its_operations_at_the_rate() -> None:
    plan = gp.trace(nn.Linear, 1024, 1024).to("cuda")
    slow = FAST.model_copy(update={"flops": (("float32", Rate.of(1e9)),), "launch": 0.0})
    found = plan.step_time(gp.Training("sgd", batch_size=1024), speeds=slow)
    assert found.flops == 2 * 2 * 1024**3  # the input needs no gradient
    assert found.compute == pytest.approx(found.flops / 1e9, rel=0.01)
    assert found.optimizer == pytest.approx(3 * weights(plan) / 1e11)
    assert not found.exposed and not found.recompute


@pytest.mark.parametrize(("reshard", "times"), [(True, 2), (False, 1)])
def test_fsdp_gathers_every_unit_and_again_where_it_is_freed(reshard: bool, times: int) -> None:
    plan = llama().shard({"dp": 4}, reshard=reshard, compute_dtype=BF16)
    assert beside(plan, "all-gather") == pytest.approx(times * weights(plan, 2) * 3 / 4 / 1e10)
    assert beside(plan, "reduce-scatter") == pytest.approx(weights(plan, 2) * 3 / 4 / 1e10)


def test_gradients_are_sent_in_the_dtype_that_they_are_reduced_in() -> None:
    plan = llama().shard({"dp": 4}, compute_dtype=BF16, reduce_dtype=torch.float32)
    assert beside(plan, "reduce-scatter") == pytest.approx(weights(plan, 4) * 3 / 4 / 1e10)


def test_a_larger_part_that_stays_is_gathered_between_fewer_ranks() -> None:
    plan = llama().shard({"dp": 8}, reshard=2)
    assert beside(plan, "all-gather") == pytest.approx(weights(plan) * (7 / 8 + 1 / 2) / 1e10)


def test_hsdp_reduces_a_ranks_part_once_more_between_nodes() -> None:
    plan = llama().shard({"dp_replicate": 2, "dp_shard": 8})
    assert beside(plan, "all-reduce") == pytest.approx(weights(plan) / 8 / 1e9)  # one network card for each part
    assert beside(plan, "reduce-scatter") == pytest.approx(weights(plan) * 7 / 8 / 1e10)


def test_ddp_reduces_all_gradients() -> None:
    assert beside(llama().shard({"ddp": 4}), "all-reduce") == pytest.approx(2 * weights(llama()) * 3 / 4 / 1e10)


def test_shards_of_the_host_go_up_for_each_gather_and_gradients_down() -> None:
    plan = llama().shard({"dp": 4}, offload=True)
    assert beside(plan, "transfer") == pytest.approx(3 * weights(plan) / 4 / 1e10, rel=0.01)
    there, here = (llama().shard({"dp": 4}, offload=each).step_time(training(), speeds=FAST) for each in (True, False))
    assert there.optimizer == pytest.approx(10 * here.optimizer, rel=0.05)


def test_tensor_parallelism_waits_for_what_it_exchanges() -> None:
    rules = {
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    found = llama().shard({"tp": 2}, tensor=rules).step_time(training(), speeds=FAST)
    residual = 2 * 32 * 64 * 4
    assert found.exposed == {"all-reduce": pytest.approx(8 * 3 * residual / 1e10)}
    assert found.hidden == 0


def test_micro_batches_are_as_many_forwards_and_backwards_and_one_optimizer_step() -> None:
    plan = llama().shard({"dp": 4})
    one, three = (plan.step_time(training(accumulate=each), speeds=FAST) for each in (1, 3))
    assert three.total - three.optimizer == pytest.approx(3 * (one.total - one.optimizer), rel=0.05)  # a loss is divided besides
    assert three.optimizer == one.optimizer and three.flops == 3 * one.flops


def test_what_checkpoints_run_again_is_told() -> None:
    plain, full = (llama().step_time(training(checkpointing=each), speeds=FAST) for each in ("none", "full"))
    assert plain.recompute == 0 < full.recompute < plain.compute
    assert full.flops > plain.flops


# -- laws ---------------------------------------------------------------------------------------------------------------

_SIZES = st.sampled_from([1, 2, 4, 8, 16, 32])
_BANDWIDTHS = st.floats(1e6, 1e13)
_OVERLAPS = st.floats(0, 1)


@settings(max_examples=40, deadline=None)
@given(_SIZES, _SIZES, st.booleans(), st.sampled_from(["none", "full"]))
def test_more_devices_never_increase_computation(few: int, many: int, reshard: bool, checkpointing: Any) -> None:
    few, many = sorted((few, many))
    workload = training(checkpointing=checkpointing)
    one, other = (llama().shard({"dp": each}, reshard=reshard).step_time(workload, speeds=FAST) for each in (few, many))
    copies = one if few > 1 or many == 1 else other  # one rank copies nothing into buffers
    assert other.compute <= copies.compute * (1 + 1e-9) + 3 * weights(llama()) * 2 / 1e11
    assert other.recompute == pytest.approx(one.recompute) and other.optimizer <= one.optimizer * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(_SIZES, _SIZES, st.tuples(_BANDWIDTHS, _BANDWIDTHS), st.tuples(_BANDWIDTHS, _BANDWIDTHS), _OVERLAPS, st.booleans())
def test_slower_links_never_make_a_step_shorter(
    replicate: int, shard: int, one: tuple[float, float], other: tuple[float, float], overlap: float, ahead: bool
) -> None:
    plan = llama().shard({"dp_replicate": replicate, "dp_shard": shard})
    fast, slow = (tuple(choose(pair) for pair in zip(one, other, strict=True)) for choose in (max, min))

    def total(links: tuple[float, ...]) -> float:
        within, between = (Link(bandwidth=each) for each in links)
        speeds = FAST.model_copy(update={"within": within, "between": between, "overlap": overlap, "ahead": ahead})
        return plan.step_time(training(), speeds=speeds).total

    assert total(slow) >= total(fast) * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(_SIZES, _SIZES, st.integers(1, 16), st.integers(1, 2**34), st.integers(1, 2**34))
def test_a_larger_message_takes_longer(ranks: int, stride: int, node: int, one: int, other: int) -> None:
    speeds = FAST.model_copy(update={"node": node})
    for kind in ("all-gather", "all-reduce", "all-to-all"):
        small, large = (talking(kind, each, Group(ranks, stride), speeds) for each in sorted((one, other)))
        assert small <= large


@pytest.mark.parametrize("axes", [{"dp": 4}, {"ddp": 4}, {"dp_replicate": 2, "dp_shard": 2}])
def test_a_step_is_the_sum_of_its_blocks_and_the_edges(axes: dict[str, int]) -> None:
    plan = llama().shard(axes)
    found = plan.step_time(training(), speeds=FAST)
    blocks = sum(times * time.seconds for times, time in blocks_of(plan, training(), FAST))
    hidden = sum(times * time.hidden for times, time in blocks_of(plan, training(), FAST))
    assert found.total == pytest.approx(blocks + (hidden - found.hidden) + found.optimizer)
    assert 0 < found.hidden < hidden


@settings(max_examples=30, deadline=None)
@given(_SIZES, _BANDWIDTHS, _OVERLAPS)
def test_no_more_is_hidden_than_there_is_of_either(ranks: int, bandwidth: float, overlap: float) -> None:
    speeds = FAST.model_copy(update={"within": Link(bandwidth=bandwidth), "between": None, "overlap": overlap})
    for _, time in blocks_of(llama().shard({"dp": ranks}), training(), speeds):
        computed, sent = time.compute + time.again + time.copies, sum(time.beside.values())
        assert 0 <= time.hidden <= min(computed, sent) and time.seconds >= max(computed, sent)


def test_ddp_waits_once_for_each_bucket() -> None:
    wide = gp.trace(nn.Linear, 4096, 4096).to("cuda").shard({"ddp": 2})  # 64 MiB of gradients
    speeds = FAST.model_copy(update={"within": Link(bandwidth=1e18, latency=1.0)})
    assert beside(wide, "all-reduce", speeds, seq_len=None) == pytest.approx(weights(wide) / (25 * 2**20))


# -- links --------------------------------------------------------------------------------------------------------------


def test_a_group_that_leaves_a_node_has_a_network_card_for_each_of_its_ranks_there() -> None:
    def seconds(ranks: int, stride: int) -> float:
        return talking("all-gather", 1e9, Group(ranks, stride), FAST)

    assert seconds(8, 1) == pytest.approx(7 / 8 / 10)
    assert seconds(16, 1) == pytest.approx(15 / 16 / 8)  # eight cards, slower than the link
    assert seconds(2, 8) == pytest.approx(1 / 2 / 1)
    assert seconds(4, 4) == pytest.approx(3 / 4 / 2)
    assert seconds(1, 1) == 0


def test_steps_of_a_ring_are_those_within_nodes_and_those_between() -> None:
    speeds = FAST.model_copy(
        update={"within": Link(bandwidth=1e18, latency=1.0, step=10.0), "between": Link(bandwidth=1e18, latency=2.0, step=100.0)}
    )
    assert talking("all-gather", 1, Group(8), speeds) == pytest.approx(1 + 7 * 10)
    assert talking("all-gather", 1, Group(16), speeds) == pytest.approx(2 + 14 * 10 + 100)
    assert talking("all-reduce", 1, Group(16), speeds) == pytest.approx(2 + 2 * (14 * 10 + 100))


def test_measured_collectives_go_first() -> None:
    talk = Talk(kind="all-gather", ranks=4, link=Link(bandwidth=1.0, latency=5.0))
    speeds = FAST.model_copy(update={"talks": (talk,)})
    assert talking("all-gather", 8, Group(4), speeds) == 5 + 6
    assert talking("all-reduce", 8, Group(4), speeds) == pytest.approx(12 / 1e10)


# -- speeds -------------------------------------------------------------------------------------------------------------


def test_speeds_of_the_catalog_are_shares_of_peaks() -> None:
    speeds = Speeds.of("2x8xH100-80GB")
    assert speeds.flops_of("bfloat16").at(1) == MATMUL * 989.4e12
    assert speeds.flops_of("float32").at(1) == MATMUL * 67e12 != speeds.flops_of("tf32").at(1)
    assert speeds.memory.at(1) == MEMORY * 3.35e12
    assert speeds.node == 8 and speeds.within is not None and speeds.between is not None
    assert speeds.within.bandwidth > speeds.between.bandwidth and not speeds.notes
    assert Speeds.of("1xH100-80GB").within is None


@pytest.mark.parametrize("cluster", ["2x24GB", "64GB-cpu", "2x2x24GB", "1xA100-80GB+64GB-cpu"])
def test_what_is_not_known_of_a_device_has_a_stand_in_and_a_note(cluster: str) -> None:
    known = "A100" in cluster
    assert bool(Speeds.of(cluster).notes) != known


def test_the_slowest_of_unequal_devices_counts() -> None:
    assert Speeds.of("H100-80GB+A100-80GB").memory == Speeds.of("1xA100-80GB").memory
    assert "slow as A100-80GB" in Speeds.of("H100-80GB+A100-80GB").notes[0]


def test_speeds_are_saved_and_read_again(tmp_path: Path) -> None:
    speeds = Speeds.of("2x8xH100-80GB").model_copy(
        update={"talks": (Talk(kind="all-reduce", ranks=2, link=Link(bandwidth=1e9)),)}
    )
    speeds.save(tmp_path / "speeds.json")
    assert Speeds.load(tmp_path / "speeds.json") == speeds
    data = json.loads((tmp_path / "speeds.json").read_text())
    for key, value, said in (("overlap", 2, "overlap is 2"), ("memory", {"points": [[2, 1], [1, 1]]}, "rise")):
        (tmp_path / "wrong.json").write_text(json.dumps({**data, key: value}))
        with pytest.raises(gp.CalibrationError, match=said):
            Speeds.load(tmp_path / "wrong.json")
    with pytest.raises(gp.CalibrationError, match=r"nowhere\.json cannot be read"):
        Speeds.load(tmp_path / "nowhere.json")


# -- what is raised -----------------------------------------------------------------------------------------------------


def test_what_cannot_be_said_is_raised() -> None:
    plan, workload = llama(), training()
    wrong: dict[str, Any] = {
        "how fast": lambda: plan.step_time(workload),
        "has 16 ranks": lambda: plan.shard({"dp": 16}).step_time(workload, "8xH100-80GB"),
        "for the CPU": lambda: plan.to("cpu").step_time(workload, "8xH100-80GB"),
        "for CUDA": lambda: plan.step_time(workload, "64GB-cpu"),
        "a pipeline": lambda: plan.shard({"pp": 2}).step_time(workload, "8xH100-80GB"),
        "know no link": lambda: plan.shard({"dp": 2}).step_time(workload, speeds=Speeds.of("1xH100-80GB")),
        "of training": lambda: plan.step_time(cast(Any, gp.Inference()), "8xH100-80GB"),
    }
    for said, call in wrong.items():
        with pytest.raises(gp.DecisionError, match=said):
            call()


def test_a_time_prints_and_is_data() -> None:
    found = llama().shard({"dp": 8}).step_time(training(), "8xH100-80GB")
    assert str(found).startswith(f"{human_seconds(found.total)} a step: compute ")
    assert json.loads(json.dumps(found.to_json()))["total"] == found.total


# -- how long it takes --------------------------------------------------------------------------------------------------


def test_a_further_layout_looks_at_no_op_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundplan.planner import work_time

    plan, workload = llama().shard({"dp": 2}), training()
    profile, (fsdp, parameters) = profile_for(plan, workload), rank_parts(plan.graph, plan.decisions, workload)
    assert fsdp is not None and flops_of(profile)
    first = step_time(profile, plan.decisions.sharding, fsdp, parameters.each, workload, FAST)
    monkeypatch.setattr(work_time, "_seconds", None)
    assert step_time(profile, plan.decisions.sharding, fsdp, parameters.each, workload, FAST) == first
    kept = replace(fsdp, units={name: replace(unit, reshard=False) for name, unit in fsdp.units.items()})
    more = step_time(profile, plan.decisions.sharding, kept, parameters.each, workload, FAST)
    assert more.total < first.total


# -- measuring ----------------------------------------------------------------------------------------------------------


def test_speeds_are_measured_by_all_ranks_together(tmp_path: Path) -> None:
    found = jobs.launch("tests.speeds_ranks", tmp_path, world=2)
    assert found[0]["speeds"] == found[1]["speeds"]
    assert all(each["generator"] for each in found)
    speeds = Speeds.model_validate_json(json.dumps(found[0]["speeds"]))
    assert {(talk.kind, talk.ranks) for talk in speeds.talks} == {
        (kind, 2) for kind in ("all-gather", "reduce-scatter", "all-reduce")
    }
    assert speeds.node == 2 and not speeds.ahead and 0 <= speeds.overlap <= 1
    assert speeds.flops_of("float32").at(1e9) > speeds.memory.at(1e6) / 4  # a product of matrices uses each number often
    assert 0 < speeds.view <= speeds.launch < 1e-3
    plan = gp.trace(nn.Linear, 64, 64).shard({"dp": 2})
    assert plan.step_time(gp.Training("sgd", batch_size=4), speeds=speeds).exposed["reduce-scatter"] > 0


def test_other_devices_are_not_measured() -> None:
    with pytest.raises(gp.DecisionError, match="not of 'mps'"):
        gp.measure_speeds("mps")
