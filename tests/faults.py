"""One rank of a job in which something goes wrong: `python -m tests.faults SCENARIO ...`, under torch.distributed's environment.

It goes through the scenarios one after the other and prints a line of JSON for each: what was raised, how soon, and what is left
of the module and the generators. The ranks are started one by one, as torchrun's agent would end the others itself.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import groundplan as gp

from .layouts import local

TIMEOUT = 3.0
"""Seconds that a rank is waited for where one never comes."""


class FromNumpy(nn.Module):
    """Holds numbers of numpy's global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(np.random.rand(6, 4)))


def burns(*_: Any) -> NoReturn:
    raise ValueError("the disk is on fire")


def dies(*_: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives on")


# what one rank does instead of a part of the library: its number, the part, and what it does
INSTEAD = {
    "raises": (1, "groundplan.runtime.shared.Watched.check", burns),
    "first raises": (0, "groundplan.runtime.shared.Watched.check", burns),
    "raises late": (1, "groundplan.runtime.inplace.wrapped", burns),
    "dies": (1, "groundplan.runtime.shared.Watched.check", dies),
    "dies late": (1, "groundplan.runtime.inplace.wrapped", dies),
    "first dies": (0, "groundplan.runtime.shared.Watched.check", dies),
}


class Scenario:
    """One scenario on this rank: the meta module, and the call that fills it."""

    def __init__(self, name: str) -> None:
        self.name, self.rank = name, dist.get_rank()
        self.odd = self.rank == 1  # the rank that does something else
        np.random.seed(self.rank if name == "numpy" else 0)
        torch.manual_seed(self.rank if name == "state" else 5)
        self.module = None if name == "plan of four" else self._sharded()
        self.before = (torch.get_rng_state(), np.random.get_state())

    def _sharded(self) -> nn.Module:
        if self.name == "numpy":
            plan = gp.trace(FromNumpy)
        elif self.name == "size":
            plan = gp.trace(nn.Linear, 4, 7 if self.odd else 6)
        else:
            plan = gp.trace(nn.Linear, 4, 6)
        if self.name == "decisions" and self.odd:
            plan = plan.cast(torch.bfloat16)
        axis = "other" if self.name == "mesh" and self.odd else "dp"
        module: nn.Module = plan.meta_module()
        fully_shard(module, mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(axis,)))
        return module

    def fill(self) -> None:
        """The call."""
        if self.module is None:
            gp.trace(nn.Linear, 4, 6).shard({"dp": 4}).materialize(seed=0)
        elif self.name == "never comes":
            if self.odd:
                time.sleep(3 * TIMEOUT)  # it may not end before the others have given it up
            else:
                gp.materialize(self.module, seed=0, timeout=TIMEOUT)
        else:
            seed = None if self.name == "state" else 1 if self.name == "seed" and self.odd else 0
            rng = "keyed" if self.name == "rng" and self.odd else "eager"
            gp.materialize(self.module, seed, rng=rng)

    def left(self) -> dict[str, Any]:
        """Whether everything is as it was before the call."""
        tensors = [] if self.module is None else [local(tensor) for tensor in self.module.parameters()]
        numbers, others = np.random.get_state(), self.before[1]
        same = all(np.array_equal(now, then) for now, then in zip(numbers, others, strict=True))
        return {
            "meta": all(tensor.is_meta for tensor in tensors),
            "generator": same and torch.equal(torch.get_rng_state(), self.before[0]),
        }


def outcome(name: str) -> dict[str, Any]:
    """What this rank sees of a scenario."""
    scenario = Scenario(name)
    rank, part, instead = INSTEAD.get(name, (-1, "groundplan.runtime.inplace.wrapped", None))
    error: Exception | None = None
    start = time.monotonic()
    try:
        if rank == scenario.rank:
            with mock.patch(part, instead):
                scenario.fill()
        else:
            scenario.fill()
    except Exception as raised:
        error = raised
    seconds = time.monotonic() - start
    return {"error": type(error).__name__ if error else None, "message": str(error), "seconds": seconds} | scenario.left()


def main(*names: str) -> None:
    """Print a line for each scenario."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in names:
        print(json.dumps(outcome(name)), flush=True)
    if dist.get_rank() == 0:
        sys.stdin.read()  # until the test has heard of the others: this process holds their store
    os._exit(0)  # the process group's own end would wait for those who are gone


if __name__ == "__main__":
    main(*sys.argv[1:])
