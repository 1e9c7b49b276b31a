"""Training steps of sharded plans by real processes: `torchrun --nproc-per-node N -m tests.rank_steps FOLDER WHICH` is one job.

Each rank takes two real steps of every case for N processes, on the CPU over gloo, and writes the bytes of each phase, and those
of a fake run of the same rank beside them, to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
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
from groundplan.runtime import gloo_works

from . import jobs
from .measured_steps import MODELS, Case, measured_peaks, plain_kernels
from .plan_driven import mixtral

BF16, F32 = torch.bfloat16, torch.float32
Found = dict[str, Any]


@contextmanager
def works_given_back() -> Iterator[None]:
    """As `plan.verify` has it, and a pause never ends before the work: ranks that are like each other can wait for each other."""
    with gloo_works.works_given_back():
        wait_tensor: Any = _functional_collectives.wait_tensor

        def waited_for(tensor: torch.Tensor) -> Any:
            dist.barrier()  # the others are as far as that, so the work is done after the pause
            return wait_tensor(tensor)

        with mock.patch.object(_functional_collectives, "wait_tensor", waited_for):
            yield


@dataclass(frozen=True)
class RankCase:
    """A sharded plan of a model, what of it is checkpointed, and its training."""

    model: str
    axes: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    levels: dict[str, Any] = field(default_factory=dict)

    @property
    def world(self) -> int:
        count = 1
        for size in self.axes.values():
            count *= size
        return count

    def __str__(self) -> str:
        known = {
            key: "rules" if key == "tensor" and isinstance(value, dict) else value
            for key, value in (self.options | self.training).items()
        }
        settings = (f"{key}={str(value).removeprefix('torch.')}" for key, value in known.items())
        levels = [f"{pattern} {level}" for pattern, level in self.levels.items()]
        return ", ".join([self.model, " x ".join(f"{name}={size}" for name, size in self.axes.items()), *settings, *levels])

    def plan(self) -> gp.Plan:
        plan = gp.trace(MEASURED[self.model].build).shard(self.axes, **self.options)
        return plan.checkpoint_activations(self.levels) if self.levels else plan

    def workload(self) -> gp.Training:
        return gp.Training(**{"inputs": MEASURED[self.model].inputs, **self.training})


MIXED: dict[str, Any] = {"compute_dtype": BF16, "reduce_dtype": F32}
_LLAMA = {
    "model.layers.*.self_attn.[qkv]_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
    "model.embed_tokens": "embedding_rowwise",
    "lm_head": "colwise_gather_output",
}
_BERT = {
    "bert.encoder.layer.*.intermediate.dense": "colwise",
    "bert.encoder.layer.*.output.dense": "rowwise",
}
_VIT = {"vit.layers.*.mlp.fc1": "colwise", "vit.layers.*.mlp.fc2": "rowwise"}
RULES: dict[str, dict[str, str]] = {
    "Llama": _LLAMA,
    "BERT": _BERT,
    "ViT": _VIT,
    "nn.Transformer": {"*coder.layers.*.linear1": "colwise", "*coder.layers.*.linear2": "rowwise"},
}
FOUR = tuple(RULES)


def _case(
    model: str, axes: dict[str, int], training: dict[str, Any] | None = None, levels: dict[str, Any] | None = None, **options: Any
) -> RankCase:
    rules = {"tensor": RULES[model]} if "tp" in axes and "tensor" not in options else {}
    return RankCase(model, axes, rules | options, training or {}, levels or {})


SHORT = [
    _case("Llama", {"dp": 2}, {"clip_grad_norm": 1.0, "checkpointing": "full"}, **MIXED),
    _case("nn.Transformer", {"dp": 2}),
    _case("Llama", {"dp": 2}, levels={"model.layers.0": "full"}, reshard={"model.layers.1": False, "*": True}, **MIXED),
    _case("Llama", {"tp": 2}, tensor="auto"),
    _case("BERT", {"dp": 4}, **MIXED),
    _case("Llama", {"dp": 2, "tp": 2}, {"clip_grad_norm": 1.0}),
]
"""Those that run by default."""

_PAIR, _HYBRID = {"dp": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}
LONG = [
    *(_case(model, {"dp": size}, **mixed) for size in (2, 4) for model in FOUR for mixed in ({}, MIXED)),
    *(_case(model, {"tp": 2}) for model in FOUR),
    *(_case(model, axes, **mixed) for axes in (_PAIR, _HYBRID) for model in ("Llama", "nn.Transformer") for mixed in ({}, MIXED)),
    *(_case("Llama", {"dp": 2}, {"optimizer": name}) for name in ("sgd", "sgd-momentum", "muon")),
    *(_case("Llama", {"dp": 2}, {"implementation": name}) for name in ("foreach", "fused")),
    *(_case("Llama", {"dp": 2}, {"checkpointing": name}, **MIXED) for name in ("full", "selective")),
    _case("nn.Transformer", {"dp": 2}, {"checkpointing": "full"}),
    _case("Llama", {"dp": 2}, {"accumulate": 2}, **MIXED),
    _case("Llama", {"dp": 2}, {"autocast": BF16}),
    _case("Llama", {"dp": 2}, reshard=False),
    *(_case("Llama", {"dp": 2}, reshard={name: False}) for name in ("model.layers.0", "model.layers.1", "")),
    _case("Llama", {"dp": 4}, reshard={"model.layers.0": 2, "model.layers.1": False, "*": True}),
    _case("Llama", {"dp": 2}, levels={"model.layers.0": "selective", "model.layers.1": "full"}),
    _case("Llama", _PAIR, levels={"model.layers.*.mlp": "full"}, reshard={"model.layers.0": False}),
    _case("nn.Transformer", {"dp": 2}, levels={"encoder.layers.1": "full", "decoder.layers.0": "selective"}, reshard={"": False}),
    _case("Llama", {"dp": 4}, reshard=2),
    _case("Llama", {"dp": 2}, compute_dtype=BF16),
    _case("Llama", {"dp": 2}, offload=True),
    _case("Llama", {"tp": 2}, {"clip_grad_norm": 1.0}),
    _case("Llama", {"tp": 2}, {"checkpointing": "full"}),
    _case("Llama", {"dp_replicate": 2, "dp_shard": 1, "tp": 2}),
    *(_case("Mixtral", axes, tensor="auto") for axes in ({"tp": 2}, _PAIR)),
    _case("Mixtral", {"dp": 2}),
    *(_case(model, {"ddp": 2}) for model in FOUR),
]
SETS = {"short": SHORT, "long": LONG}


MEASURED = MODELS | {"Mixtral": Case(mixtral, MODELS["Llama"].inputs)}


def compared(case: RankCase) -> Found:
    """The bytes of each phase of this rank's real steps, and of fake ones."""
    try:
        plan, training = case.plan(), case.workload()
        mesh = init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
        with plain_kernels():
            run = plan.memory(training, tier="T1").rank(dist.get_rank()).run
            assert run is not None
            with works_given_back():
                real = measured_peaks(plan, training, mesh=mesh)
        fake = {phase: devices["cpu"] for phase, devices in run.peaks.items()}
        return {"case": str(case), "fake": fake, "real": real}
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
