"""The report and the explanation: folding, what is shown, how wide, in which forms."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from groundplan.explain import Explanation, explain
from groundplan.fold import fold_names
from groundplan.planner.decisions import Decisions, default_decisions
from groundplan.planner.estimate import memory
from groundplan.report import Report
from groundplan.shown import shortened
from groundplan.tracer.errors import UnknownNameError
from groundplan.tracer.graph import Constant, Frame, ModuleNode, Op, ParamGraph, Storage, StreamPosition, TensorNode, View
from groundplan.units import format_bytes, format_count

from .graphs import fill, fingerprinted, graph_of, tensor

BF16 = torch.bfloat16
ROOT = ModuleNode(("",), "Net")


def planned(graph: ParamGraph, uninitialized: tuple[str, ...] = ()) -> tuple[ParamGraph, Decisions]:
    graph.__dict__["uninitialized"] = tuple(each for each in graph.tensors if each.name in uninitialized)
    return graph, default_decisions(fingerprinted(graph), "zoo.net.Net")


def reported(graph: ParamGraph, *uninitialized: str, cast: Any = None) -> Report:
    graph, decisions = planned(graph, uninitialized)
    decisions = decisions if cast is None else decisions.cast(cast, graph)
    return Report(graph, decisions, memory(graph, decisions))


def initialized(*tensors: TensorNode, **fields: Any) -> ParamGraph:
    """A graph in which a dead `kaiming_uniform_` and a `normal_` write each tensor."""
    graph = graph_of(*tensors, modules=(ROOT,), **fields)
    ops: list[Op] = []
    for each in graph.tensors:
        ops.append(fill(len(ops), each.view, "kaiming_uniform_", {"a": 5**0.5}, live=False, unread=True, position=_next(ops)))
        ops.append(fill(len(ops), each.view, "normal_", {"mean": 0.0, "std": 0.02}, position=_next(ops)))
    return graph_of(*graph.tensors, modules=(ROOT,), ops=tuple(ops), **fields)


def _next(ops: list[Op]) -> StreamPosition:
    return StreamPosition("after", len(ops) - 1) if ops else StreamPosition("ambient")


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (1_234_567_890, "1.23 GB")])
def test_format_bytes(n: int, text: str) -> None:
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00K"),
        (9_994, "9.99K"),
        (9_996, "10.0K"),
        (999_940, "999.9K"),
        (999_960, "1.00M"),
        (8_030_261_248, "8.03B"),
        (405_853_388_800, "405.9B"),
        (2 * 10**12, "2.00T"),
    ],
)
def test_format_count(n: int, text: str) -> None:
    assert format_count(n) == text


# -- folding ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w", "h.1.w", "h.2.w"], ["h.{0-2}.w"]),
        (["h.0.w", "h.1.w", "h.2.w", "h.5.w"], ["h.{0-2,5}.w"]),
        (["h.0.w", "h.0.b", "h.1.w", "h.1.b"], ["h.{0-1}.w", "h.{0-1}.b"]),
        (["h.7.w"], ["h.7.w"]),
        (["0", "1"], ["{0-1}"]),
        (["tables[0]", "tables[1]"], ["tables[{0-1}]"]),
        (["cache['0']", "cache['1']"], ["cache['0']", "cache['1']"]),
        (["conv1.w", "conv2.w"], ["conv1.w", "conv2.w"]),
        (["l.3.e.0", "l.3.e.1", "l.4.e.0", "l.4.e.1"], ["l.{3-4}.e.{0-1}"]),
        (["l.3.e.0", "l.3.e.1", "l.4.e.0"], ["l.3.e.{0-1}", "l.4.e.0"]),
        (["l.0.0", "l.1.1"], ["l.0.0", "l.1.1"]),
        ([f"h.{2 * at}" for at in range(9)], ["h.{0,2,4,6,…,16}"]),
    ],
)
def test_fold(names: list[str], folded: list[str]) -> None:
    assert [fold.name for fold in fold_names(names)] == folded


def test_names_with_different_keys_stay_apart() -> None:
    folds = fold_names(["h.0", "h.1", "h.2", "h.3"], ["a", "a", "b", "a"])
    assert [(fold.name, fold.count) for fold in folds] == [("h.{0-1,3}", 3), ("h.2", 1)]


def test_numbers_that_vary_together() -> None:
    names = ["d.0.e = e.0", "d.1.e = e.1", "d.2.e = e.0"]
    assert [fold.name for fold in fold_names(names, together=True)] == ["d.{0-1}.e = e.{0-1}", "d.2.e = e.0"]


@settings(max_examples=150, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from("ab")), min_size=1))
def test_folds_hold_exactly_the_names(indices: set[tuple[int, int, str]]) -> None:
    names = [f"l.{first}.{leaf}.{second}" for first, second, leaf in sorted(indices)]
    folds = fold_names(names)
    assert sorted(position for fold in folds for position in fold.members) == list(range(len(names)))
    for fold in folds:
        assert sorted(_unfolded(fold.name)) == sorted(names[position] for position in fold.members)


def _unfolded(name: str) -> list[str]:
    return [".".join(parts) for parts in itertools.product(*(_numbers(part) for part in name.split(".")))]


def _numbers(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    runs = [run.split("-") for run in part.strip("{}").split(",")]
    return [str(number) for run in runs for number in range(int(run[0]), int(run[-1]) + 1)]


# -- the report ---------------------------------------------------------------------------------------------------------


def llama(layers: int = 126) -> ParamGraph:
    names = ("self_attn.q_proj", "mlp.gate_proj", "post_attention_layernorm")
    sizes = ((16384, 16384), (53248, 16384), (16384,))
    blocks = [
        tensor(f"model.layers.{at}.{name}.weight", size=size)
        for at in range(layers)
        for name, size in zip(names, sizes, strict=True)
    ]
    embedding = tensor("model.embed_tokens.weight", "lm_head.weight", size=(128256, 16384))
    buffer = tensor("model.rotary_emb.inv_freq", size=(64,), kind="buffer", persistent=False)
    modules = [ModuleNode((name,), "M") for name in ("", "model.embed_tokens", "lm_head", "model.rotary_emb")]
    modules += [ModuleNode((f"model.layers.{at}.{name}",), "M") for at in range(layers) for name in names]
    graph = initialized(embedding, *blocks, buffer)
    return ParamGraph(tuple(modules), graph.tensors, graph.storages, graph.ops)


def lines(shown: object) -> list[str]:
    return str(shown).splitlines()


def line_with(shown: object, part: str) -> str:
    found = [line for line in lines(shown) if part in line]
    assert len(found) == 1, (part, found)
    return found[0]


def test_repeated_layers_are_one_line() -> None:
    report = reported(llama())
    line = line_with(report, "q_proj")
    name = "model.layers.{0-125}.self_attn.q_proj.weight"
    assert line.split() == ["126x", name, "normal_(std=0.02)", "16384×16384", "135.29", "GB"]
    assert "126x  model.layers.{0-125}.post_attention_layer….weight" in str(report)
    assert "lm_head.weight = model.embed_tokens.weight" in str(report)
    assert "parameters (float32)" in lines(report)
    assert "buffers, not persistent (float32)" in lines(report)


def test_one_layer_that_differs_is_not_merged() -> None:
    tensors = [tensor(f"h.{at}.w", size=(4, 4), requires_grad=at != 2) for at in range(5)]
    report = reported(initialized(*tensors))
    assert [(row.section, row.name, row.count) for row in report.rows] == [
        ("parameters", "h.{0-1,3-4}.w", 4),
        ("parameters, frozen", "h.2.w", 1),
    ]
    assert "64 trainable" in str(report)


@pytest.mark.parametrize("cast", [None, BF16, {"*norm*": torch.float32, "*": BF16}])
def test_never_wider_than_100_columns_and_plain(cast: Any) -> None:
    long = ".".join(f"a_rather_long_module_name_{at}" for at in range(9))
    tensors = (tensor(f"{long}.weight", size=(3, 3)), tensor("norm", size=(2,) * 20), tensor("s", size=()))
    report = reported(initialized(*tensors), cast=cast)
    for text in (str(report), str(reported(llama(2), cast=cast)), str(explain(report.graph, report.decisions))):
        assert max(len(line) for line in text.splitlines()) <= 100
        assert "\x1b" not in text
    assert [line for line in lines(report) if line.strip().startswith("a_rather") and "…" in line and ".weight " in line]


def test_final_dtypes_and_sizes() -> None:
    tensors = (
        tensor("w", size=(1000,)),
        tensor("norm", size=(1000,)),
        tensor("ids", size=(1000,), dtype=torch.int64, kind="buffer"),
    )
    report = reported(initialized(*tensors), cast={"norm": torch.float64, "*": BF16})
    assert line_with(report, " norm  ").split()[-3:] == ["float64", "8.00", "kB"]
    assert line_with(report, " w  ").split()[-3:] == ["bfloat16", "2.00", "kB"]
    assert "cast norm to float64, * to bfloat16" in line_with(report, "  decisions")
    data = report.to_json()
    assert data["bytes"] == {
        "constructed": {"float32": 8000, "int64": 8000},
        "final": {"bfloat16": 2000, "float64": 8000, "int64": 8000},
    }


def test_views_of_one_storage_count_once() -> None:
    half = TensorNode(("half",), "buffer", View(0, torch.float32, (50,), (1,)))
    report = reported(initialized(tensor("w", size=(100,), storage=0), half))
    assert report.to_json()["bytes"]["final"] == {"float32": 400}


def test_other_devices_are_named() -> None:
    report = reported(initialized(tensor("a"), tensor("b"), tensor("c"), devices={"c": "meta"}))
    assert "float32 meta" in str(report)
    assert line_with(report, "  devices").endswith("cpu, meta")


def test_dead_ops_are_summed_up() -> None:
    report = reported(llama(2))
    assert "dead ops: 8 of 16 leave nothing in the finished module" in lines(report)
    elements = sum(each.numel for each in report.graph.tensors)
    assert f"they write {format_count(elements)} elements and draw {format_count(elements)} random values" in str(report)
    assert line_with(report, "kaiming_uniform_(a=2.236)").split()[1:5] == ["8x", format_count(elements), "at", "net.py:0,"]
    assert line_with(report, "kaiming_uniform_").endswith("and 4 more lines")
    alive = graph_of(tensor("w"), modules=(ROOT,), ops=(fill(0, graph_of(tensor("w")).tensors[0].view),))
    assert "dead ops" not in str(reported(alive))


def test_uninitialized_tensors_come_with_the_way_out() -> None:
    report = reported(graph_of(*(tensor(f"h.{at}.w") for at in range(3)), modules=(ROOT,)), "h.0.w", "h.1.w", "h.2.w")
    assert "uninitialized: the constructor leaves 3 tensors without values" in str(report)
    assert "h.{0-2}.w  (3x)" in str(report)
    assert 'uninitialized="zero"' in str(report)
    assert report.to_json()["uninitialized"] == ["h.0.w", "h.1.w", "h.2.w"]


def test_a_partly_initialized_tensor_says_so() -> None:
    row = View(0, torch.float32, (3,), (1,))
    report = reported(graph_of(tensor("w"), modules=(ROOT,), ops=(fill(0, row, "zeros_"),)), "w")
    assert "zeros_()[1 of 2 rows], rest uninitialized" in str(report)


def test_many_ties_are_folded() -> None:
    tensors = [tensor(f"encoder.{at}.w", f"decoder.{at}.w") for at in range(6)]
    heads = tensor("head.0.w", *(f"head.{at}.w" for at in range(1, 6)))
    report = reported(initialized(*tensors, heads))
    assert "decoder.{0-5}.w = encoder.{0-5}.w  (6x)" in str(report)
    assert "head.{1-5}.w = head.0.w" in str(report)


def test_memory_and_notes() -> None:
    graph = initialized(tensor("w"), notes=("an interesting note",), seed_dependent=(Frame("net.py", 3, "f"),), host_random=True)
    report = reported(graph)
    for part in ("construct", "peak", "an interesting note", "net.py:3 in f", "numpy", report.memory.notes[0][:30]):
        assert part in str(report)
    assert report.to_json()["peak"] == report.memory.peak


def test_an_empty_module() -> None:
    report = reported(graph_of(modules=(ROOT,)))
    assert "0 in 0 tensors" in str(report)
    assert report.to_json()["tensors"] == []


def test_json_is_written_whole(tmp_path: Path) -> None:
    report = reported(llama(3), cast=BF16)
    data = report.to_json(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert data["tensors"][1] == {
        "section": "parameters",
        "name": "model.layers.{0-2}.self_attn.q_proj.weight",
        "count": 3,
        "shape": [16384, 16384],
        "dtype": "float32",
        "final": "bfloat16",
        "device": "cpu",
        "init": "normal_(std=0.02)",
        "nbytes": 3 * 16384 * 16384 * 2,
        "uninitialized": False,
    }
    assert data["ties"] == {"model.embed_tokens.weight": ["lm_head.weight"]}


def test_html_and_colors() -> None:
    report = reported(graph_of(tensor("<w>"), modules=(ROOT,)), "<w>")
    html = report._repr_html_()
    assert "&lt;w&gt;" in html
    assert "color: #800000" in html  # red
    console = Console(force_terminal=True, width=80, color_system="truecolor", record=True)
    with console.capture() as capture:
        console.print(report)
    assert "\x1b[" in capture.get()


def test_ninety_thousand_tensors_take_seconds() -> None:
    tensors = [tensor(f"layers.{at // 500}.experts.{at % 500}.w", size=(2, 2), storage=at) for at in range(20_000)]
    report = reported(initialized(*tensors))
    started = time.monotonic()
    text = str(report)
    assert time.monotonic() - started < 5
    assert "layers.{0-39}.experts.{0-499}.w" in text


@given(st.text(st.sampled_from("abc._{}()0 …"), max_size=80), st.integers(1, 60))
def test_shortened_fits(text: str, width: int) -> None:
    short = shortened(text, width)
    assert len(short) <= width
    assert short == text or "…" in short


# -- explanations -------------------------------------------------------------------------------------------------------


def explained(name: str | None = None, cast: Any = None) -> Explanation:
    graph, decisions = planned(initialized(tensor("w", "tied", size=(4, 4)), tensor("ids", dtype=torch.int64, kind="buffer")))
    return explain(graph, decisions if cast is None else decisions.cast(cast, graph).to("cuda"), name)


def test_a_tensor_is_explained_op_by_op() -> None:
    text = str(explained("tied"))
    for part in (
        "parameter  float32[4, 4], 64 B, trainable",
        "tied with  tied",
        "op 0  kaiming_uniform_(a=2.236)  dead, overwritten by op 1: never run",
        "draws from the cpu stream, where the constructor found it",
        "op 1  normal_(mean=0.0, std=0.02)",
        "draws from the cpu stream, right after op 0, kaiming_uniform_(a=2.236)",
        "at torch/nn/init.py:1 in normal_",
        "   zoo/net.py:1 in __init__",
    ):
        assert part in text, text
    assert "your cast" not in text


def test_steps_are_explained_for_a_tensor() -> None:
    assert "float32 → bfloat16, by your cast to bfloat16" in str(explained("w", BF16))
    assert "float32 → bfloat16, by your cast of 'ti*' to bfloat16" in str(explained("w", {"ti*": BF16}))
    assert "leaves integers and booleans alone" in str(explained("ids", BF16))
    assert "cuda: you asked to move to cuda" in str(explained("w", BF16))


def test_views_constants_and_uninitialized_tensors_are_explained() -> None:
    constant = Constant((6,), torch.float32, "cd" * 32)
    part = TensorNode(("part",), "buffer", View(0, torch.float32, (2,), (3,), 1), persistent=False)
    graph, decisions = planned(
        graph_of(
            part,
            tensor("bare", size=(2,), storage=1),
            modules=(ROOT,),
            storages=(Storage(0, 24, constant=constant), Storage(1, 8)),
        ),
        ("bare",),
    )
    text = str(explain(graph, decisions, "part"))
    assert "a view of it: stride [3], offset 1" in text
    assert "a constant from outside the tape: float32[6], digest cdcdcdcdcdcd" in text
    assert "not in the state_dict" in text
    assert 'uninitialized="zero"' in str(explain(graph, decisions, "bare"))


def test_every_decision_has_its_reason() -> None:
    text = str(explained())
    assert "device         cpu: the device the constructor asked for" in text
    assert "dtype          as constructed, under the default dtype float32" in text
    assert "random stream  cpu: the default device was cpu" in text
    assert "peak" in text
    text = str(explained(cast={"w": BF16}))
    for part in ("cuda: you asked for it", "1. cast w to bfloat16", "w to bfloat16: 1 tensor (w)", "2. move to cuda"):
        assert part in text, text
    assert "left as constructed: 1 tensor (ids)" in text


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="did you mean tied"):
        explained("tide")


def test_an_explanation_is_html_in_a_notebook() -> None:
    assert "<pre" in explained("w")._repr_html_()
