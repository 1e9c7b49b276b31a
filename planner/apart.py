"""What a plan decides of single modules, by which layers that would otherwise be alike are not.

A profile runs a few of the layers that are alike, and they stand for the rest. Layers that are checkpointed by another level, or
hold FSDP units that stay after the forward where others' go, take other bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..tracer.graph import ParamGraph
from .checkpointing import levels_of
from .decisions import Decisions
from .fsdp_units import reshard_of
from .kept import kept_with
from .placing import owners
from .sharding import Sharding

Told = tuple[str, int]
"""A module's level of checkpointing, and the number of its resharding, in the order in which the units have them."""


def told_apart(decisions: Decisions, graph: ParamGraph) -> Mapping[str, Told]:
    """What is decided of modules by themselves, under each of their names; nothing where all are treated alike.

    Which resharding it is does not matter, only which units share one: plans that differ in no more have one profile.
    """
    levels, numbers = levels_of(decisions.checkpointing, graph), _reshardings(decisions.sharding, graph)
    if not levels and not any(numbers.values()):
        return {}
    known, key = kept_with(graph), ("apart", tuple(levels.items()), tuple(numbers.items()))
    if key not in known:
        told = {module: (levels.get(module.name, "none"), numbers.get(module.name, 0)) for module in graph.modules}
        known[key] = {name: each for module, each in told.items() if each != ("none", 0) for name in module.names}
    found: Mapping[str, Told] = known[key]
    return found


def _reshardings(sharding: Sharding | None, graph: ParamGraph) -> dict[str, int]:
    if sharding is None or not sharding.shards or not sharding.reshard_rules:
        return {}
    numbers: dict[bool | int, int] = {}
    return {unit: numbers.setdefault(reshard_of(sharding, unit), len(numbers)) for unit in sharding.unit_names(graph)}


def not_told(decisions: Decisions, graph: ParamGraph) -> str | None:
    """Why a profile does not say what such decisions take, in words; None where it does.

    A unit within a module that runs again is gathered for that, and freed, before the backward comes to it.
    """
    sharding, levels = decisions.sharding, levels_of(decisions.checkpointing, graph)
    if not levels or sharding is None or not sharding.shards:
        return None
    for unit in sharding.unit_names(graph):
        around = next((owner for owner in owners(unit) if owner in levels), None)
        if around is not None:
            return f"{around} runs again in the backward, with {unit} in it, which FSDP gathers by itself: checkpoint the units"
    return None
