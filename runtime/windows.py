"""Windows: which part of every storage is needed for parts of some tensors, by what the recipe does to each element by itself.

A window is a box of a *reference*, the view that covers its storage. The recipe is walked backwards: where an op makes each
element of its result from the same element of its operands, the box asked of the result is asked of them; where it does not (a
QR decomposition, a permutation), they are needed whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from ..tracer.graph import Op, View
from .boxes import Box, whole_box
from .cuda import CudaFill
from .fill import Fill
from .truncated import Truncated


def draws_by_element(op: Op) -> bool:
    """Whether each element that the op draws can be drawn by itself."""
    if op.position is not None and op.position.device != "cpu":
        return CudaFill.of(op, torch.zeros(16, dtype=torch.uint8)) is not None
    return Fill.of_op(op) is not None or Truncated.of_op(op) is not None


class Located(NamedTuple):
    """Where a view lies in a reference: the indices it covers in every dim, and the dim that each of its own runs along."""

    ranges: Box
    dims: tuple[int | None, ...]


@lru_cache(maxsize=1 << 12)
def located(view: View, reference: View) -> Located | None:
    """`view` as a box of `reference`; None where it is none."""
    if view.dtype != reference.dtype or 0 in view.size:
        return None
    order = [dim for dim in memory_order(reference) if reference.size[dim] > 1]
    rest, ranges = view.offset - reference.offset, [range(1) for _ in reference.size]
    for dim in order:
        start, rest = divmod(rest, reference.stride[dim])
        ranges[dim] = range(start, start + 1)
    dims: list[int | None] = []
    for size, stride in zip(view.size, view.stride, strict=True):
        along = _along(stride, reference, order) if size > 1 else None
        if size > 1 and (along is None or along in dims):
            return None
        if along is not None:
            step, start = stride // reference.stride[along], ranges[along].start
            ranges[along] = range(start, start + (size - 1) * step + 1, step)
        dims.append(along)
    inside = not rest and all(part.start >= 0 and part[-1] < size for part, size in zip(ranges, reference.size, strict=True))
    return Located(tuple(ranges), tuple(dims)) if inside else None


def _along(stride: int, reference: View, order: Sequence[int]) -> int | None:
    """The dim of the reference in which a step of `stride` goes forward."""
    steps = ((dim, reference.stride[dim]) for dim in order)
    return next((dim for dim, each in steps if stride >= each > 0 and stride % each == 0), None)


def memory_order(view: View) -> list[int]:
    """The dims from the one whose elements lie farthest apart to the one whose lie nearest."""
    return sorted(range(len(view.size)), key=view.stride.__getitem__, reverse=True)


@dataclass(frozen=True, slots=True)
class Window:
    """The elements of a storage that are needed: a box of `reference`."""

    reference: View
    box: Box

    def local(self, view: View) -> Box | None:
        """The box of `view` that lies in the window; None where it cannot be told."""
        if view == self.reference:
            return self.box
        found = located(view, self.reference)
        if found is None:
            return None
        common = [_common(part, own) for part, own in zip(found.ranges, self.box, strict=True)]
        if not all(common):
            return tuple(range(0) for _ in view.size) if view.size else None
        boxes = []
        for dim in found.dims:
            if dim is None:
                boxes.append(range(1))
            else:
                own, part = common[dim], found.ranges[dim]
                first = (own.start - part.start) // part.step
                boxes.append(range(first, first + (len(own) - 1) * (own.step // part.step) + 1, own.step // part.step))
        return tuple(boxes)

    def over(self, row: torch.Tensor) -> torch.Tensor:
        """The window's elements, with the reference's dims, of a row that holds them in the reference's order of memory."""
        order = memory_order(self.reference)
        return row.view([len(self.box[dim]) for dim in order]).permute(sorted(range(len(order)), key=order.__getitem__))

    def covers(self, view: View) -> bool:
        """Whether it is a box of the reference at all."""
        return located(view, self.reference) is not None

    def positions(self, view: View, local: Box) -> tuple[Box, tuple[int | None, ...]] | None:
        """Where the box `local` of `view` lies in the window's own elements, dim by dim; and the dim of each of the view's."""
        found = located(view, self.reference)
        if found is None:
            return None
        ranges = list(found.ranges)
        for dim, part in zip(found.dims, local, strict=True):
            if dim is not None:
                ranges[dim] = ranges[dim][part.start : part.stop : part.step]
        return tuple(_within(part, own) for part, own in zip(ranges, self.box, strict=True)), found.dims


