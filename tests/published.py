"""Runs that torchtitan has published, and what is predicted for them: reserved memory of one GPU.

The figures are those of torchtitan's `benchmarks/llama3_h100_202412_torchtitan.md`: Llama 3.1 on H100 with 96 GB, end of 2024,
the largest `reserved_bytes.all.peak` between two lines of the log (`torchtitan/metrics.py`), read at the 90th step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import groundplan as gp
from groundplan.planner.allocations import OPTIMIZER, STEP, Timeline
from groundplan.planner.replayed_run import Allocator, replay_run
from groundplan.runtime.fake_ranks import followed_rank
from groundplan.runtime.fake_step import run_fake
from groundplan.runtime.fake_world import fake_world

from . import titan

GIB = 2**30


@dataclass(frozen=True)
class Published:
    """One run: what was trained and on how many GPUs, and the GiB that one of them reserved at most."""

    name: str
    sizes: titan.Sizes
    gpus: int
    batch: int
    checkpointing: str
    gib: float


RUNS = (
    Published("Llama 3.1 8B, FSDP, 8 GPUs", titan.LLAMA_8B, 8, 2, "selective", 82.4),
    Published("Llama 3.1 8B, FSDP, 128 GPUs", titan.LLAMA_8B, 128, 2, "selective", 67.0),
)
"""Those without torch.compile and float8: tables 1 and 3."""

ALLOCATORS = ("", "expandable_segments:True")
"""`PYTORCH_CUDA_ALLOC_CONF` of torchtitan's `multinode_trainer.slurm`, which says nothing, and of its `run_llama_train.sh`.

Which of them started the published runs is not said, so both are predicted, and both have to be right.
"""


def step_of(run: Published) -> Timeline:
    """Two steps of rank 0, on fake tensors: forward, backward, clipping, AdamW."""
    with torch.device("meta"):
        model = titan.Llama(run.sizes)
    module = titan.Trained(model)
    training = gp.Training("adamw", implementation="foreach", clip_grad_norm=1.0, loss=lambda loss: loss)

    with fake_world(run.gpus, 0):
        titan.prepared(model, init_device_mesh("cpu", (run.gpus,)), run.checkpointing)
        return run_fake(module, _batch(run), training, "cuda:0", around=followed_rank(module, copied=False))


def run_of_plan(run: Published) -> Timeline:
    """The same step as a plan has it: FSDP2 reshards the last block and the root as well, and the loss is within the root."""
    plan = gp.trace(lambda: titan.Trained(titan.Llama(run.sizes))).to("cuda")
    plan = plan.shard({"dp": run.gpus}, units="model.layers.*", compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    checkpointing: Any = run.checkpointing
    training = gp.Training("adamw", inputs=_batch(run), checkpointing=checkpointing, clip_grad_norm=1.0, loss=lambda loss: loss)
    found = plan.memory(training, tier="T1").run
    assert found is not None
    return found


def _batch(run: Published) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(run.batch, run.sizes.length, dtype=torch.int64, device="meta") for _ in ("tokens", "labels"))


def reserved(run: Published, step: Timeline, allocator: str) -> dict[str, float]:
    """GiB in the second step, which all later ones are like: what is active at most, and what is reserved."""
    found = replay_run(step, Allocator.of(allocator, f"{run.gpus}xH100-80GB"))
    peaks = [found.peaks[phase]["cuda:0"] for phase in (STEP, OPTIMIZER)]
    return {name: max(getattr(each, name) for each in peaks) / GIB for name in ("active", "reserved")}
