"""Whether a plan fits: bytes against usable bytes, and nothing better said than is known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import groundplan as gp
from groundplan.planner import verdict as verdicts
from groundplan.planner.catalog import Device
from groundplan.planner.estimate import RESERVED
from groundplan.planner.memory import Binding, Memory
from groundplan.planner.verdict import CONTEXT_BYTES, MARGIN, WORKSPACE_BYTES
from groundplan.tracer.errors import DecisionError

GB = 10**9
ON_TOP = CONTEXT_BYTES + WORKSPACE_BYTES


def memory(devices: dict[str, int], **fields: Any) -> Memory:
    device = max(devices, key=devices.__getitem__)
    return Memory({"load": devices}, Binding("load", device, devices[device], ()), (), **fields)


def sharded(sizes: list[int], host: int = 0, **fields: Any) -> Memory:
    """The memory of ranks that hold so many bytes each."""

    def of_rank(index: int) -> Memory:
        devices = {"cuda:0": sizes[index], **({"cpu": host} if host else {})}
        return memory(devices, ranks=len(sizes), of_rank=of_rank, **fields)

    return of_rank(0)


# -- the word -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        (10 * GB, "fits"),
        (18 * GB, "fits"),
        (19 * GB, "tight"),
        (22 * GB, "tight"),
        (23 * GB, "does not fit"),
        (90 * GB, "does not fit"),
    ],
)
def test_the_word(tensors: int, word: str) -> None:
    found = memory({"cuda:0": tensors}).fits("24GB")
    room = found.binding
    assert found.verdict == word and bool(found) is (word == "fits")
    assert room.needed == tensors + ON_TOP and room.left == 24 * GB - room.needed
    assert room.percent == pytest.approx(100 * room.left / (24 * GB))
    assert room.margin == pytest.approx(MARGIN * room.needed, abs=1)


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.sampled_from([0, 0.1, 0.2, 1.0]))
def test_the_word_is_what_its_definition_says(tensors: int, usable: int, margin: float) -> None:
    found = memory({"cuda:0": tensors}).fits(gp.Cluster(devices=(Device(name="some", memory=usable),)), margin).verdict
    needed = tensors + ON_TOP
    assert (found == "does not fit") == (needed > usable)
    if found == "fits":
        assert needed + margin * needed <= usable * (1 + 1e-12), "never said without the margin"


@given(st.integers(0, 10**11), st.integers(0, 10**11))
def test_more_bytes_never_fit_better(less: int, more: int) -> None:
    less, more = sorted((less, more))
    order = ["fits", "tight", "does not fit"]
    first, second = (order.index(memory({"cuda:0": size}).fits("H100").verdict) for size in (less, more))
    assert first <= second


def test_what_is_left_out_is_never_said_to_fit() -> None:
    found = memory({"cuda:0": GB}, left_out=("activations",)).fits("8xH100-80GB")
    assert found.verdict == "tight" and not found
    assert any("activations are not counted" in note for note in found.notes)
    assert memory({"cuda:0": 90 * GB}, left_out=("activations",)).fits("8xH100-80GB").verdict == "does not fit"


def test_the_margin_is_a_parameter() -> None:
    tight = memory({"cuda:0": 20 * GB})
    assert tight.fits("24GB").verdict == "tight" and tight.fits("24GB", margin=0.05).verdict == "fits"
    for wrong in (-0.1, 10, "a lot", True, float("nan")):
        with pytest.raises(DecisionError, match="margin is "):
            tight.fits("24GB", margin=wrong)  # type: ignore[arg-type]


# -- places -------------------------------------------------------------------------------------------------------------


def test_every_device_of_a_process_is_looked_at() -> None:
    found = memory({"cuda:0": 10 * GB, "cuda:1": 9 * GB, "cpu": GB}).fits("16GB+8GB+64GB-cpu")
    assert [(room.place, room.verdict) for room in found.rooms] == [
        ("cuda:0 on 16GB", "fits"),
        ("cuda:1 on 8GB", "does not fit"),
        ("host memory of a node, 1 process", "fits"),
    ]
    assert found.verdict == "does not fit" and found.binding.place == "cuda:1 on 8GB"


def test_ranks_of_unequal_devices_are_looked_at_one_by_one() -> None:
    found = sharded([10 * GB, 5 * GB, 9 * GB, 7 * GB]).fits("2x(16GB+8GB)")
    assert [room.verdict for room in found.rooms] == ["fits", "fits", "fits", "does not fit"]
    assert found.binding.place == "rank 3 on 8GB"


def test_rank_0_speaks_for_ranks_that_are_alike() -> None:
    found = sharded([10 * GB, 9 * GB]).fits("2x24GB")
    assert [room.place for room in found.rooms] == ["rank 0 on 24GB"]
    assert any("rank 0, which holds most" in note for note in found.notes)


def test_ranks_share_the_memory_of_their_node() -> None:
    found = sharded([GB] * 16, host=10 * GB).fits("2x8x24GB+64GB-cpu")
    host = found.rooms[1]
    assert host.place == "host memory of a node, 8 processes"
    assert host.tensors == 8 * 10 * GB and host.added == {"processes": 8 * verdicts.CUDA_PROCESS_BYTES}
    assert host.verdict == "does not fit"


def test_communicators_are_added() -> None:
    room = sharded([GB, GB], communicators=3).fits("2x24GB").binding
    assert room.added["communicators"] == 3 * verdicts.COMMUNICATOR_BYTES


def test_a_machine_without_devices() -> None:
    found = memory({"cpu": 10 * GB}).fits("64GB-cpu")
    assert found.verdict == "fits" and found.binding.added == {"processes": verdicts.PROCESS_BYTES}
    assert memory({"cpu": 10 * GB}, left_out=("activations",)).fits("64GB-cpu").verdict == "tight"


def test_unknown_host_memory_is_said() -> None:
    assert any("host memory" in note for note in memory({"cuda:0": GB}).fits("24GB").notes)


@pytest.mark.parametrize(
    ("found", "cluster", "message"),
    [
        (lambda: sharded([GB] * 4), "2x24GB", "the plan has 4 ranks, and 2x24GB has room for 2"),
        (lambda: memory({"cuda:1": GB}), "24GB", "the plan puts tensors on cuda:1, and a node of 24GB has 1 device"),
        (lambda: memory({"cuda:0": GB}), "64GB-cpu", "a node of 64GB-cpu has none"),
        (lambda: memory({"cpu": GB}), "24GB", r'everything on the CPU.*plan\.to\("cuda"\).*"24GB\+64GB-cpu"'),
        (lambda: memory({"cuda:0": GB}), "24BG", "the cluster '24BG' cannot be"),
    ],
)
def test_a_cluster_that_is_not_the_plans(found: Callable[[], Memory], cluster: str, message: str) -> None:
    with pytest.raises(DecisionError, match=message):
        found().fits(cluster)


# -- real plans ---------------------------------------------------------------------------------------------------------


class Large(torch.nn.Module):
    """Eight billion parameters, of the shape of Llama-3's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(128256, 4096)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4096, 53248, bias=False) for _ in range(32))
        self.head = torch.nn.Linear(4096, 128256, bias=False)


