"""Constructors that shard as they go, and one rank of a job that checks each of them.

`torchrun --nproc-per-node N -m tests.dtensor_worker FOLDER` is the job: each rank writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, ones, zeros
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import groundplan as gp

from . import jobs
from .law import content

SEED = 3
Build = Callable[[DeviceMesh], Any]
Found = dict[str, Any]

# -- constructors, which get a mesh of one axis -------------------------------------------------------------------------


def from_local(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)]))
    return module


def distributed(mesh: DeviceMesh, src_data_rank: int | None = None) -> nn.Module:
    """With a source rank, its values are sent to the others."""
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(distribute_tensor(torch.randn(4, 4), mesh, [Shard(1)], src_data_rank=src_data_rank))
    module.bias = nn.Parameter(distribute_tensor(module.bias.data, mesh, [Replicate()], src_data_rank=src_data_rank))
    nn.init.ones_(module.bias)
    return module


def unevenly(mesh: DeviceMesh) -> nn.Module:
    """Fewer rows on the last rank."""
    module = nn.Linear(3, 5)
    module.weight = nn.Parameter(distribute_tensor(module.weight.data, mesh, [Shard(0)], src_data_rank=None))
    return module


def factories(mesh: DeviceMesh) -> nn.Module:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(zeros(4, 4, device_mesh=mesh, placements=[Shard(0)]))
    module.bias = nn.Parameter(ones(4, device_mesh=mesh, placements=[Replicate()]))
    with torch.no_grad():
        module.weight.add_(1)
    return module


def random_init(mesh: DeviceMesh) -> nn.Module:
    """Every rank draws its part from its own generator."""
    module = distributed(mesh)
    nn.init.normal_(module.get_parameter("weight"))
    return module


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4))


def tensor_parallel(mesh: DeviceMesh, src_data_rank: int | None = None) -> nn.Module:
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    return parallelize_module(layers(), mesh, plan, src_data_rank=src_data_rank)


def fully_sharded(mesh: DeviceMesh) -> nn.Module:
    module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
    for each in (*module, module):
        fully_shard(each, mesh=mesh)
    return module


BUILDS: dict[str, Build] = {
    "from_local": from_local,
    "distribute_tensor": distributed,
    "distribute_tensor, sent": partial(distributed, src_data_rank=0),
    "unevenly": unevenly,
    "zeros and ones": factories,
    "normal_": random_init,
    "parallelize_module": tensor_parallel,
    "parallelize_module, sent": partial(tensor_parallel, src_data_rank=0),
    "fully_shard": fully_sharded,
}
ON_TOP = ("from_local", "distribute_tensor", "zeros and ones", "parallelize_module")
"""Those that `fully_shard` goes on top of, on a mesh of two axes."""

# -- what must hold on every rank ---------------------------------------------------------------------------------------


def locally(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def differing(expected: nn.Module, found: nn.Module) -> list[str]:
    """What is not as in the other module, on this rank: class, placements, local bits."""
    one, other = dict(expected.named_parameters()), dict(found.named_parameters())
    wrong = [f"names: {sorted(one)} and {sorted(other)}"] if list(one) != list(other) else []
    for name in one.keys() & other.keys():
        here, there = one[name], other[name]
        if (type(here), here.shape, _placed(here)) != (type(there), there.shape, _placed(there)):
            wrong.append(f"{name}: {type(there)} {tuple(there.shape)} {_placed(there)}")
        elif locally(here).shape != locally(there).shape or content(locally(here)) != content(locally(there)):
            wrong.append(f"{name}: {locally(there).tolist()}, eager has {locally(here).tolist()}")
    return wrong


def _placed(tensor: torch.Tensor) -> Any:
    return (tensor.placements, tuple(tensor.device_mesh.shape)) if isinstance(tensor, DTensor) else None


def eager(build: Callable[[], nn.Module]) -> tuple[nn.Module, torch.Tensor]:
    """The module, and where the generator stands."""
    torch.manual_seed(SEED)
    return build(), torch.get_rng_state()


def on_top(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`fully_shard` along the other axis."""
    for each in (*module.children(), module):
        fully_shard(each, mesh=mesh)
    return module


def filled(build: Callable[[], nn.Module], shard: Callable[[nn.Module], nn.Module], group: str | None) -> Found:
    """Whether a meta module, sharded further and filled, is what eager gives."""
    expected, generator = eager(lambda: shard(build()))
    torch.manual_seed(99)
    module = shard(gp.trace(build).meta_module())
    before = [name for name, tensor in module.named_parameters() if not locally(tensor).is_meta]
    gp.materialize(module, seed=SEED, group=group)
    return {
        "not meta": before,
        "differing": differing(expected, module),
        "generator": torch.equal(generator, torch.get_rng_state()),
    }


def materialized(build: Callable[[], nn.Module]) -> Found:
    """Whether `plan.materialize` gives what eager does."""
    expected, generator = eager(build)
    torch.manual_seed(99)
    model = gp.trace(build).materialize(seed=SEED)
    return {"differing": differing(expected, model), "generator": torch.equal(generator, torch.get_rng_state())}


def checked(name: str, build: Build) -> Found:
    line = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("line",))
    return {
        "materialize": caught(partial(materialized, partial(build, line))),
        "meta module": caught(partial(filled, partial(build, line), lambda module: module, "world")),
        "meta module, alone": caught(partial(filled, partial(build, line), lambda module: module, None)),
    }


def checked_on_top(build: Build, data: int, tensor: int) -> Found:
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))

    def shard(module: nn.Module) -> nn.Module:
        return on_top(module, mesh["data"])

    groups = {"on top": "world", "on top, alone": None}
    return {check: caught(partial(filled, partial(build, mesh["tensor"]), shard, group)) for check, group in groups.items()}


def caught(check: Callable[[], Found]) -> Found:
    try:
        return check()
    except Exception:
        return {"error": traceback.format_exc()}


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    world, found = dist.get_world_size(), {}
    for name, build in BUILDS.items():
        found[name] = checked(name, build)
    for data, tensor in ((world, 1), (1, world)):
        for name in ON_TOP:
            found[f"{name}, {data}x{tensor}"] = checked_on_top(BUILDS[name], data, tensor)
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
