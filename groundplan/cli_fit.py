"""`groundplan fit SPEC --cluster CLUSTER --train OPTIMIZER`, or `--infer`: decides, says why, and writes the plan.

What the options allow is read by functions that name the option whose value cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer

import groundplan as gp

from . import cli_inference as serving
from . import cli_options as options
from . import cli_shared as shared
from .planner.cluster import cluster_of, size_of
from .planner.optimizers import OPTIMIZERS
from .planner.speeds import Speeds
from .planner.tiers import Tier
from .planner.workload import Checkpointing as Level
from .tracer.errors import DecisionError, GroundplanError

ClusterOption = Annotated[
    str, typer.Option(metavar="CLUSTER", help="8xH100-80GB, 2x8xH100-80GB, 1x24GB+64GB-cpu, ... or a .json file.")
]
Train = Annotated[
    str | None, typer.Option(metavar="OPTIMIZER", help=f"Fit it to training with this optimizer: {', '.join(OPTIMIZERS)}.")
]
Infer = Annotated[bool, typer.Option("--infer", help="Fit it to serving: reading a prompt, decoding tokens after it.")]
Axes = Annotated[str | None, typer.Option(metavar="SIZES", help="Sizes of axes that are settled: tp=8, or dp_shard=4,tp=2.")]
Tensor = Annotated[
    str | None,
    typer.Option(
        metavar="RULES", help='Rules of a tensor axis: auto, infer, none, or JSON such as \'{"layers.*.up": "colwise"}\'.'
    ),
]
Offload = Annotated[
    bool | None, typer.Option("--offload/--no-offload", help="Shards in host memory: always, or never; else where it must be.")
]
Levels = Annotated[
    str | None, typer.Option("--checkpointing", metavar="LEVELS", help="What layers may do, of none, selective, full: none,full.")
]
Dtypes = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPES", help="Cast the weights; several, such as float32,bfloat16, to choose from."),
]
ComputeDtypes = Annotated[
    str | None, typer.Option("--compute-dtype", metavar="DTYPES", help="What FSDP computes in; several to choose from.")
]
ReduceDtypes = Annotated[
    str | None, typer.Option("--reduce-dtype", metavar="DTYPES", help="What FSDP reduces gradients in; several to choose from.")
]
SplitBatch = Annotated[bool, typer.Option("--split-batch", help="The batch may be split into micro-batches.")]
Reserve = Annotated[str | None, typer.Option(metavar="SIZE", help="Leave so much free on each device: 2GB.")]
Margin = Annotated[float | None, typer.Option(metavar="SHARE", help="Leave this share of what is needed free; 0.2 if not given.")]
TimeLimit = Annotated[float | None, typer.Option(metavar="SECONDS", help="The best that is found by then.")]
TierOption = Annotated[
    str | None, typer.Option("--tier", metavar="TIER", help="T1: run a step of what is found on fake tensors. T0: do not.")
]
SpeedsOption = Annotated[
    Path | None, typer.Option("--speeds", metavar="FILE", help="What gp.measure_speeds() measured there, as it was saved.")
]
Disk = Annotated[bool, typer.Option("--disk", help="Weights may lie on disk; with --infer.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write it as one page for a browser, too.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write the plan there, for gp.Plan.load.")]


def fit(
    spec: shared.SpecArgument,
    cluster: ClusterOption,
    kwargs: shared.KwargsOption = "{}",
    train: Train = None,
    infer: Infer = False,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    accumulate: options.Accumulate = None,
    new_tokens: serving.NewTokens = None,
    cache: serving.CacheOption = None,
    autocast: options.Autocast = None,
    clip_grad_norm: options.Clip = None,
    axes: Axes = None,
    tensor: Tensor = None,
    offload: Offload = None,
    checkpointing: Levels = None,
    dtype: Dtypes = None,
    compute_dtype: ComputeDtypes = None,
    reduce_dtype: ReduceDtypes = None,
    split_batch: SplitBatch = False,
    reserve: Reserve = None,
    margin: Margin = None,
    time_limit: TimeLimit = None,
    tier: TierOption = None,
    speeds: SpeedsOption = None,
    disk: Disk = False,
    out: Out = None,
    html: Html = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Decide what makes it fit a cluster and be fast there, with the reason for every decision; or say what would make it fit."""
    workload = serving.workload(
        train,
        infer,
        new_tokens,
        cache,
        batch_size=batch_size,
        seq_len=seq_len,
        accumulate=accumulate,
        autocast=autocast,
        clip_grad_norm=clip_grad_norm,
    )
    if workload is None:
        raise DecisionError("fit it to what? say --train with an optimizer, such as --train adamw, or --infer")
    given = {
        "axes": axes,
        "tensor": tensor,
        "offload": offload,
        "checkpointing": checkpointing,
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "reduce_dtype": reduce_dtype,
        "split_batch": split_batch or None,
        "reserve": reserve,
        "margin": margin,
        "time_limit": time_limit,
        "tier": tier,
        "speeds": speeds,
    }
    machine = cluster_of(cluster)
    allowed, cast = _for_training(given, disk) if train is not None else _for_serving(given, disk)
    with shared.session(spec, kwargs) as parsed:
        plan = shared.traced(parsed, cast, None)
        plan = plan.fit(machine, workload, **allowed)
        page = None if html is None else plan.report(cluster=machine, tier=_tier_of(plan))
    files = [path for path in (out, html) if path is not None]
    if out is not None:
        shared.write(plan.save, out)
    if html is not None and page is not None:
        shared.write(page.to_html, html)
    if as_json:
        written = {"spec": parsed.name, "files": [str(path) for path in files]}
        shared.print_json({**written, **plan.decisions.model_dump(mode="json"), "phases": dict(plan.memory().phases)})
    else:
        typer.echo(str(plan.explain()))


