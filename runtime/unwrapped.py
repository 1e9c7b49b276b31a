"""A module as its library knows it, below what sharding and wrappers have made of it.

Libraries look a model up by its class and its submodules' names. `fully_shard` gives every module it touches a class of its own,
and activation checkpointing and `torch.compile` put modules in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")


def unwrapped(module: nn.Module) -> nn.Module:
    """The same tree of modules, with the same tensors, of the classes and under the names that it had before it was wrapped.

    The modules of the tree are new objects; their attributes are the old ones' own. It is for looking at: calling or changing it
    would change only a part of what `module` is.
    """
    return _copied(module, {})


def _copied(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    module = inside(module)
    if isinstance(module, torch.jit.ScriptModule):
        return module  # its attributes are not in its `__dict__`, and no library looks it up
    if id(module) not in done:
        copy = done[id(module)] = _of_class(plain_class(module), module.__dict__)
        children = {name: child and _copied(child, done) for name, child in module._modules.items()}
        copy.__dict__["_modules"] = children
    return done[id(module)]


def _of_class(kind: type[nn.Module], members: dict[str, Any]) -> nn.Module:
    copy = object.__new__(kind)
    copy.__dict__.update(members)
    return copy


def inside(module: nn.Module) -> nn.Module:
    """The module that wrappers wrap."""
    while True:
        names = ("module",) if isinstance(module, DistributedDataParallel) else _WRAPPED
        wrapped = next((module._modules[name] for name in names if name in module._modules), None)
        if wrapped is None:
            return module
        module = wrapped


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before `fully_shard`, or another of torch's ways to distribute it, has changed it."""
    kinds = (kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.distributed."))
    return next(kind for kind in kinds if issubclass(kind, nn.Module))
