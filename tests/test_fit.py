"""plan.fit: device maps for serving that fit, that nothing beats, and what is said where there are none."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.chain import chain_of
from groundplan.planner.partition import Partition, partition
from groundplan.planner.placing import device_map
from groundplan.planner.placing import ranges as _ranges

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

GB = 10**9


def llama(**sizes: int) -> Callable[[], nn.Module]:
    config = transformers.LlamaConfig(num_key_value_heads=8, vocab_size=128_256, **sizes)
    return lambda: transformers.LlamaForCausalLM(config)


def of_8b() -> gp.Plan:
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    return gp.trace(llama(**sizes)).cast(torch.bfloat16)


SERVING = gp.Inference(batch_size=1, seq_len=8192)


# -- what is known of published models ----------------------------------------------------------------------------------


def test_llama_8b_does_not_fit_16_gb_and_what_would_do_is_said() -> None:
    pytest.importorskip("torchao")
    with pytest.raises(gp.FitError, match=r"weights take 16\.06 GB") as raised:
        of_8b().fit("1x16GB", SERVING)
    assert "16GB+" in str(raised.value) and "quantize(Int8WeightOnlyConfig()) (fits)" in str(raised.value)


def test_llama_8b_on_one_device_needs_no_map() -> None:
    plan = of_8b().fit("1x24GB", SERVING)
    assert plan.decisions.placing is None and plan.memory(SERVING).fits("1x24GB")


def test_unequal_devices_share_it_in_their_order() -> None:
    plan = of_8b().fit("8GB+16GB", SERVING)
    found = plan.memory(SERVING).fits("8GB+16GB")
    assert found.verdict == "fits" and {room.place[:6] for room in found.rooms} == {"cuda:0", "cuda:1"}
    entries = device_map(plan.decisions.placing, plan.graph)  # type: ignore[arg-type]
    layers = [entries[f"model.layers.{number}"] for number in range(32)]
    assert "cpu" not in entries.values() and layers == sorted(layers, reverse=layers[0] == "cuda:1")


def test_70b_fits_two_devices() -> None:
    sizes = {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672}
    plan = gp.trace(llama(**sizes)).cast(torch.bfloat16).fit("2x80GB", SERVING)
    assert plan.memory(SERVING).fits("2x80GB").verdict == "fits"


def linears() -> nn.Module:
    return nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(40)))


def test_the_device_with_room_has_all_of_it_wherever_it_comes() -> None:
    plan = gp.trace(linears).fit("8GB+24GB", gp.Inference())
    assert plan.decisions.placing is None and plan.decisions.steps == gp.trace(linears).to("cuda:1").decisions.steps
    assert plan.memory(gp.Inference()).fits("8GB+24GB").verdict == "fits"


class Undivided(nn.Module):
    """A module with a tensor of its own and no layers that repeat, which is one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16384, 32768, bias=False), nn.Linear(32768, 16384, bias=False)
        self.third = nn.Linear(16384, 16384, bias=False)
        self.scale = nn.Parameter(torch.ones(16384))

    def forward(self, value: torch.Tensor) -> Any:
        return self.third(self.second(self.first(value * self.scale)))


def test_a_module_that_is_one_unit_may_be_in_host_memory() -> None:
    workload = gp.Inference(inputs=lambda: (torch.empty(1, 16384, device="meta"),))
    plan = gp.trace(Undivided).fit("4500MB+64GB-cpu", workload)
    assert plan.decisions.placing is not None and plan.decisions.placing.main == "cuda:0"
    assert {_home(plan, tensor) for tensor in plan.graph.parameters} == {"cpu"}
    assert plan.memory(workload).fits("4500MB+64GB-cpu").verdict == "fits"


# -- the search ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """An embedding, layers and a head, which may be tied."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        width = 512 * chance.randint(1, 4)
        self.embed = nn.Embedding(1000 * chance.randint(1, 200), width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)) for _ in range(12)
        )
        self.head = nn.Linear(width, self.embed.num_embeddings, bias=False)
        if chance.random() < 0.5:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> Any:
        value = self.embed(tokens)
        for layer in self.layers:
            value = value + layer(value)
        return self.head(value[:, -1:])