def _within(part: range, own: range) -> range:
    """The positions of the numbers of `part` among those of `own`."""
    first, step = (part.start - own.start) // own.step, max(1, part.step // own.step)
    return range(first, first + (len(part) - 1) * step + 1, step)


def _common(one: range, other: range) -> range:
    """The numbers that are in both."""
    lowest = max(one.start, other.start)
    skipped = max(0, -(-(lowest - one.start) // one.step))
    first = next((number for number in one[skipped : skipped + other.step] if number in other), None)
    if first is None:
        return range(0)
    step, last = math.lcm(one.step, other.step), min(one[-1], other[-1])
    return range(first, last + 1, step)


def _united(one: Box, other: Box) -> Box:
    """A box that holds both."""
    if one == other:
        return one
    return tuple(a if a == b else range(min(a.start, b.start), max(a[-1], b[-1]) + 1) for a, b in zip(one, other, strict=True))


class Windows:
    """The windows that parts of some views need; a storage without one is needed whole."""

    def __init__(
        self, ops: Sequence[Op], nbytes: Mapping[int, int], whole: Iterable[int], by_element: Callable[[Op], bool]
    ) -> None:
        self._ops = ops
        self._targets: dict[int, list[View]] = {}
        for op in ops:
            for target in op.targets:
                self._targets.setdefault(target.storage, []).append(target)
        self._nbytes = nbytes
        self._whole = set(whole)
        self._by_element = by_element
        self._found: dict[int, Window] = {}

    def find(self, wanted: Iterable[tuple[View, Box]]) -> dict[int, Window]:
        """The windows for the box of every view in `wanted`, by the storage's index."""
        wanted = list(wanted)
        while True:
            before = (dict(self._found), len(self._whole))
            for view, box in wanted:
                self._ask(view, box)
            for op in reversed(self._ops):
                self._ask_operands(op)
            if (self._found, len(self._whole)) == before:
                return self._found

    def _ask(self, view: View, box: Box) -> None:
        if view.storage in self._whole or not all(box):
            return
        window = self._found.get(view.storage)
        if window is not None and view == window.reference and box == window.box:
            return
        reference = self._reference(view) if window is None else window.reference
        positions = None if reference is None else Window(reference, whole_box(reference.size)).positions(view, box)
        if reference is None or positions is None:
            self._need_whole(view.storage)
            return
        self._found[view.storage] = Window(reference, positions[0] if window is None else _united(window.box, positions[0]))

    def _need_whole(self, storage: int) -> None:
        self._whole.add(storage)
        self._found.pop(storage, None)

    def _reference(self, view: View) -> View | None:
        """A view without gaps of all of a storage: this one, or one that an op writes."""
        return next((each for each in (view, *self._targets.get(view.storage, ())) if self._is_dense(each)), None)

    def _is_dense(self, view: View) -> bool:
        if view.offset or view.nbytes != self._nbytes[view.storage] or view.conj or view.neg:
            return False
        expected = 1
        for dim in reversed(memory_order(view)):
            if view.size[dim] > 1 and view.stride[dim] != expected:
                return False
            expected *= view.size[dim]
        return True

    def _ask_operands(self, op: Op) -> None:
        target = op.targets[0] if op.targets else None
        window = self._found.get(target.storage) if target is not None else None
        local = window.local(target) if window is not None and target is not None else None
        if target is None or local is None or not self._by_element(op):
            for view in (*op.reads, *op.targets):
                self._need_whole(view.storage)
            return
        for view in op.reads:
            self._ask(view, broadcast(local, view))


def broadcast(local: Box, operand: View) -> Box:
    """The box of an operand that the box `local` of the result is made from."""
    dims = local[len(local) - len(operand.size) :]
    return tuple(range(1) if size == 1 else part for size, part in zip(operand.size, dims, strict=True))
