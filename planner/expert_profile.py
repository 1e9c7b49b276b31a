"""A profile on one rank of the expert axis, where experts are modules in a list: each is whole, with its gradient, on one rank.

What else the experts of other ranks do in the trace stands for what this rank's do with the tokens of other ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache

from ..tracer.graph import ParamGraph
from .experts import experts_of
from .profile import Block, Profile, Stretch, stretch
from .sharding import Sharding


def on_rank(profile: Profile, sharding: Sharding | None, graph: ParamGraph, held: Iterable[str]) -> Profile:
    """The same, where gradients of experts that are not among what the rank `held` take nothing."""
    if sharding is None or sharding.size("expert") == 1:
        return profile
    listed = {name for name, each in experts_of(sharding.experts, graph).items() if each.number is not None}
    others = listed.difference(held)
    return _without(profile, frozenset(others)) if others else profile


@lru_cache(maxsize=64)
def _without(profile: Profile, others: frozenset[str]) -> Profile:
    allocations = tuple(
        replace(each, nbytes=0) if each.kind == "gradient" and each.name in others else each for each in profile.allocations
    )

    def again(block: Block) -> Block:
        parts = (stretch(list(part.events), allocations) if isinstance(part, Stretch) else part for part in block.parts)
        return replace(block, parts=tuple(parts))

    return replace(profile, allocations=allocations, blocks=tuple(map(again, profile.blocks)))
