"""A constructor that raises in eager raises the same under trace, and leaves nothing changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp

from .law import generator_states


def _parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*size))


class _Own(Exception):
    """An error of the user's own."""


def _own_after_work() -> None:
    nn.Linear(3, 3)
    random.random()
    raise _Own("after some work")


def _interrupt() -> None:
    torch.randn(3)
    raise KeyboardInterrupt


FAILING: dict[str, Callable[[], Any]] = {
    "copy_ of another shape": lambda: torch.empty(3).copy_(torch.ones(4)),
    "in place on a leaf": lambda: _parameter(3).add_(1),
    "fill of a leaf": lambda: _parameter(3).fill_(1),
    "fill of a leaf's view": lambda: _parameter(3, 3)[0].fill_(1),
    "uniform_ from above to": lambda: torch.empty(3).uniform_(1, 0),
    "normal_ with negative std": lambda: torch.empty(3).normal_(0, -1),
    "normal_ on integers": lambda: torch.empty(3, dtype=torch.long).normal_(),
    "uniform_ on booleans": lambda: torch.empty(3, dtype=torch.bool).uniform_(),
    "normal_ on an expanded tensor": lambda: torch.empty(1).expand(3).normal_(),
    "view of another size": lambda: torch.empty(3).view(2, 2),
    "view of a transposed tensor": lambda: torch.empty(3, 4).t().view(12),
    "select out of range": lambda: torch.empty(3)[5],
    "index out of range": lambda: torch.ones(3)[torch.tensor([5])],
    "item of two elements": lambda: torch.ones(2).item(),
    "bool of two elements": lambda: bool(torch.ones(2)),
    "matmul of shapes": lambda: torch.ones(2, 3) @ torch.ones(2, 3),
    "cat of shapes": lambda: torch.cat([torch.ones(2, 3), torch.ones(3, 4)]),
    "in place to another dtype": lambda: torch.ones(2, dtype=torch.long).add_(0.5),
    "negative size": lambda: torch.empty(-1),
    "cholesky": lambda: torch.linalg.cholesky(-torch.eye(3)),
    "inverse of zero": lambda: torch.linalg.inv(torch.zeros(2, 2)),
    "exponential_ with a negative rate": lambda: torch.empty(3).exponential_(-1),
    "bernoulli_ with p above 1": lambda: torch.empty(3).bernoulli_(1.5),
    "bernoulli of a probability above 1": lambda: torch.bernoulli(torch.full((3,), 2.0)),
    "multinomial of nothing": lambda: torch.multinomial(torch.zeros(3), 2),
    "poisson of a negative rate": lambda: torch.poisson(-torch.ones(3)),
    "random_ from above to": lambda: torch.empty(3).random_(5, 2),
    "randint of an empty range": lambda: torch.randint(5, 2, (3,)),
    "trunc_normal_ on integers": lambda: nn.init.trunc_normal_(torch.empty(3, dtype=torch.long)),
    "orthogonal_ of a vector": lambda: nn.init.orthogonal_(torch.empty(3)),
    "numpy of what requires grad": lambda: _parameter(3).numpy(),
    "deepcopy of a non-leaf": lambda: copy.deepcopy(_parameter(3) * 2),
    "integer parameter": lambda: nn.Parameter(torch.ones(3, dtype=torch.long)),
    "padding_idx out of range": lambda: nn.Embedding(3, 4, padding_idx=7),
    "embedding out of range": lambda: nn.functional.embedding(torch.tensor([9]), torch.ones(3, 4)),
    "heads that do not divide": lambda: nn.MultiheadAttention(7, 2),
    "groups that do not divide": lambda: nn.Conv2d(3, 4, 3, groups=2),
    "buffer that is no tensor": lambda: nn.Module().register_buffer("a", 3),  # type: ignore[arg-type]
    "state_dict of another shape": lambda: nn.Linear(2, 2).load_state_dict({"weight": torch.ones(3, 3)}),
    "attribute that is not there": lambda: torch.ones(3).weight,  # type: ignore[attr-defined]
    "data that is no tensor": lambda: setattr(torch.ones(2), "data", 3),
    "unknown device": lambda: torch.empty(3, device="tpu"),
    "length of a scalar": lambda: len(torch.tensor(1.0)),
    "list index out of range": lambda: [1, 2][torch.tensor(5)],
    "generator that is none": lambda: torch.randn(3, generator=5),  # type: ignore[call-overload]
    "user's own": _own_after_work,
    "interrupt": _interrupt,
}


def error_of(call: Callable[[], Any]) -> tuple[type[BaseException], str]:
    torch.manual_seed(0)
    with pytest.raises(BaseException) as caught:
        call()
    return caught.type, str(caught.value)


