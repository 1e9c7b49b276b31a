"""Real ranks of plans that checkpoint, and reshard, module by module: `torchrun -m tests.checkpointing_ranks FOLDER` is the job.

Each takes one step of the plan, and of the same without, and writes what is not the same to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
import traceback
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import groundplan as gp

from . import jobs
from .checkpointed import MODELS, different, step

WORLD = 2
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama": ("Llama", {"model.layers.0": "full", "model.layers.1-2": "selective"}, {"reshard": {"model.layers.2": False}}),
    "encoder": ("encoder", {"layers.0-1": "full", "layers.2": "selective"}, {"reshard": {"layers.0-1": False, "*": True}}),
    "units inside": ("Llama", {"model": "full"}, {}),
    "replicated": ("Llama", {"model.layers.1-3": "full"}, {"axis": "ddp"}),
    "tensor": (
        "encoder",
        {"layers.*": "full"},
        {"tensor": {"layers.*.linear1": "colwise", "layers.*.linear2": "rowwise"}, "axis": "tp"},
    ),
}
"""A model, what is checkpointed, and how it is sharded: along `dp`, where no other axis is named."""


def outcome(name: str) -> dict[str, Any]:
    """What differs from the plan without, how often layers ran, and which were whole after the forward."""
    key, levels, options = CASES[name]
    given = dict(options)
    model, axes = MODELS[key], {given.pop("axis", "dp"): WORLD}
    plan = gp.trace(model.build)
    rules = {name: value for name, value in given.items() if name == "tensor"}
    plain = step(plan.shard(axes, **rules).materialize(seed=0, progress=False), model)
    checkpointed = plan.checkpoint_activations(levels)
    found = step(checkpointed.shard(axes, **given).materialize(seed=0, progress=False), model)
    out = {"different": different(plain, found), "runs": found["runs"], "whole": found["whole"]}
    if "dp" in axes:
        by_hand = checkpointed.meta_module()
        for layer in by_hand.get_submodule(model.layer):
            fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)))
        again = step(gp.materialize(fully_shard(by_hand, mesh=init_device_mesh("cpu", (WORLD,))), seed=0), model)
        out |= {"different by hand": different(plain, again), "runs by hand": again["runs"]}
    return out


def main(folder: str) -> None:
    """One rank's work."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found: dict[str, Any] = {}
    for name in CASES:
        try:
            found[name] = outcome(name)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
