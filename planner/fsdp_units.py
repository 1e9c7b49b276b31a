"""FSDP's units as the closed form takes them: which parameters are gathered together, and what a rank holds of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..tracer.graph import ParamGraph
from .changes import HOST
from .decisions import Decisions
from .experts import expert_modules
from .fsdp_form import Fsdp, Part, Unit
from .records import dtype_named
from .sharding import Sharding

if TYPE_CHECKING:
    from .rank_memory import Held


def fsdp_of(graph: ParamGraph, decisions: Decisions, held: Sequence[Held], device: str) -> Fsdp | None:
    """How FSDP2 is applied to what a rank that computes on `device` holds; None where nothing is sharded."""
    sharding = decisions.sharding
    if sharding is None or not sharding.shards:
        return None
    reduced = sharding.reduce_dtype if sharding.reduce_dtype != sharding.compute_dtype else None
    return Fsdp(
        units=_units(graph, sharding, held),
        ranks=sharding.shard_ranks,
        apart=_apart(graph, sharding),
        reduce_itemsize=None if reduced is None else dtype_named(reduced).itemsize,
        copies=sharding.size("replicate"),
        offload=sharding.offload and device != HOST,
        on_cpu=device == HOST,
    )


def _apart(graph: ParamGraph, sharding: Sharding) -> dict[str, int]:
    """Between how many ranks FSDP divides the units that hold experts."""
    if sharding.size("expert") == 1:
        return {}
    return dict.fromkeys(expert_modules(sharding.experts, graph), sharding.expert_shard_ranks)


def reshard_of(sharding: Sharding, unit: str, apart: Mapping[str, int] = MappingProxyType({})) -> bool | int:
    """What a unit does after its forward, where 1 rank is not to reshard, and all ranks are to do it.

    As torch's `_get_post_forward_mesh_info`. So a number is never 1. Of a unit that is `apart`, between other ranks, a number that
    does not divide them, or is all of them, is to reshard.
    """
    reshard, ranks = sharding.reshard_of(unit), apart.get(unit, sharding.shard_ranks)
    if not isinstance(reshard, bool) and ranks != sharding.shard_ranks:
        return True if ranks <= reshard or ranks % reshard else reshard
    return reshard if isinstance(reshard, bool) else {1: False, sharding.shard_ranks: True}.get(reshard, reshard)


def _units(graph: ParamGraph, sharding: Sharding, held: Sequence[Held]) -> dict[str, Unit]:
    """Units with the parameters that no unit inside them has; the module as a whole is one, in the order of the modules."""
    names = {"", *sharding.unit_names(graph)}
    parts: dict[str, list[Part]] = {module.name: [] for module in graph.modules if module.name in names}
    dtype = None if sharding.compute_dtype is None else dtype_named(sharding.compute_dtype)
    for each in held:
        if each.tensor.kind == "parameter":
            converted = dtype is not None and each.tensor.dtype.is_floating_point
            gathered = dtype.itemsize if dtype is not None and converted else each.itemsize
            parts[_owner(each.tensor.name, names)].append(Part(each.tensor.name, each.padded, each.itemsize, gathered))
    apart = _apart(graph, sharding)
    return {name: Unit(name, tuple(found), reshard_of(sharding, name, apart)) for name, found in parts.items()}


def _owner(name: str, units: set[str]) -> str:
    while name not in units:
        name = name.rpartition(".")[0]
    return name
