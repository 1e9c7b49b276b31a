"""`trunc_normal_` without its full-size rounds: only what is out of bounds is drawn again.

torch (from 2.12 on) draws the whole tensor, then the whole tensor again for those elements that are out of bounds, until none
is. An element's number in round r lies r - 1 fills further on in the stream, so every stretch of elements can be settled by
itself. How many rounds there are, and so where the stream goes on, is what the slowest element takes: a *length* that only
values tell, which is remembered for each state of the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..tracer.draws import is_redrawn, is_trunc_normal
from ..tracer.graph import Op
from ..tracer.native import Native, native
from ..tracer.places import Place
from ..tracer.schema import aten
from .boxes import pieces
from .fill import Fill
from .pens import CHUNK, CompiledHand, Pen
from .workers import Workers

_FEW = 4  # elements of a chunk: so few are drawn one by one, in their blocks
_BLOCK = 16


class Truncated:
    """A `trunc_normal_` on elements that lie side by side: a normal fill that is repeated, and the bounds."""

    def __init__(self, fill: Fill, low: float, high: float) -> None:
        self.fill = fill
        self._limits = low, high

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value, in the tensor's dtype: so torch compares them."""
        low, high = torch.tensor(self._limits, dtype=self.fill.dtype, device="cpu").tolist()
        return low, high

    @classmethod
    def of(cls, args: tuple[float, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Truncated | None:
        """The call with `args` (mean, std, a, b); None where it works otherwise, or is too small to be worth it."""
        if not contiguous or numel < _BLOCK or not is_redrawn(args):
            return None
        mean, std, low, high = args
        fill = Fill.of(aten.normal_.default, (mean, std), dtype, numel, True)
        return None if fill is None else cls(fill, low, high)

    @classmethod
    def of_op(cls, op: Op) -> Truncated | None:
        """The same for a recorded op."""
        if not is_trunc_normal(op.func):
            return None
        view = op.targets[0]
        return cls.of(op.args[1:], view.dtype, view.numel, view.is_contiguous)

    def write(self, first: int, out: torch.Tensor, place: Place, workers: Workers) -> int:
        """Write the elements from number `first` on into the row `out`; returns the rounds that these take."""
        rounds: list[int] = []

        def settle(piece: range) -> None:
            settler = Settler(self, place)
            settler.settle(first + piece.start, out[piece.start : piece.stop])
            rounds.append(settler.rounds)

        workers.each(settle, pieces(out.numel(), workers, self.fill.quantum))
        return max(rounds, default=1)

    def rounds(self, place: Place, workers: Workers) -> int:
        """How many rounds the whole fill takes from `place`."""
        found = self.known(place)
        return self.remember(place, self.rounds_of(place, 0, 1, workers)) if found is None else found

    def rounds_of(self, place: Place, part: int, parts: int, workers: Workers) -> int:
        """How many rounds one of `parts` equal parts of the elements takes."""
        rounds: list[int] = []
        share = -(-self.fill.numel // (parts * self.fill.quantum)) * self.fill.quantum
        first = min(part * share, self.fill.numel)

        def settle(piece: range) -> None:
            settler, scratch = Settler(self, place), torch.empty(CHUNK, dtype=self.fill.dtype, device="cpu")
            for start in range(first + piece.start, first + piece.stop, CHUNK):
                settler.settle(start, scratch[: min(CHUNK, first + piece.stop - start)])
            rounds.append(settler.rounds)

        workers.each(settle, pieces(min(share, self.fill.numel - first), workers, self.fill.quantum))
        return max(rounds, default=1)

    def after(self, place: Place, rounds: int) -> Place:
        """Where the stream stands after so many rounds."""
        for _ in range(rounds):
            place = place.after(self.fill.draw)
        return place

    def known(self, place: Place) -> int | None:
        """How many rounds the whole fill takes from `place`, if that has been found out before."""
        return place.stream.lengths.get((place.words, self._key))

    def remember(self, place: Place, rounds: int) -> int:
        """Note that the whole fill takes so many rounds from `place`."""
        place.stream.lengths[place.words, self._key] = rounds
        return rounds

    @property
    def _key(self) -> tuple[object, ...]:
        return self.fill.dtype, self.fill.numel, self.fill.args, self._limits


class Settler:
    """Draws elements of a `trunc_normal_` that starts from `place`, chunk after chunk in ascending order."""

    def __init__(self, call: Truncated, place: Place) -> None:
        self._low, self._high = call.bounds
        self._pens = _Pens(call, place)
        self._compiled = _CompiledRounds(call, place) if call.fill.numel % _BLOCK == 0 and _is_compiled(call.fill.dtype) else None
        self._scratch: torch.Tensor | None = None

    @property
    def rounds(self) -> int:
        """The rounds that the elements so far have taken."""
        return max(len(self._pens), len(self._compiled) if self._compiled else 0)

    def settle(self, first: int, out: torch.Tensor) -> None:
        """Write the elements from number `first` on into the row `out`."""
        if self._compiled is not None and first % _BLOCK == len(out) % _BLOCK == 0:
            self._compiled.settle(first, out)
            return
        for start in range(0, len(out), CHUNK):
            self._settle(first + start, out[start : start + CHUNK])

    def _settle(self, first: int, chunk: torch.Tensor) -> None:
        self._pens.write(0, first, chunk)
        wrong = self._out_of_bounds(chunk).nonzero().view(-1)
        number = 1
        while len(wrong):
            if self._scratch is None:
                self._scratch = torch.empty(CHUNK, dtype=chunk.dtype, device="cpu")
            found = self._pens.some(number, first, wrong, self._scratch[: len(chunk)])
            chunk[wrong] = found
            wrong = wrong[self._out_of_bounds(found)]
            number += 1

    def _out_of_bounds(self, values: torch.Tensor) -> torch.Tensor:
        return torch.logical_or(values < self._low, values > self._high)


class _CompiledRounds:
    """The same by compiled code, for whole blocks of 16: a hand for each round, made when it is first needed."""

    def __init__(self, call: Truncated, place: Place) -> None:
        self._call, self._place = call, place
        self._hands: list[CompiledHand] = []

    def __len__(self) -> int:
        return len(self._hands)

    def settle(self, first: int, out: torch.Tensor) -> None:
        """Write the elements from number `first` on into the row `out`."""
        for start in range(0, len(out), _COMPILED_CHUNK):
            self._settle(first + start, out[start : start + _COMPILED_CHUNK])

    def _settle(self, first: int, chunk: torch.Tensor) -> None:
        self._hand(0, first).draw(chunk, len(chunk))
        bounds, number = self._call.bounds, 1
        wrong = _native().outside(chunk, *bounds)
        while len(wrong):
            wrong = self._hand(number, first).redraw(chunk, wrong, bounds)
            number += 1

    def _hand(self, number: int, first: int) -> CompiledHand:
        """The hand of a round, at element `first`: an element takes one word."""
        if number == len(self._hands):
            start = self._call.after(self._place, number)
            self._hands.append(CompiledHand(self._call.fill, start, first, _native()))
        hand = self._hands[number]
        hand.skip(first - hand.words)
        return hand


_COMPILED_CHUNK = 1 << 17


def _native() -> Native:
    compiled = native()
    assert compiled is not None
    return compiled


@cache
def _is_compiled(dtype: torch.dtype) -> bool:
    """Whether compiled code settles elements of a dtype as torch does, tried on some thousand of them."""
    compiled = native()
    if compiled is None or not compiled.fills(dtype, "normal"):
        return False
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator().manual_seed(7)
        place, args = Place.at(generator.get_state()), (0.1, 1.0, -0.9, 1.3)
        whole, parts = torch.empty(1 << 12, dtype=dtype, device="cpu"), torch.empty(1 << 12, dtype=dtype, device="cpu")
        torch.nn.init._no_grad_trunc_normal_(whole, *args, generator=generator)
        call = Truncated.of(args, dtype, len(parts), True)
        if call is None:
            return False
        rounds = _CompiledRounds(call, place)
        for first in range(0, len(parts), 1 << 10):
            rounds.settle(first, parts[first : first + (1 << 10)])
        arrived = torch.equal(call.after(place, len(rounds)).state(), generator.get_state())
        return arrived and torch.equal(whole.view(torch.int16), parts.view(torch.int16))


class _Pens:
    """A pen for each round of a `trunc_normal_`, made when it is first needed."""

    def __init__(self, call: Truncated, place: Place) -> None:
        self._call, self._place = call, place
        self._pens: list[Pen] = []

    def __len__(self) -> int:
        return len(self._pens)

    def write(self, number: int, first: int, out: torch.Tensor) -> None:
        """Write the elements from `first` on as round `number` draws them."""
        if number == len(self._pens):
            self._pens.append(self._call.fill.pen(self._call.after(self._place, number), first))
        pen = self._pens[number]
        pen.skip(first - pen.at)
        pen.write(out)

    def some(self, number: int, first: int, wanted: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """The elements `wanted` of the chunk that starts with element `first`, as round `number` draws them."""
        if len(wanted) > _FEW:
            self.write(number, first, scratch)
            return scratch.index_select(0, wanted)
        for index in _blocks(wanted.tolist()):
            self.write(number, first + index, scratch[index : index + _BLOCK])
        return scratch.index_select(0, wanted)


def _blocks(indices: Sequence[int]) -> list[int]:
    """The starts of the blocks of 16 that hold some elements of a chunk, each once."""
    return list(dict.fromkeys(index // _BLOCK * _BLOCK for index in indices))
