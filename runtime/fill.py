"""Filling with random numbers: in pieces that fit the cache, on several threads, any stretch of a tensor; the bits of one call.

A `Fill` is one call of torch's that draws a number for each element in turn. A `Pen` stands somewhere in it and writes the
elements that follow, or passes over them; torch's own kernels do the arithmetic, and only their generator is placed. How
elements lie in the random stream:

* most operators take a fixed number of words for each (`_EachPen`);
* `normal_` works in blocks of 16, and draws the last 16 anew where the elements are no multiple of it (`_BlockPen`);
* small and strided `normal_`, and `log_normal_`, draw pairs of numbers one by one (`_SinglePen`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..tracer.draws import BLOCK, HALF, draw_of_call, is_random_fill, is_trunc_normal
from ..tracer.graph import Op, View
from ..tracer.native import Kind, Native, native
from ..tracer.places import Draw, Place, skip
from ..tracer.schema import aten

CHUNK = 1 << 16
"""Elements that are filled at a time: they stay in a core's cache for what is done with them next."""

_JUMPED = 600_000  # words that are jumped over rather than drawn


@dataclass(frozen=True, slots=True)
class Fill:
    """A call of `func` with scalars `args` that draws `numel` elements of `dtype`, `draw` in all.

    `contiguous` says whether torch takes the tensor for contiguous. The elements are drawn in the order of memory.
    """

    func: Any
    args: tuple[Any, ...]
    dtype: torch.dtype
    numel: int
    contiguous: bool
    draw: Draw
    quantum: ClassVar[int] = 1024
    """Where threads divide a fill between them: at multiples of this many elements."""

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Fill | None:
        """The fill that a call is; None where its elements' places in the stream are not certain."""
        if not is_random_fill(func) or not numel or dtype.is_complex:
            return None
        draw = draw_of_call(func, (None, *args), dtype, numel, contiguous)
        if draw is None or not check_parts(func, dtype, args, draw.words // numel):
            return None
        return cls(func, args, dtype, numel, contiguous, draw)

    @classmethod
    def of_op(cls, op: Op) -> Fill | None:
        """The same for a recorded op: one that fills in place, creates a filled tensor, or is a `trunc_normal_` of one round."""
        call = as_fill(op)
        if call is None:
            return None
        view = op.targets[0]
        return cls.of(*call, view.dtype, view.numel, view.is_contiguous)

    def pen(self, place: Place, first: int = 0) -> Pen:
        """A pen at element `first`, where the fill as a whole starts from `place`."""
        pen: Pen
        if self.func is aten.log_normal_.default or self.draw.normals:
            pen = _SinglePen(self, place)
        elif self.func is aten.normal_.default:
            pen = _BlockPen(self, place)
        else:
            pen = _EachPen(self, place)
        pen.skip(first)
        return pen


def as_fill(op: Op) -> tuple[Any, tuple[Any, ...]] | None:
    """The in-place operator, and its scalars, that a recorded op comes down to."""
    func, args = op.func, op.args
    if is_random_fill(func):
        return (func, args[1:]) if all(name == "generator" for name, _ in op.kwargs) else None
    if is_trunc_normal(func):
        return (aten.normal_.default, args[1:3]) if draw_of_call(func, args, *_geometry(op.targets[0])) else None
    if func in _NEW:
        operator, arguments = _NEW[func]
        return operator, arguments(args)
    return None


def created(op: Op, args: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, tuple[Any, ...]] | None:
    """The new tensor of a call such as `torch.randn`, not filled yet, with the operator and scalars that fill it."""
    if op.func not in _NEW or torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return None
    func, scalars = _NEW[op.func]
    options = {name: value for name, value in kwargs.items() if name != "generator"} | {"dtype": op.targets[0].dtype}
    if isinstance(args[0], torch.Tensor):
        return (torch.empty_like(args[0], **options), func, scalars(args)) if args[0].device.type == "cpu" else None
    size = next(each for each in args if isinstance(each, list | tuple))
    return torch.empty(size, **options), func, scalars(args)


def _geometry(view: View) -> tuple[torch.dtype, int, bool]:
    return view.dtype, view.numel, view.is_contiguous


_UNIFORM: tuple[Any, Any] = (aten.uniform_.default, lambda args: (0.0, 1.0))
_NORMAL: tuple[Any, Any] = (aten.normal_.default, lambda args: (0.0, 1.0))
_NEW: dict[Any, tuple[Any, Any]] = {
    aten.rand.default: _UNIFORM,
    aten.rand.generator: _UNIFORM,
    aten.rand_like.default: _UNIFORM,
    aten.randn.default: _NORMAL,
    aten.randn.generator: _NORMAL,
    aten.randn_like.default: _NORMAL,
    aten.normal.float_float: (aten.normal_.default, lambda args: args[:2]),
    aten.randint.default: (getattr(aten.random_, "from"), lambda args: (0, args[0])),
    aten.randint.generator: (getattr(aten.random_, "from"), lambda args: (0, args[0])),
    aten.randint.low: (getattr(aten.random_, "from"), lambda args: args[:2]),
    aten.randint.low_generator: (getattr(aten.random_, "from"), lambda args: args[:2]),
}


def in_order(tensor: torch.Tensor) -> torch.Tensor | None:
    """The elements in the order in which a fill visits them, that of memory, as one row; None where memory has gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


# -- pens ---------------------------------------------------------------------------------------------------------------


class Pen:
    """Writes the elements of `dtype` of one fill, one stretch after the other; `at` is the next element."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.at = dtype, 0

    def write(self, out: torch.Tensor) -> None:
        """Write the next elements into `out`, a row of the fill's dtype without gaps."""
        raise NotImplementedError

    def skip(self, count: int) -> None:
        """Pass over the next `count` elements."""
        raise NotImplementedError

    def write_at(self, first: int, out: torch.Tensor) -> None:
        """Write the elements from number `first` on, which is not behind, into `out`."""
        self.skip(first - self.at)
        self.write(out)

    def write_rows(self, out: torch.Tensor, gap: int) -> bool:
        """Write the rows of `out`, passing over `gap` elements between two; False, and nothing is done, where it cannot."""
        return False

    def chunks(self, count: int, converted: bool) -> Iterator[int]:
        """How many elements to write at a time, `count` in all, if they are to be `converted` or not."""
        for start in range(0, count, CHUNK):
            yield min(CHUNK, count - start)

    def run(self, out: torch.Tensor) -> None:
        """Write the next elements into `out`, which may be of another dtype: they are converted on the way."""
        chunks = list(self.chunks(len(out), out.dtype != self.dtype))
        scratch = None if out.dtype == self.dtype else torch.empty(max(chunks, default=0), dtype=self.dtype, device="cpu")
        start = 0
        for count in chunks:
            piece = out[start : start + count]
            self.write(piece if scratch is None else scratch[:count])
            if scratch is not None:
                _convert(scratch[:count], piece)
            start += count


_SERIAL = 1 << 15  # elements: torch hands larger conversions to threads of its own, and these pieces have threads already


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, len(source), _SERIAL):
        target[start : start + _SERIAL].copy_(source[start : start + _SERIAL])


