"""Putting a tensor that has values in the place of a meta tensor."""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..tracer.errors import MaterializeError
from .regions import local_of
from .targets import Target


def wrapped(meta: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """`local` as a tensor of the same class and placement as `meta`, with its Python attributes."""
    made = _of_class(meta, local)
    made.__dict__.update(meta.__dict__)
    return made


def _of_class(meta: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    if is_traceable_wrapper_subclass(meta):
        names, context = meta.__tensor_flatten__()
        kind: Any = type(meta)
        parts = {name: getattr(meta, name) for name in names}
        parts |= {name: local for name, part in parts.items() if part is local_of(meta)}
        made: torch.Tensor = kind.__tensor_unflatten__(parts, context, meta.shape, meta.stride())
        return nn.Parameter(made, meta.requires_grad) if isinstance(meta, nn.Parameter) else made
    if type(meta) is torch.Tensor:
        return local.requires_grad_(meta.requires_grad)
    return torch.Tensor._make_subclass(type(meta), local, meta.requires_grad)


def place(target: Target, made: torch.Tensor) -> None:
    """Put `made` wherever the meta tensor is; the object stays the same where torch allows it, so that references to it hold."""
    tensor = target.tensor
    if _may_swap(tensor) and _may_swap(made) and _slots(tensor) == _slots(made):
        torch.utils.swap_tensors(tensor, made)
        made = tensor
    for put in target.places:
        put(made)


def check_hooks(target: Target) -> None:
    """Raise `MaterializeError` where a hook hangs on a meta tensor: it would be lost."""
    if target.tensor._backward_hooks or getattr(target.tensor, "_post_accumulate_grad_hooks", None):
        raise MaterializeError(
            f"{target.path} is a meta tensor with a gradient hook, which would be lost; register hooks after gp.materialize"
        )


def _may_swap(tensor: torch.Tensor) -> bool:
    """Whether `torch.utils.swap_tensors` takes it: nothing else refers to what the Python object stands for."""
    return not weakref.getweakrefs(tensor) and tensor._use_count() == 1  # type: ignore[attr-defined]


def _slots(tensor: torch.Tensor) -> set[str]:
    return set(copyreg._slotnames(type(tensor)))  # type: ignore[attr-defined]


def renew_weak_references(modules: Iterable[nn.Module]) -> None:
    """Recurrent layers keep weak references to their weights, and torch's own conversions renew them so."""
    for each in modules:
        if isinstance(each, nn.RNNBase) and not any(isinstance(weight, DTensor) for weight in each._parameters.values()):
            each._init_flat_weights()
