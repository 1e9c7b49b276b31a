"""Filling a meta module one submodule at a time, for engines that divide each of them as soon as it has its values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..tracer.streams import generator_states, generators_kept, restore_generators
from .agreement import agreement
from .inplace import Own, materialize_module
from .keyed import drawn_seed
from .meta import Blueprint, remembered
from .options import Options
from .regions import local_of
from .targets import find_targets


class ModuleFiller:
    """Gives the tensors that a module holds itself, not those of its submodules, their values; the order makes no difference.

    All are drawn from one state of the generators: that of `seed`, or without one that of now. The generators are left alone,
    except that `rng="keyed"` without a seed draws one number.
    """

    def __init__(self, options: Options, device: str | torch.device | None) -> None:
        draws = options.seed is None and options.rng == "keyed"
        self.options = replace(options, seed=drawn_seed()) if draws else options
        self._device = device
        self._states = generator_states()
        self._known: dict[int, tuple[Blueprint, Own]] = {}  # with the blueprint, or another could get its id
        self._made = WeakTensorKeyDictionary()

    def fill(self, module: nn.Module) -> None:
        """Fill one module; nothing is done to one that holds no meta tensor.

        Raises `MaterializeError` for a meta tensor that no plan knows; what `materialize_module` raises.
        """
        self._tie(module)
        memory = remembered(module)
        if memory is None and not any(tensor.is_meta for _, _, tensor in _members(module)):
            return  # a wrapper, which holds nothing itself
        before = [(members, key, tensor) for members, key, tensor in _members(module) if tensor.is_meta]
        own = Own() if memory is None else self._known.setdefault(id(memory.blueprint), (memory.blueprint, Own()))[1]
        with generators_kept():
            restore_generators(self._states)
            if find_targets(module, own=True)[1]:
                materialize_module(module, self.options, self._device, group=None, own=own)
        for members, key, tensor in before:
            if tensor.is_meta:  # torch would not let it become another object's content: where else it is held, it is still meta
                self._made[tensor] = weakref.ref(members[key])

    def says(self, blueprint: Blueprint) -> dict[str, str]:
        """What the ranks that fill the same module have to agree on."""
        said = {name: str(getattr(self.options, name)) for name in ("rng", "uninitialized", "load")}
        with generators_kept():
            restore_generators(self._states)
            return agreement(blueprint.build, blueprint.decisions, self.options.seed) | said

    def _tie(self, module: nn.Module) -> None:
        """Put what another module was given in the places of the same meta tensor here."""
        for members, key, tensor in list(_members(module)):
            made = self._made.get(tensor)
            if made is not None and (alive := made()) is not None:
                members[key] = alive


def _members(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """The places where a module itself holds a tensor, each with the local part of that."""
    for members in (module._parameters, module._buffers):
        for key, tensor in members.items():
            if tensor is not None:
                yield members, key, local_of(tensor)
