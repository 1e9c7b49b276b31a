"""Constructors that shard as they go: DTensors, parallelize_module and fully_shard inside the constructor.

On one process here, and on two in one torchrun job (dtensor_worker.py), whose findings the tests read.
"""

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
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, rand, randn, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import groundplan as gp

from . import dtensor_worker, jobs

pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).parents[1]
Found = dict[str, dict[str, Any]]


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


@pytest.mark.parametrize("build", [from_local, distributed, factory, tensor_parallel, fully_sharded])
def test_a_meta_module_is_filled_as_eager(build: Callable[[DeviceMesh], Any], mesh: DeviceMesh) -> None:
    found = dtensor_worker.filled(lambda: build(mesh), lambda module: module, "world")
    assert found == {"not meta": [], "differing": [], "generator": True}


@pytest.mark.parametrize("build", [from_local, distributed, factory, tensor_parallel])
def test_a_meta_module_is_sharded_once_more(build: Callable[[DeviceMesh], Any], mesh: DeviceMesh) -> None:
    both = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    found = dtensor_worker.filled(
        lambda: build(both["tensor"]), lambda module: dtensor_worker.on_top(module, both["data"]), "world"
    )
    assert found == {"not meta": [], "differing": [], "generator": True}


@pytest.mark.parametrize("factory", [rand, randn])
def test_what_torch_refuses_is_refused_as_torch_does(factory: Any, mesh: DeviceMesh) -> None:
    """The random factories need a mesh of GPUs."""

    def build() -> nn.Parameter:
        return nn.Parameter(factory(4, 4, device_mesh=mesh, placements=[Shard(0)]))

    for attempt in (build, lambda: gp.trace(build)):
        with pytest.raises(AssertionError):
            attempt()


# -- on two processes ---------------------------------------------------------------------------------------------------

SENT = [name for name in dtensor_worker.BUILDS if name.endswith(", sent")]
UNSENT = [name for name in dtensor_worker.BUILDS if name not in SENT]
ON_TOP = [(name, sizes) for name in dtensor_worker.ON_TOP for sizes in ("2x1", "1x2")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    return jobs.launch("tests.dtensor_worker", tmp_path_factory.mktemp("dtensor"))


@pytest.mark.parametrize("name", dtensor_worker.BUILDS)
def test_every_rank_builds_what_eager_builds_there(ranks: list[Found], name: str) -> None:
    for rank in ranks:
        assert rank[name]["materialize"] == {"differing": [], "generator": True}


@pytest.mark.parametrize("name", [*UNSENT, *SENT])
def test_every_rank_fills_a_meta_module_alone(ranks: list[Found], name: str) -> None:
    for rank in ranks:
        assert rank[name]["meta module, alone"] == {"not meta": [], "differing": [], "generator": True}


@pytest.mark.parametrize("name", [*UNSENT, *SENT])
def test_the_ranks_fill_a_meta_module_together(ranks: list[Found], name: str) -> None:
    for rank in ranks:
        assert rank[name]["meta module"] == {"not meta": [], "differing": [], "generator": True}


@pytest.mark.parametrize(("name", "sizes"), ON_TOP)
def test_every_rank_shards_once_more_alone(ranks: list[Found], name: str, sizes: str) -> None:
    for rank in ranks:
        assert rank[f"{name}, {sizes}"]["on top, alone"] == {"not meta": [], "differing": [], "generator": True}


@pytest.mark.parametrize("case", ON_TOP)
def test_the_ranks_shard_once_more_together(ranks: list[Found], case: tuple[str, str]) -> None:
    for rank in ranks:
        assert rank[", ".join(case)]["on top"] == {"not meta": [], "differing": [], "generator": True}