def _tier_of(plan: gp.Plan) -> Tier:
    """The tier of the page: the one that training was checked by; what is served runs on fake tensors in each."""
    fitted = plan.decisions.fitted
    return "T1" if fitted is not None and fitted.tier == "T1" else "T0"


# -- what is allowed ----------------------------------------------------------------------------------------------------


def _for_training(given: Mapping[str, Any], disk: bool) -> tuple[dict[str, Any], None]:
    """The arguments of `plan.fit`; what was not given is left out. Raises `DecisionError` naming an option that cannot be."""
    if disk:
        raise DecisionError("--disk is about serving: say --infer; --offload is for training")
    return {name: _READ.get(name, _itself)(name, value) for name, value in given.items() if value is not None}, None


def _for_serving(given: Mapping[str, Any], disk: bool) -> tuple[dict[str, Any], str | None]:
    """The same, with the dtype that weights are cast to before."""
    strange = next((name for name, value in given.items() if value is not None and name != "dtype"), None)
    if strange is not None:
        raise DecisionError(f"{options.option(strange)} is about training, and --infer is not")
    return ({"disk": True} if disk else {}), given["dtype"]


def _itself(name: str, value: Any) -> Any:
    return value


def _tensor(name: str, text: str) -> str | Mapping[str, str] | None:
    if text in ("auto", "infer", "none"):
        return None if text == "none" else text
    return options.rules(text)


def _axes(name: str, text: str) -> dict[str, int]:
    """`dp_shard=4,tp=2`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if not axis or not size.isascii() or not size.isdigit():
            raise DecisionError(f"{options.option(name)} takes sizes of axes such as tp=8 or dp_shard=4,tp=2; {part!r} is none")
        if axis in found:
            raise DecisionError(f"{options.option(name)} gives {axis} twice")
        found[axis] = int(size)
    return found


def _dtypes(name: str, text: str) -> torch.dtype | list[torch.dtype | None]:
    found = [options.dtype(options.option(name), part.strip()) for part in text.split(",")]
    return found[0] if len(found) == 1 else list(found)


def _levels(name: str, text: str) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    strange = next((level for level in found if level not in get_args(Level)), None)
    if strange is not None:
        raise DecisionError(f"{options.option(name)} {strange!r} is not known: {', '.join(get_args(Level))}")
    return found


def _size(name: str, text: str) -> int:
    try:
        return size_of(text)
    except DecisionError as error:
        raise DecisionError(f"{options.option(name)}: {error}") from error


def _tier(name: str, text: str) -> str:
    if text not in ("T0", "T1"):
        raise DecisionError(f"{options.option(name)} {text!r}: what fits is checked by a run, T1, or in closed form alone, T0")
    return text


def _speeds(name: str, path: Path) -> Speeds:
    try:
        return Speeds.load(path)
    except GroundplanError as error:
        raise DecisionError(f"{options.option(name)}: {error}") from error


_READ: Mapping[str, Callable[[str, Any], Any]] = {
    "axes": _axes,
    "tensor": _tensor,
    "checkpointing": _levels,
    "dtype": _dtypes,
    "compute_dtype": _dtypes,
    "reduce_dtype": _dtypes,
    "reserve": _size,
    "tier": _tier,
    "speeds": _speeds,
}
