"""Decisions: what each step does to each tensor is what `nn.Module.to` does, and what cannot be done is refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from groundplan.planner.check import check_decisions
from groundplan.planner.decisions import (
    Cast,
    Decisions,
    Rule,
    cast_dtype,
    cast_target,
    default_decisions,
    final_device,
    final_dtype,
)
from groundplan.planner.records import device_name
from groundplan.tracer.errors import DecisionError, PlanFileError
from groundplan.tracer.graph import Ambient, Frame, ParamGraph

from .graphs import fingerprinted, graph_of, tensor

BF16, F32, F16, I64 = torch.bfloat16, torch.float32, torch.float16, torch.int64


def a_graph() -> ParamGraph:
    return fingerprinted(
        graph_of(
            tensor("embed.weight", "head.weight"),
            tensor("norm.weight"),
            tensor("norm.count", kind="buffer", dtype=I64),
            tensor("rope.freqs", kind="buffer", dtype=torch.complex64),
            tensor("table", kind="attribute"),
        )
    )


def decided(graph: ParamGraph) -> Decisions:
    return default_decisions(graph, "model.Model")


def dtypes(graph: ParamGraph, decisions: Decisions) -> dict[str, torch.dtype]:
    return {each.name: final_dtype(each, decisions) for each in graph}


# -- defaults -----------------------------------------------------------------------------------------------------------


def test_defaults_change_nothing() -> None:
    graph = a_graph()
    decisions = decided(graph)
    assert decisions.steps == () and decisions.bound_state is None
    assert decisions.fingerprint == graph.fingerprint and decisions.torch_version == torch.__version__
    assert dtypes(graph, decisions) == {each.name: each.dtype for each in graph}
    assert {final_device(each, graph.storages[each.view.storage], decisions) for each in graph} == {"cpu"}


def test_ambient_settings_survive_as_data() -> None:
    ambient = Ambient(default_dtype=F16, default_device="cuda:1", grad_enabled=False, inference_mode=True)
    decisions = decided(fingerprinted(graph_of(tensor("w"), ambient=ambient)))
    assert decisions.ambient.default_dtype == "float16"
    assert decisions.ambient.to_ambient() == ambient


# -- casts --------------------------------------------------------------------------------------------------------------


class _Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.index = nn.Parameter(torch.ones(2, dtype=I64), requires_grad=False)
        self.mask = nn.Buffer(torch.ones(2, dtype=torch.bool))
        self.freqs = nn.Buffer(torch.ones(2, dtype=torch.complex64))
        self.low = nn.Buffer(torch.ones(2, dtype=F16))
        self.table = torch.ones(2)


def mixed_graph(module: nn.Module) -> ParamGraph:
    kinds = {name: "parameter" for name, _ in module.named_parameters()} | {name: "buffer" for name, _ in module.named_buffers()}
    names = ["weight", "index", "mask", "freqs", "low", "table"]
    return fingerprinted(
        graph_of(*(tensor(n, size=(2,), dtype=getattr(module, n).dtype, kind=kinds.get(n, "attribute")) for n in names))  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("target", [BF16, F16, torch.float64, torch.float8_e4m3fn, torch.complex64, torch.complex128])
def test_a_uniform_cast_is_what_nn_module_does(target: torch.dtype) -> None:
    module = _Mixed()
    graph = mixed_graph(module)
    decisions = decided(graph).cast(target, graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.to(target)
    assert dtypes(graph, decisions) == {each.name: getattr(module, each.name).dtype for each in graph}
    assert isinstance(decisions.steps[0], Cast) and decisions.steps[0].uniform == target


@pytest.mark.parametrize("target", [torch.int8, torch.bool, I64, torch.quint8])
def test_a_dtype_that_nn_module_refuses_is_refused(target: torch.dtype) -> None:
    with pytest.raises(TypeError):
        nn.Linear(1, 1).to(target)
    with pytest.raises(DecisionError, match=f"{target}.*floating-point or complex"):
        decided(a_graph()).cast(target, a_graph())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_accepted_dtype_can_be_converted_to() -> None:
    for value in list(vars(torch).values()):
        if isinstance(value, torch.dtype) and (value.is_floating_point or value.is_complex):
            try:
                torch.zeros(1).to(value)
            except NotImplementedError:
                with pytest.raises(DecisionError, match="no conversion"):
                    cast_target(value)
            else:
                assert cast_target(value) is value


def test_the_first_matching_rule_wins() -> None:
    graph = a_graph()
    decisions = decided(graph).cast({"*norm*": F32, "*": BF16}, graph)
    assert dtypes(graph, decisions) == {
        "embed.weight": BF16, "norm.weight": F32, "norm.count": I64, "rope.freqs": BF16, "table": F32
    }  # fmt: skip
    swapped = decided(graph).cast({"*": BF16, "*norm*": F32}, graph)
    assert dtypes(graph, swapped)["norm.weight"] == BF16


def test_any_name_of_a_tied_tensor_matches() -> None:
    graph = a_graph()
    decisions = decided(graph).cast({"head.*": BF16}, graph)
    assert dtypes(graph, decisions)["embed.weight"] == BF16
    assert dtypes(graph, decisions)["norm.weight"] == F32


def test_two_dtypes_for_one_tied_tensor_are_refused_by_name() -> None:
    graph = a_graph()
    with pytest.raises(DecisionError, match=r"embed.weight to bfloat16, head.weight to float32"):
        decided(graph).cast({"head.*": F32, "*": BF16}, graph)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"norn.weight": BF16}, "norn.weight.*did you mean norm.weight"),
        ({"norm.count": BF16}, "leaves alone.*norm.count, a buffer of torch.int64"),
        ({"table": BF16}, "leaves alone.*table, an attribute"),
        ({}, "empty mapping"),
        ({"*": "bfloat16"}, "did you mean torch.bfloat16"),
        ({3: BF16}, "3 is no pattern"),
        ({"": BF16}, "'' is no pattern"),
        ("bfloat16", "did you mean torch.bfloat16"),
        (None, "takes a torch.dtype"),
    ],
)
def test_a_cast_that_cannot_be_is_refused(rules: object, message: str) -> None:
    graph = a_graph()
    with pytest.raises(DecisionError, match=message):
        decided(graph).cast(rules, graph)  # type: ignore[arg-type]


def test_a_uniform_cast_needs_no_match() -> None:
    graph = fingerprinted(graph_of(tensor("count", kind="buffer", dtype=I64)))
    assert dtypes(graph, decided(graph).cast(BF16, graph)) == {"count": I64}


def test_cast_dtype_leaves_attributes_alone() -> None:
    cast = Cast(rules=(Rule(pattern="*", dtype="bfloat16"),))
    assert cast_dtype(tensor("w"), cast) == BF16
    assert cast_dtype(tensor("w", kind="attribute"), cast) == F32
    assert Cast(rules=(Rule(pattern="w*", dtype="bfloat16"),)).uniform is None


# -- moves and order ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", "cpu"), ("cpu:0", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), (torch.device("cuda", 3), "cuda:3")],
)
def test_devices_by_name(device: object, name: str) -> None:
    assert device_name(device) == name


@pytest.mark.parametrize(
    "device", ["meta", "mps", "xla", "", "cuda:", "cuda:01", "cuda:-1", "cuda:128", "cuda:300", "CUDA", 0, None]
)
def test_other_devices_are_refused(device: object) -> None:
    with pytest.raises(DecisionError, match="CPU and CUDA are supported"):
        decided(a_graph()).to(device)  # type: ignore[arg-type]


def test_the_last_step_wins_and_attributes_stay() -> None:
    graph = a_graph()
    decisions = decided(graph).cast(BF16, graph).to("cuda").cast({"norm*": F16}, graph).to("cuda:1")
    assert [step.kind for step in decisions.steps] == ["cast", "move", "cast", "move"]
    devices = {each.name: final_device(each, graph.storages[each.view.storage], decisions) for each in graph}
    assert devices == {"table": "cpu"} | dict.fromkeys(["embed.weight", "norm.weight", "norm.count", "rope.freqs"], "cuda:1")
    assert dtypes(graph, decisions)["norm.weight"] == F16 and dtypes(graph, decisions)["embed.weight"] == BF16


def test_decisions_are_immutable_values() -> None:
    graph = a_graph()
    first = decided(graph)
    second = first.to("cuda")
    assert first.steps == () and second != first and second == first.to("cuda") and hash(second) == hash(first.to("cuda"))
    with pytest.raises(ValidationError):
        first.reference = "cuda"


# -- the checker --------------------------------------------------------------------------------------------------------


def test_the_checker_takes_what_belongs_together() -> None:
    graph = a_graph()
    check_decisions(decided(graph).cast({"*norm*": F32, "*": BF16}, graph).to("cuda"), graph)


def test_the_checker_refuses_another_graph_with_both_digests() -> None:
    decisions = decided(a_graph())
    with pytest.raises(PlanFileError, match=f"{'ab' * 32}.*{'cd' * 32}"):
        check_decisions(decisions, fingerprinted(graph_of(tensor("w")), "cd" * 32))


def test_the_checker_refuses_a_rule_without_a_match() -> None:
    decisions = decided(a_graph()).cast({"norm*": BF16}, a_graph())
    with pytest.raises(DecisionError, match="norm"):
        check_decisions(decisions, fingerprinted(graph_of(tensor("w"))))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reference": "cuda:0"}, "reference device 'cpu', this graph with 'cuda'"),
        ({"ambient": Ambient(default_dtype=BF16)}, "default_dtype 'float32', this graph with 'bfloat16'"),
        ({"ambient": Ambient(inference_mode=True)}, "inference_mode False"),
    ],
)
def test_the_checker_refuses_other_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanFileError, match=message):
        check_decisions(decided(a_graph()), fingerprinted(graph_of(tensor("w"), **fields)))


def test_the_checker_refuses_to_move_meta_tensors() -> None:
    graph = fingerprinted(graph_of(tensor("ghost"), tensor("w"), devices={"ghost": "meta"}))
    check_decisions(decided(graph).cast(BF16, graph), graph)
    with pytest.raises(DecisionError, match="ghost is a meta tensor"):
        check_decisions(decided(graph).to("cuda"), graph)


def test_the_checker_wants_the_state_that_the_tape_holds_for() -> None:
    graph = fingerprinted(graph_of(tensor("w"), seed_dependent=(Frame("model.py", 7, "__init__"),)))
    check_decisions(default_decisions(graph, "model.Model", bound_state="0f" * 32), graph)
    with pytest.raises(DecisionError, match=r"model\.py:7"):
        check_decisions(decided(graph), graph)
