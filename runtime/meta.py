"""A module without memory: what the plan says, made of ordinary meta tensors, for the user's own sharding code.

Each of its submodules remembers the plan and its own name there, so that it can be filled later wherever it has been moved to:
under another name, in a wrapper, without its neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..planner.decisions import Decisions
from ..tracer.collect import named_modules
from ..tracer.errors import MaterializeError
from ..tracer.released import release
from .build import Build
from .steps import traced_with_casts

_MEMORY = "_groundplan"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a meta module is filled by: the constructor followed by the plan's casts, traced, and the plan's decisions."""

    build: Build
    decisions: Decisions


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a submodule of a meta module knows: its blueprint, and its name there."""

    blueprint: Blueprint
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Remembered:
        return self  # a copy of a layer gets the same values

    def __reduce__(self) -> tuple[Any, ...]:
        return _forgotten, ()  # a pickled module does not take its constructor along


def _forgotten() -> None:
    return None


def remembered(module: nn.Module) -> Remembered | None:
    """What a module remembers; None for one that is no part of a meta module."""
    found = module.__dict__.get(_MEMORY)
    return found if isinstance(found, Remembered) else None


def forget(module: nn.Module) -> None:
    """Have the submodules of a filled meta module remember nothing: it is then as the constructor makes it."""
    for each in module.modules():
        each.__dict__.pop(_MEMORY, None)


def check_not_quantized(module: nn.Module) -> None:
    """Raise `MaterializeError` for a part of a meta module whose plan quantizes."""
    for each in module.modules():
        memory = remembered(each)
        if memory is not None and memory.blueprint.decisions.quantizing:
            raise MaterializeError(
                f"the plan quantizes ({memory.blueprint.decisions.quantizing[0].describe()}), which plan.materialize() does; to "
                "fill a meta module, take it from the plan before .quantize(...)"
            )


def meta_module(build: Build, decisions: Decisions) -> Any:
    """What `build()` returns, with the casts of `decisions` done to it, made of meta tensors; a new one at each call.

    What the plan checkpoints runs again in the backward already.

    The constructor runs once more, under trace. Raises `MaterializeError` where it does something else than before.
    """
    traced, built = traced_with_casts(build, decisions)
    _check_same(build, traced)
    _check_hooks(built)
    release(built)
    if decisions.checkpointing:
        from .checkpointing import checkpoint_by_plan

        checkpoint_by_plan(built, decisions, build.graph)
    blueprint = Blueprint(traced, decisions)
    for name, module in named_modules(built):
        module.__dict__[_MEMORY] = Remembered(blueprint, name)
    return built


def meta_likeness(build: Build, decisions: Decisions) -> Any:
    """The same without the plan's casts, to be looked at and not to be filled: the constructor may do as it likes."""
    _, built = traced_with_casts(build, decisions.model_copy(update={"steps": ()}))
    release(built)
    return built


class HookedError(MaterializeError):
    """The constructor hangs a gradient hook on a tensor, which a meta module does not have."""


def _check_hooks(built: Any) -> None:
    """Raise where a gradient hook would be lost: hooks hang on the traced tensors, which go."""
    for prefix, module in named_modules(built):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None)):
                path = f"{prefix}.{name}" if prefix else name
                raise HookedError(
                    f"the constructor hangs a gradient hook on {path}, which a meta module does not have; "
                    "register it after gp.materialize, or build with plan.materialize"
                )


def _check_same(build: Build, again: Build) -> None:
    before = {tensor.names: tensor.shape for tensor in build.graph.tensors}
    now = {tensor.names: tensor.shape for tensor in again.graph.tensors}
    names = next((names for names in (*before, *now) if before.get(names) != now.get(names)), None)
    if names is not None:
        raise MaterializeError(
            f"the constructor does something else each time it runs: {names[0]} is not as it was in the first trace. It may "
            "consume an iterator or count its calls; let it depend on its arguments alone"
        )
