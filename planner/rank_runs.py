"""Runs of a sharded plan's step, one for every class of ranks: those that hold parts of the same shapes.

What else a step allocates depends on these and on the inputs, whose shapes are the same on every rank. Where all parameters
divide evenly there is one class; where some do not, the last ranks hold less, or nothing, of them.
"""

from __future__ import annotations

from collections.abc import Callable

from ..tracer.graph import ParamGraph
from .allocations import Timeline
from .decisions import Decisions
from .estimate import memory_of_run
from .local_parts import LocalParts
from .memory import Memory
from .profile import NoProfile, Profile
from .sharding import Sharding
from .workload import Training

RankClass = tuple[tuple[int, ...], ...]
"""The shapes of what a rank holds of every parameter."""


def rank_class(graph: ParamGraph, sharding: Sharding, rank: int) -> RankClass:
    """What ranks with the same memory have in common; the same for two of them exactly where they hold the same shapes."""
    parts = LocalParts.of_rank(sharding, graph, rank)
    return tuple(parts.shape(tensor) or () for tensor in graph.parameters)


def memory_of_ranks(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training,
    run_of: Callable[[int], Timeline],
    profile: Profile | NoProfile | None = None,
) -> Memory:
    """The memory of training on rank 0, which holds most; that of others on demand, with one run for each class.

    `run_of` runs the step of one rank. Raises what it and `memory` raise.
    """
    sharding = decisions.sharding
    assert sharding is not None
    runs: dict[RankClass, Timeline] = {}

    def of_rank(index: int) -> Memory:
        found = rank_class(graph, sharding, index)
        if found not in runs:
            runs[found] = run_of(index)
        return memory_of_run(graph, decisions, workload, runs[found], profile, index, of_rank)

    return of_rank(0)
