"""Serving of sharded plans by real processes: `torchrun --nproc-per-node 2 -m tests.serving_ranks FOLDER` is one job.

Each rank serves every case for real, on the CPU over gloo, and writes the bytes of each phase, and those of a fake run of the
same rank beside them, to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import groundplan as gp

from . import jobs
from .measured_inference import SERVED, measured_inference
from .measured_steps import MODELS, plain_kernels
from .rank_steps import works_given_back

CASES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "tensor parallel": ({"tp": 2}, {"tensor": "auto"}),
    "FSDP": ({"dp": 2}, {}),
}


def compared(axes: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    """The bytes of each phase of this rank's real run, and of a fake one."""
    plan, inference = gp.trace(SERVED["Llama"]).shard(axes, **options), gp.Inference(batch_size=2, seq_len=16, new_tokens=3)
    with plain_kernels():
        run = plan.memory(inference, tier="T1").rank(dist.get_rank()).run
        assert run is not None
        mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        with works_given_back():
            real = measured_inference(plan, inference, mesh=mesh)
    return {"fake": {phase: run.peaks[phase]["cpu"] for phase in real}, "real": real}


def launch(folder: Path) -> list[list[dict[str, Any]]]:
    """Run the job of two processes, and return what each rank has found; raises `RuntimeError` with what a crash says."""
    return jobs.launch("tests.serving_ranks", folder, world=2, seconds=300)


def main(folder: str) -> None:
    """One rank's work: every case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    gp.trace(MODELS["LSTM"].build).shard({"dp": 2}).materialize(seed=0)  # what is made once in a process
    jobs.finish(folder, [{"case": name, **compared(*case)} for name, case in CASES.items()])


if __name__ == "__main__":
    main(*sys.argv[1:])