def surroundings() -> tuple[object, ...]:
    """What a failing trace might leave changed."""
    return (
        generator_states(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_default_device(),
        nn.init._no_grad_trunc_normal_,
        torch.Tensor._make_subclass,
        nn.Parameter.__new__,
        torch._C._len_torch_dispatch_stack(),
        len(torch.cuda._queued_calls),
    )


@pytest.mark.parametrize("name", FAILING)
def test_the_same_error_under_trace(name: str) -> None:
    def build() -> nn.Module:
        FAILING[name]()
        return nn.Linear(1, 1)

    torch.manual_seed(0)
    random.seed(0)
    before = surroundings()
    expected = error_of(build)
    random.seed(0)
    assert error_of(lambda: gp.trace(build)) == expected
    torch.manual_seed(0)
    assert surroundings() == before


def test_a_failed_trace_leaves_the_generators_where_they_were() -> None:
    torch.manual_seed(3)
    before = surroundings()
    with pytest.raises(_Own):
        gp.trace(_own_after_work)
    assert surroundings() == before


def test_what_is_no_module_is_refused() -> None:
    for build, what in ((lambda: 3, "int"), (dict, "dict"), (lambda: {"a": nn.Linear(1, 1), "b": 2}, "'b': int")):
        with pytest.raises(gp.TraceError, match=r"returns an nn\.Module, or a tuple or dict of them") as caught:
            gp.trace(build)
        assert what in str(caught.value)


def test_an_escaped_tensor_says_what_happened() -> None:
    kept: list[torch.Tensor] = []

    def keeps() -> nn.Module:
        kept.append(torch.ones(3))
        return nn.Linear(1, 1)

    gp.trace(keeps)
    for use in (lambda: kept[0] + 1, lambda: kept[0].tolist(), lambda: kept[0].sum().item()):
        with pytest.raises(gp.TraceError, match="trace"):
            use()
    assert "Traced(size=(3,)" in repr(kept[0])

    def uses() -> nn.Module:
        module = nn.Linear(1, 1)
        module.register_buffer("kept", kept[0] + 1)
        return module

    with pytest.raises(gp.TraceError, match="an earlier trace made"):
        gp.trace(uses)


def test_uninitialized_tensors_are_named() -> None:
    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.utils.skip_init(nn.Linear, 3, 2)
            self.scale = nn.Parameter(torch.empty(4))
            self.norm = nn.LayerNorm(2)

    plan = gp.trace(Forgets)
    assert [tensor.name for tensor in plan.graph.uninitialized] == ["scale", "linear.weight", "linear.bias"]
    with pytest.raises(gp.UninitializedError, match=r"3 tensors.*\n.*scale.*\n.*linear.weight"):
        plan.materialize(seed=0)
    with pytest.raises(gp.UninitializedError, match="scale"):
        plan.materialize_state(["scale"], seed=0)
    assert set(plan.materialize_state(["norm.weight"], seed=0)) == {"norm.weight"}
    model = plan.materialize(seed=0, uninitialized="zero")
    assert not model.scale.any() and not model.linear.weight.any() and bool((model.norm.weight == 1).all())
    assert not plan.materialize_state(["scale"], uninitialized="zero")["scale"].any()
    assert plan.materialize(seed=0, uninitialized="empty").scale.shape == (4,)
    assert "uninitialized: the constructor leaves 3 tensors without values" in str(plan.report())


@pytest.mark.filterwarnings("ignore")
def test_from_pretrained_is_refused_with_the_way_out(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9, max_position_embeddings=4
    )
    transformers.BertModel(config).save_pretrained(tmp_path)

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = transformers.BertModel.from_pretrained(tmp_path)

    with pytest.raises(
        gp.TraceError, match=r"BertModel.from_pretrained was called under a trace \(.*test_errors.py.*from_config"
    ):
        gp.trace(Wraps)
    loaded = transformers.BertModel.from_pretrained(tmp_path)
    plan = gp.trace(lambda: nn.Sequential(loaded, nn.Linear(8, 2)))
    assert plan.materialize(seed=0)[0] is loaded


def test_a_change_of_geometry_that_eager_refuses_raises_eager_s_error() -> None:
    with pytest.raises(RuntimeError, match="t_\\(\\) expects a tensor with <= 2 dimensions, but self is 3D"):
        gp.trace(lambda: nn.ParameterList([torch.zeros(2, 3, 4).t_()]))


def test_a_tensor_from_outside_keeps_its_shape() -> None:
    given = torch.ones(1)
    with pytest.raises(gp.TraceError, match="out gives a tensor from outside the constructor another shape"):
        gp.trace(lambda: nn.ParameterList([torch.add(torch.ones(3), 1, out=given)]))
    assert given.shape == (1,)
