"""Boxes: the parts of a tensor that a range of indices in every dim selects, and filling just these.

The elements of a box lie in the random stream as stretches with gaps between them. Long gaps are passed over; where they are
short, whole rows are drawn into scratch memory and the box is cut out of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..tracer.places import Place
from .fill import CHUNK, Pen
from .workers import Workers

Box = tuple[range, ...]
Draws = Callable[[int, torch.Tensor], None]

_PARALLEL = 1 << 20  # elements: what is smaller is not worth a second thread
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
    share = count if count < _PARALLEL else -(-count // (workers.count * quantum)) * quantum
    return [range(start, min(start + share, count)) for start in range(0, count, share)] if count else []


def fill_box(fill: Penned, size: tuple[int, ...], box: Box, out: torch.Tensor, place: Place | None, workers: Workers) -> None:
    """Write the elements of a fill of shape `size` that are in `box` into `out`, of the box's shape and without gaps.

    Dims are given in the order of memory, the slowest first.
    """
    if not out.numel():
        return
    rows = Rows.of(size, box)
    if rows.is_one_stretch:
        fill_stretch(fill, rows.first, out.view(-1), place, workers)
        return
    starts, target = rows.starts, rows.shaped(out)

    def write(piece: range) -> None:
        pen = fill.pen(place, starts[piece.start])
        part = starts[piece.start : piece.stop], target[piece.start : piece.stop]
        if rows.write_together(*part, pen):
            return
        if rows.gap >= _GAP:
            rows.write_stretches(*part, pen)
        else:
            rows.cut_out(*part, pen.write_at, fill.dtype)

    share = len(starts) if len(starts) * rows.length < _PARALLEL else -(-len(starts) // workers.count)
    workers.each(write, [range(start, min(start + share, len(starts))) for start in range(0, len(starts), share)])


def cut_rows(
    size: tuple[int, ...], box: Box, out: torch.Tensor, draw: Draws, dtype: torch.dtype, chunk: int | None = None
) -> None:
    """The same as `fill_box` by way of `draw(first, row)`, which writes any elements, called in ascending order.

    It is asked for about `chunk` elements at a time.
    """
    rows = Rows.of(size, box)
    if rows.is_one_stretch:
        draw(rows.first, out.view(-1))
    else:
        rows.cut_out(rows.starts, rows.shaped(out), draw, dtype, chunk)


@dataclass(frozen=True)
class Rows:
    """A box as rows of `count` times `inner` elements that start with the elements `starts`, of which `part` of the `count`."""

    starts: list[int]
    part: range
    count: int
    inner: int

    @classmethod
    def of(cls, size: tuple[int, ...], box: Box) -> Rows:
        """The rows of a tensor of shape `size` that `box` is cut out of: they go through the last dim that it does not fill."""
        cut = max((dim for dim, part in enumerate(box) if part != range(size[dim])), default=0)
        if not size:
            return cls([0], range(1), 1, 1)
        inner = math.prod(size[cut + 1 :])
        strides = [math.prod(size[dim + 1 :]) for dim in range(cut)]
        starts = [sum(map(int.__mul__, index, strides)) for index in itertools.product(*box[:cut])]
        return cls(starts, box[cut], size[cut], inner)

    @property
    def length(self) -> int:
        """The elements of a row."""
        return self.count * self.inner

    @property
    def first(self) -> int:
        """The first element of the box."""
        return self.starts[0] + self.part.start * self.inner

    @property
    def is_one_stretch(self) -> bool:
        """Whether the box's elements lie side by side."""
        return len(self.starts) == 1 and (self.part.step == 1 or len(self.part) == 1)

    @property
    def gap(self) -> int:
        """The elements between two stretches."""
        return self.length - len(self.part) * self.inner if self.part.step == 1 else (self.part.step - 1) * self.inner

    def shaped(self, out: torch.Tensor) -> torch.Tensor:
        """The box's tensor as rows of what is cut out of each."""
        return out.view(len(self.starts), len(self.part), self.inner)

    def write_together(self, starts: list[int], target: torch.Tensor, pen: Pen) -> bool:
        """All stretches by one call of the pen's; False where they are not evenly spaced, or the pen cannot."""
        evenly = starts[-1] - starts[0] == (len(starts) - 1) * self.length
        if self.part.step != 1 or not evenly or target.dtype != pen.dtype:
            return False
        pen.skip(starts[0] + self.part.start * self.inner - pen.at)
        return pen.write_rows(target.view(len(starts), -1), self.gap)

    def write_stretches(self, starts: list[int], target: torch.Tensor, pen: Pen) -> None:
        """One stretch after the other, passing over what is between them."""
        if self.part.step == 1:
            firsts = [start + self.part.start * self.inner for start in starts]
            stretches = target.view(len(starts), -1).unbind()
        else:
            firsts = [start + index * self.inner for start in starts for index in self.part]
            stretches = target.view(-1, self.inner).unbind()
        for first, stretch in zip(firsts, stretches, strict=True):
            pen.skip(first - pen.at)
            pen.run(stretch)

    def cut_out(self, starts: list[int], target: torch.Tensor, draw: Draws, dtype: torch.dtype, chunk: int | None = None) -> None:
        """All elements around the wanted ones, as many rows at a time as fit into the cache, or a part of a long row."""
        chunk = chunk or CHUNK
        if self.length <= chunk:
            self._cut_out_of_rows(starts, target, draw, dtype, chunk)
            return
        step = self.part.step
        at_once = max(1, chunk // (self.inner * step))
        scratch = torch.empty(at_once * step * self.inner, dtype=dtype, device=target.device)
        for start, row in zip(starts, target, strict=True):
            for number in range(0, len(self.part), at_once):
                indices = self.part[number : number + at_once]
                drawn = scratch[: (indices[-1] - indices.start + 1) * self.inner]
                draw(start + indices.start * self.inner, drawn)
                row[number : number + at_once] = drawn.view(-1, self.inner)[::step]

    def _cut_out_of_rows(self, starts: list[int], target: torch.Tensor, draw: Draws, dtype: torch.dtype, chunk: int) -> None:
        at_once = max(1, chunk // self.length)
        scratch = torch.empty(at_once, self.count, self.inner, dtype=dtype, device=target.device)
        number = 0
        while number < len(starts):
            count = self._consecutive(starts, number, at_once)
            draw(starts[number], scratch[:count].view(-1))
            target[number : number + count] = scratch[:count, self.part.start : self.part.stop : self.part.step]
            number += count

    def _consecutive(self, starts: list[int], number: int, most: int) -> int:
        """How many rows from `number` on lie one behind the other, `most` at the most."""
        count = 1
        while count < most and number + count < len(starts) and starts[number + count] == starts[number] + count * self.length:
            count += 1
        return count
