"""Boxes: the parts of a tensor that a range of indices in every dim selects, and filling just these.

The elements of a box lie in the random stream as stretches with gaps between them. Long gaps are passed over; where they are
short, whole rows are drawn into scratch memory and the box is cut out of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ..tracer.native import native
from ..tracer.places import Place
from .pens import CHUNK, Pen
from .workers import Workers

Box = tuple[range, ...]
Draws = Callable[[int, torch.Tensor], None]

_PARALLEL = 1 << 20  # elements: what is smaller is not worth a second thread, where compiled code jumps there
_PARALLEL_UNCOMPILED = 1 << 22  # the same without it
_GAP = 1 << 12  # elements: shorter gaps are drawn, as every stretch costs a few microseconds


def whole_box(size: tuple[int, ...]) -> Box:
    """All of a tensor of this shape."""
    return tuple(map(range, size))


class Penned(Protocol):
    """What gives out pens: a `Fill`, where it starts from; or a fill that starts from nowhere in particular."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def quantum(self) -> int: ...
    def pen(self, place: Any, first: int = 0) -> Pen: ...


def fill_stretch(fill: Penned, first: int, out: torch.Tensor, place: Place | None, workers: Workers) -> None:
    """Write the elements of a fill that starts from `place`, from number `first` on, into the row `out`.

    Where `out` has another dtype than the fill, the numbers are converted on the way.
    """

    def write(piece: range) -> None:
        fill.pen(place, first + piece.start).run(out[piece.start : piece.stop])

    workers.each(write, pieces(len(out), workers, fill.quantum))


