"""A model as a chain of units for a device map: what is not divided, in the constructor's order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from ..tracer.graph import ParamGraph, TensorNode
from .decisions import Decisions, final_dtype
from .partition import Unit
from .placing import children_of, owners
from .sharding import matches, repeated_layers


@dataclass(frozen=True, slots=True)
class Chain:
    """Units, the modules that each is made of, and the tensors (with their bytes) that only the main device can have.

    What a unit keeps where it runs (`Unit.cache`) are its buffers: they are not brought along, but stay there.
    """

    units: tuple[Unit, ...]
    modules: tuple[tuple[str, ...], ...]
    resident: tuple[str, ...]
    resident_bytes: int


def chain_of(graph: ParamGraph, decisions: Decisions, together: Sequence[str] | None = None) -> Chain:
    """The units of a model: modules that match a pattern of `together` (None: every layer that repeats), and parts of the rest.

    A module with tensors of its own beside submodules is one unit, as its forward needs them in one place, unless there are
    units within it: then its own tensors stay on the main device. Units that share a tensor are one, at the place of the first.
    """
    patterns = repeated_layers(graph) if together is None else list(together)
    names = list(_units("", _wanted(graph, patterns), _own(graph), children_of(graph)))
    units = {name: number for number, name in enumerate(names)}
    homes = [(tensor, _homes(tensor, units)) for tensor in graph.tensors if tensor.kind != "attribute"]
    ties = nx.Graph([(one, other) for _, found in homes for one in found for other in found])
    ties.add_nodes_from(range(len(names)))
    groups = sorted(sorted(group) for group in nx.connected_components(ties))
    held: dict[int, list[TensorNode]] = {number: [] for group in groups for number in group}
    for tensor, found in homes:
        if found:
            held[found[0]].append(tensor)
    resident = [tensor for tensor, found in homes if not found]
    members = [[tensor for number in group for tensor in held[number]] for group in groups]
    return Chain(
        tuple(_unit(names[group[0]], tensors, decisions) for group, tensors in zip(groups, members, strict=True)),
        tuple(tuple(names[number] for number in group) for group in groups),
        tuple(tensor.name for tensor in resident),
        sum(_nbytes(tensor, decisions) for tensor in resident),
    )


def _wanted(graph: ParamGraph, patterns: Sequence[str]) -> set[str]:
    return {name for module in graph.modules for name in module.names if any(matches(each, name) for each in patterns)}


def _own(graph: ParamGraph) -> set[str]:
    """Modules with tensors of their own."""
    return {name.rpartition(".")[0] for tensor in graph.tensors for name in tensor.names}


def _units(name: str, wanted: set[str], own: set[str], children: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The units below a module, in order."""
    below = f"{name}." if name else ""
    divided = any(each.startswith(below) and each != name for each in wanted)
    if name in wanted or (name in own and not divided):
        yield name
        return
    for child in children.get(name, ()):
        yield from _units(child, wanted, own, children)


def _homes(tensor: TensorNode, units: Mapping[str, int]) -> list[int]:
    """The units that a tensor is a part of, by each of its names."""
    found = {units[owner] for name in tensor.names if not name.endswith("]") for owner in owners(name) if owner in units}
    return sorted(found)


def _unit(name: str, tensors: Sequence[TensorNode], decisions: Decisions) -> Unit:
    by_module: dict[str, int] = {}
    for tensor in tensors:
        if tensor.kind == "parameter":
            owner = tensor.name.rpartition(".")[0]
            by_module[owner] = by_module.get(owner, 0) + _nbytes(tensor, decisions)
    buffers = sum(_nbytes(tensor, decisions) for tensor in tensors if tensor.kind != "parameter")
    return Unit(name, sum(by_module.values()), cache=buffers, streamed=max(by_module.values(), default=0))


def _nbytes(tensor: TensorNode, decisions: Decisions) -> int:
    return tensor.numel * final_dtype(tensor, decisions).itemsize
