"""Activation checkpointing: modules that run again in the backward, instead of keeping what they computed.

A plan says which modules, each by its level (`checkpoint_by_plan`); a workload says it of every layer that repeats
(`checkpoint_layers`), as the user's own script will do it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..planner.checkpointing import levels_of
from ..planner.decisions import Decisions
from ..planner.placing import owners
from ..planner.workload import Checkpointing
from ..tracer.collect import named_modules
from ..tracer.errors import DecisionError, MaterializeError
from ..tracer.graph import ParamGraph
from .run_again import ForwardAgain, RunAgain, options_of, run_once

# -- what the plan says -------------------------------------------------------------------------------------------------


def checkpoint_by_plan(built: Any, decisions: Decisions, graph: ParamGraph) -> None:
    """Have the modules of `built`, what the constructor returned, run again in the backward as the plan's rules say.

    A layer of transformers that knows how does it itself, others have their forward wrapped: names, values and classes stay.
    Raises `MaterializeError` for a module whose forward is compiled.
    """
    levels = levels_of(decisions.checkpointing, graph)
    modules = dict(named_modules(built)) if levels else {}
    for name, level in levels.items():
        _checkpoint(name, modules[name], level)
        _without_cache([modules[owner] for owner in owners(name) if owner in modules])


def _checkpoint(name: str, layer: nn.Module, level: Checkpointing) -> None:
    if isinstance(layer, torch.jit.ScriptModule):
        raise MaterializeError(
            f"{name} is compiled by torch.jit.script, and its forward cannot run again in the backward; leave it out of "
            "plan.checkpoint_activations, or name a module around it"
        )
    if _knows_how(layer):
        known: Any = layer
        known.gradient_checkpointing, known._gradient_checkpointing_func = True, RunAgain(level)
    else:
        _wrap(layer, level)


def _wrap(layer: nn.Module, level: Checkpointing) -> None:
    layer.__dict__["forward"] = ForwardAgain(layer, level)


def _knows_how(layer: nn.Module) -> bool:
    """Whether it is a layer of transformers that goes by its own flag, and function."""
    known = getattr(sys.modules.get("transformers.modeling_layers"), "GradientCheckpointingLayer", None)
    return known is not None and isinstance(layer, known)


def _without_cache(around: list[nn.Module]) -> None:
    """Have a transformers model around a layer make no cache of keys and values while it trains, as its own switch does.

    Its own code looks at its flag for that (`merge_with_config_defaults`), and may hand its layers to its function.
    """
    model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if model is None or not any(isinstance(each, model) for each in around):
        return
    for each in around:
        if hasattr(each, "gradient_checkpointing") and not _knows_how(each):
            owner: Any = each
            owner.gradient_checkpointing, owner._gradient_checkpointing_func = True, run_once


# -- what the workload says ---------------------------------------------------------------------------------------------


def checkpoint_layers(module: Any, checkpointing: Checkpointing) -> None:
    """Have every layer that repeats keep its inputs alone, or by op (`selective`), and run again in the backward.

    A transformers model that knows how does it itself; of others, the members of one class in an `nn.ModuleList`,
    `nn.ModuleDict` or `nn.Sequential` have their forward wrapped. Raises `DecisionError` where nothing repeats.
    """
    if getattr(module, "supports_gradient_checkpointing", False):
        _checkpoint_transformers(module, options_of(checkpointing))
        return
    layers = list(_repeated(module))
    if not layers:
        raise DecisionError(
            f'checkpointing="{checkpointing}" goes by layers that repeat, and the module has none: say checkpointing="none"'
        )
    for layer in layers:
        _wrap(layer, checkpointing)


def _checkpoint_transformers(module: Any, options: dict[str, Any]) -> None:
    """Under the new name where transformers has one (5.24; the old one goes in 6)."""
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of containers that hold at least two modules of one class, with parameters."""
    for child in module.children():
        members = list(child.children()) if isinstance(child, _CONTAINERS) else []
        classes = [type(each) for each in members if any(True for _ in each.parameters())]
        if classes and max(map(classes.count, classes)) > 1:
            yield from (each for each in members if classes.count(type(each)) > 1)
        else:
            yield from _repeated(child)