class _Hand:
    """What draws for a pen: torch's generator, somewhere after `place`; `words` says where."""

    def __init__(self, fill: Fill, place: Place, words: int) -> None:
        self._fill, self._place, self.words = fill, place, words
        self._generator = place.moved(words).generator()

    def draw(self, out: torch.Tensor, words: int) -> None:
        """Fill `out`, which takes so many words."""
        self._fill.func(out, *self._fill.args, generator=self._generator)
        self.words += words

    def skip(self, words: int) -> None:
        """Pass over so many words."""
        if words < _JUMPED:
            skip(words, self._generator)
        else:
            self._place.moved(self.words).reached(self._generator)
            self._generator = self._place.moved(self.words + words).generator()
        self.words += words

    def arrived(self) -> None:
        """Tell the stream where this is."""
        self._place.moved(self.words).reached(self._generator)


class _CompiledHand(_Hand):
    """The same by compiled code, which torch's generator takes no part in."""

    def __init__(self, fill: Fill, place: Place, words: int, compiled: Native) -> None:
        self._fill, self._place, self.words = fill, place, words
        self._compiled = compiled
        self._call = compiled.uniform if fill.func is aten.uniform_.default else compiled.normal
        self._block, self._next = place.stream.block(place.words + words)

    def draw(self, out: torch.Tensor, words: int) -> None:
        self._next = self._call(self._block, self._next, out, *_bounds(self._fill))
        self.words += words

    def rows(self, out: torch.Tensor, gap: int, words: int) -> None:
        """Fill the rows of `out`, passing over `gap` words between two: so many words in all."""
        self._next = self._compiled.rows(_KINDS[self._fill.func], self._block, self._next, out, gap, *_bounds(self._fill))
        self.words += words

    def skip(self, words: int) -> None:
        if words < _COMPILED_JUMPED:
            self._next = self._compiled.skip(self._block, self._next, words)
        else:
            self.arrived()
            self._block, self._next = self._place.stream.block(self._place.words + self.words + words)
        self.words += words

    def arrived(self) -> None:
        self._place.stream.note(self._place.words + self.words, self._block.copy())


