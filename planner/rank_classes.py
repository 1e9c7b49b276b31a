"""Ranks that hold the same in every phase, so that each kind is shown once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .sharding import Sharding

if TYPE_CHECKING:
    from .memory import Memory

_ALL = 32
"""Up to so many ranks are looked at one by one; of more, the first and the last along each axis of the mesh."""


@dataclass(frozen=True, slots=True)
class RankClass:
    """Ranks, of those that were looked at, whose phases take the same bytes, and the memory of the first of them."""

    ranks: tuple[int, ...]
    memory: Memory

    def describe(self) -> str:
        """Their numbers, runs of them shortened.

        >>> from .memory import Binding, Memory
        >>> RankClass((0, 1, 2, 5), Memory({}, Binding("", "", 0, ()), ())).describe()
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


def rank_classes(memory: Memory, sharding: Sharding | None) -> tuple[RankClass, ...]:
    """The classes of a plan's ranks, that of rank 0 first; of a run, which is one rank's, that rank alone."""
    if memory.ranks == 1 or memory.run is not None:
        return (RankClass((0,), memory),)
    found: list[tuple[list[int], Memory]] = []
    for rank in _looked_at(memory.ranks, [axis.size for axis in sharding.axes] if sharding else []):
        of_rank = memory.rank(rank)
        same = next((ranks for ranks, known in found if known.by_device == of_rank.by_device), None)
        if same is None:
            found.append(([rank], of_rank))
        else:
            same.append(rank)
    return tuple(RankClass(tuple(ranks), of_rank) for ranks, of_rank in found)


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
