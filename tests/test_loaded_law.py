"""A constructor and its own state as a checkpoint: what comes out is eager's module, whatever the constructor does.

Only what a fill leaves on a tensor besides its values is not compared: how often it was written, and whether it is a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.parameter import is_lazy

import groundplan as gp

from . import law, zoo
from .behaviors import BEHAVIORS

pytestmark = pytest.mark.filterwarnings("ignore")
ALL = zoo.builtins() | zoo.awkward() | zoo.transformers_types() | BEHAVIORS
REFUSED = {
    "a quantized submodule": r"inner\.0\.scale \[\] is not in the module",
    "sparse and nested tensors": r"graph is a sparse_coo",
}


@pytest.fixture(autouse=True)
def _values_and_structure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    compare = law._assert_equal

    def without_traces_of_writing(name: str, what: str, left: Any, right: Any) -> None:
        if what not in ("version", "bytes of its storage"):
            compare(name, what, left, right)

    monkeypatch.setattr(law, "_assert_equal", without_traces_of_writing)
    monkeypatch.setattr(law, "_autograd", lambda tensor: f"{law._grad_fn(tensor)} {tensor.requires_grad}")


def _state(built: Any) -> dict[str, torch.Tensor]:
    found = {}
    for prefix, root in law.roots(built).items():
        for name, tensor in root.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor) and not is_lazy(tensor):
                found[f"{prefix}.{name}" if prefix else name] = tensor.detach().clone()
    return found


@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
def test_its_own_state_gives_eagers_module(name: str) -> None:
    build: Callable[[], Any] = ALL[name]
    law._seed_everything(7)
    expected = build()
    law._seed_everything(7)
    plan = gp.trace(build)
    law._seed_everything(7)
    found = plan.materialize(seed=7, checkpoint=_state(expected))
    law.assert_same(expected, found)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_checkpoint_does_not_fill_is_said(name: str) -> None:
    plan = gp.trace(ALL[name])
    with pytest.raises(gp.CheckpointError, match=REFUSED[name]):
        plan.materialize(seed=7, checkpoint=_state(ALL[name]()))


def test_a_gradient_hook_of_the_constructor_is_not_lost() -> None:
    build = BEHAVIORS["hooks"]
    plan = gp.trace(build)
    with pytest.raises(gp.MaterializeError, match=r"hangs a gradient hook on linear\.weight, which a meta module does not have"):
        plan.meta_module()
    found = plan.materialize(seed=1, checkpoint={"linear.weight": torch.full((3, 3), 2.0)})
    assert len(found.linear.weight._backward_hooks) == 1 and torch.equal(found.linear.weight, torch.full((3, 3), 2.0))
    torch.manual_seed(1)
    eager: Any = build()
    assert torch.equal(found.linear.bias, eager.linear.bias)
