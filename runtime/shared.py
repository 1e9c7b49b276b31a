"""Lengths that only values tell, found out once: the ranks divide the work, and tell each other."""

from __future__ import annotations

from collections.abc import Container

import torch

from ..tracer.draws import draw_of
from ..tracer.graph import Op
from ..tracer.places import Place
from .filler import Threaded
from .pages import prefer_huge_pages
from .parts import PartialReplay
from .ranks import Ranks, Seen
from .truncated import Truncated
from .workers import Workers

_AT_ONCE = 16  # ranks that look at one tensor: more would wait for each other longer than they draw


class Shared(Threaded):
    """Passes over what every rank passes over, as `Threaded`; `ranks` find out the rounds of each `trunc_normal_` together.

    Where they are few, each draws what it will hold of the tensor, and gives it to `replay`, which then need not draw that: of
    the storages in `stay`, whose elements stay as they are made. Where that is not all of the tensor, or there are many ranks,
    some of them look at equal parts of it.
    """

    def __init__(self, workers: Workers, ranks: Ranks, replay: PartialReplay, stay: Container[int]) -> None:
        super().__init__(workers)
        self._ranks = ranks
        self._replay = replay
        self._stay = stay

    def check(self) -> None:
        """As a `Filler`."""
        self._ranks.check()

    def passed(self, op: Op, start: Place) -> Place | None:
        """As a `Filler`."""
        truncated = Truncated.of_op(op) if draw_of(op) is None else None
        if truncated is None:
            return super().passed(op, start)
        rounds = self._united(op, truncated, start) if self._ranks.count <= _AT_ONCE else None
        if rounds is None:
            rounds = self._divided(op, truncated, start)
        return truncated.after(start, truncated.remember(start, rounds))

    def _united(self, op: Op, call: Truncated, start: Place) -> int | None:
        return self._ranks.united(str(op.index), op.index, self._seen(op, call, start), call.fill.numel)

    def _seen(self, op: Op, call: Truncated, start: Place) -> Seen | None:
        known = call.known(start)
        if known is not None:
            return Seen(known, 0, call.fill.numel)
        stretch = self._replay.stretch(op) if op.targets[0].storage in self._stay else None
        if stretch is None:
            return None
        row = torch.empty(len(stretch), dtype=call.fill.dtype, device="cpu")
        prefer_huge_pages(row.untyped_storage())
        rounds = call.write(stretch.start, row, start, self.workers)
        self._replay.keep(op, row)
        return Seen(rounds, stretch.start, stretch.stop)

    def _divided(self, op: Op, call: Truncated, start: Place) -> int:
        parts = min(self._ranks.count, _AT_ONCE)

        def find(part: int) -> int:
            known = call.known(start)
            return call.rounds_of(start, part, parts, self.workers) if known is None else known

        return self._ranks.largest(str(op.index), op.index, parts, find)


class Watched(Threaded):
    """As `Threaded`, and stops where another rank has failed."""

    def __init__(self, workers: Workers, ranks: Ranks) -> None:
        super().__init__(workers)
        self._ranks = ranks

    def check(self) -> None:
        """As a `Filler`."""
        self._ranks.check()
