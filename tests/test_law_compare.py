"""The comparison that the law tests rest on: it accepts two equal builds, and fails for every kind of single difference."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import groundplan as gp

from . import law
from .law import assert_law, assert_law_of, assert_same, assert_same_states, content, generator_states

NAN = torch.tensor([0x7FC00000, 0x7FC00001, 0x3F800000], dtype=torch.int32)


@dataclass
class Config:
    """Settings that compare with `==`, and hold a module that does not."""

    depth: int = 2
    names: list[str] = field(default_factory=lambda: ["a"])
    module: nn.Module = field(default_factory=nn.Identity)


class Sample(nn.Module):
    """One of everything that the comparison looks at."""

    table: torch.Tensor
    passing: torch.Tensor
    complex: torch.Tensor
    small: torch.Tensor
    flags: torch.Tensor
    nan: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 6, generator=generator))
        self.tied = self.weight
        self.part = nn.Parameter(self.weight.data[1:3])
        vars(self.weight)["tag"] = {"rate": torch.ones(2), "names": ["a", "b"]}
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_parameter("absent", None)
        self.register_buffer("table", torch.arange(6).reshape(2, 3))
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.register_buffer("complex", torch.tensor([1 + 2j, 3 - 4j]))
        self.register_buffer("small", torch.ones(4).to(torch.float8_e4m3fn))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("nan", NAN.clone().view(torch.float32))
        self.scaled = self.weight * 2
        self.cache: dict[str, Any] = {"k": torch.zeros(3), "v": [torch.ones(2), (torch.ones(1), 4)]}
        self.child = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1))
        self.same = self.child
        self.config = Config()
        self.rates, self.kinds, self.step = [0.1, float("nan")], {1, 2}, np.float32(2)
        self.noise, self.array = torch.Generator().manual_seed(3), np.arange(3)
        with torch.no_grad():
            for parameter in self.child.parameters():
                parameter.fill_(0.5)


Change = Callable[[Sample], Any]


def _tag(module: Sample) -> dict[str, Any]:
    """The Python attribute of the first parameter."""
    tag: dict[str, Any] = vars(module.weight)["tag"]
    return tag


def _buffer(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    """A change that puts another tensor in a buffer's place."""
    return lambda module: module._buffers.update({name: change(module._buffers[name])})  # type: ignore[arg-type]


def _flip(tensor: torch.Tensor) -> torch.Tensor:
    """Flip the lowest bit of the last element, behind autograd's back."""
    ctypes.c_uint8.from_address(tensor[-1:].data_ptr() + (tensor[-1:].numel() - 1) * tensor.element_size()).value ^= 1
    return tensor


def _untied(module: Sample) -> None:
    module.tied = nn.Parameter(module.weight.data)
    vars(module.tied)["tag"] = _tag(module)


def _unshared(module: Sample) -> None:
    apart = module.weight.data.clone()
    module.part = nn.Parameter(apart[1:3])


def _shifted(module: Sample) -> None:
    module.part = nn.Parameter(module.weight.data[2:4])


def _bumped(module: Sample) -> None:
    with torch.no_grad():
        module.frozen.mul_(1)


def _reordered(module: Sample) -> None:
    module._parameters["weight"] = module._parameters.pop("weight")


def _as_a_buffer(module: Sample) -> None:
    module._parameters.pop("frozen")
    module.register_buffer("frozen", torch.ones(3))


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    return (-tensor.clone())._neg_view()


