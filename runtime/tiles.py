"""Tiles: a tensor whose parts lie in several tensors of a checkpoint, and how a box of it is read from just these parts.

Hubs store some tensors in other pieces than models hold them: each expert for itself where the model stacks them, query, key and
value as one. A library's own conversion is run on `Tiled` tensors in place of the stored ones: it copies nothing, and what comes
out knows where each of its elements is stored. So a rank that holds three experts reads three experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .boxes import Box
from .entries import Entry

aten = torch.ops.aten


class Untiled(Exception):
    """An operation whose result is not put together from boxes of its operands."""


@dataclass(frozen=True, slots=True)
class Side:
    """A tile along one dim: where it starts, how long it is, and the dim of its source (None: one element, no dim there)."""

    start: int
    length: int
    dim: int | None

    def common(self, wanted: range) -> tuple[slice, range]:
        """What `wanted` has of this side: its place in `wanted`, and the indices counted from the start of the side."""
        before = max(0, -(-(self.start - wanted.start) // wanted.step))
        until = max(before, min(len(wanted), -(-(self.start + self.length - wanted.start) // wanted.step)))
        found = wanted[before:until]
        return slice(before, until), range(found.start - self.start, found.stop - self.start, found.step)


@dataclass(frozen=True, slots=True)
class Tile:
    """A box of a checkpoint's tensor, `first` being its first element there, and its sides in the tensor it is a part of."""

    source: Entry
    first: tuple[int, ...]
    sides: tuple[Side, ...]

    @classmethod
    def whole(cls, source: Entry) -> Tile:
        """All of a checkpoint's tensor."""
        sides = tuple(Side(0, length, dim) for dim, length in enumerate(source.shape))
        return cls(source, (0,) * len(sides), sides)

    def read(self, box: Box, out: torch.Tensor) -> None:
        """Write what this tile has of `box` into its place in `out`, which is all of the box."""
        common = [side.common(wanted) for side, wanted in zip(self.sides, box, strict=True)]
        if not all(indices for _, indices in common):
            return
        wanted = [range(first, first + 1) for first in self.first]
        for side, (_, indices) in zip(self.sides, common, strict=True):
            if side.dim is not None:
                first = self.first[side.dim]
                wanted[side.dim] = range(first + indices.start, first + indices.stop, indices.step)
        self.source.read(tuple(wanted), self._as_stored(out[tuple(place for place, _ in common)]))

    def _as_stored(self, part: torch.Tensor) -> torch.Tensor:
        """A view of `part` with the dims of the source, in their order there."""
        for dim in reversed([dim for dim, side in enumerate(self.sides) if side.dim is None]):
            part = part.select(dim, 0)
        dims = [side.dim for side in self.sides if side.dim is not None]
        part = part.permute(sorted(range(len(dims)), key=dims.__getitem__))
        for dim in range(len(self.first)):
            if dim not in dims:
                part = part.unsqueeze(dim)
        return part

    def moved(self, dim: int, by: int) -> Tile:
        """Farther along in the tensor."""
        side = self.sides[dim]
        return self._with_side(dim, Side(side.start + by, side.length, side.dim))

    def cut(self, dim: int, start: int, stop: int) -> Tile | None:
        """What lies from `start` to `stop` along a dim, counted from there; None where that is nothing."""
        side = self.sides[dim]
        begin, end = max(side.start, start), min(side.start + side.length, stop)
        if begin >= end:
            return None
        first = list(self.first)
        if side.dim is not None:
            first[side.dim] += begin - side.start
        return Tile(self.source, tuple(first), self.sides)._with_side(dim, Side(begin - start, end - begin, side.dim))

    def with_dim(self, dim: int) -> Tile:
        """With a new dim of one element."""
        return Tile(self.source, self.first, (*self.sides[:dim], Side(0, 1, None), *self.sides[dim:]))

    def without_dim(self, dim: int) -> Tile:
        """Without a dim of one element."""
        return Tile(self.source, self.first, (*self.sides[:dim], *self.sides[dim + 1 :]))

    def permuted(self, order: Sequence[int]) -> Tile:
        """With the dims in another order."""
        return Tile(self.source, self.first, tuple(self.sides[dim] for dim in order))

    def _with_side(self, dim: int, side: Side) -> Tile:
        return Tile(self.source, self.first, (*self.sides[:dim], side, *self.sides[dim + 1 :]))


