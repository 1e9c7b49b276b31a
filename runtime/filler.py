"""How the runtime draws: which calls are taken apart, and which are left to torch as they are.

`Threaded` does the same as one call after another on one thread, bit for bit; a call that it does not know is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..tracer.draws import draw_of, draw_of_call, is_trunc_normal
from ..tracer.graph import Op, View
from ..tracer.native import native
from ..tracer.places import Place, skip
from ..tracer.replay import Filler
from ..tracer.traced import view_of
from .boxes import fill_stretch
from .cuda import passed_on_cuda
from .fill import Fill, in_order
from .pages import prefer_huge_pages
from .truncated import Truncated
from .workers import Workers

LARGE = 1 << 22  # elements from which on a fill is worth taking apart: a jump takes as long as drawing a million
_LARGE_COMPILED = 1 << 14  # the same where compiled code draws

_DRAWN = 1 << 16  # words that are drawn and dropped rather than worked out


class Threaded(Filler):
    """Draws with `workers`."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    # -- for a replay ---------------------------------------------------------------------------------------------------

    def passed(self, op: Op, start: Place) -> Place | None:
        """As a `Filler`: also past a `trunc_normal_` whose rounds have to be found out."""
        draw = draw_of(op)
        if draw is not None:
            return start.after(draw)
        truncated = Truncated.of_op(op)
        return None if truncated is None else truncated.after(start, truncated.rounds(start, self.workers))

    def passed_on_cuda(self, op: Op, start: torch.Tensor) -> torch.Tensor | None:
        """As a `Filler`."""
        return passed_on_cuda(op, start)

    def filled(self, op: Op, open_view: Callable[[View], torch.Tensor], start: Place) -> Place | None:
        """As a `Filler`."""
        view = op.targets[0]
        if not is_large(view.numel) or view.dtype.is_complex:
            return None
        if is_trunc_normal(op.func):
            done = self.truncated(open_view(view), op.args[1:], start)
            return None if done is None else done[0]
        fill = Fill.of_op(op)
        return None if fill is None else self._fill(fill, open_view(view), start)

    # -- for a tensor ---------------------------------------------------------------------------------------------------

    def fill(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], start: Place) -> Place | None:
        """Fill `target` as `func(target, *args)` does from `start`; None, and nothing is done, where torch is to do it."""
        if not is_large(target.numel()) or target.device.type != "cpu":
            return None
        fill = Fill.of(func, args, target.dtype, target.numel(), target.is_contiguous())
        return None if fill is None else self._fill(fill, target, start)

    def truncated(self, target: torch.Tensor, args: tuple[float, ...], start: Place) -> tuple[Place, int] | None:
        """The same for `trunc_normal_` with `args` (mean, std, a, b); also says how many rounds it took."""
        if not is_large(target.numel()) or target.device.type != "cpu":
            return None
        call = Truncated.of(args, target.dtype, target.numel(), target.is_contiguous())
        if call is None:
            return None
        row = alias_of(target).view(-1)
        prefer_huge_pages(row.untyped_storage())
        rounds = call.remember(start, call.write(0, row, start, self.workers))
        return call.after(start, rounds), rounds

    def convert(self, func: Any, args: tuple[Any, ...], start: Place, like: torch.Tensor, out: torch.Tensor) -> bool:
        """Write into `out`, of another dtype than `like`, what filling `like` from `start` and converting it gives.

        `like` is only asked for its geometry. False, and nothing is done, where that is to be done one after the other.
        """
        fill = Fill.of(func, args, like.dtype, like.numel(), like.is_contiguous())
        row = in_order(out)
        if fill is None or row is None or fill.draw.normals or out.stride() != like.stride():
            return False
        prefer_huge_pages(row.untyped_storage())
        fill_stretch(fill, 0, row, start, self.workers)
        return True

    def _fill(self, fill: Fill, target: torch.Tensor, start: Place) -> Place | None:
        row = in_order(alias_of(target))
        if row is None or fill.draw.normals:
            return None
        prefer_huge_pages(row.untyped_storage())
        fill_stretch(fill, 0, row, start, self.workers)
        return start.after(fill.draw)


def is_large(numel: int) -> bool:
    """Whether a fill of so many elements is worth taking apart."""
    return numel >= (LARGE if native() is None else min(LARGE, _LARGE_COMPILED))


def advance(func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: torch.Generator) -> bool:
    """Move a CPU generator past `func(target, *args)`; False, and nothing is done, where what it draws is not certain."""
    draw = draw_of_call(func, (target, *args), target.dtype, target.numel(), target.is_contiguous())
    if draw is None:
        return False
    if not draw.normals and draw.words < _DRAWN:
        skip(draw.words, generator)
    else:
        generator.set_state(Place.at(generator.get_state()).after(draw).state())
    return True


def alias_of(target: torch.Tensor) -> torch.Tensor:
    """Another tensor over the same elements: writing it leaves the version counter of `target` alone."""
    return view_of(target, 0).over(target.untyped_storage())
