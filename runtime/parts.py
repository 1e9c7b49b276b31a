"""Replaying parts of tensors: of every storage, only the elements in its window are made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..tracer.elements import CONSTANTS, FILLED, by_element
from ..tracer.errors import MaterializeError
from ..tracer.graph import Op, StreamPosition, View
from ..tracer.places import Place
from ..tracer.replay import Replay, Spot
from ..tracer.schema import aten
from .boxes import Box, cut_rows, fill_box, whole_box
from .cuda import SCRATCH, CudaFill
from .fill import Fill
from .filler import Threaded
from .pages import passing_row, prefer_huge_pages
from .truncated import Settler, Truncated
from .windows import Window, Windows, broadcast, draws_by_element, memory_order

Deliver = Callable[[int, torch.Tensor], torch.Tensor]
Wanted = Sequence[tuple[View, Box]]


def _kept(number: int, piece: torch.Tensor) -> torch.Tensor:
    return piece


class PartialReplay(Replay):
    """A `Replay` of the boxes of some views."""

    def __init__(
        self, ops: Sequence[Any], records: Sequence[Any], states: Mapping[str, torch.Tensor], zeros: bool, filler: Threaded
    ) -> None:
        super().__init__(ops, records, states, zeros, filler)
        self.staying: frozenset[int] | None = None  # the storages whose memory is kept by whoever asked; None: that may be any
        self._threaded = filler
        self._windows: dict[int, Window] = {}
        self._made: dict[int, torch.Tensor] = {}
        self._drawn_before: dict[int, torch.Tensor] = {}
        self._prepared: Wanted | None = None
        self._storages_wanted: list[int] = []
        self._needed: frozenset[int] = frozenset()
        self._held: Counter[int] = Counter()
        self._deliveries = _Deliveries((), _kept)
        self._conversions: Mapping[int, Op] = {}
        self._converted: set[int] = set()

    def run_whole(self, views: Sequence[View]) -> list[torch.Tensor]:
        """All of every view; views of one storage share its memory, which is nobody else's."""
        storages = list(dict.fromkeys(view.storage for view in views))
        with self._without_windows():
            self.run(storages)
        for index in storages:
            constant, memory = self._records[index].constant, self.storages[index]
            if constant is not None and memory.data_ptr() == constant.value.untyped_storage().data_ptr():
                self.storages[index] = memory.clone()
        return [self.open(view) for view in views]

    def prepare(self, wanted: Wanted) -> None:
        """Work out which part of every storage `run_parts` will make for these; it does so itself where this was not called."""
        self._made.clear()
        self._drawn_before.clear()
        self._prepared = wanted
        self._storages_wanted = list(dict.fromkeys(view.storage for view, box in wanted if all(box)))
        needed, _ = self._to_run(self._storages_wanted)
        self._needed = frozenset(needed)
        self._held = Counter()
        for view, box in wanted:
            self._held[view.storage] += math.prod(map(len, box))
        ops = [self._ops[index] for index in needed]
        elsewhere = [each.index for each in self._records if each.constant is not None or _is_missing(str(each.device))]
        self._windows = Windows(ops, self._nbytes, elsewhere, self._is_by_element).find(wanted)
        self._conversions, self._converted = self._find_conversions(ops), set()

    def run_parts(
        self, wanted: Wanted, ends: Sequence[StreamPosition] = (), deliver: Deliver = _kept
    ) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """The box of every view, each in memory of its own; and as for `run`. What was replayed before is forgotten.

        Each is given to `deliver` with its number as soon as it is finished, and what that returns is kept in its place.
        """
        if self._prepared is not wanted:
            self.prepare(wanted)
        self._prepared = None
        self.storages.clear()
        self._deliveries = _Deliveries(wanted, deliver)
        states = self._run(self._storages_wanted, list(ends))
        for storage in self._deliveries.left():
            self._finished(storage, True)
        return self._deliveries.pieces(), states

    def stretch(self, op: Op) -> range | None:
        """The elements that will be made of what the op fills, by their places in memory, once all is prepared.

        None where they do not lie side by side, or where more than these, or than what is wanted, is made of the storage.
        """
        view = op.targets[0]
        window = self._windows.get(view.storage)
        if window is None or op.index not in self._needed or self._held[view.storage] < math.prod(map(len, window.box)):
            return None
        order = memory_order(view)
        size, box = tuple(view.size[dim] for dim in order), tuple(window.box[dim] for dim in order)
        if view != window.reference or not all(box) or box[1:] != whole_box(size)[1:] or box[0].step != 1:
            return None
        each = math.prod(size[1:])
        return range(box[0].start * each, box[0].stop * each)

    def keep(self, op: Op, row: torch.Tensor) -> None:
        """Take the elements of the op's `stretch`, drawn already, where they are wanted: they are not drawn again."""
        self._drawn_before[op.index] = row

    @contextmanager
    def _without_windows(self) -> Iterator[None]:
        """Make whole storages meanwhile, and touch no window."""
        windows, made = self._windows, self._made
        self._windows, self._made = {}, {}
        try:
            yield
        finally:
            self._windows, self._made = windows, made

    def _find_conversions(self, ops: Sequence[Op]) -> Mapping[int, Op]:
        """By the number of a fill, the op that converts what it writes, where nothing else is done with that.

        The numbers are then converted while they are drawn, as a window in the dtype of the fill would take more than the result.
        """
        uses: dict[int, list[Op]] = {}
        for op in ops:
            for storage in {view.storage for view in (*op.reads, *op.targets)}:
                uses.setdefault(storage, []).append(op)
        kept = frozenset(self._storages_wanted)
        pairs = [found for storage, found in uses.items() if len(found) == 2 and storage not in kept]
        found = [(fill, then) for fill, then in pairs if self._converts(fill, then)]
        return {fill.index: then for fill, then in found if len(uses[then.targets[0].storage]) == 1}

    def _converts(self, fill: Op, then: Op) -> bool:
        if fill.position is None or then.func is not aten._to_copy.default or then.reads != fill.targets:
            return False
        before, after = fill.targets[0], then.targets[0]
        mine, theirs = self._windows.get(before.storage), self._windows.get(after.storage)
        if mine is None or theirs is None or (before.size, before.stride) != (after.size, after.stride):
            return False
        on_host = all(str(self._records[view.storage].device) == "cpu" for view in (before, after))
        return on_host and not (before.dtype.is_complex or after.dtype.is_complex) and mine.local(before) == theirs.local(after)

    def _is_by_element(self, op: Op) -> bool:
        return by_element(op, draws_by_element)

    # -- storages -------------------------------------------------------------------------------------------------------

    def _storage(self, index: int) -> torch.UntypedStorage:
        if index in self._windows:
            return self._window(index).untyped_storage()
        return super()._storage(index)

    def _window(self, index: int) -> torch.Tensor:
        """The window's elements, a tensor with the reference's dims in the reference's order of memory."""
        if index not in self._made:
            window = self._windows[index]
            size, dtype, device = math.prod(map(len, window.box)), window.reference.dtype, self._records[index].device
            if self.staying is None or index in self.staying or device != "cpu":
                made = (torch.zeros if self._zeros else torch.empty)(size, dtype=dtype, device=device)
            else:
                made = passing_row(size, dtype)
            prefer_huge_pages(made.untyped_storage())
            self._made[index] = window.over(made)
        return self._made[index]

    def _finished(self, storage: int, is_wanted: bool) -> None:
        for number, view, box in self._deliveries.of(storage):
            self._deliveries.take(number, self._own(self._piece(view, box), storage))
        super()._finished(storage, is_wanted and storage not in self._deliveries.storages)
        self._made.pop(storage, None)

    def _own(self, piece: torch.Tensor, storage: int) -> torch.Tensor:
        """The piece itself if it is all that its memory holds, and not a tensor's from outside; else a copy."""
        memory, constant = piece.untyped_storage(), self._records[storage].constant
        outside = constant is not None and memory.data_ptr() == constant.value.untyped_storage().data_ptr()
        return piece.clone() if outside or memory.nbytes() != piece.nbytes else piece

    def _piece(self, view: View, local: Box) -> torch.Tensor:
        """The box `local` of a view, for real."""
        if view.storage not in self._windows:
            return self.open(view)[tuple(slice(part.start, part.stop, part.step) for part in local)]
        window = self._windows[view.storage]
        if view == window.reference and local == window.box:
            return self._window(view.storage)
        found = window.positions(view, local)
        assert found is not None
        positions, dims = found
        piece = self._window(view.storage)[tuple(slice(part.start, part.stop, part.step) for part in positions)]
        along = [dim for dim in dims if dim is not None]
        piece = piece.permute([*along, *(dim for dim in range(len(positions)) if dim not in along)])
        return piece.reshape([len(part) for part in local]) if len(along) < len(dims) else piece.view(piece.shape[: len(dims)])

    # -- ops ------------------------------------------------------------------------------------------------------------

    def _local(self, op: Op) -> Box | None:
        """The box of what the op makes that lies in its storage's window; None where all of it is made."""
        window = self._windows.get(op.targets[0].storage) if op.targets else None
        return None if window is None else window.local(op.targets[0])

    def _call(self, op: Any) -> None:
        local = self._local(op)
        if local is None:
            super()._call(op)
        elif all(local) and op.index not in self._converted:
            self._by_element(op, local)

    def _by_element(self, op: Op, local: Box) -> None:
        target = self._piece(op.targets[0], local)
        if op.func in CONSTANTS:
            target.fill_(CONSTANTS[op.func](op.args))
        elif op.func in FILLED:
            op.func(target, *op.args[1:])
        else:
            self._compute(op, local, target)

    def _compute(self, op: Op, local: Box, target: torch.Tensor) -> None:
        def piece(value: Any) -> Any:
            return self._piece(value, broadcast(local, value)) if isinstance(value, View) else value

        if op.func is aten._to_copy.default:
            target.copy_(piece(op.args[0]))  # the same conversion, without a tensor in between
            return
        torch.set_default_dtype(op.default_dtype)
        kwargs = {name: piece(value) for name, value in op.kwargs if name not in ("memory_format", "device", "pin_memory")}
        out = op.func(*map(piece, op.args), **kwargs)
        if op.outputs:
            target.copy_(out)

    def _drawn(self, op: Any, start: Spot) -> Spot | Callable[[], Spot]:
        local = self._local(op)
        if local is None:
            return super()._drawn(op, start)
        if not isinstance(start, Place):
            return self._drawn_on_cuda(op, local, _sure(CudaFill.of(op, start)))
        fill = Fill.of_op(op)
        if fill is not None:
            if all(local):
                workers, then = self._threaded.workers, self._conversions.get(op.index, op)
                self._fill_box(then, local, lambda size, box, out: fill_box(fill, size, box, out, start, workers))
                self._converted.add(then.index)
            return start.after(fill.draw)
        truncated = _sure(Truncated.of_op(op))
        before = self._drawn_before.pop(op.index, None)
        if before is not None:
            self._take(op.targets[0].storage, before)
        elif all(local):
            self._fill_box(op, local, lambda size, box, out: self._settle(truncated, size, box, out, start))
        return lambda: _sure(self._threaded.passed(op, start))

    def _passed_over(self, op: Any, start: Spot) -> Spot | Callable[[], Spot]:
        """As for a whole replay: what such an op writes is dropped, and no window is touched."""
        with self._without_windows():
            return super()._passed_over(op, start)

    def _take(self, storage: int, row: torch.Tensor) -> None:
        """Make a row the elements of a storage's window, in the order of memory."""
        ready = self._windows[storage].over(row)
        if storage in self._made:
            self._made[storage].copy_(ready)
        else:
            self._made[storage] = ready

    def _drawn_on_cuda(self, op: Op, local: Box, fill: CudaFill) -> torch.Tensor:
        """Draw the box `local` of what the op fills, in large pieces: a kernel fills few elements no faster than many."""
        pen = fill.pen()
        if all(local):
            self._fill_box(op, local, lambda size, box, out: cut_rows(size, box, out, pen.write_at, fill.dtype, SCRATCH))
        return fill.end

    def _fill_box(self, op: Op, local: Box, fill: Callable[[tuple[int, ...], Box, torch.Tensor], None]) -> None:
        """Draw the box `local` of what the op fills: `fill` is given shape, box and where to, in the order of memory."""
        view = op.targets[0]
        order = memory_order(view)
        target = self._piece(view, local).permute(order)
        out = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        fill(tuple(view.size[dim] for dim in order), tuple(local[dim] for dim in order), out)
        if out is not target:
            target.copy_(out)

    def _settle(self, call: Truncated, size: tuple[int, ...], box: Box, out: torch.Tensor, start: Place) -> None:
        if box[1:] == whole_box(size)[1:] and box[0].step == 1:
            rounds = call.write(box[0].start * (call.fill.numel // size[0]), out.view(-1), start, self._threaded.workers)
            if box == whole_box(size):
                call.remember(start, rounds)
        else:
            cut_rows(size, box, out, Settler(call, start).settle, call.fill.dtype)


def _is_missing(device: str) -> bool:
    """Whether tensors cannot be made there: the meta device, or CUDA where there is none."""
    return device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available())


class _Deliveries:
    """The pieces that are wanted, by the storage that each is cut out of: handed over as soon as that is finished."""

    def __init__(self, wanted: Sequence[tuple[View, Box]], deliver: Deliver) -> None:
        self._deliver = deliver
        self._pieces: dict[int, torch.Tensor] = {}
        self._awaited: dict[int, list[tuple[int, View, Box]]] = {}
        for number, (view, box) in enumerate(wanted):
            if all(box):
                self._awaited.setdefault(view.storage, []).append((number, view, box))
            else:
                self.take(number, _nothing(view, box))
        self.storages = frozenset(self._awaited)

    def of(self, storage: int) -> list[tuple[int, View, Box]]:
        """What is cut out of a storage; asked for once."""
        return self._awaited.pop(storage, [])

    def left(self) -> list[int]:
        """The storages that no op has written or read."""
        return list(self._awaited)

    def take(self, number: int, piece: torch.Tensor) -> None:
        """Hand a piece over."""
        self._pieces[number] = self._deliver(number, piece)

    def pieces(self) -> list[torch.Tensor]:
        """All of them, in order."""
        return [self._pieces[number] for number in range(len(self._pieces))]


def _nothing(view: View, box: Box) -> torch.Tensor:
    """A part without elements."""
    return torch.empty([len(part) for part in box], dtype=view.dtype)


def _sure(found: Any) -> Any:
    if found is None:
        raise MaterializeError("a part of a tensor cannot be finished; this is a bug in groundplan, please report it")
    return found
