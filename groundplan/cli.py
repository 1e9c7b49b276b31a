"""The command line: `groundplan report | materialize | explain | verify SPEC`, `groundplan doctor`.

Errors that groundplan raises on purpose, and those of the user's constructor, end as one message on stderr and exit code 1.
With `--json` stdout holds one JSON object and nothing else; what the constructor prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape

import groundplan as gp

from . import cli_inference as serving
from . import cli_options as options
from .doctor import examine
from .planner.cluster import cluster_of
from .planner.memory import human_bytes
from .planner.optimizers import OPTIMIZERS
from .save import CONFIG, WEIGHTS, Output, named_state, save_state, write_config
from .spec import Spec, offline, parse_spec
from .tracer.errors import GroundplanError, MaterializeError, SpecError

app = typer.Typer(
    name="groundplan",
    help="Draws a PyTorch model's ground plan before anything is built, then builds it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="`package.module:callable`, or a transformers config.json.")]
KwargsOption = Annotated[
    str, typer.Option("--kwargs", metavar="JSON", help="Keyword arguments of the callable; for a config.json, fields to replace.")
]
DtypeOption = Annotated[str | None, typer.Option(metavar="DTYPE", help="Cast floating-point tensors, as `.to(dtype)` would.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Move tensors there, as `.to(device)` would: cpu, cuda, cuda:1, ...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def main(argv: Sequence[str] | None = None) -> None:
    """The `groundplan` script: runs one command with `argv` (`sys.argv` when None) and ends the process with its exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="groundplan")
    except GroundplanError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"groundplan {gp.__version__} (torch {torch.__version__}, Python {sys.version.split()[0]})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# -- report and explain -------------------------------------------------------------------------------------------------


@app.command()
def report(
    spec: SpecArgument,
    kwargs: KwargsOption = "{}",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    train: options.Train = None,
    infer: serving.Infer = False,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    accumulate: options.Accumulate = None,
    new_tokens: serving.NewTokens = None,
    cache: serving.CacheOption = None,
    autocast: options.Autocast = None,
    checkpointing: options.Checkpointing = None,
    clip_grad_norm: options.Clip = None,
    tier: options.TierOption = "T0",
    allocator: options.AllocatorOption = None,
    shard: options.Shard = None,
    tensor: options.Tensor = None,
    compute_dtype: options.ComputeDtype = None,
    reduce_dtype: options.ReduceDtype = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="CLUSTER",
            help="Say whether it fits: 8xH100-80GB, 1x24GB+64GB-cpu, ... or a .json file. Moves to cuda, if it has devices.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `verify --calibration` measured on such devices, for --cluster.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it as one page for a browser, too; the page loads nothing.")
    ] = None,
    svg: options.Svg = None,
    png: options.Png = None,
    as_json: JsonOption = False,
) -> None:
    """Say what the constructor creates: tensors, init functions, bytes, memory. Nothing is allocated."""
    workload = serving.workload(
        train,
        infer,
        new_tokens,
        cache,
        batch_size=batch_size,
        seq_len=seq_len,
        accumulate=accumulate,
        autocast=autocast,
        checkpointing=checkpointing,
        clip_grad_norm=clip_grad_norm,
    )
    sharded = options.sharded(shard, tensor, compute_dtype, reduce_dtype)
    chosen = options.tier(tier, workload, allocator)
    machine = cluster_of(cluster) if cluster is not None else None
    device = "cuda" if device is None and machine is not None and machine.devices else device
    with _session(spec, kwargs) as parsed:
        plan = _plan(parsed, dtype, device)
        plan = plan if sharded is None else sharded.of(plan)
        found = plan.report(workload, machine, tier=chosen, allocator=allocator, calibration=calibration)
    for write, path in ((found.to_html, html), (found.to_svg, svg), (found.to_png, png)):
        if path is not None:
            _write(write, path)
    if as_json:
        _print_json({"spec": parsed.name, **found.to_json(), "memory": found.memory.to_json()})
    else:
        typer.echo(str(found))


def _write(write: Callable[[Path], None], path: Path) -> None:
    try:
        write(path)
    except OSError as error:
        raise _FileError(f"{path} cannot be written: {error}") from error


@app.command()
def explain(
    spec: SpecArgument,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A tensor; without it, every decision.")] = None,
    kwargs: KwargsOption = "{}",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
) -> None:
    """Show one tensor's recipe with its source lines, or every decision with its reason."""
    with _session(spec, kwargs) as parsed:
        text = str(_plan(parsed, dtype, device).explain(name))
    typer.echo(text)