def _conjugated(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.conj().resolve_conj().conj()


def _in_a_subclass(module: Sample) -> None:
    class Own(nn.Parameter):
        pass

    module.frozen = Own(module.frozen.data, requires_grad=False)


def _with_a_gradient(module: Sample) -> None:
    module.part.grad = torch.ones(2, 6)


DIFFERENCES: dict[str, tuple[Change, str]] = {
    "bit of a parameter": (lambda m: _flip(m.frozen.data), "frozen: 1 of 3 values differ; at [2] it is 1.0 in eager and 1.00"),
    "bit of an integer": (lambda m: _flip(m.table), "table: 1 of 6 values differ; at [1, 2] it is 5 in eager and 4 here"),
    "bit of a float8": (lambda m: _flip(m.small), "small: 1 of 4 values differ; at [3] it is 1.0 in eager and 1.125 here"),
    "bit of a NaN": (lambda m: m.nan.view(torch.int32)[1].copy_(NAN[0]), "nan: "),
    "sign of a zero": (lambda m: m.passing.copy_(torch.tensor([0.0, -0.0])), "passing: "),
    "bit of a bool": (lambda m: m.flags.logical_not_(), "flags: "),
    "bit of a complex": (lambda m: m.complex.add_(1j), "complex: "),
    "value in a list": (lambda m: m.cache["v"][1][0].add_(1), "cache.v[1][0]: version is 0 in eager and 1 here"),
    "dtype": (_buffer("table", torch.Tensor.int), "table: dtype is torch.int64 in eager and torch.int32 here"),
    "shape": (_buffer("table", lambda t: t.reshape(3, 2)), "table: shape is torch.Size([2, 3])"),
    "stride": (_buffer("table", lambda t: t.t().contiguous().t()), "table: stride is (3, 1) in eager and (1, 2) here"),
    "offset": (_buffer("passing", lambda t: torch.zeros(3)[1:]), "passing: storage_offset is 0 in eager and 1 here"),
    "storage's size": (
        _buffer("passing", lambda t: t.new_zeros(3).data[:2].data),
        "passing: bytes of its storage is 8 in eager and 12",
    ),
    "conjugate bit": (_buffer("complex", _conjugated), "complex: is_conj is False in eager and True here"),
    "negative bit": (_buffer("passing", _negated), "passing: is_neg is False in eager and True here"),
    "requires_grad": (lambda m: m.frozen.requires_grad_(), "frozen: requires_grad is False in eager and True here"),
    "grad_fn": (lambda m: setattr(m, "scaled", m.weight + m.weight.detach()), "scaled: autograd is MulBackward0, leaf: False"),
    "leaf": (lambda m: setattr(m, "scaled", m.scaled.detach().requires_grad_()), "scaled: autograd is MulBackward0"),
    "view": (_buffer("passing", lambda t: t.view(2)), "passing: autograd is NoneType, leaf: True, view: False in eager and"),
    "gradient": (_with_a_gradient, "part.grad: class of an attribute is builtins.NoneType in eager and torch.Tensor here"),
    "version": (_bumped, "frozen: version is 0 in eager and 1 here"),
    "class of a parameter": (_in_a_subclass, "frozen: class is <class 'torch.nn.parameter.Parameter'> in eager"),
    "tie broken": (_untied, "the module: ties is [['tied', 'weight']] in eager and [['tied'], ['weight']] here"),
    "shared storage apart": (
        _unshared,
        "the module: shared storages is [['part', 'tied', 'weight']] in eager and [['part'], ",
    ),
    "another part of a storage": (_shifted, "part: storage_offset is 6 in eager and 12 here"),
    "tensor left out": (lambda m: m.cache.pop("k"), "keys is ["),
    "parameter left out": (lambda m: m._parameters.pop("part"), "slots is "),
    "parameter that was none": (lambda m: setattr(m, "absent", nn.Parameter(torch.ones(1))), "slots is "),
    "order of parameters": (_reordered, "the module: tensors is "),
    "parameter as a buffer": (_as_a_buffer, "the module: tensors is "),
    "persistence": (lambda m: m._non_persistent_buffers_set.clear(), "persistence is {'passing'} in eager and set() here"),
    "attribute of a parameter": (
        lambda m: _tag(m)["names"].append("c"),
        "weight.tag.names: length is 2 in eager and 3 here",
    ),
    "tensor on a parameter": (lambda m: _tag(m)["rate"].mul_(2), "weight.tag.rate: version is 0 in eager and 1 here"),
    "attribute that is new": (lambda m: setattr(m.part, "tag", 1), "part: keys is [] in eager and [\"'tag'\"] here"),
    "training": (lambda m: m.child[1].eval(), "child.1: training is True in eager and False here"),
    "class of a module": (lambda m: m.child.__setitem__(1, nn.Dropout1d(0.1)), "child.1: class is "),
    "module left out": (lambda m: m.child.__delitem__(1), "the module: submodules is "),
    "module no longer shared": (lambda m: setattr(m, "same", nn.Sequential(*m.child)), "the module: shared submodules is "),
    "attribute of a module": (lambda m: setattr(m.child[1], "p", 0.2), "child.1.p: value is 0.1 in eager and 0.2 here"),
    "number's type": (lambda m: m.rates.__setitem__(0, np.float64(0.1)), "rates[0]: class of an attribute is builtins.float"),
    "number in a list": (lambda m: m.rates.__setitem__(0, 0.2), "rates[0]: value is 0.1 in eager and 0.2 here"),
    "set": (lambda m: m.kinds.add(3), "kinds: value is {1, 2} in eager and {1, 2, 3} here"),
    "numpy scalar": (lambda m: setattr(m, "step", np.float32(3)), "step: value is np.float32(2.0) in eager"),
    "array": (lambda m: m.array.__setitem__(1, 5), "array: array is "),
    "dataclass": (lambda m: m.config.names.append("b"), "config.names: length is 1 in eager and 2 here"),
    "private generator": (lambda m: torch.rand(1, generator=m.noise), "noise: state is "),
    "hook": (lambda m: m.child.register_forward_hook(lambda *_: None), "child: number of hooks is "),
    "hook of a parameter": (
        lambda m: m.part.register_hook(lambda gradient: gradient),
        "part: number of hooks is 0 in eager and 1",
    ),
}


def test_equal_builds_are_accepted() -> None:
    assert_same(Sample(), Sample())
    assert_same((Sample(), Sample()), (Sample(), Sample()))
    assert_same({"a": Sample()}, {"a": Sample()})
    assert_law(Sample)


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_every_single_difference_is_found(kind: str) -> None:
    change, message = DIFFERENCES[kind]
    left, right = Sample(), Sample()
    change(right)
    with pytest.raises(AssertionError) as caught:
        assert_same(left, right)
    assert message in str(caught.value)


def test_other_results_differ() -> None:
    for one, other in ((Sample(), (Sample(),)), ((Sample(),), (Sample(), Sample())), ({"a": Sample()}, {"b": Sample()})):
        with pytest.raises(AssertionError):
            assert_same(one, other)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), random.random, np.random.rand])
