"""Plans that shard, built by several processes: `torchrun --nproc-per-node N -m tests.plan_driven FOLDER` is one job.

Each rank builds every case for N processes by `plan.shard(...).materialize(...)` alone, compares it with the eager constructor on
a single device and with what the planner has said, and writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import groundplan as gp
from groundplan.planner.rank_memory import rank_timelines

from . import jobs, layouts
from .layouts import Tensors, causal_loss, differing, left_on_meta, local, members, ties_of, transformer_loss

SEED = 3
BF16 = torch.bfloat16
Rules = dict[str, str]
Found = dict[str, Any]

# -- models -------------------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"model.layers.*.self_attn.[qkv]_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}
_VOCABULARY = {"model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_gather_output"}
_MLP = {
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


def llama() -> nn.Module:
    import transformers as tf

    return tf.LlamaForCausalLM(tf.LlamaConfig(**_TEXT, tie_word_embeddings=True))


def untied_llama() -> nn.Module:
    import transformers as tf

    return tf.LlamaForCausalLM(tf.LlamaConfig(**_TEXT, tie_word_embeddings=False))


def qwen() -> nn.Module:
    import transformers as tf

    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**_TEXT))


def mixtral() -> nn.Module:
    import transformers as tf

    return tf.MixtralForCausalLM(tf.MixtralConfig(**_TEXT, num_local_experts=4))


_LINEAR = {"*coder.layers.*.linear1": "colwise", "*coder.layers.*.linear2": "rowwise"}
RULES: dict[str, Rules] = {
    "Llama": _ATTENTION | _MLP | _VOCABULARY,
    "Llama, untied": _ATTENTION | _MLP | _VOCABULARY,
    "Qwen3": _ATTENTION | _MLP,
    "Mixtral": _ATTENTION | _VOCABULARY,
    "nn.Transformer": _LINEAR,
}
MODELS = {
    "Llama": layouts.Model(llama, "", causal_loss, {}),
    "Llama, untied": layouts.Model(untied_llama, "", causal_loss, {}),
    "Qwen3": layouts.Model(qwen, "", causal_loss, {}),
    "Mixtral": layouts.Model(mixtral, "", causal_loss, {}),
    "nn.Transformer": layouts.Model(layouts.transformer, "", transformer_loss, {}),
}

# -- cases --------------------------------------------------------------------------------------------------------------

ALL = tuple(MODELS)
PUBLISHED = ALL[:-1]


@dataclass(frozen=True)
class Case:
    """What is asked of the plan, for these models; `tensor` is `"rules"` or `"auto"`.

    `how` the plan becomes a module: as it is, from a file, on a mesh of the user's, or without a seed.
    """

    axes: dict[str, int]
    models: tuple[str, ...]
    tensor: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    cast: torch.dtype | None = None
    how: str = "as it is"
    tolerance: float = 1e-4

    @property
    def world(self) -> int:
        """How many processes it takes."""
        count = 1
        for size in self.axes.values():
            count *= size
        return count


_PAIR = {"dp": 2, "tp": 2}
CASES = {
    "FSDP": Case({"dp": 2}, ALL),
    "FSDP, not resharding": Case({"fsdp": 2}, ("Qwen3",), options={"reshard": False}),
    "FSDP, mixed precision": Case({"dp": 2}, ("Llama",), options={"compute_dtype": BF16}, tolerance=0.01),
    "FSDP, reducing precisely": Case(
        {"dp": 2}, ("Qwen3",), options={"compute_dtype": BF16, "reduce_dtype": torch.float32}, tolerance=0.01
    ),
    "FSDP, offloaded": Case({"dp": 2}, ("Llama, untied",), options={"offload": True}),
    "FSDP, other units": Case({"dp": 2}, ("nn.Transformer",), options={"units": ["encoder", "decoder.layers.*.linear1"]}),
    "FSDP, no units": Case({"dp": 2}, ("Llama",), options={"units": ()}),
    "FSDP, cast": Case({"dp": 2}, ("Llama", "nn.Transformer"), cast=BF16, tolerance=0.01),
    "FSDP, from a file": Case({"dp": 2}, ("Qwen3",), how="file"),
    "FSDP, user's mesh": Case({"shard": 2}, ("Llama",), how="mesh"),
    "FSDP, no seed": Case({"dp": 2}, ("Llama",), how="no seed"),
    "TP by rules": Case({"tp": 2}, ALL, "rules"),
    "TP by rules, cast": Case({"tp": 2}, ("Llama",), "rules", cast=BF16, tolerance=0.01),
    "TP of the model's own": Case({"tp": 2}, PUBLISHED, "auto"),
    "DDP": Case({"ddp": 2}, ("Llama", "Mixtral", "nn.Transformer")),
    "FSDP of four": Case({"dp": 4}, ("Llama", "nn.Transformer")),
    "HSDP": Case({"dp_replicate": 2, "dp_shard": 2}, ("Llama", "Mixtral")),
    "HSDP, sharing units": Case({"dp_replicate": 1, "dp_shard": 4}, ("Llama",), options={"reshard": 2}),
    "FSDP x TP by rules": Case(_PAIR, ALL, "rules"),
    "FSDP x TP of the model's own": Case(_PAIR, PUBLISHED, "auto"),
    "FSDP x TP, offloaded, cast": Case(_PAIR, ("Llama",), "rules", {"offload": True}, BF16, tolerance=0.01),
    "FSDP x TP, from a file": Case(_PAIR, ("Qwen3",), "auto", how="file"),
    "FSDP x TP, user's mesh": Case(_PAIR, ("Llama, untied",), "rules", how="mesh"),
}


def cases(world: int) -> list[tuple[str, str]]:
    """The cases for so many processes, each with its models."""
    return [(name, model) for name, case in CASES.items() if case.world == world for model in case.models]


# -- on a single device -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Eager:
    """The plan, and what the eager constructor gives: values, ties, the generator afterwards, losses around a step."""

    plan: gp.Plan
    values: Tensors
    ties: list[list[str]]
    generator: torch.Tensor
    losses: list[float]


@cache
def eager(name: str, cast: torch.dtype | None) -> Eager:
    plan = gp.trace(MODELS[name].build)
    torch.manual_seed(SEED)
    module = MODELS[name].build().to(cast)
    generator = torch.get_rng_state()
    values = {key: tensor.detach().clone() for key, tensor in members(module).items()}
    ties = ties_of(members(module))
    return Eager(plan.cast(cast) if cast else plan, values, ties, generator, layouts.losses(module, MODELS[name]))


# -- on one of several ranks --------------------------------------------------------------------------------------------


def checked(name: str, model: str, folder: Path) -> Found:
    """What this rank finds in one case, or the error that it meets."""
    found: Found = {"case": name, "model": model}
    try:
        return found | _checked(CASES[name], model, folder)
    except Exception:
        return found | {"error": traceback.format_exc()}


def _checked(case: Case, model: str, folder: Path) -> Found:
    expected = eager(model, case.cast)
    rules: Any = RULES[model] if case.tensor == "rules" else case.tensor
    plan = expected.plan.shard(case.axes, tensor=rules, **case.options)
    module = _built(plan, case, MODELS[model].build, folder)
    generator = torch.equal(torch.get_rng_state(), expected.generator)
    tensors = members(module)
    found = {
        "differing": differing(expected.values, tensors),
        "meta": left_on_meta(module),
        "ties": ties_of(tensors) == expected.ties,
        "generator": generator,
        "mispredicted": _mispredicted(plan, tensors),
        "bytes": sum({id(tensor): local(tensor).nbytes for tensor in tensors.values()}.values()),
        "predicted": plan.memory().rank(dist.get_rank()).by_device["checkpoint"]["cpu"],
    }
    return found | {"losses": layouts.losses(module, MODELS[model]), "expected": expected.losses}


def _built(plan: gp.Plan, case: Case, build: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """The module, by the way that the case goes; the generator stands elsewhere on each rank, unless it says the values."""
    torch.manual_seed(SEED if case.how == "no seed" else 100 + dist.get_rank())
    options: dict[str, Any] = {}
    if case.how == "file":
        file = folder / f"plan{dist.get_rank()}.json"
        plan.save(file)
        plan = gp.Plan.load(file).bind(build)
    if case.how == "mesh":
        options["mesh"] = init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
    module = plan.materialize(None if case.how == "no seed" else SEED, **options)
    assert isinstance(module, nn.Module)
    return module


def _mispredicted(plan: gp.Plan, tensors: Tensors) -> list[str]:
    """The tensors of which this rank holds something else than the planner says."""
    said = {each.tensor: each.nbytes for each in rank_timelines(plan.graph, plan.decisions, None, dist.get_rank())["checkpoint"]}
    return [
        f"{name} holds {local(tensors[name]).nbytes} bytes, not {nbytes}"
        for name, nbytes in said.items()
        if local(tensors[name]).nbytes != nbytes
    ]


def refused() -> Found:
    """The errors of meshes that do not fit, on every rank: one of other names, and a plan for more ranks than there are."""
    plan, world = gp.trace(nn.Linear, 4, 6), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("copies",))
    return {
        "names": _error(lambda: plan.shard({"dp": world}).materialize(seed=0, mesh=mesh)),
        "ranks": _error(lambda: plan.shard({"dp": 2 * world}).materialize(seed=0)),
    }


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except gp.MaterializeError as error:
        return str(error)
    return "nothing was raised"


# -- a job --------------------------------------------------------------------------------------------------------------


def launch(world: int, folder: Path) -> list[Found]:
    """Run the job of so many processes, and return what each rank has found; raises `RuntimeError` with what a crash says."""
    return jobs.launch("tests.plan_driven", folder, world=world, seconds=600)


def main(folder: str) -> None:
    """One rank's work: every case for this number of processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    found: Found = {"refused": refused()}
    found["cases"] = [checked(*case, Path(folder)) for case in cases(dist.get_world_size())]
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