# -- verify -------------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    spec: SpecArgument,
    kwargs: KwargsOption = "{}",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    train: Annotated[
        str | None,
        typer.Option(metavar="OPTIMIZER", help=f"Train it with this optimizer: {', '.join(OPTIMIZERS)}; else build it only."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(metavar="N", help="Samples of a step; with --train.")] = None,
    seq_len: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a sample; with --train.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps that are measured.")] = 3,
    seed: Annotated[int, typer.Option(help="As torch.manual_seed(SEED) before the constructor.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(metavar="PATH", help="Load it from there.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Add what was measured to this file, for `report --calibration`.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build it, and train it for some steps, for real: predicted against measured memory, and what the difference is."""
    workload = options.training(train, batch_size=batch_size, seq_len=seq_len)
    with _session(spec, kwargs) as parsed:
        plan = _plan(parsed, dtype, device)
        _check_main_memory(plan.memory(workload))
        found = plan.verify(workload, steps=steps, seed=seed, checkpoint=checkpoint)
    if calibration is not None:
        found.save_calibration(calibration)
    if as_json:
        _print_json({"spec": parsed.name, **found.to_json()})
    else:
        typer.echo(str(found))


# -- doctor -------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say which ways are open on this machine: what draws random numbers here, tried against torch's own results."""
    found = examine()
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo(str(found))


# -- materialize --------------------------------------------------------------------------------------------------------


@app.command()
def materialize(
    spec: SpecArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help=f"Where {WEIGHTS} is written.")],
    seed: Annotated[int, typer.Option(help="As torch.manual_seed(SEED) before the constructor.")] = 0,
    kwargs: KwargsOption = "{}",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    rng: Annotated[str, typer.Option(help="`eager`, or `keyed`: values by the seed and each name alone.")] = "eager",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that draw random numbers; all cores if not given.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Read values from there; what it does not have is drawn.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are already in DIR.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Build the model and write its state_dict to DIR/model.safetensors; for a config.json, write that too."""
    started = time.monotonic()
    with _session(spec, kwargs) as parsed, Output(out, (WEIGHTS, *((CONFIG,) if parsed.config else ())), force) as written:
        plan = _plan(parsed, dtype, device)
        _check_room(plan, out)
        with _constructing(parsed.name):
            model = plan.materialize(seed=seed, checkpoint=checkpoint, rng=rng, threads=threads)
        saved = save_state(named_state(model), written.temporary(WEIGHTS))
        if parsed.config:
            write_config(parsed.config, model, written.temporary(CONFIG))
        written.commit()
    seconds = time.monotonic() - started
    result = {
        "spec": parsed.name,
        "files": [str(path) for path in written.paths],
        "seed": seed,
        "rng": rng,
        "tensors": saved.tensors,
        "bytes": saved.nbytes,
        "ties": dict(saved.ties),
        "seconds": round(seconds, 3),
    }
    if as_json:
        _print_json(result)
    else:
        what = f"{saved.tensors:,} tensors, {human_bytes(saved.nbytes)}, seed {seed}, {seconds:.1f} s"
        typer.echo(f"{', '.join(map(str, written.paths))}: {what}")


def _check_room(plan: gp.Plan, out: Path) -> None:
    """Refuse what this machine cannot hold, before the system ends the process half-way."""
    size, disk = sum(plan.report().sizes[1].values()), shutil.disk_usage(out).free
    _check_main_memory(plan.memory())
    if size > disk:
        raise MaterializeError(f"the file takes {human_bytes(size)}, and {out} has {human_bytes(disk)} left")


def _check_main_memory(needs: gp.Memory) -> None:
    needed, memory = max(found.get("cpu", 0) for found in needs.by_device.values()), _main_memory()
    if memory is not None and needed > memory:
        raise MaterializeError(
            f"building it takes {human_bytes(needed)} of main memory, and this machine has {human_bytes(memory)}: cast it with "
            "--dtype, or build some tensors only, in Python, with plan.materialize_state(names)"
        )


def _main_memory() -> int | None:
    """Bytes of main memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


# -- what the commands share --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _session(spec: str, kwargs: str) -> Iterator[Spec]:
    """The parsed SPEC; meanwhile stdout is ours alone, and a configuration file stays off the network."""
    with contextlib.redirect_stdout(sys.stderr):
        parsed = parse_spec(spec, _json_object(kwargs))
        with offline() if parsed.config is not None else contextlib.nullcontext():
            yield parsed


def _json_object(text: str) -> dict[str, Any]:
    form = """--kwargs takes a JSON object, such as --kwargs '{"hidden_size": 64}'"""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SpecError(f"{form}; {text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{form}; got {text}")
    return value


def _plan(spec: Spec, dtype: str | None, device: str | None) -> gp.Plan:
    with _constructing(spec.name):
        plan = gp.trace(spec.build, *spec.args, **spec.kwargs)
    plan = plan.cast(options.dtype("--dtype", dtype)) if dtype else plan
    return plan.to(device) if device else plan


def _print_json(value: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


class _FileError(GroundplanError):
    """A file that a command was to write cannot be written."""


class _ConstructorError(GroundplanError):
    """The user's constructor raised; the message says what and where."""


@contextlib.contextmanager
def _constructing(name: str) -> Iterator[None]:
    """Errors of the user's own code come out as one message with their line; groundplan's and torch's own as they are."""
    try:
        yield
    except GroundplanError:
        raise
    except Exception as error:
        line = _users_line(error)
        if line is None:
            raise
        where = f"{line.filename}:{line.lineno} in {line.name}"
        source = f"\n    {line.line}" if line.line else ""
        raise _ConstructorError(f"the constructor {name} raised {type(error).__name__}: {error}\n  {where}{source}") from error


def _users_line(error: Exception) -> traceback.FrameSummary | None:
    """The innermost line outside groundplan, torch and the standard library; None when groundplan itself failed last."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and _is_ours(frames[-1].filename):
        return None
    return next((frame for frame in reversed(frames) if not _is_ours(frame.filename) and not _is_library(frame.filename)), None)


_PACKAGE = Path(__file__).parent.resolve()
_OURS = tuple(
    {str(folder.resolve()) + os.sep for folder in (_PACKAGE, *(_PACKAGE / stage for stage in ("tracer", "planner", "runtime")))}
)
_TORCH = str(Path(torch.__file__).resolve().parent) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep


def _is_ours(file: str) -> bool:
    return os.path.realpath(file).startswith(_OURS)


def _is_library(file: str) -> bool:
    real = os.path.realpath(file)
    return real.startswith(_TORCH) or (real.startswith(_STDLIB) and "site-packages" not in real)
