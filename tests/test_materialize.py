"""The second run: shortcuts taken and given up, waiting storages, random states, nothing left behind on failure."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.runtime import guided, waiting

from . import zoo


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts what the guided run does: fills left out, storages that waited, runs given up."""
    counts = {"left out": 0, "waited": 0, "diverged": 0}
    leave_out, take, diverged = guided.Guided._leave_out, waiting.WaitingRoom.take, guided.Diverged.__init__

    def counting_leave_out(self: Any, *args: Any) -> bool:
        done = leave_out(self, *args)
        counts["left out"] += done
        return done

    def counting_take(self: Any, *args: Any) -> bool:
        done = take(self, *args)
        counts["waited"] += done
        return done

    def counting_diverged(self: Any, *args: Any) -> None:
        counts["diverged"] += 1
        diverged(self, *args)

    monkeypatch.setattr(guided.Guided, "_leave_out", counting_leave_out)
    monkeypatch.setattr(waiting.WaitingRoom, "take", counting_take)
    monkeypatch.setattr(guided.Diverged, "__init__", counting_diverged)
    yield counts


def eager(build: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    return build()


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- shortcuts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.builtins() | zoo.awkward() | zoo.transformers_types())
def test_the_second_run_follows_the_tape(name: str, runs: dict[str, int]) -> None:
    gp.trace((zoo.builtins() | zoo.awkward() | zoo.transformers_types())[name]).materialize(seed=0)
    assert runs["diverged"] == 0


def test_dead_fills_are_left_out(runs: dict[str, int]) -> None:
    plan = gp.trace(zoo.transformers_types()["Llama"])
    plan.materialize(seed=0)
    assert runs["left out"] == sum(op.unread and bool(op.writes) for op in plan.graph.ops) > 10


def test_a_constructor_that_changes_is_run_without_shortcuts(runs: dict[str, int]) -> None:
    calls: list[None] = []

    def changing() -> nn.Module:
        calls.append(None)
        return nn.Sequential(*[nn.Linear(3, 3) for _ in calls])

    plan = gp.trace(changing)
    torch.manual_seed(0)
    model = plan.materialize(seed=7)
    state = torch.get_rng_state()
    assert runs["diverged"] == 1
    expected = eager(lambda: nn.Sequential(*[nn.Linear(3, 3) for _ in model]), 7)
    assert equal_states(model, expected) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "second",
    [
        lambda: nn.init.uniform_(torch.empty(4, 4), -1, 2),
        lambda: nn.init.normal_(torch.empty(4, 4)),
        lambda: nn.init.uniform_(torch.empty(4, 5), -1, 1),
        lambda: nn.init.trunc_normal_(torch.empty(4, 4)),
        lambda: torch.rand(4, 4) * 2,
        lambda: torch.ones(4, 4),
    ],
)
def test_every_kind_of_change_is_noticed(second: Any, runs: dict[str, int]) -> None:
    calls: list[None] = []

    def changing() -> nn.Module:
        calls.append(None)
        module = nn.Module()
        value = nn.init.uniform_(torch.empty(4, 4), -1, 1) if len(calls) == 1 else second()
        module.weight = nn.Parameter(value)
        return module

    model = gp.trace(changing).materialize(seed=3)
    assert runs["diverged"] == 1
    torch.manual_seed(3)
    assert torch.equal(model.weight, second())


# -- waiting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.builtins() | zoo.awkward() | zoo.transformers_types())
def test_waiting_changes_no_value(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "WAITING_BYTES", 1)
    build = (zoo.builtins() | zoo.awkward() | zoo.transformers_types())[name]
    _seed_host()
    model = gp.trace(build).cast(torch.bfloat16).materialize(seed=5)
    state = torch.get_rng_state()
    _seed_host()
    expected = eager(build, 5)
    for one, other in zip(_members(model), _members(expected), strict=True):
        other.to(torch.bfloat16)
        for (path, left), right in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            if not nn.parameter.is_lazy(left):
                assert torch.equal(_bits(left), _bits(right)), path
    assert torch.equal(torch.get_rng_state(), state)


def _seed_host() -> None:
    random.seed(1)
    np.random.seed(1)


