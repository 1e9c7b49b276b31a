"""Constructors that shard as they go: DTensors, parallelize_module and fully_shard inside the constructor, on one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import groundplan as gp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def from_local(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(DTensor.from_local(torch.randn(4, 4), mesh, [Shard(0)]))
    return module


def distributed(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(1)]))
    module.bias = nn.Parameter(distribute_tensor(module.bias.data, mesh, [Replicate()]))
    nn.init.ones_(module.bias)
    return module


def factory(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(zeros(4, 4, device_mesh=mesh, placements=[Shard(0)]))
    with torch.no_grad():
        module.weight.add_(1)
    return module


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4))
    return parallelize_module(module, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def fully_sharded(mesh: DeviceMesh) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    for each in (*module, module):
        fully_shard(each, mesh=mesh)
    return module


def locally(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("build", [from_local, distributed, factory, tensor_parallel, fully_sharded])
def test_it_is_identical_to_eager(build: Callable[[DeviceMesh], Any], mesh: DeviceMesh) -> None:
    plan = gp.trace(build, mesh)
    model = plan.materialize(seed=3)
    after = torch.rand(2)
    torch.manual_seed(3)
    expected = build(mesh)
    assert torch.equal(after, torch.rand(2))
    for (name, one), (other_name, other) in zip(expected.named_parameters(), model.named_parameters(), strict=True):
        assert name == other_name and type(one) is type(other)
        assert torch.equal(locally(one), locally(other))
        assert getattr(one, "placements", None) == getattr(other, "placements", None)
        assert plan.graph.tensor(name).opaque == isinstance(one, DTensor)
    assert plan.report()


def test_a_part_is_refused(mesh: DeviceMesh) -> None:
    plan = gp.trace(from_local, mesh)
    with pytest.raises(gp.MaterializeError, match=r"weight is a DTensor float32\[4, 4\] tensor"):
        plan.materialize_state(["weight"])
    assert plan.materialize_state(["bias"], seed=0)["bias"].shape == (4,)
