"""Layers that repeat, of which a trace runs the first three and the last: the others hand on what the first ones would.

A *run* is a stretch of a list of layers that repeats every `period` layers: alike in class, tensors and settings, and in what a
plan decides of each by itself. Its repeats are *rounds*. A layer of a round in the middle is not run: each tensor that it would
give is taken from among its arguments, where the next layer looks for it, so that the code around the layers goes on as before.
What cannot be handed on in this way is found when it comes up (`CannotSkip`), and the trace begins again with every layer run.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

ROUNDS = 4
"""Rounds that are run: the first, one that stands for all in the middle, the one after it, and the last."""

_LONGEST_PERIOD = 8
_CLOSURES = 4  # functions around functions that are looked into
_NOTHING: Mapping[str, Any] = {}

_LISTS = nn.ModuleList | nn.Sequential | nn.ModuleDict


class CannotSkip(Exception):
    """A layer in the middle gives, or is given, something else than those before it."""


@dataclass(frozen=True, slots=True)
class Run:
    """Layers that repeat: their names in order, and after how many they repeat."""

    layers: tuple[str, ...]
    period: int

    @property
    def rounds(self) -> int:
        """How often the period comes."""
        return len(self.layers) // self.period

    def round_of(self, position: int) -> int | None:
        """Which of the `ROUNDS` that are run a layer belongs to; None where it is skipped."""
        found = position // self.period
        return found if found < ROUNDS - 1 else ROUNDS - 1 if found == self.rounds - 1 else None


def runs_of(module: nn.Module, apart: Mapping[str, Any] = _NOTHING) -> list[Run]:
    """The runs that are long enough for layers to be skipped, outermost first; `apart` tells modules apart by their names."""
    found: list[Run] = []
    lists = ((name, each) for name, each in module.named_modules() if isinstance(each, _LISTS))
    for name, layers in lists:
        if not any(name.startswith(f"{layer}.") or name == layer for run in found for layer in run.layers):
            found += _runs_in(name, {key: layer for key, layer in layers._modules.items() if layer is not None}, apart)
    return found


def _runs_in(name: str, members: Mapping[str, nn.Module], apart: Mapping[str, Any]) -> Iterator[Run]:
    layers, names = list(members.values()), [f"{name}.{key}" if name else key for key in members]
    alike = _Alike(layers, names, apart)
    start = 0
    while start < len(layers):
        period, count = alike.longest_from(start)
        if count > ROUNDS and any(True for layer in layers[start : start + period] for _ in layer.parameters()):
            yield Run(tuple(names[start : start + count * period]), period)
            start += count * period
        else:
            start += 1


class _Alike:
    """Which layers of a list are alike."""

    def __init__(self, layers: Sequence[nn.Module], names: Sequence[str], apart: Mapping[str, Any]) -> None:
        self._looks = [_look(layer, name, apart) for layer, name in zip(layers, names, strict=True)]

    def longest_from(self, start: int) -> tuple[int, int]:
        """The period and the number of rounds, from `start` on, that cover most layers; the shortest such period."""
        best = (1, 1)
        for period in range(1, _LONGEST_PERIOD + 1):
            end = start + period
            while end < len(self._looks) and self._are(end - period, end):
                end += 1
            rounds = (end - start) // period
            if rounds > ROUNDS and rounds * period > best[0] * best[1]:
                best = (period, rounds)
        return best

    def _are(self, one: int, other: int) -> bool:
        first, second = self._looks[one], self._looks[other]
        return first[0] == second[0] and all(map(lambda a, b: same_number(a, b, other - one), first[1], second[1]))


def _look(layer: nn.Module, name: str, apart: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """What layers that are alike have in common, and numbers, which may count up."""
    fixed: list[Any] = []
    numbers: list[Any] = []
    for path, each in layer.named_modules():
        fixed.append((path, type(each), each.training, apart.get(f"{name}.{path}" if path else name)))
        places: tuple[Mapping[str, Any], ...] = (each._parameters, each._buffers)
        fixed += [(key, _tensor_look(value)) for place in places for key, value in place.items() if value is not None]
        for key, value in vars(each).items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                fixed.append(key)
                numbers.append(value)
            elif _is_setting(value):
                fixed.append((key, _routine_look(value) if inspect.isroutine(value) else value))
    return fixed, numbers


def _routine_look(value: Any, depth: int = _CLOSURES) -> Any:
    """A function itself; of one that was made around other things, as tensor parallelism makes each layer's forward, its code and
    what plain values those have.
    """
    function = getattr(value, "__func__", value)
    cells = getattr(function, "__closure__", None)
    if not cells or not depth:
        return function
    return function.__code__, tuple(_cell_look(cell, depth - 1) for cell in cells)


def _cell_look(cell: Any, depth: int) -> Any:
    try:
        value = cell.cell_contents
    except ValueError:  # not bound yet
        return None
    if inspect.isroutine(value):
        return _routine_look(value, depth)
    if _is_setting(value):
        return value
    plain = {
        key: each for key, each in getattr(value, "__dict__", {}).items() if _is_setting(each) and not inspect.isroutine(each)
    }
    return type(value), plain


def _is_setting(value: Any) -> bool:
    """What a layer's code may go by: plain values, tuples and lists of them, and functions, as that of an activation."""
    if isinstance(value, tuple | list):
        return all(map(_is_setting, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | type) or inspect.isroutine(value)


def same_number(one: Any, other: Any, apart: int) -> bool:
    """Whether two settings are the same, or a number that counts layers, or rates above 0 (of dropout, which may grow)."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (0 < one < 1 and 0 < other < 1)
    return bool(one == other) or (type(one) is type(other) is int and other - one == apart)


def _tensor_look(value: torch.Tensor) -> tuple[Any, ...]:
    return value.shape, value.dtype, value.stride(), value.requires_grad


# -- calls --------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Call:
    """What a layer was given and gave, without keeping any of it."""

    given: list[Any]
    shape: Any
    results: list[Any] = field(default_factory=list)
    result_shape: Any = None
    refs: list[Any] = field(default_factory=list)
    taken: dict[int, int] = field(default_factory=dict)  # the place of a result to that of the argument that it is taken from


class Skipping:
    """Has the layers of one run call their forward, or hand on."""

    def __init__(self, module: nn.Module, run: Run) -> None:
        self._run = run
        self._calls: dict[int, _Call] = {}
        self._last: int | None = None
        for position, name in enumerate(run.layers):
            self._take_over(module.get_submodule(name), position)

    def _take_over(self, layer: nn.Module, position: int) -> None:
        own = type(layer)
        seen = self._skip if self._run.round_of(position) is None else self._call

        def call(each: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return seen(position, partial(own.__call__, each), args, kwargs)

        changed = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
        layer.__class__ = changed

    def _call(self, position: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if torch._C._current_autograd_node() is not None:  # a checkpoint runs it again
            return run(*args, **kwargs)
        leaves, shape = flattened((args, kwargs))
        self._look_for_results(position, leaves)
        call = self._calls[position] = _Call([_seen(leaf) for leaf in leaves], shape)
        ids = {id(leaf): place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
        del leaves
        out = run(*args, **kwargs)
        results, call.result_shape = flattened(out)
        for place, result in enumerate(results):
            if id(result) in ids:
                call.taken[place] = ids[id(result)]
            call.results.append(_seen(result))
            call.refs.append(weakref.ref(result) if isinstance(result, torch.Tensor) else None)
        self._last = position
        return out

    def _look_for_results(self, position: int, leaves: list[Any]) -> None:
        """Where the layer before this one finds its results again: among this one's arguments."""
        before = self._calls.get(position - 1) if self._last == position - 1 else None
        if before is None:
            return
        for place, ref in enumerate(before.refs):
            result = None if ref is None else ref()
            found = next((index for index, leaf in enumerate(leaves) if result is not None and leaf is result), None)
            if found is not None:
                before.taken.setdefault(place, found)

    def _skip(self, position: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        like = self._run.period + position % self._run.period
        call = self._calls.get(like)
        leaves, shape = flattened((args, kwargs))
        self._last = None
        if call is None or shape != call.shape:
            raise CannotSkip(f"{self._run.layers[position]} is called in another way than {self._run.layers[like]}")
        for mine, its in zip(leaves, call.given, strict=True):
            if not _is_like(_seen(mine), its, position - like):
                raise CannotSkip(f"{self._run.layers[position]} is given something else than {self._run.layers[like]}")
        return rebuilt(call.result_shape, (self._handed_on(call, place, leaves) for place in range(len(call.results))))

    def _handed_on(self, call: _Call, place: int, leaves: list[Any]) -> Any:
        result = call.results[place]
        if not isinstance(result, _Tensor):
            if result[0] is _OTHER:
                raise CannotSkip(f"a layer returns a {result[1].__name__}")
            return result[1]
        source = call.taken.get(place)
        if source is None or source >= len(leaves) or _seen(leaves[source]) != result:
            raise CannotSkip("what a layer returns is not what the next one is given")
        return leaves[source]


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


_PLAIN, _OTHER = object(), object()


def _seen(leaf: Any) -> Any:
    """A leaf without keeping it: a tensor's properties, a plain value, or the class of another object."""
    if isinstance(leaf, torch.Tensor):
        return _Tensor(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, leaf.requires_grad)
    if leaf is None or isinstance(leaf, bool | int | float | str | torch.dtype | torch.device):
        return _PLAIN, leaf
    return _OTHER, type(leaf)


def _is_like(one: Any, other: Any, apart: int) -> bool:
    if isinstance(one, _Tensor) or isinstance(other, _Tensor):
        return bool(one == other)
    return one[0] is other[0] and (one[1] == other[1] or same_number(other[1], one[1], apart))


def flattened(value: Any) -> tuple[list[Any], Any]:
    """The leaves of plain tuples, lists and dicts, and their shape.

    >>> flattened(("a", {"b": ["c"]}))[0]
    ['a', 'c']
    """
    leaves: list[Any] = []
    return leaves, _walk(value, leaves)


def _walk(value: Any, leaves: list[Any]) -> Any:
    if type(value) in (tuple, list):
        return type(value), tuple(_walk(each, leaves) for each in value)
    if type(value) is dict:
        return dict, tuple(value), tuple(_walk(each, leaves) for each in value.values())
    leaves.append(value)
    return None


def rebuilt(shape: Any, leaves: Iterator[Any]) -> Any:
    """What `flattened` took apart."""
    if shape is None:
        return next(leaves)
    if shape[0] is dict:
        return {key: rebuilt(inner, leaves) for key, inner in zip(shape[1], shape[2], strict=True)}
    return shape[0](rebuilt(inner, leaves) for inner in shape[1])
