"""Measuring speeds on several processes: `torchrun --nproc-per-node N -m tests.speeds_ranks FOLDER` is one job."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import groundplan as gp

from . import jobs


def main(folder: str) -> None:
    """One rank: what it has measured, and whether its generator is as it was."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    before = torch.get_rng_state()
    speeds = gp.measure_speeds("cpu")
    same = torch.equal(before, torch.get_rng_state())
    jobs.finish(folder, {"speeds": speeds.model_dump(mode="json"), "generator": same})


if __name__ == "__main__":
    main(*sys.argv[1:])
