"""The command line: `groundplan report | fit | materialize | explain | verify SPEC`, `groundplan doctor`.

Errors that groundplan raises on purpose, and those of the user's constructor, end as one message on stderr and exit code 1.
With `--json` stdout holds one JSON object and nothing else; what the constructor prints goes to stderr.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape

import groundplan as gp

from . import cli_inference as serving
from . import cli_options as options
from . import cli_shared as shared
from .cli_fit import fit
from .doctor import examine
from .planner.cluster import cluster_of
from .planner.memory import human_bytes
from .planner.optimizers import OPTIMIZERS
from .save import CONFIG, WEIGHTS, Output, named_state, save_state, write_config
from .tracer.errors import GroundplanError, MaterializeError

app = typer.Typer(
    name="groundplan",
    help="Draws a PyTorch model's ground plan before anything is built, then builds it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


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
    spec: shared.SpecArgument,
    kwargs: shared.KwargsOption = "{}",
    dtype: shared.DtypeOption = None,
    device: shared.DeviceOption = None,
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
    as_json: shared.JsonOption = False,
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
    with shared.session(spec, kwargs) as parsed:
        plan = shared.traced(parsed, dtype, device)
        plan = plan if sharded is None else sharded.of(plan)
        found = plan.report(workload, machine, tier=chosen, allocator=allocator, calibration=calibration)
    for write, path in ((found.to_html, html), (found.to_svg, svg), (found.to_png, png)):
        if path is not None:
            shared.write(write, path)
    if as_json:
        shared.print_json({"spec": parsed.name, **found.to_json(), "memory": found.memory.to_json()})
    else:
        typer.echo(str(found))


@app.command()
def explain(
    spec: shared.SpecArgument,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A tensor; without it, every decision.")] = None,
    kwargs: shared.KwargsOption = "{}",
    dtype: shared.DtypeOption = None,
    device: shared.DeviceOption = None,
) -> None:
    """Show one tensor's recipe with its source lines, or every decision with its reason."""
    with shared.session(spec, kwargs) as parsed:
        text = str(shared.traced(parsed, dtype, device).explain(name))
    typer.echo(text)


# -- verify -------------------------------------------------------------------------------------------------------------


@app.command()
def verify(
    spec: shared.SpecArgument,
    kwargs: shared.KwargsOption = "{}",
    dtype: shared.DtypeOption = None,
    device: shared.DeviceOption = None,
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
    as_json: shared.JsonOption = False,
) -> None:
    """Build it, and train it for some steps, for real: predicted against measured memory, and what the difference is."""
    workload = options.training(train, batch_size=batch_size, seq_len=seq_len)
    with shared.session(spec, kwargs) as parsed:
        plan = shared.traced(parsed, dtype, device)
        _check_main_memory(plan.memory(workload))
        found = plan.verify(workload, steps=steps, seed=seed, checkpoint=checkpoint)
    if calibration is not None:
        found.save_calibration(calibration)
    if as_json:
        shared.print_json({"spec": parsed.name, **found.to_json()})
    else:
        typer.echo(str(found))


# -- doctor -------------------------------------------------------------------------------------------------------------


@app.command()
def doctor(as_json: shared.JsonOption = False) -> None:
    """Say which ways are open on this machine: what draws random numbers here, tried against torch's own results."""
    found = examine()
    if as_json:
        shared.print_json(found.to_json())
    else:
        typer.echo(str(found))


# -- materialize --------------------------------------------------------------------------------------------------------


@app.command()
def materialize(
    spec: shared.SpecArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help=f"Where {WEIGHTS} is written.")],
    seed: Annotated[int, typer.Option(help="As torch.manual_seed(SEED) before the constructor.")] = 0,
    kwargs: shared.KwargsOption = "{}",
    dtype: shared.DtypeOption = None,
    device: shared.DeviceOption = None,
    rng: Annotated[str, typer.Option(help="`eager`, or `keyed`: values by the seed and each name alone.")] = "eager",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that draw random numbers; all cores if not given.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Read values from there; what it does not have is drawn.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are already in DIR.")] = False,
    as_json: shared.JsonOption = False,
) -> None:
    """Build the model and write its state_dict to DIR/model.safetensors; for a config.json, write that too."""
    started = time.monotonic()
    with shared.session(spec, kwargs) as parsed, Output(out, (WEIGHTS, *((CONFIG,) if parsed.config else ())), force) as written:
        plan = shared.traced(parsed, dtype, device)
        _check_room(plan, out)
        with shared.constructing(parsed.name):
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
        shared.print_json(result)
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


app.command()(fit)
