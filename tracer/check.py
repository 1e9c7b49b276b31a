"""The first stage's checker: a graph that contradicts itself is a bug here, not a wrong value later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from .digraph import covers, overwrites_all, owner_name
from .errors import GraphError
from .graph import Op, ParamGraph, TensorNode, View

DIGRAPH_LIMIT = 200
"""The digraph is built and checked for graphs of fewer ops than this; the rest of the check is fast at any size."""


def check_graph(graph: ParamGraph) -> None:
    """Raise `GraphError`, naming the offender, where `graph` contradicts itself; takes time linear in its size."""
    _check_indices(graph)
    _check_names(graph)
    _check_owners(graph)
    _check_views(graph)
    _check_order(graph)
    _check_positions(graph.ops)
    _check_liveness(graph)
    if len(graph.ops) < DIGRAPH_LIMIT:
        _check_acyclic(graph)


# -- names and numbers --------------------------------------------------------------------------------------------------


def _check_indices(graph: ParamGraph) -> None:
    for expected, op in enumerate(graph.ops):
        if op.index != expected:
            raise GraphError(f"op {op.index} ({op.name}) stands at place {expected} of the tape; op indices count from 0 up")
    if repeated := _repeated(storage.index for storage in graph.storages):
        raise GraphError(f"there is more than one storage {repeated[0]}")


def _check_names(graph: ParamGraph) -> None:
    for kind, nodes in (("tensor", graph.tensors), ("module", graph.modules)):
        for node in nodes:
            if not node.names:
                raise GraphError(f"a {kind} has no name: {node}")
        if repeated := _repeated(name for node in nodes for name in node.names):
            raise GraphError(f"more than one {kind} is called {repeated[0]!r}")


def _repeated(items: Iterable[object]) -> list[object]:
    seen: set[object] = set()
    return [item for item in items if item in seen or seen.add(item)]  # type: ignore[func-returns-value]


def _check_owners(graph: ParamGraph) -> None:
    modules = {name: module for module in graph.modules for name in module.names}
    for tensor in graph.tensors:
        for name in tensor.names:
            if owner_name(name, modules) not in modules:
                raise GraphError(f"{name} belongs to a module called {owner_name(name, modules)!r}, and there is none")


def _check_positions(ops: Sequence[Op]) -> None:
    for op in ops:
        if op.position is None or op.position.origin != "after":
            continue
        before = op.position.op
        if before is None or not 0 <= before < op.index:
            raise GraphError(f"op {op.index} ({op.name}) draws after op {before}, which does not come before it")
        if not ops[before].random:
            raise GraphError(f"op {op.index} ({op.name}) draws after op {before} ({ops[before].name}), which draws nothing")


# -- views and order ----------------------------------------------------------------------------------------------------


def _check_views(graph: ParamGraph) -> None:
    nbytes = {storage.index: storage.nbytes for storage in graph.storages}
    seen: set[int] = set()
    for who, view in _all_views(graph):
        if id(view) in seen:
            continue
        seen.add(id(view))
        if view.storage not in nbytes:
            raise GraphError(f"{_called(who)} is a view of storage {view.storage}, and there is none")
        if not _fits(view, nbytes[view.storage]):
            raise GraphError(
                f"{_called(who)} is a view of size {view.size}, stride {view.stride}, offset {view.offset} in {view.dtype}, "
                f"which does not fit the {nbytes[view.storage]} bytes of storage {view.storage}"
            )


def _all_views(graph: ParamGraph) -> Iterator[tuple[str | Op, View]]:
    for tensor in graph.tensors:
        yield tensor.name, tensor.view
    for op in graph.ops:
        for view in op.reads + op.targets:
            yield op, view


def _called(who: str | Op) -> str:
    return who if isinstance(who, str) else f"something that op {who.index} ({who.name}) reads or writes"


def _fits(view: View, nbytes: int) -> bool:
    _, dtype, sizes, strides, last, _, _ = view
    if len(sizes) != len(strides) or last < 0:
        return False
    for size, stride in zip(sizes, strides, strict=True):
        if size < 0 or stride < 0:
            return False
        last += (size - 1) * stride
    return 0 in sizes or (last + 1) * dtype.itemsize <= nbytes


def _check_order(graph: ParamGraph) -> None:
    """No op reads a storage that a later op creates."""
    outside = {storage.index for storage in graph.storages if storage.constant is not None}
    reader: dict[int, Op] = {}
    written: set[int] = set()
    for op in graph.ops:
        for view in op.reads:
            if view.storage not in written and view.storage not in outside:
                reader.setdefault(view.storage, op)
        for output in op.outputs:
            if output is not None and output.storage not in written and (early := reader.get(output.storage, op)) is not op:
                raise GraphError(
                    f"op {early.index} ({early.name}) reads storage {output.storage}, "
                    f"which op {op.index} ({op.name}) creates only later"
                )
        written.update(view.storage for view in op.targets)


# -- liveness -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Written:
    """A storage after writes to parts of it: the last whole overwrite, the last write, and the bytes of all those parts."""

    whole: Op | None = None
    last: tuple[Op, View] | None = None
    since: int = 0


_Held = dict[int, Op | _Written]  # by storage; the op itself where one has just overwritten all of it


def _check_liveness(graph: ParamGraph) -> None:
    """Whatever a live op or a tensor surely depends on is live.

    Surely: the last write, where the reader sees all of it; the last whole overwrite, where the writes to parts of the storage
    since then are too small to hide it.
    """
    nbytes = {storage.index: storage.nbytes for storage in graph.storages}
    held: _Held = {}
    for op in graph.ops:
        if op.unread and op.live:
            raise GraphError(f"op {op.index} ({op.name}) is live and unread at once; what nothing reads is dead")
        if op.live:
            for view in op.reads:
                _check_writers(op, view, held, nbytes)
        for view in op.targets:
            _write(op, view, held, nbytes[view.storage])
    for tensor in graph.tensors:
        _check_writers(tensor, tensor.view, held, nbytes)


def _write(op: Op, view: View, held: _Held, nbytes: int) -> None:
    if overwrites_all(op, view, nbytes):
        held[view.storage] = op
        return
    now = held.get(view.storage)
    if not isinstance(now, _Written):
        now = held[view.storage] = _Written(now)
    now.last = (op, view)
    if op.overwrites:
        now.since += view.nbytes


def _check_writers(reader: Op | TensorNode, view: View, held: _Held, nbytes: Mapping[int, int]) -> None:
    now = held.get(view.storage)
    if now is None or 0 in view.size:
        return
    for op in (now,) if isinstance(now, Op) else _needed(now, view, nbytes[view.storage]):
        if not op.live:
            who = f"op {reader.index} ({reader.name})" if isinstance(reader, Op) else reader.name
            raise GraphError(f"{who} depends on op {op.index} ({op.describe()}), which is marked dead")


def _needed(now: _Written, view: View, nbytes: int) -> Iterator[Op]:
    """The ops that what `view` shows surely depends on."""
    whole = covers(view, nbytes)
    if now.last is not None:
        last, target = now.last
        if 0 not in target.size and (whole or target == view or covers(target, nbytes)):
            yield last
    if now.whole is not None and whole and now.since < nbytes:
        yield now.whole


# -- the digraph --------------------------------------------------------------------------------------------------------


def _check_acyclic(graph: ParamGraph) -> None:
    if nx.is_directed_acyclic_graph(graph.digraph):
        return
    cycle = " -> ".join(str(getattr(start, "name", start)) for start, _ in nx.find_cycle(graph.digraph))
    raise GraphError(f"the graph has a cycle: {cycle}")