_COMPILED_JUMPED = 4_000_000  # words that are jumped over rather than twisted over


def _bounds(fill: Fill) -> tuple[float, float]:
    """The two scalars of a `uniform_` or `normal_`, torch's defaults where they are not given."""
    low = fill.args[0] if fill.args else 0.0
    return low, fill.args[1] if len(fill.args) > 1 else 1.0


_KINDS: dict[Any, Kind] = {aten.uniform_.default: "uniform", aten.normal_.default: "normal"}


def _compiled(fill: Fill) -> Native | None:
    """The compiled code, if it does this fill."""
    found = native() if fill.func in _KINDS else None
    return found if found is not None and found.fills(fill.dtype, _KINDS[fill.func]) else None


def _hand(fill: Fill, place: Place, words: int) -> _Hand:
    compiled = _compiled(fill)
    return _Hand(fill, place, words) if compiled is None else _CompiledHand(fill, place, words, compiled)


class _StreamPen(Pen):
    """Draws from the stream, in which the fill starts from `place`."""

    def __init__(self, fill: Fill, place: Place) -> None:
        super().__init__(fill.dtype)
        self.fill, self._place = fill, place
        self._hand: _Hand | None = None

    def _at(self, words: int) -> _Hand:
        """The hand, `words` words after the fill's start."""
        if self._hand is None or words < self._hand.words:
            self._hand = _hand(self.fill, self._place, words)
        elif words > self._hand.words:
            self._hand.skip(words - self._hand.words)
        return self._hand

    def skip(self, count: int) -> None:
        self.at += count

    def chunks(self, count: int, converted: bool) -> Iterator[int]:
        """As a `Pen`; compiled code writes each element once, so that it has no use for a cache."""
        return super().chunks(count, converted) if converted or _compiled(self.fill) is None else iter([count])


class _EachPen(_StreamPen):
    """Every element takes the same number of words."""

    def __init__(self, fill: Fill, place: Place) -> None:
        super().__init__(fill, place)
        self._words = fill.draw.words // fill.numel

    def write(self, out: torch.Tensor) -> None:
        hand = self._at(self.at * self._words)
        hand.draw(out, len(out) * self._words)
        self.at += len(out)
        if self.at == self.fill.numel:
            hand.arrived()

    def write_rows(self, out: torch.Tensor, gap: int) -> bool:
        hand = self._at(self.at * self._words)
        if not isinstance(hand, _CompiledHand):
            return False
        elements = out.numel() + (len(out) - 1) * gap
        hand.rows(out, gap, elements)
        self.at += elements
        return True


