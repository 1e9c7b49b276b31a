"""One rank of four: real steps of models divided by hand (`hand_divided`, `expert_mixtures`), beside the closed form's."""

from __future__ import annotations

import datetime
import gc
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.utils._python_dispatch import TorchDispatchMode

from groundplan.planner.allocations import START
from groundplan.runtime.gloo_works import PAUSE
from groundplan.runtime.memory_events import memory_profile
from groundplan.runtime.training_step import run_training

from . import expert_mixtures, hand_divided
from .closed_form import PHASES
from .expert_mixtures import Experts
from .hand_divided import Divided
from .jobs import finish
from .measured_steps import _MARK, _peaks, memory_events, plain_kernels
from .rank_steps import works_given_back

Case = Divided | Experts
CASES: list[Case] = [
    Divided("titan", "cpu", {"tp": 4}, True, True, {}, {"optimizer": "adamw"}, 2, 64),
    Divided("feeds", "cpu", {"dp": 2, "tp": 2}, True, False, {"reshard": True}, {"optimizer": "sgd"}, 4, 64),
    Experts(False, "cpu", 4, 2, {"reshard": True}, {"optimizer": "adamw"}, 2, 64),
    Experts(True, "cpu", 4, 4, {"reshard": True}, {"optimizer": "sgd"}, 2, 64),
]


def divided(case: Case) -> tuple[nn.Module, Any]:
    """The module of a rank, with values, and its inputs."""
    torch.manual_seed(0)
    if isinstance(case, Divided):
        mesh = init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
        module = hand_divided.divided_by_hand(hand_divided.MODELS[case.model].build(), case, mesh)
        return module, tuple(torch.ones(each.shape, dtype=each.dtype) for each in case.workload().inputs)
    return expert_mixtures.divided_by_hand(case, case.module(), case.mesh()), case.workload().inputs


class Paused(TorchDispatchMode):
    """Ranks wait for each other before a wait that C++ calls, too: the backward of torch 2.11's `all_to_all_single_autograd`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.wait_tensor.default:
            dist.barrier()
            time.sleep(PAUSE)
        return func(*args, **(kwargs or {}))


def measured(case: Case) -> dict[str, int]:
    phases = [START]

    def phase(name: str) -> None:
        phases.append(name)
        torch.empty(_MARK + len(phases) - 1, dtype=torch.uint8)

    gc.collect()
    training = replace(case.workload(), implementation="for-loop")
    around = loss_parallel() if isinstance(case, Divided) and case.loss else nullcontext()
    with works_given_back(), around, memory_profile() as profiler, Paused():  # type: ignore[no-untyped-call]
        module, inputs = divided(case)
        gc.collect()
        run_training(module, inputs, training, phase)
    found = _peaks(memory_events(profiler), phases)
    found["optimizer"] = max(found["optimizer"], found["first_optimizer"])
    return {name: found[name] for name in PHASES}


def compared(case: Case) -> dict[str, Any]:
    with plain_kernels():
        memory = case.plan().memory(case.workload())
        return {
            "case": str(case),
            "reckoned": {phase: memory.phases[phase] for phase in PHASES},
            "left_out": memory.left_out,
            "real": measured(case),
        }


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    finish(folder, [compared(case) for case in CASES])


if __name__ == "__main__":
    main(*sys.argv[1:])
