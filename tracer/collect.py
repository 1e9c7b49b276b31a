"""From a finished (traced) module to the tensors and modules of its graph, under all of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .errors import TraceError
from .graph import Kind, ModuleNode, TensorNode
from .ledger import Ledger
from .opaque import is_opaque, opaque_kind
from .traced import public_type

_INTERNAL = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


_Names = dict[int, tuple[str, ...]]  # every name of an object, by its id
_Member = tuple[str, torch.Tensor, bool]  # its name in the module, the tensor, whether it is part of the state dict


def roots_of(built: Any) -> dict[str, nn.Module]:
    """The modules that a constructor returned, by their prefix: a module itself has the empty one.

    Raises `TraceError` for anything but a module, or a tuple, list or dict of them.
    """
    if isinstance(built, nn.Module):
        return {"": built}
    members = built.items() if isinstance(built, Mapping) else enumerate(built) if isinstance(built, tuple | list) else ()
    found = {str(key): member for key, member in members}
    wrong = next(
        (f"{key!r}: {type(member).__name__}" for key, member in found.items() if not isinstance(member, nn.Module)), None
    )
    if not found or wrong:
        what = f"one with {wrong}" if wrong else "none of these"
        raise TraceError(f"a constructor returns an nn.Module, or a tuple or dict of them; this {type(built).__name__} is {what}")
    return found


def collect(built: Any, ledger: Ledger) -> tuple[tuple[ModuleNode, ...], tuple[TensorNode, ...]]:
    """The modules and tensors of what the constructor returned, in `named_modules` order."""
    modules, names = _modules(built)
    nodes = [ModuleNode(names[key], type(module).__name__, module.training) for key, module in modules.items()]
    return tuple(nodes), tuple(_tensors(modules, names, ledger))


def named_modules(built: Any) -> list[tuple[str, nn.Module]]:
    """Every module of what a constructor returned, under the first of its names."""
    modules, names = _modules(built)
    return [(names[key][0], module) for key, module in modules.items()]


def _modules(built: Any) -> tuple[dict[int, nn.Module], _Names]:
    modules: dict[int, nn.Module] = {}
    names: _Names = {}
    for prefix, root in roots_of(built).items():
        _walk(root, prefix, modules, names)
    return modules, names


def _walk(module: nn.Module, name: str, modules: dict[int, nn.Module], names: _Names) -> None:
    """Every module with all its names: those of a shared one's children are given once per name of its own."""
    key = id(module)
    modules[key] = module
    names[key] = (*names.get(key, ()), name)
    for child, member in module._modules.items():
        if member is not None:
            _walk(member, _joined(name, child), modules, names)


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _tensors(modules: Mapping[int, nn.Module], owners: _Names, ledger: Ledger) -> list[TensorNode]:
    """Parameters first, then buffers, then other tensors; one that is several of these counts as the first."""
    names: _Names = {}
    found: dict[Kind, dict[int, torch.Tensor]] = {}
    passing: set[int] = set()
    for kind, members in _MEMBERS.items():
        mine: dict[int, torch.Tensor] = {}
        for key, module in modules.items():
            for name, tensor, persistent in members(module):
                place = id(tensor)
                if place not in mine:
                    if place in names:
                        continue
                    mine[place] = tensor
                    if not persistent:
                        passing.add(place)
                names[place] = names.get(place, ()) + tuple([_joined(prefix, name) for prefix in owners[key]])
        found[kind] = mine
    return [
        _node(tensor, kind, place not in passing, names[place], ledger)
        for kind, mine in found.items()
        for place, tensor in mine.items()
    ]


def _parameters(module: nn.Module) -> Iterable[_Member]:
    return [(name, each, True) for name, each in module._parameters.items() if each is not None]


def _buffers(module: nn.Module) -> Iterable[_Member]:
    if not module._buffers:
        return ()
    passing = getattr(module, "_non_persistent_buffers_set", ())
    return [(name, each, name not in passing) for name, each in module._buffers.items() if each is not None]


def _attributes(module: nn.Module) -> Iterable[_Member]:
    found: list[_Member] = []
    for name, value in module.__dict__.items():
        kind: Any = type(value)
        if _may_hold(kind) and name not in _INTERNAL and (isinstance(value, torch.Tensor) or len(value)):
            found.extend([(path, each, True) for path, each in _inside(name, value, 0)])
    return found


@cache
def _may_hold(kind: type) -> bool:
    return issubclass(kind, torch.Tensor | list | tuple | dict)


_MEMBERS: Mapping[Kind, Callable[[nn.Module], Iterable[_Member]]] = {
    "parameter": _parameters,
    "buffer": _buffers,
    "attribute": _attributes,
}


def _inside(path: str, value: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in an attribute: itself, or what its lists, tuples and dicts hold."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth < 4 and isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _inside(f"{path}[{index}]", each, depth + 1)
    elif depth < 4 and isinstance(value, dict):
        for key, each in value.items():
            yield from _inside(f"{path}[{key!r}]", each, depth + 1)


def _node(tensor: torch.Tensor, kind: Kind, persistent: bool, names: tuple[str, ...], ledger: Ledger) -> TensorNode:
    names = tuple(dict.fromkeys(names)) if len(names) > 1 else names
    if is_traceable_wrapper_subclass(tensor):
        inner = getattr(tensor, tensor.__tensor_flatten__()[0][0])
        said = f"{type(tensor).__name__} {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        return TensorNode(names, kind, ledger.view(inner), tensor.requires_grad, persistent, _grad_fn(tensor), said, True)
    if is_opaque(tensor):
        view = ledger.opaque_view(tensor)
        return TensorNode(names, kind, view, tensor.requires_grad, persistent, _grad_fn(tensor), opaque_kind(tensor), True)
    return TensorNode(names, kind, ledger.view(tensor), tensor.requires_grad, persistent, _grad_fn(tensor), public_type(tensor))


def _grad_fn(tensor: torch.Tensor) -> str | None:
    """The class of its `grad_fn`; for a view that autograd forbids to follow (its base was changed in place) there is none."""
    try:
        node = tensor.grad_fn
        return None if node is None else type(node).__name__
    except RuntimeError:
        return None