class _BlockPen(_StreamPen):
    """`normal_` on 16 elements or more that lie side by side."""

    def __init__(self, fill: Fill, place: Place) -> None:
        super().__init__(fill, place)
        self._each = 2 if fill.dtype == torch.float64 else 1
        self._whole = fill.numel // BLOCK * BLOCK
        self._block: tuple[int, torch.Tensor] | None = None  # the block drawn last for a part of it, and its first element
        self._tail: torch.Tensor | None = None

    def write(self, out: torch.Tensor) -> None:
        start, done, count = self.at, 0, len(out)
        while done < count and self.at < self._whole:
            wanted = min(count - done, self._whole - self.at)
            if self.at % BLOCK == 0 and wanted >= BLOCK:
                wanted = wanted // BLOCK * BLOCK
                self._at(self.at * self._each).draw(out[done : done + wanted], wanted * self._each)
            else:
                within = self.at % BLOCK
                wanted = min(wanted, BLOCK - within)
                out[done : done + wanted] = self._current()[within : within + wanted]
            self.at += wanted
            done += wanted
        self.at = start + count
        if self._whole < self.fill.numel:
            self._write_tail(out, start)
        elif self.at == self._whole and self._hand is not None and self._hand.words == self._whole * self._each:
            self._hand.arrived()

    def write_rows(self, out: torch.Tensor, gap: int) -> bool:
        elements = out.numel() + (len(out) - 1) * gap
        aligned = self.at % BLOCK == 0 and out.shape[1] % BLOCK == 0 and gap % BLOCK == 0
        inside = self._whole == self.fill.numel or self.at + elements <= self.fill.numel - BLOCK
        if not (aligned and inside):
            return False
        hand = self._at(self.at)
        if not isinstance(hand, _CompiledHand):
            return False
        hand.rows(out, gap, elements)
        self.at += elements
        return True

    def _current(self) -> torch.Tensor:
        """The block that `at` lies within."""
        start = self.at // BLOCK * BLOCK
        if self._block is None or self._block[0] != start:
            block = torch.empty(BLOCK, dtype=self.fill.dtype, device="cpu")
            self._at(start * self._each).draw(block, BLOCK * self._each)
            self._block = start, block
        return self._block[1]

    def _write_tail(self, out: torch.Tensor, start: int) -> None:
        """The last 16 elements are drawn once more, with the words that follow."""
        first = self.fill.numel - BLOCK
        if start + len(out) <= first:
            return
        if self._tail is None:
            words = self._whole if self.fill.dtype in HALF else self.fill.numel * self._each
            self._tail = torch.empty(BLOCK, dtype=self.fill.dtype, device="cpu")
            hand = _hand(self.fill, self._place, words) if self._hand is None or self._hand.words > words else self._at(words)
            hand.draw(self._tail, BLOCK * self._each)
            hand.arrived()
        begin = max(start, first)
        out[begin - start :] = self._tail[begin - first : start + len(out) - first]


class _SinglePen(Pen):
    """Normal samples that are drawn one by one, two of them from each pair of doubles."""

    def __init__(self, fill: Fill, place: Place) -> None:
        super().__init__(fill.dtype)
        self.fill, self._place = fill, place
        self._generator: torch.Generator | None = None

    def write(self, out: torch.Tensor) -> None:
        if self._generator is None:
            self._generator = self._place.after(Draw(0, self.at)).generator()
        apart = torch.empty(len(out), 2, dtype=self.fill.dtype, device="cpu")[:, 0]  # with gaps, so that torch draws single ones
        self.fill.func(apart, *self.fill.args, generator=self._generator)
        out.copy_(apart)
        self.at += len(out)

    def skip(self, count: int) -> None:
        self.at += count
        if count:
            self._generator = None


# -- the parts tried ----------------------------------------------------------------------------------------------------

_CUTS = (0, 5, 40, 41, 64, 97, 113)


def check_parts(func: Any, dtype: torch.dtype, args: tuple[Any, ...], words_each: int) -> bool:
    """Whether parts of a small tensor, filled one by one, have the bits that one call gives, for an operator and a dtype here."""
    return _parts_are_whole(func, dtype, args if func is getattr(aten.random_, "from") or func in _BOUNDED else (), words_each)


_BOUNDED = (aten.random_.to, aten.geometric_.default, aten.bernoulli_.float)


@cache
def _parts_are_whole(func: Any, dtype: torch.dtype, args: tuple[Any, ...], words_each: int) -> bool:
    with _disable_current_modes(), torch.no_grad():
        try:
            return all(_same_parts(func, dtype, args, numel, step) for numel in (_CUTS[-1], 9, 96) for step in (1, 2))
        except (RuntimeError, NotImplementedError, TypeError):
            return False


def _same_parts(func: Any, dtype: torch.dtype, args: tuple[Any, ...], numel: int, step: int) -> bool:
    generator = torch.Generator().manual_seed(numel)
    place = Place.at(generator.get_state())
    whole = torch.empty(numel, step, dtype=dtype, device="cpu")[:, 0]
    draw = draw_of_call(func, (None, *args), dtype, numel, whole.is_contiguous())
    func(whole, *args, generator=generator)
    if draw is None:
        return whole.is_contiguous() and numel % BLOCK > 0  # an odd tail that is not certain: never taken apart
    fill, parts = Fill(func, args, dtype, numel, whole.is_contiguous(), draw), torch.empty(numel, dtype=dtype, device="cpu")
    for first, last in pairwise(_CUTS):
        stretch = parts[first : min(last, numel)]
        if len(stretch):
            fill.pen(place, first).write(stretch)
    return torch.equal(parts.view(torch.uint8), whole.contiguous().view(torch.uint8))