@dataclass(frozen=True)
class TiledEntry:
    """A tensor that is put together from tiles; of a box, just the parts of the sources that lie in it are read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tiles: tuple[Tile, ...]

    divisible = True

    @property
    def where(self) -> str:
        """The files that the sources are in."""
        return files_of(tile.source for tile in self.tiles)

    @property
    def position(self) -> tuple[str, int]:
        """That of the first source."""
        return self.tiles[0].source.position if self.tiles else ("", 0)

    @property
    def elements(self) -> Any:
        """Those of the sources, and where they go."""
        return self.shape, self.dtype, [(tile.source.elements, tile.first, tile.sides) for tile in self.tiles]

    def expect(self, box: Box) -> None:
        """Nothing: the parts of a box lie in many places."""

    def read(self, box: Box, out: torch.Tensor) -> None:
        """Fill `out` with this box of the tensor."""
        for tile in self.tiles:
            tile.read(box, out)


def files_of(sources: Iterable[Entry]) -> str:
    """The files of several entries, for messages."""
    files = list(dict.fromkeys(source.where for source in sources))
    return ", ".join(files) if len(files) < 3 else f"{files[0]} and {len(files) - 1} more files"


class Tiled(torch.Tensor):
    """A tensor without elements that knows its tiles. Operations that do more than move elements in boxes raise `Untiled`."""

    tiles: tuple[Tile, ...]

    @staticmethod
    def __new__(cls, tiles: Iterable[Tile], shape: Sequence[int], dtype: torch.dtype) -> Tiled:
        made: Tiled = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=torch.device("meta"))
        made.tiles = tuple(tiles)
        return made

    @classmethod
    def of(cls, source: Entry) -> Tiled:
        """A checkpoint's tensor."""
        return cls([Tile.whole(source)], source.shape, source.dtype)

    def entry(self, name: str) -> TiledEntry:
        """The tensor as an entry."""
        return TiledEntry(name, tuple(self.shape), self.dtype, self.tiles)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = _OPERATIONS.get(func)
        if operation is None:
            raise Untiled(str(func))
        return operation(*args, **(kwargs or {}))


# -- the operations that keep tiles: their arguments are ATen's ---------------------------------------------------------


def _cat(tensors: Sequence[Any], dim: int = 0) -> Tiled:
    tiles: list[Tile] = []
    length = 0
    shape = list(tensors[0].shape)
    dim %= len(shape)
    for each in tensors:
        if not isinstance(each, Tiled):
            raise Untiled("concatenated with a tensor that is not the checkpoint's")
        if [*each.shape[:dim], *each.shape[dim + 1 :]] != [*shape[:dim], *shape[dim + 1 :]]:
            raise ValueError(f"{list(each.shape)} and {shape} do not fit together along dim {dim}")
        tiles += [tile.moved(dim, length) for tile in each.tiles]
        length += each.shape[dim]
    shape[dim] = length
    return Tiled(tiles, shape, tensors[0].dtype)


def _stack(tensors: Sequence[Any], dim: int = 0) -> Tiled:
    dim %= tensors[0].dim() + 1
    return _cat([_unsqueeze(each, dim) if isinstance(each, Tiled) else each for each in tensors], dim)


def _slice(tensor: Tiled, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tiled:
    if step != 1:
        raise Untiled("a slice with gaps")
    dim %= tensor.dim()
    start, stop, _ = slice(start, end).indices(tensor.shape[dim])
    shape = list(tensor.shape)
    shape[dim] = max(0, stop - start)
    parts = [tile.cut(dim, start, stop) for tile in tensor.tiles]
    return Tiled([part for part in parts if part is not None], shape, tensor.dtype)


def _split_with_sizes(tensor: Tiled, sizes: Sequence[int], dim: int = 0) -> list[Tiled]:
    if sum(sizes) != tensor.shape[dim]:
        raise ValueError(f"{list(tensor.shape)} cannot be split into {list(sizes)} along dim {dim}")
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [_slice(tensor, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _split(tensor: Tiled, size: int, dim: int = 0) -> list[Tiled]:
    return [_slice(tensor, dim, start, start + size) for start in range(0, tensor.shape[dim], size)]


def _select(tensor: Tiled, dim: int, index: int) -> Tiled:
    dim %= tensor.dim()
    index %= tensor.shape[dim]
    return _squeeze(_slice(tensor, dim, index, index + 1), dim)


def _unbind(tensor: Tiled, dim: int = 0) -> list[Tiled]:
    return [_select(tensor, dim, index) for index in range(tensor.shape[dim])]


def _unsqueeze(tensor: Tiled, dim: int) -> Tiled:
    dim %= tensor.dim() + 1
    shape = [*tensor.shape[:dim], 1, *tensor.shape[dim:]]
    return Tiled([tile.with_dim(dim) for tile in tensor.tiles], shape, tensor.dtype)


def _squeeze(tensor: Tiled, dim: int) -> Tiled:
    dim %= tensor.dim()
    if tensor.shape[dim] != 1:
        return tensor
    return Tiled([tile.without_dim(dim) for tile in tensor.tiles], [*tensor.shape[:dim], *tensor.shape[dim + 1 :]], tensor.dtype)


def _permute(tensor: Tiled, order: Sequence[int]) -> Tiled:
    order = [dim % tensor.dim() for dim in order]
    return Tiled([tile.permuted(order) for tile in tensor.tiles], [tensor.shape[dim] for dim in order], tensor.dtype)


def _transpose(tensor: Tiled, dim0: int, dim1: int) -> Tiled:
    order = list(range(tensor.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(tensor, order)


def _transpose_matrix(tensor: Tiled) -> Tiled:
    return _permute(tensor, list(reversed(range(tensor.dim()))))


def _same(tensor: Tiled, **options: Any) -> Tiled:
    """A copy; a conversion of the dtype is left to whoever reads."""
    return Tiled(tensor.tiles, tensor.shape, tensor.dtype)


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.cat.default: _cat,
    aten.stack.default: _stack,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.select.int: _select,
    aten.unbind.int: _unbind,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose_matrix,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten._to_copy.default: _same,
}
