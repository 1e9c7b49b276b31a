"""Processes that build and load a module of 268 MB: `torchrun --nproc-per-node N -m tests.process_peaks FOLDER` is one job.

Each rank writes the peak of its resident memory in every case, and what was predicted, to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import groundplan as gp
from groundplan.planner.process import process_bytes
from groundplan.runtime.process_peak import peak_bytes, restart_peak

from . import jobs

BF16 = torch.bfloat16
SAVED = ("one.safetensors", "several", "old.bin")


def peak_of(plan: gp.Plan, phase: str, body: Callable[[], Any]) -> dict[str, int]:
    gc.collect()
    tensors = plan.memory().rank(dist.get_rank() if plan.decisions.sharding else 0).by_device[phase]["cpu"]
    restart_peak()
    kept = body()
    peak = peak_bytes()
    del kept
    return {"peak": peak, "tensors": tensors, "beside": sum(process_bytes(plan.graph, plan.decisions).values())}


def cases(plan: gp.Plan, folder: Path) -> dict[str, dict[str, int]]:
    """Building and loading, some as they are and some converted."""
    plan = plan if dist.get_world_size() == 1 else plan.shard({"dp": dist.get_world_size()})
    found = {"construct": peak_of(plan, "construct", lambda: plan.materialize(seed=0))}
    found |= {f"load {file}": loaded(plan, folder / file) for file in (SAVED[0], SAVED[2])}
    plan = gp.trace(jobs.Deep).cast(BF16)
    plan = plan if dist.get_world_size() == 1 else plan.shard({"dp": dist.get_world_size()})
    found["construct, bfloat16"] = peak_of(plan, "construct", lambda: plan.materialize(seed=0))
    return found | {"load several, bfloat16": loaded(plan, folder / SAVED[1])}


def loaded(plan: gp.Plan, path: Path) -> dict[str, int]:
    return peak_of(plan, "load", lambda: plan.materialize(checkpoint=path, missing="error"))


def write(plan: gp.Plan, folder: Path) -> None:
    plan.save_checkpoint(0, folder / "one.safetensors")
    plan.save_checkpoint(0, folder / "several", max_shard_size="100MB")
    torch.save(plan.materialize(seed=0, progress=False).state_dict(), folder / "old.bin")


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    plan = gp.trace(jobs.Deep)
    if not (folder / SAVED[0]).exists() and dist.get_rank() == 0:
        write(plan, folder)
    dist.barrier()
    jobs.finish(folder, cases(plan, folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