def pieces(count: int, workers: Workers, quantum: int) -> list[range]:
    """`count` elements, divided between the workers at multiples of `quantum`."""
    share = count if count < _least() else -(-count // (workers.count * quantum)) * quantum
    return [range(start, min(start + share, count)) for start in range(0, count, share)] if count else []


def _least() -> int:
    """The elements from which on threads divide a fill between them."""
    return _PARALLEL if native() is not None else max(_PARALLEL, _PARALLEL_UNCOMPILED)


def fill_box(fill: Penned, size: tuple[int, ...], box: Box, out: torch.Tensor, place: Place | None, workers: Workers) -> None:
    """Write the elements of a fill of shape `size` that are in `box` into `out`, of the box's shape and without gaps.

    Dims are given in the order of memory, the slowest first.
    """
    if not out.numel():
        return
    first = one_stretch(size, box)
    if first is not None:
        fill_stretch(fill, first, out.view(-1), place, workers)
        return
    stretches = Stretches(size, box, out)
    rows = stretches if stretches.gap >= _GAP else CutOut(size, box, out, fill.dtype, CHUNK)

    def write(piece: range) -> None:
        rows.write(piece, fill.pen(place))

    def write_together(piece: range) -> None:
        if not stretches.write_together(piece, fill.pen(place)):
            left.append(piece)

    left: list[range] = []
    if stretches.evenly:
        workers.each(write_together, _shares(stretches.number, stretches.number * stretches.length, workers))
    if left or not stretches.evenly:
        workers.each(write, _shares(rows.number, stretches.number * stretches.length, workers))


def _shares(number: int, elements: int, workers: Workers) -> list[range]:
    """The numbers of some rows, which go through so many elements, divided between the workers."""
    share = number if elements < _least() else -(-number // workers.count)
    return [range(start, min(start + share, number)) for start in range(0, number, share)]


def cut_rows(
    size: tuple[int, ...], box: Box, out: torch.Tensor, draw: Draws, dtype: torch.dtype, chunk: int | None = None
) -> None:
    """The same as `fill_box` by way of `draw(first, row)`, which writes any elements, called in ascending order.

    It is asked for about `chunk` elements at a time.
    """
    first = one_stretch(size, box)
    if first is not None:
        draw(first, out.view(-1))
    else:
        rows = CutOut(size, box, out, dtype, chunk or CHUNK)
        rows.draw(range(rows.number), draw)


def one_stretch(size: tuple[int, ...], box: Box) -> int | None:
    """The first element of a box whose elements lie side by side; None for any other."""
    cut = _cut(size, box)
    if any(len(part) > 1 for part in box[:cut]) or (box and len(box[cut]) > 1 and box[cut].step > 1):
        return None
    return sum(part.start * math.prod(size[dim + 1 :]) for dim, part in enumerate(box))


def _cut(size: tuple[int, ...], box: Box) -> int:
    """The last dim that a box does not fill."""
    return max((dim for dim, part in enumerate(box) if part != range(size[dim])), default=0)


def _starts(size: tuple[int, ...], box: Box, dim: int, piece: range) -> Iterator[int]:
    """The first elements of the rows number `piece` that a box selects, where a row goes through the dims from `dim` on."""
    strides = [math.prod(size[each + 1 :]) for each in range(dim)]
    indices = itertools.islice(itertools.product(*box[:dim]), piece.start, piece.stop)
    return (sum(map(int.__mul__, index, strides)) for index in indices)


class Stretches:
    """A box as stretches of elements that lie side by side, with long gaps between them that are passed over."""

    def __init__(self, size: tuple[int, ...], box: Box, out: torch.Tensor) -> None:
        self._size, self._box, self._cut = size, box, _cut(size, box)
        self._part, self._inner = box[self._cut], math.prod(size[self._cut + 1 :])
        self.number = math.prod(len(part) for part in box[: self._cut])
        self.length = size[self._cut] * self._inner
        self._target = out.view(self.number, len(self._part), self._inner)

    @property
    def gap(self) -> int:
        """The elements between two stretches."""
        if self._part.step > 1:
            return (self._part.step - 1) * self._inner
        return self.length - len(self._part) * self._inner

    @property
    def evenly(self) -> bool:
        """Whether the gaps are all the same."""
        before = self._box[1 : self._cut] == whole_box(self._size[1 : self._cut])
        return self._part.step == 1 and before and (self._cut == 0 or self._box[0].step == 1)

    def write_together(self, piece: range, pen: Pen) -> bool:
        """The stretches number `piece` by one call of the pen's; False, and nothing is done, where it cannot."""
        target = self._target[piece.start : piece.stop].view(len(piece), -1)
        if target.dtype != pen.dtype:
            return False
        first = next(_starts(self._size, self._box, self._cut, range(1))) + piece.start * self.length
        pen.skip(first + self._part.start * self._inner - pen.at)
        return pen.write_rows(target, self.gap)

    def write(self, piece: range, pen: Pen) -> None:
        """The stretches of the rows number `piece`, one after the other."""
        starts = _starts(self._size, self._box, self._cut, piece)
        together = self._part.step == 1
        for start, row in zip(starts, self._target[piece.start : piece.stop], strict=True):
            for index, stretch in [(self._part.start, row.view(-1))] if together else zip(self._part, row, strict=True):
                pen.skip(start + index * self._inner - pen.at)
                pen.run(stretch)


class CutOut:
    """A box that is cut out of rows drawn into scratch memory, of `chunk` elements at most."""

    def __init__(self, size: tuple[int, ...], box: Box, out: torch.Tensor, dtype: torch.dtype, chunk: int) -> None:
        self._size, self._box, self._out, self._dtype, self._chunk = size, box, out, dtype, chunk
        fitting = (dim for dim in range(len(size)) if math.prod(size[dim:]) <= chunk)
        self._dim = min(next(fitting, len(size)), _cut(size, box))  # the first dim of a row
        self._length = math.prod(size[self._dim :])
        self.number = math.prod(len(part) for part in box[: self._dim])

    def write(self, piece: range, pen: Pen) -> None:
        """The rows number `piece`."""
        self.draw(piece, pen.write_at)

    def draw(self, piece: range, draw: Draws) -> None:
        """The rows number `piece`, their elements by `draw`."""
        target = self._out.view(self.number, *self._out.shape[self._dim :])[piece.start : piece.stop]
        starts = _starts(self._size, self._box, self._dim, piece)
        if self._length > self._chunk:
            for start, row in zip(starts, target, strict=True):
                self._long_row(start, row, draw)
        else:
            self._short_rows(starts, target, draw)

    def _long_row(self, start: int, row: torch.Tensor, draw: Draws) -> None:
        """Some indices of the row's first dim at a time."""
        part, inner = self._box[self._dim], self._length // self._size[self._dim]
        at_once = max(1, self._chunk // (inner * part.step))
        scratch = torch.empty(at_once * part.step * inner, dtype=self._dtype, device=row.device)
        for number in range(0, len(part), at_once):
            indices = part[number : number + at_once]
            count = indices[-1] - indices.start + 1
            drawn = scratch[: count * inner]
            draw(start + indices.start * inner, drawn)
            shaped = drawn.view(count, *self._size[self._dim + 1 :])
            row[number : number + at_once] = shaped[(slice(None, None, part.step), *_slices(self._box[self._dim + 1 :]))]

    def _short_rows(self, starts: Iterator[int], target: torch.Tensor, draw: Draws) -> None:
        """As many rows at a time as lie one behind the other and fit."""
        at_once = max(1, self._chunk // self._length)
        scratch = torch.empty(at_once, *self._size[self._dim :], dtype=self._dtype, device=target.device)
        number = 0
        for first, count in _consecutive(starts, self._length, at_once):
            draw(first, scratch[:count].view(-1))
            target[number : number + count] = scratch[(slice(count), *_slices(self._box[self._dim :]))]
            number += count


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(part.start, part.stop, part.step) for part in box)


def _consecutive(starts: Iterator[int], length: int, most: int) -> Iterator[tuple[int, int]]:
    """The rows that lie one behind the other, together: the first one's start, and how many."""
    first, count = next(starts), 1
    for start in starts:
        if start == first + count * length and count < most:
            count += 1
        else:
            yield first, count
            first, count = start, 1
    yield first, count
