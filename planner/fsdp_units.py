"""FSDP's units as the closed form takes them: which parameters are gathered together, and what a rank holds of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from ..tracer.graph import ParamGraph
from .alike import Alike
from .changes import HOST
from .decisions import Decisions
from .experts import expert_modules
from .fsdp_form import Fsdp, Part, Unit
from .held import Held, made_parameters
from .kept import kept
from .records import dtype_named
from .sharding import Sharding


def fsdp_of(graph: ParamGraph, decisions: Decisions, held: Alike[Held], device: str) -> Fsdp | None:
    """How FSDP2 is applied to what a rank that computes on `device` holds; None where nothing is sharded."""
    sharding = decisions.sharding
    if sharding is None or not sharding.shards:
        return None
    apart = _apart(graph, sharding)
    reduced = sharding.reduce_dtype if sharding.reduce_dtype != sharding.compute_dtype else None
    return Fsdp(
        units=_Units(_members(graph, sharding), held, sharding, apart),
        ranks=sharding.shard_ranks,
        apart=apart,
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

    As torch's `_get_post_forward_mesh_info`. So a number is never 1. Of a unit that is `apart`, between other ranks, a number
    that does not divide them, or is all of them, is to reshard.
    """
    reshard, ranks = sharding.reshard_of(unit), apart.get(unit, sharding.shard_ranks)
    if not isinstance(reshard, bool) and ranks != sharding.shard_ranks:
        return True if ranks <= reshard or ranks % reshard else reshard
    return reshard if isinstance(reshard, bool) else {1: False, sharding.shard_ranks: True}.get(reshard, reshard)


class _Units(Mapping[str, Unit]):
    """Units by name, put together when asked for: a step looks at those few that stand for all that are like them."""

    def __init__(
        self, members: Mapping[str, tuple[str, ...]], held: Alike[Held], sharding: Sharding, apart: Mapping[str, int]
    ) -> None:
        dtype = None if sharding.compute_dtype is None else dtype_named(sharding.compute_dtype)
        self._sharding, self._apart = sharding, apart
        self._members, self._numbers = members, held.numbers
        self._sizes = [(each.padded, each.itemsize, _gathered(each, dtype)) for each in held.kinds]
        self._made: dict[str, Unit] = {}

    def __getitem__(self, name: str) -> Unit:
        if name not in self._made:
            here = ((each, self._numbers[each]) for each in self._members[name] if each in self._numbers)
            parts = tuple(Part(each, *self._sizes[number]) for each, number in here)
            self._made[name] = Unit(name, parts, reshard_of(self._sharding, name, self._apart))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)


def _gathered(held: Held, compute_dtype: torch.dtype | None) -> int:
    """The bytes of an element as it is gathered."""
    converted = compute_dtype is not None and held.tensor.dtype.is_floating_point
    return compute_dtype.itemsize if compute_dtype is not None and converted else held.itemsize


def _members(graph: ParamGraph, sharding: Sharding) -> Mapping[str, tuple[str, ...]]:
    return _parameters_of(graph, tuple(sharding.unit_names(graph)))


@kept
def _parameters_of(graph: ParamGraph, units: tuple[str, ...]) -> Mapping[str, tuple[str, ...]]:
    """Units with the parameters that no unit inside them has; the module as a whole is one, in the order of the modules."""
    names = {"", *units}
    found: dict[str, list[str]] = {module.name: [] for module in graph.modules if module.name in names}
    for name in made_parameters(graph):
        found[_owner(name, names)].append(name)
    return {unit: tuple(parameters) for unit, parameters in found.items()}


def _owner(name: str, units: set[str]) -> str:
    while name not in units:
        name = name.rpartition(".")[0]
    return name
