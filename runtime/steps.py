"""The plan's steps, done by the calls they stand for: `module.to(dtype)`, `module.to(device)`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..planner.decisions import Cast, Decisions, Move
from ..tracer.ambient import ambient_applied, host_random_from, one_at_a_time
from ..tracer.collect import roots_of
from ..tracer.graph import ParamGraph
from ..tracer.streams import generators_kept, restore_generators
from .build import Build


def apply_steps(built: Any, decisions: Decisions, graph: ParamGraph) -> Any:
    """Do every step on the module (or the modules) that the constructor returned."""
    for step in decisions.steps:
        for prefix, root in roots_of(built).items():
            if isinstance(step, Move):
                root.to(step.device)
            elif step.uniform is not None:
                root.to(step.uniform)
            else:
                _cast_by_name(root, prefix, step, graph)
    return built


def traced_with_casts(build: Build, decisions: Decisions) -> tuple[Build, Any]:
    """The constructor followed by the plan's casts, traced from where the first trace started; and what that returned.

    `module.to` itself is traced, whatever it does. Without casts it is the constructor alone, once more.
    """
    only_casts = decisions.model_copy(update={"steps": decisions.casts})

    def build_and_cast() -> Any:
        built = build()
        roots_of(built)
        return apply_steps(built, only_casts, build.graph)

    with one_at_a_time, generators_kept(), host_random_from(build.origin.host), ambient_applied(build.graph.ambient):
        restore_generators(build.origin.torch)
        return Build.trace_and_keep(build_and_cast, (), {})


def _cast_by_name(root: nn.Module, prefix: str, step: Cast, graph: ParamGraph) -> None:
    """`module.to(dtype)` with a dtype per tensor: the same call, looking up the dtype by the tensor it is handed."""
    targets = _targets(root, prefix, step, graph)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        dtype = targets.get(id(tensor))
        return tensor if dtype is None else tensor.to(dtype)

    root._apply(convert)


def _targets(root: nn.Module, prefix: str, step: Cast, graph: ParamGraph) -> Mapping[int, torch.dtype]:
    """The dtype of every parameter and buffer that the cast converts, by the tensor's id."""
    found: dict[int, torch.dtype] = {}
    for name, tensor in _members(root, prefix):
        node = graph.by_name.get(name)
        names = node.names if node is not None else (name,)
        dtype = step.dtype_for(names) if tensor.is_floating_point() or tensor.is_complex() else None
        if dtype is not None:
            found[id(tensor)] = dtype
    return found


def _members(root: nn.Module, prefix: str) -> Iterable[tuple[str, torch.Tensor]]:
    yield from root.named_parameters(prefix, remove_duplicate=False)
    yield from root.named_buffers(prefix, remove_duplicate=False)
