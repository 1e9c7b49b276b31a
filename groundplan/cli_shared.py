"""What the commands of the command line share: SPEC and its options, running the user's constructor, what is written."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import groundplan as gp

from . import cli_options as options
from .spec import Spec, offline, parse_spec
from .tracer.errors import GroundplanError, SpecError

SpecArgument = Annotated[str, typer.Argument(metavar="SPEC", help="`package.module:callable`, or a transformers config.json.")]
KwargsOption = Annotated[
    str, typer.Option("--kwargs", metavar="JSON", help="Keyword arguments of the callable; for a config.json, fields to replace.")
]
DtypeOption = Annotated[str | None, typer.Option(metavar="DTYPE", help="Cast floating-point tensors, as `.to(dtype)` would.")]
DeviceOption = Annotated[
    str | None, typer.Option(metavar="DEVICE", help="Move tensors there, as `.to(device)` would: cpu, cuda, cuda:1, ...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


# -- a session ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def session(spec: str, kwargs: str) -> Iterator[Spec]:
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


def traced(spec: Spec, dtype: str | None, device: str | None) -> gp.Plan:
    """The plan of SPEC, with what `--dtype` and `--device` say."""
    with constructing(spec.name):
        plan = gp.trace(spec.build, *spec.args, **spec.kwargs)
    plan = plan.cast(options.dtype("--dtype", dtype)) if dtype else plan
    return plan.to(device) if device else plan


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False))


class FileError(GroundplanError):
    """A file that a command was to write cannot be written."""


class _ConstructorError(GroundplanError):
    """The user's constructor raised; the message says what and where."""


@contextlib.contextmanager
def constructing(name: str) -> Iterator[None]:
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


def write(form: Callable[[Path], None], path: Path) -> None:
    """Write a file; raises `FileError` where that cannot be."""
    try:
        form(path)
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}") from error
