"""A traced module as an ordinary one: the same objects, with meta tensors where traced ones were.

Ties, views of one storage, Python attributes and the classes of parameters stay; what autograd knew of how a tensor came about
does not, and neither does what only a closure refers to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .collect import named_modules
from .traced import Traced

_DEPTH = 4  # of lists, tuples and dicts that an attribute is searched through, as for the graph


def release(built: Any) -> None:
    """Replace every traced tensor of the module (or modules) that a constructor returned, in place, after its trace."""
    known: dict[int, torch.Tensor] = {}
    for _, module in named_modules(built):
        members: Any
        for members in (module._parameters, module._buffers):
            for name, tensor in list(members.items()):
                if tensor is not None:
                    members[name] = _ordinary(tensor, known)
        for name, value in list(module.__dict__.items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                released = _inside(value, known, 0)
                if released is not value:
                    module.__dict__[name] = released
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()  # it keeps weak references


def _inside(value: Any, known: dict[int, torch.Tensor], depth: int) -> Any:
    """An attribute's value without traced tensors: lists and dicts are changed in place, tuples made anew."""
    if isinstance(value, torch.Tensor):
        return _ordinary(value, known)
    if depth == _DEPTH or not isinstance(value, list | tuple | dict):
        return value
    if isinstance(value, dict):
        for key, each in list(value.items()):
            if (released := _inside(each, known, depth + 1)) is not each:
                value[key] = released
        return value
    members = [_inside(each, known, depth + 1) for each in value]
    if all(one is other for one, other in zip(members, value, strict=True)):
        return value
    if isinstance(value, list):
        value[:] = members
        return value
    return type(value)(*members) if hasattr(value, "_fields") else type(value)(members)


def _ordinary(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    """The meta tensor that takes the place of a traced one, the same for each place; any other tensor is its own."""
    if id(tensor) not in known:
        known[id(tensor)] = _made(tensor, known)
    return known[id(tensor)]


def _made(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    if isinstance(tensor, Traced):
        return _with_attributes(_of_class(tensor), tensor)
    if is_traceable_wrapper_subclass(tensor):
        return _wrapper(tensor, known)
    return tensor


def _of_class(tensor: Traced) -> torch.Tensor:
    kind: Any = next(base for base in type(tensor).__mro__ if not issubclass(base, Traced))
    if issubclass(kind, UninitializedParameter | UninitializedBuffer):
        return kind(requires_grad=tensor.requires_grad, device=tensor._traced_device, dtype=tensor.dtype)  # type: ignore[no-any-return]
    meta = tensor._twin.detach()
    if type(tensor) is Traced and tensor.__dict__.get("_is_param"):
        kind = nn.Parameter
    if kind is torch.Tensor:
        return meta.requires_grad_(tensor.requires_grad)
    return torch.Tensor._make_subclass(kind, meta, tensor.requires_grad)  # type: ignore[no-any-return]


def _with_attributes(made: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    attributes = dict(tensor.__dict__)
    if isinstance(made, nn.Parameter):
        attributes.pop("_is_param", None)  # only a sign that a parameter is of another class
    made.__dict__.update(attributes)
    return made


def _wrapper(tensor: torch.Tensor, known: dict[int, torch.Tensor]) -> torch.Tensor:
    """A DTensor, or another tensor made of tensors, whose parts are released."""
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(tensor, name) for name in names}
    released = {name: _ordinary(part, known) for name, part in parts.items()}
    if all(released[name] is part for name, part in parts.items()):
        return tensor
    kind: Any = type(tensor)
    with torch.no_grad():
        made = kind.__tensor_unflatten__(released, context, tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return _with_attributes(nn.Parameter(made, tensor.requires_grad), tensor)
    return _with_attributes(made, tensor)
