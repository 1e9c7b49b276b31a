"""Pens: they write the elements of a fill one stretch after the other, or pass over them.

A pen stands somewhere in a fill; torch's own kernels do the arithmetic, or compiled code with the same bits, and only the
generator is placed. How elements lie in the random stream:

* most operators take a fixed number of words for each (`_EachPen`);
* `normal_` works in blocks of 16, and draws the last 16 anew where the elements are no multiple of it (`_BlockPen`);
* small and strided `normal_`, and `log_normal_`, draw pairs of numbers one by one (`_SinglePen`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..tracer.draws import BLOCK, HALF, ROUNDS_UP
from ..tracer.native import Kind, Native, Places, native
from ..tracer.places import Draw, Place, skip
from ..tracer.schema import aten

if TYPE_CHECKING:
    from .fill import Fill

CHUNK = 1 << 15
"""Elements that are filled at a time: they stay in a core's cache for what is done with them next, and torch does not hand that
to threads of its own (these pieces have threads already)."""

_JUMPED = 600_000  # words that are jumped over rather than drawn


def pen_for(fill: Fill, place: Place) -> Pen:
    """A pen at the first element of a fill that starts from `place`."""
    if fill.func is aten.log_normal_.default or fill.draw.normals:
        return _SinglePen(fill, place)
    return _BlockPen(fill, place) if fill.func is aten.normal_.default else _EachPen(fill, place)


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
                piece.copy_(scratch[:count])
            start += count


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


class CompiledHand(_Hand):
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

    def redraw(self, out: torch.Tensor, wrong: Places, bounds: tuple[float, float]) -> Places:
        """Draw `out` again at the places `wrong`; the places that are out of bounds again."""
        call = (out, wrong, _bounds(self._fill), bounds)
        self._next, left = self._compiled.redraw(self._block, self._next, *call)
        self.words += len(out)
        return left

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


def compiled_for(fill: Fill) -> Native | None:
    """The compiled code, if it does this fill."""
    found = native() if fill.func in _KINDS else None
    return found if found is not None and found.fills(fill.dtype, _KINDS[fill.func]) else None


def _hand(fill: Fill, place: Place, words: int) -> _Hand:
    compiled = compiled_for(fill)
    return _Hand(fill, place, words) if compiled is None else CompiledHand(fill, place, words, compiled)


@cache
def _rounds_alike(args: tuple[Any, ...], dtype: torch.dtype, half: torch.dtype) -> bool:
    """Whether compiled `normal_` of a half-precision dtype is that of float32, converted: tried on some thousand numbers."""
    compiled = native()
    if compiled is None or dtype != torch.float32 or not all(compiled.fills(each, "normal") for each in (dtype, half)):
        return False
    place = Place.at(torch.Generator().manual_seed(0).get_state())
    bounds, drawn = (args[0] if args else 0.0, args[1] if len(args) > 1 else 1.0), []
    for each in (dtype, half):
        out = torch.empty(1 << 13, dtype=each, device="cpu")
        compiled.normal(*place.stream.block(0), out, *bounds)
        drawn.append(out.to(half).view(torch.int16))
    return torch.equal(*drawn)


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
        return super().chunks(count, converted) if converted or compiled_for(self.fill) is None else iter([count])


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
        if not isinstance(hand, CompiledHand):
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

    def run(self, out: torch.Tensor) -> None:
        """As a `Pen`; where compiled code makes the same half-precision numbers as a conversion does, it writes them itself."""
        if out.dtype != self.dtype and _rounds_alike(self.fill.args, self.dtype, out.dtype):
            self.write(out)
        else:
            super().run(out)

    def write_rows(self, out: torch.Tensor, gap: int) -> bool:
        elements = out.numel() + (len(out) - 1) * gap
        aligned = self.at % BLOCK == 0 and out.shape[1] % BLOCK == 0 and gap % BLOCK == 0
        inside = self._whole == self.fill.numel or self.at + elements <= self.fill.numel - BLOCK
        if not (aligned and inside):
            return False
        hand = self._at(self.at)
        if not isinstance(hand, CompiledHand):
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
            words = self._whole if ROUNDS_UP and self.fill.dtype in HALF else self.fill.numel * self._each
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
