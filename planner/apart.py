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
from .sharding import Sharding

Told = tuple[str, int]
"""A module's level of checkpointing, and the number of its resharding, in the order in which the units have them."""


def told_apart(decisions: Decisions, graph: ParamGraph) -> Mapping[str, Told]:
    """What is decided of modules by themselves, under each of their names; nothing where all are treated alike.

    Which resharding it is does not matter, only which units share one: plans that differ in no more have one profile.
    """
    levels = levels_of(decisions.checkpointing, graph)
    numbers = _reshardings(decisions.sharding, graph)
    found: dict[str, Told] = {}
    for module in graph.modules if levels or numbers else ():
        told = levels.get(module.name, "none"), numbers.get(module.name, 0)
        if told != ("none", 0):
            found |= dict.fromkeys(module.names, told)
    return found


def _reshardings(sharding: Sharding | None, graph: ParamGraph) -> dict[str, int]:
    if sharding is None or not sharding.shards or not sharding.reshard_rules:
        return {}
    numbers: dict[bool | int, int] = {}
    return {unit: numbers.setdefault(reshard_of(sharding, unit), len(numbers)) for unit in sharding.unit_names(graph)}