def _members(built: Any) -> list[nn.Module]:
    return [built] if isinstance(built, nn.Module) else list(built.values() if isinstance(built, dict) else built)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def test_large_fills_wait_for_a_cast_and_only_then(runs: dict[str, int]) -> None:
    plan = gp.trace(nn.Embedding, 2000, 200, padding_idx=3)
    plan.materialize(seed=0)
    assert runs["waited"] == 0
    model = plan.cast(torch.float16).materialize(seed=0)
    assert runs["waited"] == 2  # the table, and its zeroed row
    assert torch.equal(model.weight, eager(lambda: nn.Embedding(2000, 200, padding_idx=3), 0).half().weight)


def test_a_storage_that_is_read_early_is_filled_early(runs: dict[str, int]) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(700, 700).normal_())
            self.total = self.weight.sum().item()
            self.copy = nn.Parameter(self.weight.detach().clone())
            with torch.no_grad():
                self.weight[:10].uniform_()

    model = gp.trace(Reads).cast(torch.bfloat16).materialize(seed=2)
    expected = eager(Reads, 2).to(torch.bfloat16)
    assert runs["waited"] and equal_states(model, expected) and model.total == expected.total


def test_memory_that_python_looks_at_does_not_wait() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(700, 700).normal_())
            self.first = self.weight.detach().numpy()[0, 0]
            self.some = self.weight[0].tolist()

    model = gp.trace(Looks).cast(torch.bfloat16).materialize(seed=2)
    expected = eager(Looks, 2)
    assert model.first == expected.first and model.some == expected.some


# -- steps --------------------------------------------------------------------------------------------------------------


def test_a_cast_by_names_converts_what_it_names() -> None:
    plan = gp.trace(zoo.transformers_types()["Llama"]).cast({"*norm*": torch.float32, "*": torch.bfloat16})
    model = plan.materialize(seed=1)
    expected = eager(zoo.transformers_types()["Llama"], 1)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(tensor, expected.state_dict()[name].to(tensor.dtype))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_overridden_apply_is_called() -> None:
    class Keeps(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            self.bias.data = self.bias.data.double()
            return self

    plan = gp.trace(Keeps, 3, 3).cast(torch.bfloat16)
    model = plan.materialize(seed=1)
    assert (model.weight.dtype, model.bias.dtype) == (torch.bfloat16, torch.float64)
    state = plan.materialize_state(["weight", "bias"], seed=1)
    assert torch.equal(state["weight"], model.weight) and torch.equal(state["bias"], model.bias)


# -- random states ------------------------------------------------------------------------------------------------------


def test_without_a_seed_the_global_generator_is_drawn_from() -> None:
    plan = gp.trace(nn.Linear, 5, 5)
    torch.manual_seed(8)
    torch.rand(3)
    models = [plan.materialize() for _ in range(2)]
    after = torch.rand(2)
    torch.manual_seed(8)
    torch.rand(3)
    for model in models:
        assert equal_states(model, nn.Linear(5, 5))
    assert torch.equal(after, torch.rand(2))


def test_host_randomness_is_that_of_the_trace() -> None:
    def build() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("noise", torch.tensor([random.random(), float(np.random.rand())]))
        return module

    random.seed(4)
    np.random.seed(4)
    plan = gp.trace(build)
    first = plan.materialize(seed=0)
    moved = random.getstate()
    random.seed(4)
    np.random.seed(4)
    assert equal_states(first, eager(build, 0)) and random.getstate() == moved
    random.seed(9)
    before = random.getstate()
    assert equal_states(plan.materialize(seed=0), first) and random.getstate() == before


class _DecidesAndAsksNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.host = nn.Parameter(torch.tensor(np.random.rand(2)).float())
        if torch.rand(1).item() > 0.5:
            self.wide = nn.Parameter(torch.randn(3))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["plain", "cast"])
def test_host_randomness_is_that_of_the_trace_where_the_seed_calls_for_another_one(dtype: torch.dtype | None) -> None:
    np.random.seed(0)
    plan = gp.trace(_DecidesAndAsksNumpy)
    plan = plan.cast(dtype) if dtype else plan
    np.random.rand()
    before: Any = np.random.get_state()
    for seed in range(4):
        model = plan.materialize(seed=seed)
        state = plan.materialize_state(list(model.state_dict()), seed=seed)
        after: Any = np.random.get_state()
        assert np.array_equal(before[1], after[1]) and before[2] == after[2]
        np.random.seed(0)
        expected = eager(_DecidesAndAsksNumpy, seed).to(dtype or torch.float32)
        np.random.set_state(before)
        assert equal_states(model, expected) and all(
            torch.equal(state[name], value) for name, value in expected.named_parameters()
        )


