"""Every behavior of tests/behaviors.py: identical to eager, plainly, under another seed, and followed by a cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import groundplan as gp

from .behaviors import BEHAVIORS
from .law import assert_law

pytestmark = [pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", BEHAVIORS)
def test_it_is_identical_to_eager(name: str) -> None:
    plan = assert_law(BEHAVIORS[name])
    assert str(plan.report()) and plan.graph.to_text()


@pytest.mark.parametrize("name", BEHAVIORS)
def test_and_so_it_is_under_a_cast(name: str) -> None:
    assert_law(BEHAVIORS[name], seed=3, cast=torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in BEHAVIORS if name not in ("a quantized submodule", "a scripted submodule")])
def test_and_under_another_default_dtype(name: str) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert_law(BEHAVIORS[name], seed=5)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_comes_from_outside_is_the_same_object() -> None:
    from .behaviors import _OUTSIDE, _TABLE

    model = gp.trace(BEHAVIORS["a module and tensors from outside"]).materialize(seed=0)
    assert model.module is _OUTSIDE and model.weight is _OUTSIDE.weight and model.table is _TABLE


def test_a_part_of_another_kind_is_refused() -> None:
    plan = gp.trace(BEHAVIORS["sparse and nested tensors"])
    assert plan.graph.tensor("graph").opaque and plan.graph.tensor("graph").type == "sparse_coo float32[4, 4]"
    with pytest.raises(
        gp.MaterializeError, match=r"graph is a sparse_coo float32\[4, 4\] tensor, which has no recipe of its own"
    ):
        plan.materialize_state(["graph"])


def test_a_sparse_tensor_from_outside_is_left_alone() -> None:
    given = torch.eye(3).to_sparse()

    def build() -> nn.Module:
        given.mul_(2)
        return nn.Linear(2, 2)

    with pytest.raises(gp.TraceError, match=r"changes a sparse_coo float32\[3, 3\] tensor from outside"):
        gp.trace(build)
    assert torch.equal(given.to_dense(), torch.eye(3))
