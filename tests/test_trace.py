"""What the tracer writes down: tensors, ops, sites, stream positions; and what it leaves alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.tracer.graph import Op, ParamGraph

from . import zoo
from .law import assert_law, generator_states


def graph_of(build: Any, *args: Any, **kwargs: Any) -> ParamGraph:
    return gp.trace(build, *args, **kwargs).graph


def names(ops: tuple[Op, ...]) -> list[str]:
    return [op.describe().partition("(")[0] for op in ops]


# -- tensors ------------------------------------------------------------------------------------------------------------


def test_terabytes_are_traced_without_memory() -> None:
    graph = graph_of(nn.Linear, 10**6, 10**7)
    assert graph.tensor("weight").nbytes == 4 * 10**13


def test_a_traced_tensor_reports_what_eager_reports() -> None:
    seen: dict[str, Any] = {}

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 4))
            tensor = self.weight
            seen.update(device=tensor.device, is_meta=tensor.is_meta, is_cpu=tensor.is_cpu, is_cuda=tensor.is_cuda)
            seen.update(parameter=isinstance(tensor, nn.Parameter), dtype=tensor.dtype, leaf=tensor.is_leaf)
            seen.update(detached=tensor.detach().device, t=tensor.t().stride(), element=tensor.element_size())

    Asks()
    eager = dict(seen)
    gp.trace(Asks)
    assert seen == eager


def test_kinds_names_and_flags() -> None:
    graph = graph_of(zoo.Tied)
    assert graph.tensor("head.weight") is graph.tensor("embed.weight")
    assert graph.tensor("flat").view.storage == graph.tensor("part").view.storage == graph.tensor("alias").view.storage
    assert graph.tensor("part").view.offset == 4
    assert "members[0]" not in graph.by_name  # a parameter goes by its own names
    assert graph.tensor("again.weight").names[0] == "shared.weight"
    assert not graph.tensor("frozen").requires_grad
    assert {name for tie in graph.ties for name in tie.names} >= {"embed.weight", "head.weight", "again.bias"}


def test_buffers_and_plain_attributes() -> None:
    graph = graph_of(zoo.Buffers)
    assert {tensor.name: tensor.persistent for tensor in graph.buffers} == {"table": True, "row": True, "columns": False}
    attributes = {tensor.name for tensor in graph if tensor.kind == "attribute"}
    assert attributes == {"steps", "cache['k']", "cache['v'][0]", "cache['v'][1][0]", "scaled"}
    assert graph.tensor("scaled").grad_fn == "MulBackward0"


# -- ops ----------------------------------------------------------------------------------------------------------------


def test_a_dead_initialization_is_dead_and_unread() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            nn.init.normal_(self.linear.weight, std=0.02)

    graph = graph_of(Again)
    assert names(graph.ops) == ["kaiming_uniform_", "uniform_", "normal_"]
    assert [(op.live, op.unread) for op in graph.ops] == [(False, True), (True, False), (True, False)]
    assert names(graph.recipe("linear.weight")) == ["normal_"]


def test_what_is_read_before_it_is_overwritten_is_dead_but_not_unread() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.empty(4).uniform_()
            weight.sum()  # dropped
            self.weight = nn.Parameter(weight.normal_())

    uniform = graph_of(Reads).ops[0]
    assert not uniform.live and not uniform.unread


def test_a_partial_overwrite_keeps_the_rest_alive() -> None:
    graph = graph_of(nn.Embedding, 5, 3, padding_idx=1)
    assert [op.live for op in graph.ops] == [True, True]
    assert len(graph.recipe("weight")) == 2


def test_a_dropped_tensor_is_dead_and_one_held_by_a_closure_is_not() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.ones(3)
            held = torch.zeros(4)
            self.call = lambda: held

    ones, zeros = graph_of(Drops).ops
    assert (ones.live, zeros.live) == (False, True)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_trunc_normal_is_one_op(std: float) -> None:
    class Truncated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(50, 50))
            nn.init.trunc_normal_(self.weight, std=std)

    (op,) = graph_of(Truncated).ops
    assert op.describe().startswith("trunc_normal_(") and op.random and op.name == "trunc_normal_"


INIT_FUNCTIONS = {
    "uniform_": (),
    "normal_": (),
    "trunc_normal_": (),
    "constant_": (0.3,),
    "ones_": (),
    "zeros_": (),
    "eye_": (),
    "dirac_": (),
    "xavier_uniform_": (),
    "xavier_normal_": (),
    "kaiming_uniform_": (),
    "kaiming_normal_": (),
    "orthogonal_": (),
    "sparse_": (0.2,),
}


@pytest.mark.parametrize("name", INIT_FUNCTIONS)
def test_every_init_function_is_named(name: str) -> None:
    shape = (4, 4, 3) if name == "dirac_" else (4, 4)

    class Initialized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(shape))
            getattr(nn.init, name)(self.weight, *INIT_FUNCTIONS[name])

    graph = graph_of(Initialized)
    assert {op.site.init for op in graph.recipe("weight")} == {name}


def test_a_site_is_the_constructors_line() -> None:
    line = graph_of(zoo.Data).recipe("e")[-1].site.line
    assert line is not None and line.function == "__init__" and line.file.endswith("zoo.py")
    source = Path(zoo.__file__).read_text(encoding="utf-8").splitlines()[line.line - 1]
    assert "trunc_normal_(self.e)" in source


# -- outside ------------------------------------------------------------------------------------------------------------


def test_outside_tensors_are_constants_and_stay_as_they_are() -> None:
    table = torch.arange(6.0)
    seen: list[object] = []

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table
            table.mul_(2)
            table[1:3].fill_(7)
            seen.append((table.numpy().tolist(), table.sum().item(), table.tolist()))
            self.doubled = nn.Parameter(table + 1)

    version = table._version
    graph = graph_of(Uses)
    assert torch.equal(table, torch.arange(6.0)) and table._version == version
    assert seen == [([0, 7, 7, 6, 8, 10], 38, [0, 7, 7, 6, 8, 10])]
    constant = graph.storages[graph.tensor("table").view.storage].constant
    assert constant is not None and constant.size == (6,) and constant.dtype == torch.float32


def test_memory_shared_with_numpy_is_followed() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            array = np.zeros(3, dtype="float32")
            tensor = torch.from_numpy(array)
            array[1] = 7
            tensor.add_(1)
            self.seen = float(array[1])
            self.register_buffer("tensor", tensor)

    plan = gp.trace(Shares)
    assert plan.materialize_state(["tensor"], seed=0)["tensor"].tolist() == [1, 8, 1]
    assert plan.materialize(seed=0).seen == 8


# -- streams ------------------------------------------------------------------------------------------------------------


def positions(graph: ParamGraph) -> list[tuple[str, int | None]]:
    return [(op.position.origin, op.position.op) for op in graph.ops if op.position is not None]


def test_each_draw_follows_the_one_before() -> None:
    assert positions(graph_of(nn.Linear, 3, 3)) == [("ambient", None), ("after", 0)]


def test_a_fork_goes_back_to_where_it_left() -> None:
    class Forks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.randn(3)
            with torch.random.fork_rng():
                self.b = torch.randn(3)
            self.c = torch.randn(3)

    assert positions(graph_of(Forks)) == [("ambient", None), ("after", 0), ("after", 0)]


def test_seeds_and_private_generators_are_explicit() -> None:
    class Seeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.randn(3, generator=torch.Generator().manual_seed(7))
            self.b = torch.randn(3)
            torch.manual_seed(11)
            self.c = torch.randn(3)

    first, second, third = graph_of(Seeds).ops
    assert first.position is not None and (first.position.origin, first.position.seed) == ("explicit", 7)
    assert second.position is not None and second.position.origin == "ambient"
    assert third.position is not None and (third.position.origin, third.position.seed) == ("explicit", 11)


def test_tracing_leaves_every_generator_where_it_stood() -> None:
    private = torch.Generator().manual_seed(3)
    before, own = generator_states(), private.get_state()

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.randn(3, generator=private)
            self.b = torch.rand(4) * random.random() * float(np.random.rand())
            torch.manual_seed(1)

    gp.trace(Draws)
    assert generator_states() == before and torch.equal(private.get_state(), own)


# -- values -------------------------------------------------------------------------------------------------------------


def test_values_asked_for_are_the_real_ones() -> None:
    found: list[Any] = []

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            steps = torch.linspace(0, 1, 5)
            drawn = torch.randn(4)
            found.append([x.item() for x in steps])
            found.append((drawn * 2).tolist())
            found.append(bool((drawn > 0).any()))
            found.append(torch.allclose(steps, steps + 1e-9))
            found.append(repr(drawn))
            found.append(drawn.numpy().tolist())
            found.append(torch.nonzero(drawn > 0).shape)

    torch.manual_seed(4)
    plan = gp.trace(Asks)
    traced = list(found)
    found.clear()
    torch.manual_seed(4)
    Asks()
    assert traced == found
    assert plan.graph.seed_dependent and plan.decisions.bound_state is not None


def test_values_that_do_not_depend_on_the_seed_bind_nothing() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.depth = int(torch.randint(1, 9, ()))
            self.rates = torch.linspace(0, 1, 3).tolist()

    plan = gp.trace(Asks)
    assert not plan.graph.seed_dependent and plan.decisions.bound_state is None


# -- the graph ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.awkward() | zoo.transformers_types())
def test_the_graph_is_sound_in_every_form(name: str) -> None:
    graph = graph_of((zoo.awkward() | zoo.transformers_types())[name])
    graph.check()
    assert graph.digraph.number_of_nodes() > len(graph.ops)
    assert all(tensor.name in graph.to_text() for tensor in graph)
    assert len(graph.to_json()["ops"]) == len(graph.ops)


def test_the_users_own_meta_tensors_stay_meta() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(3, 3, device="meta")
            self.real = nn.Linear(3, 3)

    plan = gp.trace(Mixed)
    assert plan.graph.storages[plan.graph.tensor("own.weight").view.storage].device == "meta"
    model = plan.materialize(seed=0)
    assert model.own.weight.is_meta and not model.real.weight.is_meta


def test_draws_that_the_trace_does_not_see_are_refused() -> None:
    class Threads(nn.Module):
        def __init__(self, before: bool) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2) if before else None
            with ThreadPoolExecutor(1) as pool:
                self.layers = nn.ModuleList(pool.map(lambda _: nn.Linear(3, 3), range(2)))
            self.last = nn.Linear(2, 2) if not before else None

    for before in (True, False):
        state = torch.get_rng_state()
        with pytest.raises(gp.TraceError, match="in another thread"):
            gp.trace(Threads, before)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_forward_pass_in_the_constructor_changes_running_statistics() -> None:
    class Runs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
            width = self.net(torch.rand(2, 3, 8, 8)).shape[1]
            self.head = nn.Linear(width, 2)
            with torch.no_grad():
                self.net.eval()(torch.rand(1, 3, 8, 8))

    assert_law(Runs)
