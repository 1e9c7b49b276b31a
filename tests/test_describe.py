"""Ops, recipes and graphs in words and as JSON; real schemas come from real torch operators."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from groundplan.tracer.describe import describe_op, describe_recipe, describe_value, graph_json, graph_text, recipe_phrases
from groundplan.tracer.graph import Constant, Frame, ModuleNode, Op, ParamGraph, Site, Storage, StreamPosition, View

from .graphs import fill, graph_of, tensor

aten = torch.ops.aten
F32 = torch.float32
W = View(0, F32, (8, 4), (4, 1))
ROW = View(0, F32, (4,), (1,), offset=12)
DRAWN = StreamPosition("ambient")


def aten_op(func: Any, *args: Any, index: int = 0, random: bool = False, outputs: tuple[View, ...] = (), **kwargs: Any) -> Op:
    """What the tape holds for a call of `func` outside any init function; in place where there is no output."""
    views = [value for value in args if isinstance(value, View)]
    return Op(
        index=index,
        name=str(func),
        args=args,
        kwargs=tuple(kwargs.items()),
        reads=tuple(views if outputs else views[1:]),
        writes=() if outputs else tuple(views[:1]),
        outputs=outputs,
        overwrites=True,
        site=Site((Frame("/home/me/net.py", 7, "__init__"),)),
        position=DRAWN if random else None,
        func=func,
    )


# -- ops ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (fill(0, W, "kaiming_uniform_", {"a": 5**0.5}), "kaiming_uniform_(a=2.236)"),
        (fill(0, W, "trunc_normal_", {"std": 0.02}), "trunc_normal_(std=0.02)"),
        (fill(0, W, "normal_", {"mean": 0.0, "std": 0.02}), "normal_(mean=0.0, std=0.02)"),
        (fill(0, W, "zeros_"), "zeros_()"),
        (aten_op(aten.normal_.default, W, 0.0, 0.02, random=True), "normal_(mean=0.0, std=0.02)"),
        (aten_op(aten.normal_.default, W, random=True), "normal_(mean=0.0, std=1.0)"),
        (aten_op(aten.uniform_.default, W, -0.5, 0.5, random=True), "uniform_(from=-0.5, to=0.5)"),
        (aten_op(aten.uniform_.default, W, 0.0, 1.0, generator=object(), random=True), "uniform_(from=0.0, to=1.0)"),
        (aten_op(aten.zero_.default, W), "zero_()"),
        (aten_op(aten.fill_.Scalar, W, 0.5), "fill_(0.5)"),
        (aten_op(aten.copy_.default, W, View(1, torch.bfloat16, (8, 4), (4, 1))), "copy_(bfloat16[8, 4])"),
        (aten_op(aten.full.default, [8, 4], 0.5, outputs=(W,), pin_memory=False), "full(0.5)"),
        (aten_op(aten.arange.start_step, 0, 8, 2, outputs=(W,)), "arange(0, 8, 2)"),
        (aten_op(aten._to_copy.default, W, dtype=torch.float16, outputs=(W,)), "_to_copy(float32[8, 4], dtype=float16)"),
        (aten_op(aten.cat.default, [W, ROW], 1, outputs=(W,)), "cat(tensors=[float32[8, 4], float32[4]], dim=1)"),
        (fill(0, W, None, name="zoo::spiral_.default", args=(W, 3, 1e-5)), "spiral_(3, 1e-05)"),
    ],
)
def test_describe_op(op: Op, text: str) -> None:
    assert describe_op(op) == text
    assert op.describe() == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1.0"),
        (1 / 3, "0.3333"),
        (1e-12, "1e-12"),
        (float("-inf"), "-inf"),
        (-2.0, "-2.0"),
        (123456.0, "1.235e+05"),
        (True, "True"),
        (None, "None"),
        ("fan_in", "'fan_in'"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, …]"),
        (torch.device("cuda", 1), "cuda:1"),
        (object(), "object"),
    ],
)
def test_describe_value(value: object, text: str) -> None:
    assert describe_value(value) == text


# -- recipes ------------------------------------------------------------------------------------------------------------


def normal(index: int, view: View = W, std: float = 0.02) -> Op:
    return fill(index, view, "normal_", {"mean": 0.0, "std": std})


def test_what_is_taken_for_granted_is_left_out_of_a_phrase() -> None:
    assert describe_recipe([normal(0)]) == "normal_(std=0.02)"
    assert describe_recipe([fill(0, W, "normal_", {"mean": 0.5, "std": 1.0})]) == "normal_(mean=0.5, std=1.0)"
    assert describe_recipe([fill(0, W, "uniform_", {"a": 0.0, "b": 1.0})]) == "uniform_(a=0.0, b=1.0)"
    assert describe_recipe([fill(0, W, "xavier_uniform_", {"gain": 1.0})]) == "xavier_uniform_()"


def test_a_phrase_starts_at_the_last_whole_overwrite() -> None:
    ops = [fill(0, W, "kaiming_uniform_", {"a": 5**0.5}), fill(1, ROW, "zeros_"), normal(2), fill(3, ROW, "zeros_")]
    assert describe_recipe(ops, W) == "normal_(std=0.02) + zeros_()[1 of 8 rows]"


def test_a_phrase_is_about_the_elements_in_view() -> None:
    ops = [normal(0), fill(1, ROW, "zeros_")]
    assert describe_recipe(ops, ROW) == "zeros_()"
    assert describe_recipe(ops, View(0, F32, (3, 4), (4, 1))) == "normal_(std=0.02)"


def test_parts_are_told_in_rows_or_elements() -> None:
    ends = View(0, F32, (8,), (4,))
    bias = View(0, F32, (32,), (1,))
    assert describe_recipe([normal(0), fill(1, ends, "ones_")], W) == "normal_(std=0.02) + ones_()[8 of 32]"
    assert describe_recipe([fill(0, bias._replace(size=(8,)), "ones_")], bias) == "ones_()[8 of 32]"


def test_equal_neighbors_are_counted() -> None:
    rows = [fill(index, ROW._replace(offset=4 * index), None, name="aten.zero_.default") for index in range(3)]
    assert describe_recipe([normal(0), *rows], W) == "normal_(std=0.02) + 3x zero_()[1 of 8 rows]"


def test_an_init_function_of_several_ops_is_one_call() -> None:
    scaled = fill(1, W, "trunc_normal_", {"std": 0.02}, overwrites=False, site=fill(0, W, "trunc_normal_", {"std": 0.02}).site)
    assert describe_recipe([fill(0, W, "trunc_normal_", {"std": 0.02}), scaled], W) == "trunc_normal_(std=0.02)"


def test_computed_values_are_told_from_their_source_on() -> None:
    made = [View(index, F32, (4,), (1,)) for index in range(5)]
    ops = [
        aten_op(aten.arange.start_step, 0, 8, 2, outputs=(made[0],)),
        aten_op(aten.div.Tensor, made[0], 8, outputs=(made[1],), index=1),
        aten_op(aten.pow.Scalar, 10000.0, made[1], outputs=(made[2],), index=2),
    ]
    assert describe_recipe(ops) == "arange(0, 8, 2) → div(8) → pow(self=1e+04)"
    ops += [aten_op(aten.reciprocal.default, made[2], outputs=(made[3],), index=3)]
    ops += [aten_op(aten.mul.Tensor, made[3], 2.0, outputs=(made[4],), index=4)]
    assert describe_recipe(ops) == "arange(0, 8, 2) → div(8) → … → mul(2.0)"


def test_no_op_at_all() -> None:
    constant = Storage(0, 128, constant=Constant((8, 4), F32, "ab" * 32))
    assert describe_recipe([]) == "uninitialized"
    assert describe_recipe([], W, [Storage(0, 128)]) == "uninitialized"
    assert describe_recipe([], W, [constant]) == "constant"
    assert describe_recipe([fill(0, ROW, "zeros_")], W, [constant]) == "constant + zeros_()[1 of 8 rows]"
    assert describe_recipe([normal(0)], W, [constant]) == "normal_(std=0.02)"
    assert describe_recipe([], W._replace(size=(0, 4)), [Storage(0, 0)]) == "empty"


def test_phrases_of_a_graph_leave_dead_ops_out() -> None:
    ops = (normal(0), fill(1, View(1, F32, (8, 4), (4, 1)), "zeros_", live=False, unread=True))
    graph = graph_of(tensor("w", size=(8, 4), storage=0), tensor("v", size=(8, 4), storage=1), ops=ops)
    assert recipe_phrases(graph) == {"w": "normal_(std=0.02)", "v": "uninitialized"}


# -- the graph ----------------------------------------------------------------------------------------------------------


def small() -> ParamGraph:
    ops = (
        fill(0, W, "kaiming_uniform_", {"a": 5**0.5}, live=False, unread=True, position=DRAWN),
        fill(1, W, "normal_", {"mean": 0.0, "std": 0.02}, position=StreamPosition("after", 0)),
        aten_op(aten.mul.Tensor, W, float("inf"), outputs=(View(1, F32, (8, 4), (4, 1)),), index=2),
    )
    tensors = (
        tensor("w", "tied", size=(8, 4), storage=0),
        tensor("scaled", size=(8, 4), storage=1, kind="buffer", persistent=False),
        tensor("table", size=(2,), storage=2, kind="attribute", dtype=torch.int64),
        tensor("bare", size=(2,), storage=3, requires_grad=False),
    )
    constant = Constant((2,), torch.int64, "ab" * 32, torch.tensor([1, 2]))
    storages = (Storage(0, 128), Storage(1, 128), Storage(2, 16, constant=constant), Storage(3, 8))
    return graph_of(*tensors, modules=(ModuleNode(("",), "Net"),), ops=ops, storages=storages)


def test_graph_text() -> None:
    assert graph_text(small()).splitlines() == [
        "4 tensors, 3 ops, 1 dead; reference stream: cpu",
        "w: parameter float32[8, 4] = tied",
        "    normal_(mean=0.0, std=0.02)  at zoo/net.py:1 in __init__",
        "scaled: buffer float32[8, 4], not persistent",
        "    normal_(mean=0.0, std=0.02)  at zoo/net.py:1 in __init__",
        "    mul(float32[8, 4], other=inf)  at /home/me/net.py:7 in __init__",
        "table: attribute int64[2]",
        "    constant int64[2], digest abababababab",
        "bare: parameter float32[2], frozen",
        "    uninitialized",
    ]
    assert str(small()) == graph_text(small())


def test_graph_json_is_plain_and_deterministic() -> None:
    data = graph_json(small())
    text = json.dumps(data, allow_nan=False)
    assert text == json.dumps(graph_json(small()), allow_nan=False)
    assert data["tensors"][0] == {
        "names": ["w", "tied"],
        "kind": "parameter",
        "view": {"storage": 0, "dtype": "float32", "size": [8, 4], "stride": [4, 1], "offset": 0},
        "requires_grad": True,
        "persistent": True,
        "grad_fn": None,
        "type": "Tensor",
    }
    assert data["storages"][2]["constant"] == {"size": [2], "dtype": "int64", "digest": "ab" * 32}
    assert data["ops"][2]["args"] == [data["tensors"][0]["view"], "inf"]
    assert data["ops"][1]["position"] == {"origin": "after", "op": 0, "seed": None, "state": None, "device": "cpu"}
    assert data["ops"][1]["init_args"] == {"mean": 0.0, "std": 0.02}


def test_json_holds_no_addresses_and_no_generator_state() -> None:
    position = StreamPosition("explicit", state=b"\x00" * 5056)
    ops = (fill(0, W, None, args=(W, object(), {"k": (1j, torch.strided)}), position=position),)
    op = graph_json(graph_of(tensor("w", size=(8, 4)), ops=ops))["ops"][0]
    assert op["args"][1:] == ["object", {"k": ["1j", "strided"]}]
    assert len(op["position"]["state"]) == 64
