"""The third stage's checkers: what must hold before a build, and after it."""

from __future__ import annotations

from typing import Literal

import torch

from ..planner.decisions import Decisions, Move
from ..tracer.errors import MaterializeError, UninitializedError
from ..tracer.graph import ParamGraph, TensorNode
from .guided import Guided

Uninitialized = Literal["error", "zero", "empty"]
_SHOWN = 8


def check_devices(graph: ParamGraph, decisions: Decisions) -> None:
    """Raise `MaterializeError` where the constructor or a step wants a device that this machine does not have."""
    built_on = dict.fromkeys([graph.ambient.default_device, *(storage.device for storage in graph.storages)])
    moved_to = dict.fromkeys(step.device for step in decisions.steps if isinstance(step, Move))
    for device, who, way_out in (
        *((device, "the constructor", "build on one that has, or give the constructor another device") for device in built_on),
        *((device, "the plan", "say plan.to('cpu'), or build on one that has") for device in moved_to),
    ):
        check_device(device, who, way_out)


def check_device(device: str | torch.device, who: str = "the call", way_out: str = "name another device") -> None:
    """Raise `MaterializeError` for a device that this machine does not have."""
    kind = torch.device(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind.type == "cuda" and (kind.index or 0) >= count:
        has = f"has {count} CUDA device{'s' * (count != 1)}" if count else "has no CUDA device"
        raise MaterializeError(f"{who} puts tensors on {device}, and this machine {has}; {way_out}")


def check_uninitialized(graph: ParamGraph, uninitialized: str, wanted: set[str] | None = None) -> None:
    """Raise `UninitializedError` where the constructor leaves tensors without values and nobody said what to do about it."""
    if uninitialized not in ("error", "zero", "empty"):
        raise MaterializeError(f'uninitialized={uninitialized!r} is not one of "error", "zero", "empty"')
    if uninitialized != "error":
        return
    missing = [tensor for tensor in graph.uninitialized if wanted is None or wanted.intersection(tensor.names)]
    if missing:
        raise UninitializedError(_message(missing))


def _message(missing: list[TensorNode]) -> str:
    shown = "".join(f"\n  {each.name}  {str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in missing[:_SHOWN])
    more = f"\n  … and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (
        f"the constructor never gives {len(missing)} tensor{'s' * (len(missing) != 1)} a value:{shown}{more}\n"
        'eager would leave whatever the memory held. Initialize them in the constructor, or say uninitialized="zero" '
        '(or "empty", which leaves memory as it is)'
    )


def check_rng(rng: str, graph: ParamGraph) -> None:
    """Raise `MaterializeError` for an unknown `rng`, and where keyed numbers would make the constructor go another way."""
    if rng not in ("eager", "keyed"):
        raise MaterializeError(f'rng={rng!r} is not one of "eager", "keyed"')
    if rng == "keyed" and graph.seed_dependent:
        lines = "".join(f"\n  {frame}" for frame in graph.seed_dependent[:_SHOWN])
        raise MaterializeError(
            f"the constructor looks at the random values that eager draws, and may go another way with others:{lines}\n"
            'take rng="eager"'
        )


def check_done(mode: Guided) -> None:
    """Raise where something still waits after the last step."""
    if len(mode.waiting):
        raise MaterializeError(f"{len(mode.waiting)} storages were not filled; this is a bug in groundplan, please report it")
