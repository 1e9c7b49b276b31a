"""Lengths that only values tell, found out once: the ranks divide the work, and tell each other."""

from __future__ import annotations

from ..tracer.draws import draw_of
from ..tracer.graph import Op
from ..tracer.places import Place
from .filler import Threaded
from .ranks import Ranks
from .truncated import Truncated
from .workers import Workers

_AT_ONCE = 16  # ranks that look at one tensor: more would wait for each other longer than they draw


class Shared(Threaded):
    """Passes over what every rank passes over, as `Threaded`; `ranks` find out the rounds of each `trunc_normal_` together."""

    def __init__(self, workers: Workers, ranks: Ranks) -> None:
        super().__init__(workers)
        self._ranks = ranks

    def check(self) -> None:
        """As a `Filler`."""
        self._ranks.check()

    def passed(self, op: Op, start: Place) -> Place | None:
        """As a `Filler`."""
        truncated = Truncated.of_op(op) if draw_of(op) is None else None
        if truncated is None:
            return super().passed(op, start)
        call, parts = truncated, min(self._ranks.count, _AT_ONCE)

        def find(part: int) -> int:
            known = call.known(start)
            return call.rounds_of(start, part, parts, self.workers) if known is None else known

        rounds = self._ranks.largest(str(op.index), op.index, parts, find)
        return call.after(start, call.remember(start, rounds))


class Watched(Threaded):
    """As `Threaded`, and stops where another rank has failed."""

    def __init__(self, workers: Workers, ranks: Ranks) -> None:
        super().__init__(workers)
        self._ranks = ranks

    def check(self) -> None:
        """As a `Filler`."""
        self._ranks.check()
