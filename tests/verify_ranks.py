"""Sharded plans that are verified: `python -m torch.distributed.run ... -m tests.verify_ranks FOLDER`.

Each rank writes what it finds to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import groundplan as gp
from groundplan.runtime import verify

from . import jobs


class Deep(nn.Module):
    """Four equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(4))

    def forward(self, value: torch.Tensor) -> Any:
        for block in self.blocks:
            value = torch.relu(block(value))
        return value


def failing() -> str:
    """What a rank says where the constructor fails on the second one, when it runs for real."""
    plan = gp.trace(deep_or_not).shard({"dp": 2})
    allowed[0] = False
    try:
        plan.verify(seed=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


allowed = [True]


def deep_or_not() -> nn.Module:
    if dist.get_rank() == 1 and not allowed[0]:
        raise ValueError("no")
    return Deep()


def saved() -> list[list[str]]:
    """The phases of unequal ranks, by the largest checkpoint: below all that there is, and just that."""
    plan = gp.trace(nn.Linear, 300, 5).shard({"dp": 2})
    one, other = (plan.memory().rank(rank).phases["load"] for rank in range(2))
    assert other < one
    found = []
    for most in (other, 2 * one):
        with mock.patch.object(verify, "SAVED_AT_MOST", most):
            found.append([check.phase for check in plan.verify(seed=1).checks])
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))  # for a rank that waits for nobody
    plan = gp.trace(Deep).shard({"dp": dist.get_world_size()})
    before = torch.get_rng_state()
    built = plan.verify(seed=1)
    trained = plan.verify(gp.Training("adamw", inputs=lambda: (torch.ones(2, 256),)), seed=1)
    found = {
        "built": built.to_json(),
        "trained": trained.to_json(),
        "text": str(trained),
        "saved": saved(),
        "failing": failing(),
        "kept": torch.equal(before, torch.get_rng_state()),
    }
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