@pytest.mark.parametrize("seed", range(12))
def test_what_is_found_fits_and_offloads_no_more_than_has_to_be(seed: int) -> None:
    """In less room than its devices have, nothing offloads less: not even without a cache, activations and a margin."""
    chance, plan, workload = random.Random(seed), gp.trace(Model, seed), gp.Inference(batch_size=2, seq_len=64)
    weights = sum(tensor.numel * 4 for tensor in plan.graph.parameters)
    sizes = [4 * GB + int(weights * chance.uniform(0.1, 0.8)) // 10**6 * 10**6 for _ in range(chance.randint(1, 2))]
    cluster = gp.Cluster.parse("+".join(f"{size // 10**6}MB" for size in sizes) + "+64GB-cpu")
    found = plan.fit(cluster, workload)
    verdict = found.memory(workload).fits(cluster)
    assert verdict.verdict == "fits", str(verdict)
    offloaded = sum(each.numel * 4 for each in plan.graph.parameters if _home(found, each) == "cpu")
    chain = chain_of(plan.graph, plan.decisions)
    least = partition(chain.units, sizes, 64 * GB)
    assert isinstance(least, Partition) and offloaded >= least.offloaded(chain.units)
    fewer = [size - 3 * GB for size in sizes]  # context, workspaces, margin and activations are less than that
    most = partition(chain.units, fewer, 64 * GB)
    assert isinstance(most, Partition) and offloaded <= most.offloaded(chain.units)


def _home(plan: gp.Plan, tensor: Any) -> str | None:
    return None if plan.decisions.placing is None else plan.decisions.placing.device_for(tensor)


def test_the_plan_is_saved_and_bound_again(tmp_path: Path) -> None:
    plan, workload = gp.trace(Model, 1), gp.Inference(batch_size=1, seq_len=8)
    found = plan.fit("2200MB+64GB-cpu", workload)
    assert found.decisions.placing is not None
    found.save(tmp_path / "plan.json")
    assert gp.Plan.load(tmp_path / "plan.json").bind(Model, 1).decisions == found.decisions


def test_the_disk_is_taken_only_if_that_is_allowed() -> None:
    plan, workload = gp.trace(linears), gp.Inference()
    with pytest.raises(gp.FitError, match=r"GB-cpu, with .* of the weights in host memory"):
        plan.fit("4GB+4GB-cpu", workload)
    found = plan.fit("4GB+4GB-cpu", workload, disk=True)
    assert found.decisions.placing is not None and "disk" in {rule.device for rule in found.decisions.placing.rules}


def test_numbers_that_follow_each_other_are_one_pattern() -> None:
    entries = [("0", "cpu"), ("1", "cpu"), ("3", "cpu"), ("a.9", "cpu"), ("a.10", "cpu"), ("b.11", "cpu")]
    assert _ranges(entries) == [("0-1", "cpu"), ("3", "cpu"), ("a.9-10", "cpu"), ("b.11", "cpu")]


@pytest.mark.parametrize(
    ("plan", "cluster", "workload", "message"),
    [
        (lambda: gp.trace(nn.Linear, 3, 4), "8GB", "training", "gp.Inference"),
        (lambda: gp.trace(nn.Linear, 3, 4).to("cuda"), "8GB", gp.Inference(), "moves to a device"),
        (lambda: gp.trace(nn.Linear, 3, 4).place({"*": "cpu"}), "8GB", gp.Inference(), "places tensors"),
        (lambda: gp.trace(nn.Linear, 3, 4), "2x8xH100-80GB", gp.Inference(), "2 nodes"),
        (lambda: gp.trace(nn.Linear, 3, 4), "64GB-cpu", gp.Inference(), "no devices"),
        (lambda: gp.trace(nn.Linear, 3, 4), "8 sheep", gp.Inference(), "8 sheep"),
    ],
)
def test_what_cannot_be_fitted_is_refused(plan: Callable[[], gp.Plan], cluster: str, workload: Any, message: str) -> None:
    with pytest.raises(gp.DecisionError, match=message):
        plan().fit(cluster, workload)
