"""Sharded modules that are saved, and sharded plans that load: `python -m torch.distributed.run ... -m tests.save_ranks FOLDER`.

Each rank writes what it finds to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

import groundplan as gp

from . import jobs

SEED = 3


class Model(nn.Module):
    """A tie, a buffer, sizes that two ranks do not divide evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(31, 8), nn.Linear(8, 31, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.register_buffer("table", torch.arange(5.0))


def whole(module: nn.Module) -> dict[str, Any]:
    """Every tensor of a sharded module, as lists."""
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).tolist() for name, t in module.state_dict().items()}


def saved(plan: gp.Plan, folder: Path) -> dict[str, Any]:
    module = plan.meta_module()
    for block in module.blocks:
        fully_shard(block)
    gp.materialize(fully_shard(module), seed=SEED)
    plan.save_checkpoint(module, folder / "one.safetensors")
    plan.save_checkpoint(module, folder / "several", max_shard_size=400)
    plan.save_checkpoint(module, folder / "dcp", format="dcp")
    none_left = mock.patch("os.posix_fallocate", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    limits = {"full": mock.patch("os.pwrite", limited()), "no room": none_left}
    return {"refused": refused(plan, module, folder)} | {name: full(plan, module, folder, how) for name, how in limits.items()}


class Packed(nn.Module):
    """Two projections in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8))


def packed(folder: Path) -> None:
    """Each rank holds a half of both projections, as transformers' `packed_colwise` divides them."""
    plan = gp.trace(Packed)
    module = plan.meta_module()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    part = DTensor.from_local(torch.empty(3, 4, device="meta"), mesh, [_StridedShard(1, split_factor=2)], run_check=False)
    module.weight = nn.Parameter(part)
    gp.materialize(module, seed=SEED)
    plan.save_checkpoint(module, folder / "packed.safetensors")


def refused(plan: gp.Plan, module: nn.Module, folder: Path) -> str:
    """What all ranks say where the first one finds a file in the way."""
    try:
        plan.save_checkpoint(module, folder / "one.safetensors")
    except gp.CheckpointError as error:
        return str(error)
    return ""


def limited() -> Any:
    """A disk that is full after four writes."""
    done, write = [0], os.pwrite

    def pwrite(*args: Any) -> int:
        done[0] += 1
        if done[0] > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    return pwrite


def full(plan: gp.Plan, module: nn.Module, folder: Path, how: Any) -> str:
    """What all ranks say where the first one's disk is full."""
    try:
        with how:
            plan.save_checkpoint(module, folder / "full")
    except gp.CheckpointError as error:
        return str(error)
    return ""


def loaded(plan: gp.Plan, folder: Path) -> dict[str, Any]:
    sharded = plan.shard({"dp": 2}, units="blocks.*")
    found = {name: whole(sharded.materialize(checkpoint=folder / name, missing="error")) for name in ("one.safetensors", "dcp")}
    state = {"embed.weight": torch.ones(31, 8)}
    return found | {"part": whole(sharded.materialize(seed=SEED, checkpoint=state))}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    plan = gp.trace(Model)
    found = saved(plan, folder) | {"loaded": loaded(plan, folder)}
    packed(folder)
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
