"""CUDA on a machine without it: a constructor that puts tensors there is traced all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import groundplan as gp

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def traced(make: Callable[[], Any]) -> gp.ParamGraph:
    """The graph of a module that has `make()` for its buffer."""

    def build() -> nn.Module:
        module = nn.Module()
        module.register_buffer("made", make())
        return module

    return gp.trace(build).graph


MADE: dict[str, tuple[Callable[[], Any], str]] = {
    "a factory": (lambda: torch.empty(3, device="cuda"), "cuda:0"),
    "a factory by number": (lambda: torch.ones(3, device="cuda:2"), "cuda:2"),
    "to": (lambda: torch.ones(3).to("cuda:1"), "cuda:1"),
    "cuda()": (lambda: torch.ones(3).cuda(), "cuda:0"),
    "cuda(number)": (lambda: torch.ones(3).cuda(1), "cuda:1"),
    "cuda(device)": (lambda: torch.ones(3).cuda(torch.device("cuda")), "cuda:0"),
    "and back": (lambda: torch.ones(3).cuda().cpu(), "cpu"),
    "tensor": (lambda: torch.tensor([1.0, 2.0], device="cuda"), "cuda:0"),
    "tensor of a tensor": (lambda: torch.tensor(torch.ones(3).cuda(), device="cuda:1"), "cuda:1"),
    "as_tensor": (lambda: torch.as_tensor(np.arange(3), device="cuda"), "cuda:0"),
    "as_tensor of a tensor": (lambda: torch.as_tensor(torch.ones(2), device="cuda:1"), "cuda:1"),
    "as_tensor left where it is": (lambda: torch.as_tensor(torch.ones(2).cuda(1)), "cuda:1"),
    "asarray": (lambda: torch.asarray([1, 2], device="cuda"), "cuda:0"),
    "new_tensor": (lambda: torch.ones(3, device="cuda").new_tensor([1]), "cuda:0"),
    "new_zeros": (lambda: torch.ones(3, device="cuda:1").new_zeros(2), "cuda:1"),
    "like": (lambda: torch.rand_like(torch.ones(3, device="cuda:1")), "cuda:1"),
}


@pytest.mark.parametrize("name", MADE)
def test_a_tensor_is_where_eager_would_put_it(name: str) -> None:
    make, device = MADE[name]
    graph = traced(make)
    assert graph.storages[graph.tensor("made").view.storage].device == device


def test_the_constructor_is_told_the_same() -> None:
    seen: list[Any] = []

    def make() -> torch.Tensor:
        tensor = torch.tensor([1.0], device="cuda")
        with torch.cuda.device(1):
            seen.append(torch.cuda.current_device())
            inner = torch.ones(2, device="cuda")
        seen.extend([torch.cuda.current_device(), tensor.device, tensor.is_cuda, inner.device, torch.cuda.is_available()])
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            tensor.numpy()
        return tensor

    traced(make)
    assert seen == [1, 0, torch.device("cuda", 0), True, torch.device("cuda", 1), False]


def test_modules_are_moved() -> None:
    graph = gp.trace(
        lambda: nn.Sequential(nn.Linear(2, 2, device="cuda"), nn.Linear(2, 2).cuda(1), nn.LSTM(2, 2).to("cuda"))
    ).graph
    found = {each.name.partition(".")[0]: graph.storages[each.view.storage].device for each in graph.parameters}
    assert found == {"0": "cuda:0", "1": "cuda:1", "2": "cuda:0"}


def test_the_default_device_may_be_cuda() -> None:
    with torch.device("cuda"):
        graph = gp.trace(lambda: nn.Sequential(nn.Linear(2, 2), nn.Embedding.from_pretrained(torch.tensor([[1.0]])))).graph
    assert graph.reference == "cuda" and graph.ambient.default_device == "cuda:0"
    assert {graph.storages[each.view.storage].device for each in graph.parameters} == {"cuda:0"}
    assert all(op.position.device == "cuda:0" for op in graph.ops if op.position)


def test_the_streams_of_imagined_generators() -> None:
    def make() -> torch.Tensor:
        first = torch.rand(2, device="cuda")
        torch.manual_seed(5)
        torch.rand(2)
        return torch.rand(2, device="cuda:1") + torch.rand(2, device="cuda").to("cuda:1") + first.to("cuda:1")

    drawn = [op.position for op in traced(make).ops if op.position]
    assert [(each.origin, each.seed, each.device) for each in drawn] == [
        ("ambient", None, "cuda:0"),
        ("explicit", 5, "cpu"),
        ("explicit", 5, "cuda:1"),
        ("explicit", 5, "cuda:0"),
    ]


def test_values_that_no_cuda_stream_decides_can_be_looked_at() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*[nn.Dropout(rate.item()) for rate in torch.linspace(0, 0.5, 3, device="cuda")])

    assert [each.type for each in gp.trace(build).graph.modules] == ["Sequential", "Dropout", "Dropout", "Dropout"]
    with pytest.raises(gp.TraceError, match="random stream of cuda:0, which this machine does not have"):
        gp.trace(lambda: nn.Linear(int(torch.rand(1, device="cuda").item()) + 1, 2))


def test_it_is_built_only_where_there_is_cuda() -> None:
    plan = gp.trace(nn.Linear, 2, 2, device="cuda")
    for use in (plan.materialize, plan.to("cpu").materialize, lambda: plan.materialize_state(["bias"])):
        with pytest.raises(gp.MaterializeError, match="the constructor puts tensors on cuda:0, and this machine has no CUDA"):
            use()


def test_torch_is_afterwards_as_it_was() -> None:
    before = {name: vars(torch)[name] for name in ("tensor", "as_tensor", "asarray")} | vars(torch.cuda)
    with pytest.raises(ZeroDivisionError):
        gp.trace(lambda: nn.Linear(1 // 0, 2))
    gp.trace(nn.Linear, 2, 2, device="cuda")
    after = {name: vars(torch)[name] for name in ("tensor", "as_tensor", "asarray")} | vars(torch.cuda)
    assert before == after
    with pytest.raises((AssertionError, RuntimeError)):
        torch.ones(2, device="cuda")
