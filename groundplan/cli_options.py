"""The options of `groundplan report` that say what is trained, how it is divided, and how its memory is found out.

Each is checked by itself, so that what is wrong is said of the option that it was written with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import torch
import typer

import groundplan as gp

from .planner.allocator_config import AllocatorConfig
from .planner.optimizers import OPTIMIZERS
from .planner.tiers import Tier
from .planner.workload import Checkpointing as Known
from .tracer.errors import DecisionError, GroundplanError, nearest

Train = Annotated[
    str | None,
    typer.Option(metavar="OPTIMIZER", help=f"The memory of training with it, not the weights alone: {', '.join(OPTIMIZERS)}."),
]
BatchSize = Annotated[int | None, typer.Option(metavar="N", help="Samples on one device; with --train or --infer.")]
SeqLen = Annotated[int | None, typer.Option(metavar="N", help="Tokens of a sample or prompt; with --train or --infer.")]
Accumulate = Annotated[int | None, typer.Option(metavar="N", help="Micro-batches of a step; with --train.")]
Autocast = Annotated[str | None, typer.Option(metavar="DTYPE", help="Train under torch.autocast: bfloat16 or float16.")]
Checkpointing = Annotated[str | None, typer.Option(metavar="HOW", help=f"Checkpoint activations: {', '.join(get_args(Known))}.")]
Clip = Annotated[float | None, typer.Option("--clip-grad-norm", metavar="NORM", help="Clip the gradients to this norm.")]
TierOption = Annotated[
    str, typer.Option(metavar="TIER", help="T0: closed form. T1: a run on fake tensors. T2: that and the caching allocator.")
]
AllocatorOption = Annotated[
    str | None, typer.Option(metavar="SETTINGS", help="As in PYTORCH_ALLOC_CONF: expandable_segments:True; with T0 and T2.")
]
Shard = Annotated[
    str | None, typer.Option(metavar="JSON", help="""Divide it between ranks: '{"dp": 8}', '{"dp_shard": 4, "tp": 2}'.""")
]
Tensor = Annotated[
    str | None,
    typer.Option(metavar="RULES", help='Tensor parallel rules: auto, infer, or JSON such as \'{"layers.*.up": "colwise"}\'.'),
]
ComputeDtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="FSDP computes in it; with --shard.")]
ReduceDtype = Annotated[str | None, typer.Option(metavar="DTYPE", help="FSDP reduces gradients in it; with --shard.")]
Svg = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the memory over time as a drawing, too.")]
Png = Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as an image, too; needs the package resvg-py.")]


# -- training -----------------------------------------------------------------------------------------------------------


def training(train: str | None, **settings: Any) -> gp.Training | None:
    """The workload of `--train` and what goes with it, by the names that `gp.Training` has; None without `--train`.

    Raises `DecisionError` naming the option whose value cannot be, or that lacks `--train`.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if train is None:
        if given:
            raise DecisionError(f"{option(next(iter(given)))} is about training: say with which optimizer, such as --train adamw")
        return None
    _checked("--train", optimizer=train)
    if "autocast" in given:
        given["autocast"] = dtype("--autocast", given["autocast"])
    for name, value in given.items():
        _checked(option(name), **{name: value})
    return gp.Training(optimizer=train, **given)


def _checked(name: str, **field: Any) -> None:
    try:
        gp.Training(**field)
    except DecisionError as error:
        raise DecisionError(f"{name}: {error}") from error


def option(name: str) -> str:
    """The option of a parameter.

    >>> option("batch_size")
    '--batch-size'
    """
    return f"--{name.replace('_', '-')}"


def dtype(name: str, value: str) -> torch.dtype:
    """The floating-point dtype that an option names; raises `DecisionError`."""
    found = getattr(torch, value.removeprefix("torch."), None)
    if isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    floating = [str(each)[6:] for each in vars(torch).values() if isinstance(each, torch.dtype) and each.is_floating_point]
    hint = nearest(value, sorted(set(floating))) or "; write bfloat16, float16 or float32"
    raise DecisionError(f"{name} {value!r} is no floating-point dtype of torch{hint}")


# -- sharding -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sharded:
    """What `--shard` and the options beside it say: arguments of `plan.shard`."""

    axes: Mapping[str, int]
    arguments: Mapping[str, Any]

    def of(self, plan: gp.Plan) -> gp.Plan:
        """The plan, divided."""
        try:
            return plan.shard(self.axes, **self.arguments)
        except GroundplanError as error:
            raise DecisionError(f"--shard: {error}") from error


def sharded(shard: str | None, tensor: str | None, compute_dtype: str | None, reduce_dtype: str | None) -> Sharded | None:
    """Reads the options; raises `DecisionError` naming the one that cannot be, or that lacks `--shard`."""
    dtypes = {"compute_dtype": compute_dtype, "reduce_dtype": reduce_dtype}
    if shard is None:
        beside = next((name for name, value in {"tensor": tensor, **dtypes}.items() if value is not None), None)
        if beside is not None:
            raise DecisionError(f"""{option(beside)} is about ranks: say which, such as --shard '{{"dp": 8}}'""")
        return None
    arguments: dict[str, Any] = {name: dtype(option(name), value) for name, value in dtypes.items() if value is not None}
    if tensor is not None:
        arguments["tensor"] = tensor if tensor in ("auto", "infer") else rules(tensor)
    return Sharded(_object("--shard", shard, int, '{"dp": 8}'), arguments)


def rules(text: str) -> dict[str, str]:
    """The rules of `--tensor` that are JSON; raises `DecisionError`."""
    return _object("--tensor", text, str, '{"layers.*.up": "colwise"}')


def _object(name: str, text: str, kind: type, example: str) -> dict[str, Any]:
    form = f"{name} takes a JSON object such as {name} '{example}'"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise DecisionError(f"{form}; {text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DecisionError(f"{form}; got {text}")
    wrong = next((key for key, each in value.items() if not isinstance(each, kind) or isinstance(each, bool)), None)
    if wrong is not None:
        raise DecisionError(f"{form}; {wrong!r} is {json.dumps(value[wrong])}")
    return value


# -- tiers --------------------------------------------------------------------------------------------------------------


def tier(name: str, workload: gp.Training | gp.Inference | None, allocator: str | None) -> Tier:
    """The tier of that name; raises `DecisionError` naming the option that cannot be, or does not go with the others."""
    if name not in get_args(Tier):
        raise DecisionError(f"--tier {name!r} is not known: {', '.join(get_args(Tier))}")
    if name != "T0" and workload is None:
        raise DecisionError(f"--tier {name} runs a step: say which, such as --train adamw, or --infer")
    if name == "T1" and allocator is not None:
        raise DecisionError("--allocator is for --tier T2, which is T1 with the allocator replayed, and for T0")
    try:
        AllocatorConfig.parse(allocator or "")
    except GroundplanError as error:
        raise DecisionError(f"--allocator: {error}") from error
    return cast("Tier", name)
