"""The digraph form, and the checker: every way in which a graph can contradict itself is found and named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch

from groundplan.tracer.digraph import build_digraph, covers, owner_name
from groundplan.tracer.errors import GraphError
from groundplan.tracer.graph import Constant, ModuleNode, Op, ParamGraph, Storage, StreamPosition, Version, View

from .graphs import fill, graph_of, tensor

F32 = torch.float32
ROOT = ModuleNode(("",), "Net")
WHOLE = View(0, F32, (2, 3), (3, 1))
ROW = View(0, F32, (3,), (1,), offset=3)
OTHER = View(1, F32, (2, 3), (3, 1))


def net(*ops: Op, **fields: Any) -> ParamGraph:
    """Two tensors of 2 x 3 float32, `w` in storage 0 and `v` in storage 1."""
    fields = {"modules": (ROOT,), "ops": ops} | fields
    return graph_of(tensor("w", storage=0), tensor("v", storage=1), **fields)


def copied(index: int, source: View, target: View, **fields: Any) -> Op:
    return fill(index, target, None, name="aten.copy_.default", args=(target, source), reads=(source,), **fields)


def kinds(graph: ParamGraph) -> set[tuple[Any, Any, str]]:
    return {(start, end, data["kind"]) for start, end, data in build_digraph(graph).edges(data=True)}


# -- the digraph --------------------------------------------------------------------------------------------------------


def test_every_edge_says_what_it_means() -> None:
    child = ModuleNode(("layer",), "Linear")
    ops = (fill(0, WHOLE), fill(1, ROW), copied(2, WHOLE, OTHER))
    graph = net(*ops, modules=(ROOT, child))
    w, v = graph.tensors
    assert kinds(graph) == {
        (graph.storages[0], Version(0, 0), "holds"),
        (graph.storages[1], Version(1, 0), "holds"),
        (ops[0], Version(0, 1), "writes"),
        (Version(0, 1), ops[1], "continues"),
        (ops[1], Version(0, 2), "writes"),
        (Version(0, 2), ops[2], "reads"),
        (ops[2], Version(1, 1), "writes"),
        (Version(0, 2), w, "views"),
        (Version(1, 1), v, "views"),
        (ROOT, child, "owns"),
        (ROOT, w, "owns"),
        (ROOT, v, "owns"),
    }


def test_a_recipe_is_the_ops_among_the_ancestors() -> None:
    ops = (fill(0, WHOLE), fill(1, WHOLE), fill(2, ROW), copied(3, WHOLE, OTHER), fill(4, WHOLE))
    graph = net(*ops)
    digraph = build_digraph(graph)
    recipes = [{node for node in nx.ancestors(digraph, each) if isinstance(node, Op)} for each in graph.tensors]
    assert recipes == [{ops[4]}, {ops[1], ops[2], ops[3]}]
    assert nx.is_directed_acyclic_graph(digraph)


def test_a_write_that_reads_what_it_changes_reads_it() -> None:
    scaled = fill(1, WHOLE, None, name="aten.mul_.Scalar", args=(WHOLE, 2), reads=(WHOLE,), overwrites=False)
    assert (Version(0, 1), scaled, "reads") in kinds(net(fill(0, WHOLE), scaled))


def test_an_in_place_change_continues_even_where_it_covers_everything() -> None:
    clamped = fill(1, WHOLE, None, overwrites=False)
    assert (Version(0, 1), clamped, "continues") in kinds(net(fill(0, WHOLE), clamped))


def test_an_op_with_several_targets_in_one_storage_makes_one_version() -> None:
    first, second = View(0, F32, (3,), (1,)), ROW
    op = fill(0, first, writes=(first, second))
    assert {edge for edge in kinds(net(op)) if edge[2] == "writes"} == {(op, Version(0, 1), "writes")}


@pytest.mark.parametrize(
    ("view", "nbytes", "whole"),
    [
        (View(0, F32, (2, 3), (3, 1)), 24, True),
        (View(0, F32, (2, 3), (1, 2)), 24, True),
        (View(0, F32, (2, 1, 3), (3, 77, 1)), 24, True),
        (View(0, F32, (), ()), 4, True),
        (View(0, torch.bfloat16, (2, 3), (3, 1)), 24, False),
        (View(0, F32, (2, 3), (3, 1)), 28, False),
        (View(0, F32, (3,), (1,), offset=3), 12, False),
        (View(0, F32, (2, 3), (0, 1)), 24, False),
        (View(0, F32, (2, 3), (2, 1)), 24, False),
        (View(0, F32, (0, 3), (3, 1)), 0, True),
    ],
)
def test_covers(view: View, nbytes: int, whole: bool) -> None:
    assert covers(view, nbytes) is whole


@pytest.mark.parametrize(
    ("name", "owner"),
    [("weight", ""), ("a.b.weight", "a.b"), ("a.tables[0]", "a"), ("a.cache['k.v']", "a"), ("d.x[0].weight", "d.x[0]")],
)
def test_owner_name(name: str, owner: str) -> None:
    assert owner_name(name, dict.fromkeys(["", "a", "a.b", "d", "d.x[0]"])) == owner


def test_a_shared_module_is_owned_by_each_holder() -> None:
    a, b, shared = ModuleNode(("a",), "A"), ModuleNode(("b",), "B"), ModuleNode(("a.x", "b.x"), "X")
    graph = graph_of(tensor("a.x.w", "b.x.w"), modules=(ROOT, a, b, shared))
    digraph = build_digraph(graph)
    assert set(digraph.predecessors(shared)) == {a, b}
    assert {node for node in digraph.predecessors(graph.tensors[0]) if isinstance(node, ModuleNode)} == {shared}


# -- the checker --------------------------------------------------------------------------------------------------------

AMBIENT = StreamPosition("ambient")
GOOD = (fill(0, WHOLE, live=False, unread=True), fill(1, WHOLE, position=AMBIENT), fill(2, ROW), copied(3, WHOLE, OTHER))


def test_a_sound_graph_passes() -> None:
    net(*GOOD).check()
    net().check()
    net(copied(0, WHOLE, OTHER), fill(1, WHOLE)).check()  # reads what nobody has written: eager allows it


BAD: dict[str, tuple[ParamGraph, list[str]]] = {
    "an index left out": (net(fill(1, WHOLE)), ["op 1", "place 0"]),
    "a storage twice": (net(storages=(Storage(0, 24), Storage(1, 24), Storage(1, 24))), ["storage 1"]),
    "an unknown storage": (net(fill(0, WHOLE._replace(storage=7))), ["op 0", "storage 7"]),
    "an unknown storage of a tensor": (graph_of(tensor("w"), modules=(ROOT,), storages=()), ["w", "storage 0"]),
    "a view too large": (net(storages=(Storage(0, 20), Storage(1, 24))), ["w", "20 bytes", "storage 0"]),
    "an offset too large": (net(fill(0, ROW._replace(offset=4))), ["op 0", "offset 4"]),
    "a negative stride": (net(fill(0, ROW._replace(stride=(-1,)))), ["op 0", "stride (-1,)"]),
    "a size without stride": (net(fill(0, ROW._replace(stride=()))), ["op 0"]),
    "a name twice": (graph_of(tensor("a", "w"), tensor("w"), modules=(ROOT,)), ["tensor", "'w'"]),
    "a module name twice": (net(modules=(ROOT, ModuleNode(("",), "Other"))), ["module", "''"]),
    "a module without a name": (net(modules=(ROOT, ModuleNode((), "Other"))), ["module", "no name"]),
    "an owner that is not there": (graph_of(tensor("gone.w"), modules=(ROOT,)), ["gone.w", "'gone'"]),
    "an attribute's owner that is not there": (graph_of(tensor("gone.w[0]"), modules=(ROOT,)), ["gone.w[0]", "'gone'"]),
    "a draw after a later op": (
        net(fill(0, WHOLE, position=StreamPosition("after", 1)), fill(1, OTHER, position=AMBIENT)),
        ["op 0", "after op 1"],
    ),
    "a draw after an op that draws nothing": (
        net(fill(0, WHOLE), fill(1, OTHER, position=StreamPosition("after", 0))),
        ["op 1", "op 0", "draws nothing"],
    ),
    "a read before the creation": (
        net(copied(0, WHOLE, OTHER), fill(1, WHOLE, None, writes=(), outputs=(WHOLE,))),
        ["op 0", "storage 0", "op 1"],
    ),
    "unread but live": (net(fill(0, WHOLE, unread=True)), ["op 0", "unread"]),
    "a dead last write": (net(fill(0, WHOLE, live=False)), ["w", "op 0", "dead"]),
    "a dead part of the end": (net(fill(0, WHOLE), fill(1, ROW, live=False)), ["w", "op 1", "dead"]),
    "a dead base": (net(fill(0, WHOLE, live=False), fill(1, ROW)), ["w", "op 0", "dead"]),
    "a dead source": (net(fill(0, WHOLE, live=False), copied(1, WHOLE, OTHER), fill(2, WHOLE)), ["op 1", "op 0", "dead"]),
}


@pytest.mark.parametrize(("graph", "parts"), BAD.values(), ids=BAD)
def test_a_contradiction_is_named(graph: ParamGraph, parts: list[str]) -> None:
    with pytest.raises(GraphError) as error:
        graph.check()
    assert all(part in str(error.value) for part in parts), error.value


def test_dead_reads_need_no_live_writer() -> None:
    net(fill(0, WHOLE, live=False), copied(1, WHOLE, OTHER, live=False), fill(2, WHOLE), fill(3, OTHER)).check()


def test_a_base_hidden_by_its_parts_may_be_dead() -> None:
    rows = (fill(1, ROW), fill(2, ROW._replace(offset=0)))
    net(fill(0, WHOLE, live=False), *rows).check()


def test_a_constant_needs_no_writer() -> None:
    held = Constant((2, 3), F32, "ab" * 32)
    storages = (Storage(0, 24, constant=held), Storage(1, 24))
    net(copied(0, WHOLE, OTHER), storages=storages).check()


def test_a_cycle_is_found() -> None:
    graph = net(*GOOD)
    digraph = build_digraph(graph)
    digraph.add_edge(graph.tensors[0], graph.ops[1])
    graph.__dict__["digraph"] = digraph
    with pytest.raises(GraphError, match="cycle"):
        graph.check()


def test_replaced_ops_keep_their_place() -> None:
    with pytest.raises(GraphError, match="place 1"):
        net(GOOD[0], replace(GOOD[1], index=5)).check()
