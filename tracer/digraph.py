"""The graph as networkx sees it: who reads, writes, views and owns what.

A storage appears once per write, as `Version`s, so the digraph is acyclic:

* `Storage` --holds--> `Version(storage, 0)`: its contents at creation;
* `Version` --reads--> `Op`: the op depends on the values;
* `Version` --continues--> `Op`: the op writes a part of the storage, or changes it, and the rest stays;
* `Op` --writes--> `Version`;
* the last `Version` --views--> `TensorNode`;
* `ModuleNode` --owns--> `ModuleNode` or `TensorNode`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx

from .graph import ModuleNode, Op, ParamGraph, Storage, TensorNode, Version, View


class Step(NamedTuple):
    """An op, and the storage versions it depends on and makes; `continues` leaves out what it `reads` anyway."""

    op: Op
    reads: tuple[Version, ...]
    continues: tuple[Version, ...]
    writes: tuple[Version, ...]


def build_digraph(graph: ParamGraph) -> nx.DiGraph[Any]:
    """The digraph of `graph`; every edge says in its attribute `kind` what it means."""
    digraph: nx.DiGraph[Any] = nx.DiGraph()
    digraph.add_nodes_from(graph.modules)
    digraph.add_nodes_from(graph.storages)
    digraph.add_nodes_from(graph.tensors)
    digraph.add_nodes_from(graph.ops)
    digraph.add_edges_from(((each, Version(each.index, 0)) for each in graph.storages), kind="holds")
    last = _add_ops(digraph, graph)
    views = ((last.get(each.view.storage, Version(each.view.storage, 0)), each) for each in graph.tensors)
    digraph.add_edges_from(views, kind="views")
    digraph.add_edges_from(_ownership(graph), kind="owns")
    return digraph


def _add_ops(digraph: nx.DiGraph[Any], graph: ParamGraph) -> Mapping[int, Version]:
    """Add the edges of every op; returns the last version of every storage that was written."""
    last: dict[int, Version] = {}
    for step in steps(graph.ops, graph.storages):
        digraph.add_edges_from(((version, step.op) for version in step.continues), kind="continues")
        digraph.add_edges_from(((version, step.op) for version in step.reads), kind="reads")
        digraph.add_edges_from(((step.op, version) for version in step.writes), kind="writes")
        last.update((version.storage, version) for version in step.writes)
    return last


def steps(ops: Iterable[Op], storages: Iterable[Storage]) -> Iterator[Step]:
    """Every op in order, with the storage versions that it depends on and makes; linear in the size of the tape."""
    nbytes = {storage.index: storage.nbytes for storage in storages}
    number: dict[int, int] = {}
    for op in ops:
        read = dict.fromkeys(view.storage for view in op.reads)
        written = dict.fromkeys(view.storage for view in op.targets)
        kept = {view.storage for view in op.targets if not overwrites_all(op, view, nbytes[view.storage])}
        reads = tuple(Version(storage, number.get(storage, 0)) for storage in read)
        continues = tuple(Version(each, number.get(each, 0)) for each in written if each in kept and each not in read)
        for storage in written:
            number[storage] = number.get(storage, 0) + 1
        yield Step(op, reads, continues, tuple(Version(storage, number[storage]) for storage in written))


def overwrites_all(op: Op, target: View, nbytes: int) -> bool:
    """Whether `op` replaces everything in a storage of `nbytes` bytes by writing `target`, without regard to what was there."""
    return (op.overwrites or target not in op.writes) and covers(target, nbytes)


def covers(view: View, nbytes: int) -> bool:
    """Whether `view` shows every byte of a storage of `nbytes` bytes exactly once, in whatever order.

    >>> import torch
    >>> covers(View(0, torch.float32, (2, 3), (3, 1)), 24), covers(View(0, torch.float32, (3,), (1,)), 24)
    (True, False)
    """
    _, dtype, sizes, strides, offset, _, _ = view
    if offset:
        return False
    count = _dense(sizes, strides)
    if count is None and math.prod(sizes) * dtype.itemsize == nbytes:
        count = _dense(*_by_stride(view))
    return count is not None and count * dtype.itemsize == nbytes


def _dense(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """How many elements there are, if they lie side by side, the last dim's closest together."""
    if 0 in sizes:
        return 0
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1:
            if stride != expected:
                return None
            expected *= size
    return expected


def _by_stride(view: View) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = sorted(range(len(view.size)), key=lambda dim: view.stride[dim], reverse=True)
    return tuple(view.size[dim] for dim in order), tuple(view.stride[dim] for dim in order)


# -- ownership ----------------------------------------------------------------------------------------------------------


def _ownership(graph: ParamGraph) -> Iterator[tuple[ModuleNode, ModuleNode | TensorNode]]:
    modules = {name: module for module in graph.modules for name in module.names}
    nodes: list[ModuleNode | TensorNode] = [*graph.modules, *graph.tensors]
    for node in nodes:
        for name in node.names:
            owner = modules.get(owner_name(name, modules)) if name else None
            if owner is not None and owner is not node:
                yield owner, node


def owner_name(name: str, modules: Mapping[str, Any]) -> str:
    """The name of the module that holds what is called `name`, given the modules by name; the root's is the empty string.

    >>> owner_name("layer.cache['k.v']", {"": None, "layer": None})
    'layer'
    """
    owner = name.rpartition(".")[0]
    if owner in modules or not name.endswith("]"):
        return owner
    return name.partition("[")[0].rpartition(".")[0]