def test_the_line_that_depends_on_the_seed_is_the_constructor_s_own() -> None:
    (frame,) = gp.trace(_DecidesAndAsksNumpy).graph.seed_dependent
    assert frame.file.endswith("test_materialize.py") and frame.function == "__init__"


def test_control_flow_on_random_values_follows_the_seed() -> None:
    plan = gp.trace(zoo.Decides)
    depths = set()
    for seed in range(8):
        model = plan.materialize(seed=seed)
        depths.add(len(model.layers))
        assert equal_states(model, eager(zoo.Decides, seed))
        assert torch.equal(plan.materialize_state(["noise"], seed=seed)["noise"], model.noise)
    assert len(depths) > 1


# -- failure and progress -----------------------------------------------------------------------------------------------


def test_a_failing_second_run_leaves_the_generators_alone() -> None:
    calls: list[None] = []

    def fails_later() -> nn.Module:
        calls.append(None)
        module = nn.Linear(4, 4)
        random.random()
        if len(calls) > 1:
            raise OSError("no such weather")
        return module

    plan = gp.trace(fails_later)
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(OSError, match="no such weather"):
        plan.materialize(seed=3)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert torch._C._len_torch_dispatch_stack() == 0


def test_progress_counts_bytes_up_to_the_total() -> None:
    seen: list[tuple[int, int]] = []
    gp.trace(nn.Transformer, 64, 4, 1, 1, 64).materialize(seed=0, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len({total for _, total in seen}) == 1 and seen[-1][0] == seen[-1][1] > 0


def test_what_comes_from_outside_stays_the_same_object() -> None:
    inner, table = nn.Linear(3, 3), torch.arange(4.0)
    model = gp.trace(zoo.FromOutside, inner, table).materialize(seed=0)
    assert model.inner is inner and model.table is table


@pytest.mark.parametrize("setting", ["dtype", "no_grad", "inference"])
def test_the_settings_of_the_trace_hold_for_the_build(setting: str) -> None:
    def traced() -> gp.Plan:
        if setting == "no_grad":
            with torch.no_grad():
                return gp.trace(zoo.Data)
        if setting == "inference":
            with torch.inference_mode():
                return gp.trace(zoo.Data)
        torch.set_default_dtype(torch.float64)
        try:
            return gp.trace(zoo.Data)
        finally:
            torch.set_default_dtype(torch.float32)

    model = traced().materialize(seed=0)
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert model.e.dtype == (torch.float64 if setting == "dtype" else torch.float32)
    assert model.e.is_inference() == (setting == "inference")


def test_parts_follow_the_default_dtype_of_each_call() -> None:
    class Switches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.randn(20) + torch.arange(20) / 3
            torch.set_default_dtype(torch.float64)
            self.b = torch.randn(20) + torch.arange(20) / 3
            torch.set_default_dtype(torch.float32)
            self.c = torch.randn(20)

    torch.set_default_dtype(torch.bfloat16)
    try:
        plan = gp.trace(Switches)
        torch.manual_seed(0)
        expected = Switches()
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in plan.materialize_state(["a", "b", "c"], seed=0).items():
        assert value.dtype == getattr(expected, name).dtype and torch.equal(value, getattr(expected, name))


def test_threads_take_turns() -> None:
    def work(_: int) -> bool:
        plan = gp.trace(zoo.Data)
        return bool((plan.materialize(seed=1).e == plan.materialize_state(["e"], seed=1)["e"]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert nn.init._no_grad_trunc_normal_.__module__ == "torch.nn.init"


@pytest.mark.parametrize("caught", [Exception, BaseException])
def test_a_constructor_that_catches_everything_does_not_hide_the_difference(caught: type[BaseException]) -> None:
    calls: list[None] = []

    def changing() -> nn.Module:
        calls.append(None)
        module = nn.Linear(4, 4)
        try:
            if len(calls) > 1:
                nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)
        except caught:
            pass
        return module

    model = gp.trace(changing).materialize(seed=3)
    torch.manual_seed(3)
    assert equal_states(model, changing())
