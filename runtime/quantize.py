"""A plan that quantizes, carried out: every layer is quantized as soon as it is filled, while the others are not there yet.

1. a meta module is filled in the order in which the constructor finishes its tensors
2. those of a layer that is to be quantized are put into it at once; with the last of them it is quantized, and they are dropped
3. what remains is filled as ever
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..planner.check import check_decisions
from ..planner.decisions import Decisions, final_device
from ..planner.quantizing import (
    BITSANDBYTES,
    Filter,
    Quantizing,
    check_layers,
    check_patterns,
    config_data,
    filter_patterns,
    picks,
)
from ..planner.records import dtype_name
from ..tracer.ambient import ambient_applied, ambient_now
from ..tracer.errors import DecisionError, MaterializeError
from .build import Build
from .inplace import fill_module
from .job import Whereto
from .materialize import restored_on_failure
from .meta import meta_module, remembered
from .options import Options
from .pages import return_freed_memory
from .placing import place, wrapped
from .quantizers import Quantizer, quantizer
from .ranks import Ranks
from .targets import Target

_TRIMMED = 2**26  # bytes of weights between one time that freed memory is returned and the next
_Picks = Callable[[nn.Module, str], bool]


# -- the decision -------------------------------------------------------------------------------------------------------


def quantizing(build: Build, decisions: Decisions, config: Any, chosen: Filter) -> Quantizing:
    """The record of what the user asks for: which layers of the module there are, and what becomes of each.

    Raises `DecisionError` where that does not fit the module.
    """
    patterns = filter_patterns(chosen)
    how: dict[str, Any] = {"mode": config} if config in BITSANDBYTES else {"config": config_data(config)}
    doing = quantizer(Quantizing(layers=("",), **how))
    module = meta_module(build, decisions)
    if not isinstance(module, nn.Module):
        raise DecisionError("the constructor returns several modules; trace and quantize each of them by itself")
    layers = list(_visited(module, _picker(chosen, patterns, doing)))
    linears = [name for name, each in module.named_modules() if doing.is_linear(each)]
    check_patterns(patterns or (), [layer.name for layer in layers], linears)
    if not layers:
        raise DecisionError(_nothing(chosen, linears))
    names = tuple(layer.name for layer in layers)
    found = Quantizing(filter=patterns, layers=names, sizes=tuple(_sizes(layers, doing)), **how)
    check_layers(found, decisions.quantizing)
    return found


def _picker(chosen: Filter, patterns: Sequence[str] | None, doing: Quantizer) -> _Picks:
    if patterns is not None:
        return lambda module, name: any(picks(pattern, name, doing.is_linear(module)) for pattern in patterns)
    if callable(chosen):
        return lambda module, name: bool(chosen(module, name))
    return lambda module, name: doing.is_linear(module)


def _nothing(chosen: Filter, linears: Sequence[str]) -> str:
    if not linears:
        return "the module has no linear layer, so there is nothing to quantize; name other modules by filter="
    return f"filter={chosen!r} picks no module; the linear layers are called {', '.join(linears[:3])} and so on"


def _sizes(layers: Iterable[_Layer], doing: Quantizer) -> Iterator[Any]:
    """One for each shape and dtype of a weight."""
    seen: set[tuple[Any, ...]] = set()
    for layer in layers:
        weight = layer.module._parameters.get("weight")
        if weight is not None and (key := (tuple(weight.shape), weight.dtype)) not in seen:
            seen.add(key)
            yield doing.size(layer.module)


# -- the layers ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Layer:
    """A module that is quantized, where it hangs, and the meta tensors that it waits for."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    awaits: set[int] = field(default_factory=set)

    @property
    def nbytes(self) -> int:
        """The bytes of its weight before it is quantized."""
        weight = self.module._parameters.get("weight")
        return 0 if weight is None else weight.numel() * weight.dtype.itemsize


def _visited(module: nn.Module, chosen: _Picks, name: str = "", parent: nn.Module | None = None) -> Iterator[_Layer]:
    """The modules that torchao's `quantize_` comes to, in its order: it does not look into one that it quantizes."""
    if chosen(module, name):
        yield _Layer(name, module, parent)
        return
    for key, child in module.named_children():
        yield from _visited(child, chosen, f"{name}.{key}" if name else key, module)


