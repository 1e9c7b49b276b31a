"""Boxes: the parts of a tensor that a range of indices in every dim selects, and filling just these.

The elements of a box lie in the random stream as stretches with gaps between them. Long gaps are passed over; where they are
short, whole rows are drawn into scratch memory and the box is cut out of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from ..tracer.places import Place
from .fill import CHUNK, Fill, Pen
from .workers import Workers

Box = tuple[range, ...]

_PARALLEL = 1 << 20  # elements: what is smaller is not worth a second thread
_GAP = 1 << 12  # elements: shorter gaps are drawn, as every stretch costs a few microseconds


def whole_box(size: tuple[int, ...]) -> Box:
    """All of a tensor of this shape."""
    return tuple(map(range, size))


def fill_all(fill: Fill, out: torch.Tensor, place: Place, workers: Workers) -> None:
    """Write all elements of a fill that starts from `place` into the row `out`, which may have another dtype."""
    fill_stretch(fill, 0, out, place, workers)


def fill_stretch(fill: Fill, first: int, out: torch.Tensor, place: Place, workers: Workers) -> None:
    """Write the elements from number `first` on into the row `out`."""

    def write(piece: range) -> None:
        fill.pen(place, first + piece.start).run(out[piece.start : piece.stop])

    workers.each(write, pieces(out.numel(), workers))


def pieces(count: int, workers: Workers) -> list[range]:
    """`count` elements, divided between the workers; cut where blocks of elements end."""
    share = count if count < _PARALLEL else -(-count // (workers.count * 1024)) * 1024
    return [range(start, min(start + share, count)) for start in range(0, count, share)] if count else []


def fill_box(fill: Fill, size: tuple[int, ...], box: Box, out: torch.Tensor, place: Place, workers: Workers) -> None:
    """Write the elements of a fill of shape `size` that are in `box` into `out`, of the box's shape and without gaps.

    Dims are given in the order of memory, the slowest first.
    """
    if not out.numel():
        return
    cut = max((dim for dim, part in enumerate(box) if part != range(size[dim])), default=None)
    if cut is None or (box[cut].step == 1 and all(len(part) == 1 for part in box[:cut])):
        first = sum(part.start * math.prod(size[dim + 1 :]) for dim, part in enumerate(box))
        fill_stretch(fill, first, out.view(-1), place, workers)
        return
    rows = _Rows(fill, box[cut], size[cut], math.prod(size[cut + 1 :]))
    starts = [index * rows.length for index in _row_numbers(size[:cut], box[:cut])]
    target = out.view(len(starts), len(box[cut]), rows.inner)

    def write(piece: range) -> None:
        rows.write(fill.pen(place, starts[piece.start]), starts[piece.start : piece.stop], target[piece.start : piece.stop])

    drawn = len(starts) * rows.length
    share = len(starts) if drawn < _PARALLEL else -(-len(starts) // workers.count)
    workers.each(write, [range(start, min(start + share, len(starts))) for start in range(0, len(starts), share)])


def _row_numbers(size: tuple[int, ...], box: Box) -> Iterator[int]:
    """The numbers of the rows that a box selects in the dims before the one that is cut."""
    strides = [math.prod(size[dim + 1 :]) for dim in range(len(size))]
    for index in itertools.product(*box):
        yield sum(map(int.__mul__, index, strides))


class _Rows:
    """Rows of `count` times `inner` elements, of which `part` of the `count` is wanted."""

    def __init__(self, fill: Fill, part: range, count: int, inner: int) -> None:
        self.fill, self.part, self.inner = fill, part, inner
        self.length = count * inner

    def write(self, pen: Pen, starts: list[int], target: torch.Tensor) -> None:
        """Write the wanted part of the rows that start with the elements `starts` into `target`, row after row."""
        gap = self.length - len(self.part) * self.inner if self.part.step == 1 else (self.part.step - 1) * self.inner
        if gap >= _GAP:
            self._stretches(pen, starts, target)
        else:
            self._cut_out(pen, starts, target)

    def _stretches(self, pen: Pen, starts: list[int], target: torch.Tensor) -> None:
        """One stretch after the other, passing over what is between them."""
        if self.part.step == 1:
            firsts = [start + self.part.start * self.inner for start in starts]
            rows = target.view(len(starts), -1).unbind()
        else:
            firsts = [start + index * self.inner for start in starts for index in self.part]
            rows = target.view(-1, self.inner).unbind()
        for first, row in zip(firsts, rows, strict=True):
            pen.skip(first - pen.at)
            pen.run(row)

    def _cut_out(self, pen: Pen, starts: list[int], target: torch.Tensor) -> None:
        """All elements around the wanted ones, as many rows at a time as fit into the cache, or a part of a long row."""
        if self.length <= CHUNK:
            self._whole_rows(pen, starts, target)
            return
        step = self.part.step
        at_once = max(1, CHUNK // (self.inner * step))
        scratch = torch.empty(at_once * step * self.inner, dtype=self.fill.dtype, device="cpu")
        for start, row in zip(starts, target, strict=True):
            for number in range(0, len(self.part), at_once):
                indices = self.part[number : number + at_once]
                pen.skip(start + indices.start * self.inner - pen.at)
                drawn = scratch[: (indices[-1] - indices.start + 1) * self.inner]
                pen.write(drawn)
                row[number : number + at_once] = drawn.view(-1, self.inner)[::step]

    def _whole_rows(self, pen: Pen, starts: list[int], target: torch.Tensor) -> None:
        at_once = max(1, CHUNK // self.length)
        scratch = torch.empty(at_once, self.length // self.inner, self.inner, dtype=self.fill.dtype, device="cpu")
        number = 0
        while number < len(starts):
            count = _consecutive(starts, number, at_once, self.length)
            pen.skip(starts[number] - pen.at)
            pen.write(scratch[:count].view(-1))
            target[number : number + count] = scratch[:count, self.part.start : self.part.stop : self.part.step]
            number += count


def _consecutive(starts: list[int], number: int, most: int, length: int) -> int:
    """How many rows from `number` on lie one behind the other, `most` at the most."""
    count = 1
    while count < most and number + count < len(starts) and starts[number + count] == starts[number] + count * length:
        count += 1
    return count
