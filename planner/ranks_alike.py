"""Ranks that hold parts of the same shapes, so that what they hold is shown once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..tracer.graph import ParamGraph
from .memory import Memory
from .rank_runs import RankClass, rank_class
from .sharding import Sharding

_ALL = 32
"""Up to so many ranks are looked at one by one; of more, the first and the last along each axis of the mesh."""


@dataclass(frozen=True, slots=True)
class RanksAlike:
    """Ranks of one class, of those that were looked at, and the memory of the first of them."""

    ranks: tuple[int, ...]
    memory: Memory

    def describe(self) -> str:
        """Their numbers, runs of them shortened.

        >>> from .memory import Binding
        >>> RanksAlike((0, 1, 2, 5), Memory({}, Binding("", "", 0, ()), ())).describe()
        'ranks 0-2, 5'
        """
        runs: list[list[int]] = []
        for rank in self.ranks:
            if runs and rank == runs[-1][-1] + 1:
                runs[-1].append(rank)
            else:
                runs.append([rank])
        named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
        return f"rank{'s' * (len(self.ranks) > 1)} {named}"


def ranks_alike(graph: ParamGraph, sharding: Sharding | None, memory: Memory) -> tuple[RanksAlike, ...]:
    """The classes of a plan's ranks, that of rank 0 first; in the tiers with a run, each class takes one."""
    if sharding is None or memory.ranks == 1:
        return (RanksAlike((0,), memory),)
    found: dict[RankClass, list[int]] = {}
    for rank in _looked_at(memory.ranks, [axis.size for axis in sharding.dense_axes]):
        found.setdefault(rank_class(graph, sharding, rank), []).append(rank)
    return tuple(RanksAlike(tuple(ranks), memory.rank(ranks[0])) for ranks in found.values())


def _looked_at(ranks: int, sizes: Sequence[int]) -> list[int]:
    """The ranks to look at: all, or those at the corners of the mesh, whose last axis goes fastest."""
    if ranks <= _ALL:
        return list(range(ranks))
    found = set()
    for corner in itertools.product(*({0, size - 1} for size in sizes)):
        rank = 0
        for place, size in zip(corner, sizes, strict=True):
            rank = rank * size + place
        found.add(rank)
    return sorted(found)