class _Layers(Whereto):
    """Takes the tensors of the layers to be quantized, and quantizes each layer that has all of its own."""

    def __init__(self, module: nn.Module, decisions: Decisions) -> None:
        memory = remembered(module)
        assert memory is not None
        self._decisions = decisions
        self._ambient = ambient_now()  # while tensors are made, torch's settings are the constructor's
        self._storages = {storage.index: storage for storage in memory.blueprint.build.graph.storages}
        self._steps: dict[int, tuple[Quantizing, Quantizer]] = {}
        self._layers: list[_Layer] = []
        self._of: dict[int, list[_Layer]] = {}
        self._freed = 0
        for found in decisions.quantizing:
            self._add(module, found)

    def _add(self, module: nn.Module, found: Quantizing) -> None:
        names, doing = frozenset(found.layers), quantizer(found)
        for layer in _visited(module, lambda _, name: name in names):
            self._layers.append(layer)
            self._steps[id(layer)] = found, doing
            for tensor in (*layer.module.parameters(), *layer.module.buffers()):
                self._of.setdefault(id(tensor), []).append(layer)

    def device(self, target: Target) -> torch.device:
        """As `Whereto`: tensors of layers are handed over."""
        layers = self._of.get(id(target.tensor), ())
        for layer in layers:
            layer.awaits.add(id(target.tensor))
        return torch.device("meta") if layers else self._home(target)

    def _home(self, target: Target) -> torch.device:
        return torch.device(final_device(target.node, self._storages[target.node.view.storage], self._decisions))

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """As `Whereto`: put it where it belongs, and quantize what is complete with it."""
        if target.spec is not None:
            raise MaterializeError(f"{target.path} is a DTensor, which is not quantized while it is made; leave its layer out")
        key = id(target.tensor)
        with ambient_applied(self._ambient):
            self._put(target, value.to(self._home(target)))
            for layer in self._of[key]:
                layer.awaits.discard(key)
                if not layer.awaits:
                    self._quantize(layer)

    def _put(self, target: Target, value: torch.Tensor) -> None:
        """Give the layer its tensor; the target, done with, keeps a tensor without memory that nothing refers to."""
        like = target.tensor
        if value.stride() != like.stride() and value.numel():
            value = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=value.device).copy_(value)
        place(copy.copy(target), wrapped(like, value.detach()))
        target.tensor = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        target.places = []

    def finish(self) -> None:
        """Quantize the layers that waited for nothing: whatever they hold was made outside of the constructor."""
        for layer in list(self._layers):
            self._quantize(layer)
        return_freed_memory()

    def _quantize(self, layer: _Layer) -> None:
        self._layers.remove(layer)
        found, doing = self._steps.pop(id(layer))
        self._freed += layer.nbytes
        try:
            made = doing(layer.module)
        except Exception as error:
            raise MaterializeError(_failed(layer, found, error)) from error
        if made is not layer.module and layer.parent is not None:
            setattr(layer.parent, layer.name.rpartition(".")[2], made)
        layer.module = made  # the old one may hold the whole weight
        if self._freed >= _TRIMMED:
            self._freed = 0
            return_freed_memory()


def _failed(layer: _Layer, found: Quantizing, error: Exception) -> str:
    weight = layer.module._parameters.get("weight")
    what = f", {dtype_name(weight.dtype)}{list(weight.shape)}" if weight is not None else ""
    return (
        f"{layer.name or 'the module'} ({type(layer.module).__name__}{what}) cannot be quantized by {found.describe()}: "
        f"{type(error).__name__}: {error}; leave it out by filter=, or take another config"
    )


# -- the verb -----------------------------------------------------------------------------------------------------------


def materialize_quantized(
    build: Build,
    decisions: Decisions,
    options: Options,
) -> nn.Module:
    """The module, quantized layer by layer while it is built; on failure nothing is left, and generators are as they were."""
    check_decisions(decisions, build.graph)
    with restored_on_failure():
        module: nn.Module = meta_module(build, decisions)
        layers = _Layers(module, decisions)
        fill_module(module, Ranks(), options, layers)
        layers.finish()
    return module
