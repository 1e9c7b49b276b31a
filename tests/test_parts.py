"""Parts of tensors: whatever is asked for, in whatever order and with however many threads, is the slice of eager's tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.runtime import boxes, filler, pens, truncated
from groundplan.tracer import places
from groundplan.tracer.draws import REDRAWS

from .law import _eager as eager
from .law import _seed_everything, named_tensors
from .programs import Constructed, Program

SETTINGS = settings(
    max_examples=int(os.environ.get("GROUNDPLAN_EXAMPLES", "300")),
    deadline=None,
    derandomize="GROUNDPLAN_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thresholds so low that small tensors take the ways of large ones."""
    with monkeypatch.context() as patched:
        shrink(patched)
        yield


def shrink(patched: pytest.MonkeyPatch) -> None:
    for module in (pens, boxes, truncated):
        patched.setattr(module, "CHUNK", 64)
    for name in ("_PARALLEL", "_PARALLEL_UNCOMPILED"):
        patched.setattr(boxes, name, 128)
    patched.setattr(boxes, "_GAP", 3)
    patched.setattr(filler, "LARGE", 64)
    patched.setattr(truncated, "_COMPILED_CHUNK", 48)
    patched.setattr(places, "_JUMP_FROM", 5_000)
    patched.setattr(places, "_COMPILED_JUMP_FROM", 10_000)
    patched.setattr(places, "_FIRST_JUMP_FROM", 20_000)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(bits(one), bits(other))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


# -- single fills -------------------------------------------------------------------------------------------------------

INITS: dict[str, Any] = {
    "uniform_": lambda t: t.uniform_(-0.3, 0.7),
    "normal_": lambda t: t.normal_(0.1, 0.02),
    "cauchy_": lambda t: t.cauchy_(),
    "exponential_": lambda t: t.exponential_(),
    "log_normal_": lambda t: t.log_normal_(),
    "random_": lambda t: t.random_(0, 100),
    "trunc_normal_, static": lambda t: nn.init.trunc_normal_(t, std=0.02),
    "trunc_normal_, tight": lambda t: nn.init.trunc_normal_(t, std=1.0, a=-1.5, b=1.0),
    "trunc_normal_, tighter": lambda t: nn.init.trunc_normal_(t, mean=0.1, std=0.5, a=-0.3, b=0.4),
    "trunc_normal_, tail": lambda t: nn.init.trunc_normal_(t, mean=0.0, std=1.0, a=1.0, b=1.5),
    "kaiming, masked": lambda t: nn.init.kaiming_uniform_(t, a=1)[1:3].zero_(),
    "scaled": lambda t: t.normal_().mul_(0.3).add_(1.0).clamp_(0.5, 2.0),
    "orthogonal_": lambda t: nn.init.orthogonal_(t) if t.dtype in (torch.float32, torch.float64) else t.normal_(),
    "sparse_": lambda t: nn.init.sparse_(t, 0.4),
    "copied": lambda t: t.copy_(torch.randn(t.shape, dtype=torch.float32)),
    "from columns": lambda t: t.copy_(torch.rand(t.shape[1], dtype=t.dtype)),
}


class One(nn.Module):
    """One tensor, filled one way, between others."""

    def __init__(self, init: str, shape: tuple[int, ...], dtype: torch.dtype, transposed: bool, before: int) -> None:
        super().__init__()
        self.before = nn.Parameter(torch.randn(before))
        tensor = torch.zeros(shape[::-1], dtype=dtype).t() if transposed else torch.zeros(shape, dtype=dtype)
        with torch.no_grad():
            INITS[init](tensor)
        self.weight = nn.Parameter(tensor)
        self.after = nn.Parameter(torch.randn(5))


def slices(size: int) -> st.SearchStrategy[Any]:
    """Parts of a dim."""
    numbers = st.integers(0, size)
    cut = st.builds(lambda one, other, step: slice(min(one, other), max(one, other), step), numbers, numbers, st.integers(1, 3))
    return st.one_of(st.just(slice(None)), cut, st.integers(-size, size - 1) if size else st.just(slice(None)))


@SETTINGS
@given(
    init=st.sampled_from(list(INITS)),
    shape=st.sampled_from([(40, 30), (7, 130), (130, 7), (16, 16), (3, 5), (33, 65)]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16]),
    transposed=st.booleans(),
    before=st.sampled_from([1, 3, 16, 700, 30_001]),
    threads=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_a_part_is_the_slice_of_the_whole(
    init: str, shape: tuple[int, int], dtype: torch.dtype, transposed: bool, before: int, threads: int, data: Any
) -> None:
    arguments = (init, shape, dtype, transposed, before)
    torch.manual_seed(3)
    expected = One(*arguments)
    plan = gp.trace(One, *arguments)
    wanted = {"after": data.draw(slices(5)), "weight": (data.draw(slices(shape[0])), data.draw(slices(shape[1])))}
    if data.draw(st.booleans()):
        wanted.pop("after")
    found = plan.materialize_state(wanted, seed=3, threads=threads)
    for name, index in wanted.items():
        assert same_bits(expected.get_parameter(name)[index], found[name]), name
    if data.draw(st.booleans()):
        built = plan.materialize(seed=3, threads=threads)
        for name, tensor in expected.named_parameters():
            assert same_bits(tensor, built.get_parameter(name)), name


