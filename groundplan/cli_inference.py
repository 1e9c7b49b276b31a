"""The options of `groundplan report` that say what is served, and how they go with those of training."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Any, get_args

import typer

import groundplan as gp

from . import cli_options
from .planner.inference import Cache
from .tracer.errors import DecisionError

Infer = Annotated[bool, typer.Option("--infer", help="The memory of serving: reading a prompt, decoding tokens after it.")]
NewTokens = Annotated[int | None, typer.Option(metavar="N", help="Tokens decoded after the prompt; with --infer.")]
CacheOption = Annotated[
    str | None, typer.Option("--cache", metavar="HOW", help=f"The cache of keys and values: {', '.join(get_args(Cache))}.")
]


def workload(
    train: str | None, infer: bool, new_tokens: int | None, cache: str | None, **settings: Any
) -> gp.Training | gp.Inference | None:
    """The workload of `--train` or `--infer` and what goes with it; `settings` are those of training, some of both.

    Raises `DecisionError` naming the option whose value cannot be, or that goes with another.
    """
    own = {name: value for name, value in {"new_tokens": new_tokens, "cache": cache}.items() if value is not None}
    if infer:
        return _inference(train, own | {name: value for name, value in settings.items() if value is not None})
    if own:
        raise DecisionError(f"{cli_options.option(next(iter(own)))} is about serving: say --infer")
    return cli_options.training(train, **settings)


def _inference(train: str | None, given: dict[str, Any]) -> gp.Inference:
    if train is not None:
        raise DecisionError("--infer and --train are two workloads: ask for one at a time")
    known = {field.name for field in fields(gp.Inference)}
    strange = next((name for name in given if name not in known), None)
    if strange is not None:
        raise DecisionError(f"{cli_options.option(strange)} is about training, and --infer is not")
    if "autocast" in given:
        given["autocast"] = cli_options.dtype("--autocast", given["autocast"])
    for name, value in given.items():
        _check(cli_options.option(name), {name: value})
    return gp.Inference(**given)


def _check(option: str, field: dict[str, Any]) -> None:
    try:
        gp.Inference(**field)
    except DecisionError as error:
        raise DecisionError(f"{option}: {error}") from error