def test_a_model_of_8_billion_in_half_precision() -> None:
    weights = gp.trace(Large).cast(torch.bfloat16).to("cuda").memory()
    assert weights.fits("1x16GB").verdict == "does not fit"
    assert weights.fits("H100-80GB").verdict == "fits"
    assert any("without a workload only construct, load, checkpoint are looked at" in note for note in weights.fits("H100").notes)
    assert weights.fits(gp.Cluster.parse("24GB")).binding.phase in ("construct", "load", "checkpoint")


def test_training_is_never_said_to_fit_before_activations_are_counted() -> None:
    plan = gp.trace(Large).to("cuda").shard({"dp": 8})
    found = plan.memory(gp.Training("adamw")).fits("8xH100-80GB")
    assert found.verdict == "tight" and found.binding.phase == "optimizer"
    assert not any("without a workload" in note for note in found.notes)
    assert found.binding.added.keys() == {"CUDA context", "workspaces", "communicators"}
    assert plan.memory(gp.Training("adamw")).fits("8x16GB").verdict == "does not fit"
    assert plan.memory().communicators == 1
    assert gp.trace(Large).shard({"dp_replicate": 2, "dp_shard": 4}).memory().communicators == 3


# -- as text and data ---------------------------------------------------------------------------------------------------


def test_the_text_says_every_constant() -> None:
    assert str(memory({"cuda:0": 20 * GB}).fits("L4")).splitlines()[:2] == [
        "tight: L4-24GB",
        "  cuda:0 on L4-24GB: tight, 21.13 GB of 23.60 GB (20.00 GB in load, CUDA context 1.00 GB, workspaces 134.22 MB); "
        "2.47 GB left, 10.4 %",
    ]
    assert "missing" in str(memory({"cuda:0": 90 * GB}).fits("H100"))


def test_json_is_plain_data() -> None:
    found = memory({"cuda:0": 16 * GB}).fits("24GB").to_json()
    assert json.loads(json.dumps(found)) == found
    assert found["verdict"] == "fits" and found["binding"]["left"] == 24 * GB - 16 * GB - ON_TOP


def test_a_step_that_was_run_counts_its_activations() -> None:
    """Nothing is left out then on the CPU, nor on CUDA, where the allocator was asked and no library has workspaces."""
    plan, workload = gp.trace(torch.nn.Linear, 64, 64), gp.Training("sgd", batch_size=2)
    assert gp.trace(torch.nn.Bilinear, 2, 3, 4).memory(workload).left_out == ("activations",)
    assert plan.memory(workload).left_out == plan.memory(workload, tier="T1").left_out == ()
    assert plan.memory(workload, tier="T1").fits("64GB-cpu").verdict == "fits"
    on_gpu = plan.to("cuda")
    assert on_gpu.memory(workload, tier="T1").left_out == (RESERVED,)
    assert on_gpu.memory(workload, tier="T2").left_out == ()
    run, replayed = (on_gpu.memory(workload, tier=tier).fits("24GB") for tier in ("T1", "T2"))
    assert run.verdict == replayed.verdict == "fits" and run.rooms == replayed.rooms


def test_what_cudas_libraries_take_is_left_out_by_name() -> None:
    plan = gp.trace(lambda: torch.nn.Sequential(torch.nn.Conv1d(3, 3, 3), torch.nn.BatchNorm1d(3))).to("cuda")
    found = plan.memory(gp.Training("sgd", inputs=(torch.ones(2, 3, 8),)), tier="T2")
    assert found.left_out == ("workspaces of cuDNN's convolutions", "what cuDNN keeps of a batch norm")
    assert found.closed_form is not None and found.closed_form.left_out == found.left_out
    assert found.fits("24GB").verdict == found.closed_form.fits("24GB").verdict == "tight"
