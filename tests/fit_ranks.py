"""Fitted plans carried out by real processes: `torchrun --nproc-per-node N -m tests.fit_ranks FOLDER` is one job.

`FOLDER` holds the plans. Each rank takes two real steps of the plan that a case would be run with by default, and of the one
that `plan.fit` found, on the CPU over gloo, and one step to compare with a single process; it writes what it finds to
`FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import groundplan as gp
from groundplan.planner.verdict import PROCESS_BYTES

from . import jobs
from .measured_steps import MODELS, measured_peaks, plain_kernels
from .rank_steps import works_given_back

WORDS, BATCH, LENGTH, WIDTH = 512, 4, 64, 96


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        num_hidden_layers=6,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return (output[..., : WIDTH // 4] - 1).square().mean()


def inputs_for(model: str, part: int) -> Any:
    """The part of the batch that one data-parallel rank has."""
    chance = torch.Generator().manual_seed(part)
    if model == "encoder":
        return (torch.randn(BATCH, 3 * LENGTH, WIDTH, generator=chance),)
    tokens = torch.randint(WORDS, (BATCH, LENGTH), generator=chance)
    return {"input_ids": tokens, "labels": tokens}


BUILDS: Mapping[str, Callable[[], nn.Module]] = {"llama": llama, "encoder": encoder}


@dataclass(frozen=True)
class FitCase:
    """A model, so many ranks, the axes that one would take without `fit`, and the share of what these need that there is."""

    model: str
    default: Mapping[str, int]
    share: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        return math.prod(self.default.values())

    def trace(self) -> gp.Plan:
        return gp.trace(BUILDS[self.model])

    def default_plan(self) -> gp.Plan:
        return self.trace().shard(self.default)

    def workload(self, part: int = 0) -> gp.Training:
        loss = loss_of if self.model == "encoder" else None
        return gp.Training("adamw", batch_size=BATCH, inputs=inputs_for(self.model, part), loss=loss)

    def limit(self) -> int:
        """Bytes of tensors that a rank may have."""
        return int(self.share * self.default_plan().memory(self.workload()).peak)

    def cluster(self) -> gp.Cluster:
        """Machines without devices, a process each, whose memory is the limit and what a process itself is taken to need."""
        return gp.Cluster(nodes=self.world, host_memory=PROCESS_BYTES + self.limit())

    def fitted(self) -> gp.Plan:
        return self.trace().fit(self.cluster(), self.workload(), margin=0.0, reserve=2**18, **self.options)


CASES: dict[str, FitCase] = {
    "DDP is too large": FitCase("llama", {"ddp": 2}, 0.85, {"checkpointing": "none", "tensor": None}),
    "checkpoints": FitCase("encoder", {"dp_shard": 2}, 0.6, {"tensor": None}),
    "a tensor axis": FitCase("llama", {"dp_shard": 2}, 0.56),
    "four ranks": FitCase("encoder", {"ddp": 4}, 0.35),
    "two axes": FitCase("llama", {"dp_shard": 4}, 0.6, {"axes": {"tp": 2}}),
}


# -- one rank -----------------------------------------------------------------------------------------------------------


def compared(name: str, case: FitCase, folder: str) -> dict[str, Any]:
    """The bytes of each phase by default and fitted, and by how much loss and gradients are off those of a single process."""
    plan = gp.Plan.load(Path(folder, f"{name}.json")).bind(BUILDS[case.model])
    with plain_kernels(), works_given_back():
        default = measured_peaks(case.default_plan(), case.workload(), mesh=mesh_of(case.default))
        fitted = measured_peaks(plan, case.workload(), mesh=mesh_of(axes_of(plan)))
    return {"case": name, "default": default, "fitted": fitted, **off(plan, case)}


def axes_of(plan: gp.Plan) -> dict[str, int]:
    assert plan.decisions.sharding is not None
    return {axis.name: axis.size for axis in plan.decisions.sharding.axes}


def mesh_of(axes: Mapping[str, int]) -> Any:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def off(plan: gp.Plan, case: FitCase) -> dict[str, Any]:
    """One step of the plan on this rank's part of the batch, against one of all parts in a single process."""
    axes = axes_of(plan)
    tensor = axes.get("tp", 1)
    module = plan.materialize(seed=0, progress=False, mesh=mesh_of(axes))
    loss = step(module, case, dist.get_rank() // tensor)
    dist.all_reduce(loss)
    parts = case.world // tensor
    alone = gp.trace(BUILDS[case.model]).materialize(seed=0, progress=False)
    whole = sum(step(alone, case, part) for part in range(parts)) / parts
    expected = {name: each.grad / parts for name, each in alone.named_parameters() if each.grad is not None}
    worst = 0.0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        wanted = expected.pop(name.removeprefix("module.").replace("_checkpoint_wrapped_module.", ""))
        worst = max(worst, float((found - wanted).abs().max() / wanted.abs().max()))
    assert not expected
    return {"loss": float(loss) / case.world, "single": float(whole), "gradients": worst}


def step(module: nn.Module, case: FitCase, part: int) -> torch.Tensor:
    module.train()
    workload = case.workload(part)
    inputs: Any = workload.inputs
    output = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    loss: torch.Tensor = output.loss if workload.loss is None else workload.loss(output)
    loss.backward()
    return loss.detach()


def launch(world: int, folder: Path) -> list[list[dict[str, Any]]]:
    """Run the job of so many processes, and return what each rank has found; raises `RuntimeError` with what a crash says."""
    return jobs.launch("tests.fit_ranks", folder, world=world, seconds=300)


def main(folder: str) -> None:
    """One rank's work: every case for this number of processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    world = dist.get_world_size()
    gp.trace(MODELS["LSTM"].build).shard({"dp": world}).materialize(seed=0)  # what is made once in a process
    jobs.finish(folder, [compared(name, case, folder) for name, case in CASES.items() if case.world == world])


if __name__ == "__main__":
    main(*sys.argv[1:])
