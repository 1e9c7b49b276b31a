"""Lightning Fabric's ModelParallelStrategy on two real processes: its `parallelize_fn` shards a meta module and fills it.

`torchrun --nproc-per-node 2 -m tests.test_fabric FOLDER` is the job; each rank writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

import groundplan as gp

from . import jobs, layouts

pytest.importorskip("transformers")
strategies: Any = pytest.importorskip("lightning_fabric.strategies")
fabric_of: Any = pytest.importorskip("lightning_fabric").Fabric

SEED = 3
SIZES = {"FSDP": (2, 1), "TP": (1, 2)}
LLAMA = layouts.MODELS["Llama"]


def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What a user of Fabric writes, for either axis."""
    if mesh["tensor_parallel"].size() > 1:
        parallelize_module(module, mesh["tensor_parallel"], LLAMA.plan)
    if mesh["data_parallel"].size() > 1:
        for name in LLAMA.blocks_of(module):
            fully_shard(module.get_submodule(name), mesh=mesh["data_parallel"])
        fully_shard(module, mesh=mesh["data_parallel"])
    return gp.materialize(module, seed=SEED)


def losses(module: nn.Module, optimizer: torch.optim.Optimizer, backward: Any) -> list[float]:
    """The loss before and after a step."""
    module.eval()
    before = LLAMA.loss(module)
    backward(before)
    optimizer.step()
    return [float(before), float(LLAMA.loss(module))]


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def checked(sizes: tuple[int, int]) -> dict[str, Any]:
    """What this rank finds."""
    torch.manual_seed(SEED)
    single = LLAMA.build()
    initial = {name: tensor.detach().clone() for name, tensor in layouts.members(single).items()}
    expected = losses(single, optimizer_of(single), torch.Tensor.backward)

    strategy = strategies.ModelParallelStrategy(parallelize, data_parallel_size=sizes[0], tensor_parallel_size=sizes[1])
    fabric = fabric_of(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(gp.trace(LLAMA.build).meta_module())
    differing = layouts.differing(initial, members(model))
    found = losses(model, fabric.setup_optimizers(optimizer_of(model)), fabric.backward)
    trained, after = {name: layouts.whole(tensor) for name, tensor in members(model).items()}, layouts.members(single)
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, initial[name])]
    wrong = [name for name, tensor in trained.items() if not torch.allclose(tensor, after[name], rtol=1e-4, atol=1e-5)]
    return {"differing": differing, "losses": found, "expected": expected, "wrong": wrong, "moved": len(moved)}


def members(model: Any) -> layouts.Tensors:
    """Of the user's module, which Fabric wraps."""
    return layouts.members(model._forward_module)


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {name: checked(sizes) for name, sizes in SIZES.items()}
    jobs.finish(folder, found)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return jobs.launch("tests.test_fabric", tmp_path_factory.mktemp("fabric"))


@pytest.mark.parametrize("layout", SIZES)
def test_every_rank_starts_with_eagers_values(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        assert rank[layout]["differing"] == []


@pytest.mark.parametrize("layout", SIZES)
def test_a_step_does_what_it_does_on_a_single_device(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        found = rank[layout]
        assert found["losses"] == pytest.approx(found["expected"], abs=1e-4)
        assert abs(found["losses"][0] - found["losses"][1]) > 1e-3, "the step does too little to be compared"
        assert found["wrong"] == [] and found["moved"] > 10


if __name__ == "__main__":
    main(*sys.argv[1:])
