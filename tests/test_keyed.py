"""`rng="keyed"`: the same values for every order, part, number of threads and surroundings; others for every seed and name."""

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
from torch.nn.parameter import is_lazy

import groundplan as gp
from groundplan.runtime import keyed

from . import zoo
from .law import generator_states, named_tensors
from .programs import Constructed, Program
from .test_parts import same_bits, shrink, slices


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks and thresholds so low that small tensors take the ways of large ones."""
    with monkeypatch.context() as patched:
        shrink(patched)
        patched.setattr(keyed, "BLOCK", 96)
        patched.setattr(keyed.KeyedFill, "quantum", 96)
        yield


class Model(nn.Module):
    """What a constructor fills, in every way that a key has to tell apart."""

    def __init__(self, width: int = 40, extra: bool = False) -> None:
        super().__init__()
        if extra:
            self.extra = nn.Linear(30, 30)
        self.layers = nn.ModuleList(nn.Linear(width, 30) for _ in range(3))
        self.norm = nn.LayerNorm(30)
        self.twice = nn.Parameter(torch.randn(20, 20) + torch.randn(20, 20))
        self.tight = nn.Parameter(nn.init.trunc_normal_(torch.empty(30, 20), std=1.0, a=-1.0, b=1.0))
        self.square = nn.Parameter(nn.init.orthogonal_(torch.empty(12, 12)))
        self.order = nn.Buffer(torch.randperm(50))
        self.turned = nn.Parameter(torch.empty(17, 23).t().normal_())
        self.tied = self.layers[0].weight
        self.private = nn.Parameter(torch.randn(99, generator=torch.Generator().manual_seed(3)))


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(module).items()}


def build(seed: int | None = 5, threads: int = 1, **kwargs: Any) -> dict[str, torch.Tensor]:
    return state(gp.trace(Model, **kwargs).materialize(seed=seed, rng="keyed", threads=threads))


def test_threads_change_nothing() -> None:
    first = build()
    for threads in (2, 3):
        again = build(threads=threads)
        assert all(same_bits(first[name], again[name]) for name in first)


def test_parts_are_slices_in_any_order() -> None:
    whole, plan = build(), gp.trace(Model)
    for name in reversed(list(plan.graph.by_name)):
        assert same_bits(whole[name], plan.materialize_state([name], seed=5, rng="keyed")[name].detach()), name
        if whole[name].dim() == 2:
            index = (slice(3, 9), slice(1, 11, 2))
            part = plan.materialize_state({name: index}, seed=5, rng="keyed", threads=2)[name].detach()
            assert same_bits(whole[name][index], part), name


def test_what_stands_before_it_changes_nothing() -> None:
    plain, more = build(), build(extra=True)
    assert all(same_bits(plain[name], more[name]) for name in plain)


def test_seeds_names_blocks_and_ops_have_numbers_of_their_own() -> None:
    whole, other = build(), build(seed=6)
    assert not same_bits(whole["layers.0.weight"], other["layers.0.weight"])
    assert not same_bits(whole["layers.0.weight"], whole["layers.1.weight"])
    blocks = whole["layers.0.weight"].flatten()[: 96 * 12].view(12, 96)
    assert len({tuple(block.tolist()) for block in blocks}) == 12
    assert whole["twice"].std() == pytest.approx(2**0.5, rel=0.2)  # and not 2: the two draws are independent
    assert sorted(whole["order"].tolist()) == list(range(50))
    assert whole["tight"].abs().max() <= 1
    assert torch.allclose(whole["square"] @ whole["square"].t(), torch.eye(12), atol=1e-5)


def test_the_distributions_are_the_constructors() -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normal = nn.Parameter(torch.empty(300, 300).normal_(0.5, 0.02))
            self.uniform = nn.Parameter(torch.empty(300, 300).uniform_(-0.1, 0.3))

    model = gp.trace(Large).materialize(seed=0, rng="keyed")
    assert model.normal.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert model.normal.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.uniform.mean().item() == pytest.approx(0.1, abs=2e-3)
    assert -0.1 <= model.uniform.min() < -0.099
    assert 0.299 < model.uniform.max() <= 0.3


def test_the_global_generators_are_left_alone() -> None:
    torch.manual_seed(17)
    before = generator_states()
    build()
    assert generator_states() == before


def test_without_a_seed_one_number_is_drawn() -> None:
    torch.manual_seed(17)
    first = build(seed=None)
    moved = torch.get_rng_state()
    torch.manual_seed(17)
    torch.empty((), dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(torch.get_rng_state(), moved)
    second = build(seed=None)
    assert not same_bits(first["layers.0.weight"], second["layers.0.weight"])
    torch.manual_seed(17)
    part = gp.trace(Model).materialize_state(["layers.0.weight"], rng="keyed")
    assert same_bits(first["layers.0.weight"], part["layers.0.weight"].detach())


def test_a_cast_rounds_the_same_numbers() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(700, 700)

    plan = gp.trace(Wide)
    whole, cast = plan.materialize(seed=1, rng="keyed"), plan.cast(torch.bfloat16).materialize(seed=1, rng="keyed")
    assert same_bits(whole.layer.weight.detach().bfloat16(), cast.layer.weight.detach())
    part = plan.cast(torch.bfloat16).materialize_state({"layer.weight": slice(3, 5)}, seed=1, rng="keyed")
    assert same_bits(cast.layer.weight[3:5].detach(), part["layer.weight"].detach())


@pytest.mark.parametrize("name", [*zoo.builtins(), *zoo.awkward(), *zoo.transformers_types()])
def test_every_kind_of_module_can_be_keyed(name: str) -> None:
    plan = gp.trace((zoo.builtins() | zoo.awkward() | zoo.transformers_types())[name])
    if plan.graph.seed_dependent or plan.graph.uninitialized:
        return
    whole = named_tensors(plan.materialize(seed=2, rng="keyed"))
    names = [key for key, node in plan.graph.by_name.items() if not node.opaque and not is_lazy(whole[key])]
    found = plan.materialize_state(names, seed=2, rng="keyed", threads=2)
    for key in names:
        if not whole[key].is_meta:
            assert same_bits(whole[key].detach(), found[key].detach()), key


steps = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))


@settings(
    max_examples=int(os.environ.get("GROUNDPLAN_EXAMPLES", "100")),
    deadline=None,
    derandomize="GROUNDPLAN_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(program=st.lists(steps, min_size=1, max_size=20), threads=st.sampled_from([1, 2, 3]), data=st.data())
def test_random_constructors(program: Program, threads: int, data: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            plan = gp.trace(Constructed, program)
            assume(not plan.graph.seed_dependent)
            whole = named_tensors(plan.materialize(seed=1, rng="keyed"))
        except Exception:
            assume(False)
        nodes = {name: node for name, node in plan.graph.by_name.items() if not node.opaque and not whole[name].is_meta}
        assume(nodes)
        name = data.draw(st.sampled_from(sorted(nodes)))
        index = tuple(data.draw(slices(size)) for size in whole[name].shape)
        found = plan.materialize_state({name: index}, seed=1, rng="keyed", threads=threads)[name]
        assert same_bits(whole[name][index], found), name


def test_a_constructor_that_looks_at_random_values_is_refused() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))
            self.size = int(self.weight.sum().item() * 10)

    with pytest.raises(gp.MaterializeError, match="looks at the random values") as raised:
        gp.trace(Looks).materialize(seed=0, rng="keyed")
    assert "test_keyed.py" in str(raised.value)


def test_an_unknown_rng_is_refused() -> None:
    with pytest.raises(gp.MaterializeError, match="rng='philox' is not one of"):
        gp.trace(nn.Linear, 2, 2).materialize(seed=0, rng="philox")


def test_a_constructor_that_changes_its_ways_is_refused() -> None:
    calls: list[int] = []

    class Changes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            calls.append(1)
            self.weight = nn.Parameter(torch.randn(3) if len(calls) == 1 else torch.rand(3))

    with pytest.raises(gp.MaterializeError, match="something else than under trace"):
        gp.trace(Changes).materialize(seed=0, rng="keyed")
