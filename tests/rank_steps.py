"""Training steps of sharded plans by real processes: `torchrun --nproc-per-node N -m tests.rank_steps FOLDER WHICH` is one job.

Each rank takes two real steps of every case for N processes, on the CPU over gloo, and writes the bytes of each phase, and those of a
fake run of the same rank beside them, to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives
from torch.distributed.device_mesh import init_device_mesh

import groundplan as gp

from . import jobs
from .measured_steps import MODELS, measured_peaks, plain_kernels

_PAUSE = 0.01  # seconds
BF16, F32 = torch.bfloat16, torch.float32
Found = dict[str, Any]


@contextmanager
def works_given_back() -> Iterator[None]:
    """Have every collective's work end in this thread: what gloo's own threads give back, the profiler does not see.

    A thread of gloo lets go of a work a moment after it has said that the work is done; whoever lets go last frees its tensors.
    """
    wait, wait_tensor = dist.Work.wait, _functional_collectives.wait_tensor

    def waited(work: dist.Work, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(_PAUSE)
        return done

    def waited_for(tensor: torch.Tensor) -> torch.Tensor:
        dist.barrier()  # the others are as far as that, so the work is done after the pause
        return wait_tensor(tensor)

    with mock.patch.object(dist.Work, "wait", waited), mock.patch.object(_functional_collectives, "wait_tensor", waited_for):
        yield


@dataclass(frozen=True)
class RankCase:
    """A sharded plan of a model, and its training."""

    model: str
    axes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        count = 1
        for size in self.axes.values():
            count *= size
        return count

    def __str__(self) -> str:
        settings = (f"{key}={value}" for key, value in (*self.options.items(), *self.training.items()))
        return ", ".join([self.model, " x ".join(f"{name}={size}" for name, size in self.axes.items()), *settings])

    def plan(self) -> gp.Plan:
        return gp.trace(MODELS[self.model].build).shard(self.axes, **self.options)

    def workload(self) -> gp.Training:
        return gp.Training(**{"inputs": MODELS[self.model].inputs, **self.training})


MIXED = {"compute_dtype": BF16, "reduce_dtype": F32}
_LLAMA = {
    "model.layers.*.self_attn.[qkv]_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
_TRANSFORMER = {"*coder.layers.*.linear1": "colwise", "*coder.layers.*.linear2": "rowwise"}
_VOCABULARY = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
QUICK = [
    RankCase("Llama", {"dp": 2}),
    RankCase("Llama", {"dp": 2}, MIXED),
    RankCase("BERT", {"dp": 2}),
    RankCase("nn.Transformer", {"dp": 2}),
    RankCase("ViT", {"dp": 2}, MIXED),
]
TRY = [
    RankCase("Llama", {"tp": 2}, {"tensor": "auto"}),
    RankCase("Llama", {"tp": 2}, {"tensor": _LLAMA}),
    RankCase("Llama", {"tp": 2}, {"tensor": _LLAMA | _VOCABULARY}),
    RankCase("nn.Transformer", {"tp": 2}, {"tensor": _TRANSFORMER}),
    RankCase("Llama", {"dp": 2}, {"reshard": False}),
    RankCase("Llama", {"dp": 2}, {"compute_dtype": BF16}),
    RankCase("Llama", {"dp": 2}, {"offload": True}),
    RankCase("Llama", {"dp": 2}, MIXED, {"checkpointing": "full", "clip_grad_norm": 1.0}),
    RankCase("nn.Transformer", {"dp": 2}, {}, {"checkpointing": "full", "optimizer": "sgd-momentum"}),
    RankCase("Llama", {"dp": 2}, {}, {"implementation": "foreach"}),
    RankCase("Llama", {"dp": 2}, {}, {"implementation": "fused"}),
    RankCase("Llama", {"ddp": 2}),
]
TP = [c for c in TRY if "tp" in c.axes]
TRY4 = [
    RankCase("Llama", {"dp": 4}),
    RankCase("Llama", {"dp": 4}, MIXED),
    RankCase("ViT", {"dp": 4}),
    RankCase("Llama", {"dp_replicate": 2, "dp_shard": 2}, MIXED),
    RankCase("Llama", {"dp_replicate": 2, "dp_shard": 2}),
    RankCase("Llama", {"dp": 4}, {"reshard": 2}),
    RankCase("Llama", {"dp": 2, "tp": 2}, {"tensor": _LLAMA}),
    RankCase("Llama", {"dp": 2, "tp": 2}, {"tensor": "auto", **MIXED}),
    RankCase("nn.Transformer", {"dp": 2, "tp": 2}, {"tensor": _TRANSFORMER}),
    RankCase("Llama", {"dp_replicate": 2, "dp_shard": 1, "tp": 2}, {"tensor": _LLAMA}),
]
SETS = {"quick": QUICK, "try": TRY, "tp": TP, "try4": TRY4}


def compared(case: RankCase) -> Found:
    """The bytes of each phase of this rank's real steps, and of fake ones."""
    try:
        plan, training = case.plan(), case.workload()
        with plain_kernels():
            from groundplan.runtime.fake_ranks import fake_rank_step

            run = fake_rank_step(plan._bound, plan.decisions, training, dist.get_rank())
            with works_given_back():
                real = measured_peaks(
                    plan, training, mesh=init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
                )
        return {"case": str(case), "fake": {phase: devices["cpu"] for phase, devices in run.peaks.items()}, "real": real}
    except Exception:
        return {"case": str(case), "error": traceback.format_exc()}


def launch(world: int, which: str, folder: Path) -> list[list[Found]]:
    """Run the job of so many processes, and return what each rank has found; raises `RuntimeError` with what a crash says."""
    return jobs.launch("tests.rank_steps", folder, which, world=world, seconds=900)


def main(folder: str, which: str) -> None:
    """One rank's work: every case of a set for this number of processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    gp.trace(MODELS["LSTM"].build).shard({"dp": dist.get_world_size()}).materialize(seed=0)  # what is made once in a process
    jobs.finish(folder, [compared(case) for case in SETS[which] if case.world == dist.get_world_size()])


if __name__ == "__main__":
    main(*sys.argv[1:])