def test_a_moved_generator_is_found(draw: Callable[[], Any]) -> None:
    before = generator_states()
    assert_same_states(before, generator_states(), "nothing moved")
    draw()
    with pytest.raises(
        AssertionError, match=r"it moved the generator of (torch|random|numpy): its state is \w+ in eager and \w+ here"
    ):
        assert_same_states(before, generator_states(), "it moved")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([1 + 2j]).conj(),
        torch.tensor([1 + 2j]).conj().imag,
        torch.ones(1).expand(3),
        torch.ones(()),
        torch.tensor([True, False]),
        torch.ones(2).to(torch.float8_e5m2),
        torch.empty(0, 3),
    ],
)
def test_content_is_the_elements_in_order(tensor: torch.Tensor) -> None:
    expected = b"".join(np.asarray(each).tobytes() for each in tensor.resolve_conj().resolve_neg().flatten().view(_plain(tensor)))
    assert content(tensor) == expected


def _plain(tensor: torch.Tensor) -> torch.dtype:
    """A dtype that numpy knows, for the same bytes."""
    return torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype


# -- the law itself: what is wrong with a plan is found -------------------------------------------------------------------


class Small(nn.Module):
    """Enough for a law test to go wrong in."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20))
        self.cache = [torch.ones(2)]


def _part(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[..., Any]:
    """A `materialize_state` with a mistake in it."""

    def wrong(plan: gp.Plan, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        state = _parts(plan, *args, **kwargs)
        change(state)
        return state

    return wrong


def _whole(change: Callable[[nn.Module], Any]) -> Callable[..., Any]:
    """A `materialize` with a mistake in it."""

    def wrong(plan: gp.Plan, *args: Any, **kwargs: Any) -> Any:
        built = _build(plan, *args, **kwargs)
        change(built)
        return built

    return wrong


_parts, _build = gp.Plan.materialize_state, gp.Plan.materialize
_kept = Small()


def _share(module: nn.Module) -> None:
    module.cache[0] = _kept.cache[0]  # type: ignore[operator]


def _trace_that_draws(*args: Any, **kwargs: Any) -> gp.Plan:
    random.random()
    return gp.Plan(*vars(_trace(*args, **kwargs)).values())


_trace = gp.trace
MISTAKES: dict[str, tuple[Any, str, Any, str]] = {
    "trace draws": (gp, "trace", _trace_that_draws, "tracing moved the generator of random"),
    "build draws": (gp.Plan, "materialize", _whole(lambda m: torch.rand(1)), "materialize left elsewhere the generator of torch"),
    "build is wrong": (gp.Plan, "materialize", _whole(lambda m: m.eval()), "training is True in eager and False here"),
    "builds share memory": (gp.Plan, "materialize", _whole(_share), "two models: shared memory is [] in eager and ['cache[0]']"),
    "parts draw": (
        gp.Plan,
        "materialize_state",
        _part(lambda s: np.random.rand()),
        "materialize_state moved the generator of numpy",
    ),
    "part is wrong": (gp.Plan, "materialize_state", _part(lambda s: s["cache[0]"].add_(1)), "cache[0]: 2 of 2 values differ"),
    "part is left out": (gp.Plan, "materialize_state", _part(lambda s: s.pop("weight")), "parts: names is "),
    "part's dtype": (
        gp.Plan,
        "materialize_state",
        _part(lambda s: s.update(weight=s["weight"].half())),
        "weight: dtype of the part",
    ),
    "graph is wrong": (law, "named_tensors", lambda built: {}, "the graph: tensors is "),
    "report is wide": (gp.Plan, "report", lambda plan: "x" * 101, "the report has a line of 101 columns"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_every_kind_of_mistake_is_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, message = MISTAKES[kind]
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError) as caught:
        assert_law(Small)
    assert message in str(caught.value)


def test_arguments_are_passed_on() -> None:
    assert assert_law_of(nn.Linear, 3, 4, seed=3, bias=False).graph.tensor("weight").shape == (4, 3)
