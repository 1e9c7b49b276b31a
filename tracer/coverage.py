"""Which tensors the constructor leaves without a value, in whole or in part.

A storage starts with nothing defined. A write defines what it covers, unless its operands were undefined themselves: then it
spreads that. Storages written as a whole, nearly all of them, need no more than a flag; only for the rest are elements counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .digraph import covers
from .graph import Op, ParamGraph, TensorNode, View


@dataclass(slots=True)
class _Contents:
    """What is known of one storage: wholly defined or not before `events`, each of which defines or undefines a view."""

    nbytes: int
    whole: bool
    events: list[tuple[View, bool]] = field(default_factory=list)

    def write(self, view: View, defined: bool) -> None:
        if not view.numel:
            return
        if covers(view, self.nbytes):
            self.whole, self.events = defined, []
        elif defined != self.whole or self.events:
            self.events.append((view, defined))

    def is_defined(self, view: View) -> bool:
        if not view.numel or (self.whole and not self.events):
            return True
        if not self.events:
            return False
        return _all_defined(view, self.whole, self.events)


def uninitialized_tensors(graph: ParamGraph) -> tuple[TensorNode, ...]:
    """The tensors with at least one element that nothing gives a value, in the graph's order."""
    contents = contents_after(graph)
    return tuple(
        tensor
        for tensor in graph.tensors
        if tensor.view.storage in contents and not contents[tensor.view.storage].is_defined(tensor.view)
    )


def contents_after(graph: ParamGraph) -> Mapping[int, _Contents]:
    """What every storage holds when the constructor is done; storages on the meta device hold nothing, and need nothing."""
    contents = {
        storage.index: _Contents(storage.nbytes, storage.constant is not None)
        for storage in graph.storages
        if storage.device != "meta"
    }
    for op in graph.ops:
        _apply(op, contents)
    return contents


def _apply(op: Op, contents: Mapping[int, _Contents]) -> None:
    defined = all(contents[view.storage].is_defined(view) for view in op.reads)
    for view in op.targets:
        in_place = not op.overwrites and view in op.writes
        whole = defined and (not in_place or contents[view.storage].is_defined(view))
        if whole or not in_place or not defined:
            contents[view.storage].write(view, whole)


def _all_defined(wanted: View, whole: bool, events: Iterable[tuple[View, bool]]) -> bool:
    """Whether every element of `wanted` is defined, counted in the largest blocks that all the views are made of."""
    pieces = [(_bytewise(view), defined) for view, defined in events]
    target = _bytewise(wanted)
    block = math.gcd(*(value for piece, _ in [*pieces, (target, True)] for value in (piece.offset, piece.run, *piece.strides)))
    length = max(piece.end for piece, _ in [*pieces, (target, True)]) // block
    mask = np.full(length, whole, dtype=np.bool_)
    for piece, defined in pieces:
        piece.of(mask, block)[...] = defined
    return bool(target.of(mask, block).all())


@dataclass(frozen=True, slots=True)
class _Piece:
    """A view in bytes: runs of `run` adjacent bytes, repeated along `sizes` at `strides`."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    run: int

    @property
    def end(self) -> int:
        return self.offset + self.run + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))

    def of(self, mask: np.ndarray[Any, np.dtype[np.bool_]], block: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """The part of a mask with one element a block that the piece covers."""
        sizes = (*self.sizes, self.run // block)
        strides = (*(stride // block for stride in self.strides), 1)
        return np.lib.stride_tricks.as_strided(mask[self.offset // block :], sizes, strides)


def _bytewise(view: View) -> _Piece:
    item = view.dtype.itemsize
    dims = sorted((d for d in zip(view.stride, view.size, strict=True) if d[1] != 1 and d[0] != 0), key=lambda d: d[0])
    run = item
    while dims and dims[0][0] * item == run:
        run *= dims.pop(0)[1]
    return _Piece(view.offset * item, tuple(size for _, size in dims), tuple(stride * item for stride, _ in dims), run)