# -- random constructors ------------------------------------------------------------------------------------------------

steps = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
programs = st.lists(steps, min_size=1, max_size=25)


@SETTINGS
@given(program=programs, seed=st.integers(0, 3), threads=st.sampled_from([1, 2, 3]), cast=st.booleans(), data=st.data())
def test_parts_of_random_constructors(program: Program, seed: int, threads: int, cast: bool, data: Any) -> None:
    dtype = torch.bfloat16 if cast else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = named_tensors(eager(lambda: Constructed(program), seed, dtype))
        except Exception:
            assume(False)
        _seed_everything(99)  # as before the eager one: Python's and numpy's random states
        plan = gp.trace(Constructed, program)
        plan = plan.cast(dtype) if dtype else plan
        nodes = {name: node for name, node in plan.graph.by_name.items() if not node.opaque and not expected[name].is_meta}
        assume(nodes)
        names = data.draw(st.lists(st.sampled_from(sorted(nodes)), min_size=1, max_size=4, unique=True))
        wanted = {name: tuple(data.draw(slices(size)) for size in expected[name].shape) for name in names}
        found = plan.materialize_state(wanted, seed=seed, threads=threads)
        for name, index in wanted.items():
            assert same_bits(expected[name][index], found[name]), name


# -- what is run, and what is refused -----------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(200, 300) for _ in range(4))
        self.square = nn.Parameter(nn.init.orthogonal_(torch.empty(20, 20)))
        self.embed = nn.Embedding(50, 16, padding_idx=3)


def test_only_the_part_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    write = pens._EachPen.write

    def counting(pen: Any, out: torch.Tensor) -> None:
        drawn.append(len(out))
        write(pen, out)

    monkeypatch.setattr(pens._EachPen, "write", counting)
    plan = gp.trace(Model)
    plan.materialize_state({"layers.2.weight": slice(30, 60)}, seed=0)  # tries each kernel, the first time
    drawn.clear()
    plan.materialize_state({"layers.2.weight": slice(30, 60)}, seed=0)
    assert sum(drawn) == 30 * 200


def test_whole_tensors_where_elements_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    expected = Model()
    found = gp.trace(Model).materialize_state({"square": (slice(5, 9), 3), "embed.weight": slice(2, 5)}, seed=0)
    assert torch.equal(found["square"], expected.square[5:9, 3])
    assert torch.equal(found["embed.weight"], expected.embed.weight[2:5])
    assert not found["embed.weight"][1].any()


def test_a_part_has_memory_of_its_own() -> None:
    found = gp.trace(Model).materialize_state({"layers.0.weight": slice(0, 10)}, seed=0)["layers.0.weight"]
    assert found.untyped_storage().nbytes() == found.nbytes
    assert found.requires_grad


@pytest.mark.parametrize(
    ("index", "why"),
    [
        (300, "dim 0 has 300 elements"),
        ((slice(None), slice(None), 0), "it has 2 dims"),
        ("0:3", "neither an integer nor a slice"),
        (slice(None, None, -1), "a step must be positive"),
        ([1, 2], "neither an integer nor a slice"),
    ],
)
def test_what_is_no_part_is_refused(index: Any, why: str) -> None:
    with pytest.raises(gp.MaterializeError, match=why) as raised:
        gp.trace(Model).materialize_state({"layers.0.weight": index}, seed=0)
    assert "layers.0.weight" in str(raised.value)


@pytest.mark.parametrize("threads", [0, -1, True, 2.0])
def test_a_number_of_threads_that_is_none_is_refused(threads: Any) -> None:
    with pytest.raises(gp.MaterializeError, match="threads="):
        gp.trace(Model).materialize(seed=0, threads=threads)


def test_lengths_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a tight `trunc_normal_` the stream goes on where only its values tell: that is found out once for each state."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tight = nn.Parameter(nn.init.trunc_normal_(torch.empty(40, 50), std=1.0, a=-1.0, b=1.0))
            self.behind = nn.Parameter(torch.randn(3))

    torch.manual_seed(11)
    expected = Behind()
    plan = gp.trace(Behind)
    settled: list[int] = []
    settle = truncated.Settler.settle

    def counting(settler: Any, first: int, out: torch.Tensor) -> None:
        settled.append(first)
        settle(settler, first, out)

    monkeypatch.setattr(truncated.Settler, "settle", counting)
    places._streams.clear()
    assert torch.equal(plan.materialize_state(["behind"], seed=11)["behind"], expected.behind)
    assert bool(settled) == REDRAWS
    settled.clear()
    assert torch.equal(plan.materialize_state(["behind"], seed=11)["behind"], expected.behind)
    assert not settled


def test_nothing_of_a_window_is_left_out() -> None:
    """Two parts of one storage, and one of a view of it."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            base = torch.randn(30, 40)
            self.upper, self.lower = nn.Parameter(base[:15]), nn.Parameter(base[15:, ::2])

    torch.manual_seed(0)
    expected = Split()
    found = gp.trace(Split).materialize_state({"upper": (slice(3, 7), slice(0, 9)), "lower": (slice(2), 5)}, seed=0)
    assert torch.equal(found["upper"], expected.upper[3:7, :9])
    assert torch.equal(found["lower"], expected.lower[:2, 5])
