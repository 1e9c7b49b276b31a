"""The meshes that the ranks of a cluster can form, of the axes that the runtime carries out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..tracer.errors import DecisionError, nearest
from .cluster import Cluster
from .sharding import ROLES, Role

SEARCHED: tuple[Role, ...] = ("replicate", "shard", "tensor")
"""The roles of axes that a search decides about, outermost first; ranks next to each other along the last are in one node."""

_NAMES: Mapping[Role, str] = {"replicate": "dp_replicate", "shard": "dp_shard", "tensor": "tp"}


def meshes(
    cluster: Cluster,
    tensor_sizes: Sequence[int] = (1,),
    fixed: Mapping[str, int] | None = None,
    sharded: bool = False,
) -> list[dict[str, int]]:
    """The axes and sizes of every mesh of all ranks; those of size 1 are left out, unless `fixed` names them.

    `tensor_sizes` are those that the model can be divided into; along the tensor axis ranks are in one node. `fixed` gives the
    sizes of some axes; the others are free. With `sharded` there is a shard axis even of size 1: mixed precision and offload are
    FSDP's. Raises `DecisionError` for axes that the search does not decide about, and where no
    mesh is left.

    >>> meshes(Cluster.parse("2xH100-80GB"), (1, 2))
    [{'dp_replicate': 2}, {'dp_shard': 2}, {'tp': 2}]
    """
    wanted = _by_role(fixed or {})
    found = [
        _mesh(sizes, fixed or {}, sharded)
        for sizes in _sizes(cluster, tensor_sizes)
        if all(dict(zip(SEARCHED, sizes, strict=True))[role] == size for role, size in wanted.items())
    ]
    if not found:
        asked = ", ".join(f"{name}={size}" for name, size in (fixed or {}).items())
        node = max(len(cluster.devices), 1)
        raise DecisionError(
            f"{cluster} has {cluster.ranks} ranks, {node} in a node, of which no mesh has {asked or 'a size that divides them'}; "
            f"the tensor axis can be {', '.join(map(str, tensor_sizes))}"
        )
    return found


def _mesh(sizes: tuple[int, int, int], fixed: Mapping[str, int], sharded: bool) -> dict[str, int]:
    """Without axes of size 1: but torch replicates beside tensor parallelism only where it shards as well."""
    needed = "shard" if sharded or (sizes[0] > 1 and sizes[2] > 1) else None
    named = zip(SEARCHED, _named(fixed), sizes, strict=True)
    return {name: size for role, name, size in named if size > 1 or name in fixed or role == needed}


def _sizes(cluster: Cluster, tensor_sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    node = max(len(cluster.devices), 1) if cluster.devices else cluster.ranks
    for tensor in sorted(set(tensor_sizes)):
        if node % tensor == 0 and cluster.ranks % tensor == 0:
            data = cluster.ranks // tensor
            yield from ((data // shard, shard, tensor) for shard in range(1, data + 1) if data % shard == 0)


def _by_role(fixed: Mapping[str, int]) -> dict[Role, int]:
    found: dict[Role, int] = {}
    for name, size in fixed.items():
        if name not in ROLES:
            raise DecisionError(f"no axis is called {name!r} (known: {', '.join(ROLES)}){nearest(name, ROLES)}")
        role = ROLES[name]
        if role not in SEARCHED:
            raise DecisionError(
                f"axes={name!r}: a search decides about {', '.join(SEARCHED)} axes, which the runtime carries out; a {role} axis "
                "is for plan.shard(...) and plan.memory(...)"
            )
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise DecisionError(f"axes: {name} is {size!r}; it counts ranks from 1 up")
        found[role] = size
    return found


def _named(fixed: Mapping[str, int]) -> list[str]:
    """The axes' names in the order of `SEARCHED`: the user's own, where given."""
    own = {ROLES[name]: name for name in fixed}
    return [own.get(role, _NAMES[role]) for role in SEARCHED]
