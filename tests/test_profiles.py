"""Which questions share a profile, and which layers stand for others: where an answer would be another's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import groundplan as gp
from groundplan.planner.profile import Profile
from groundplan.runtime import profiling
from groundplan.runtime.profiles import profile_of
from groundplan.runtime.skipped_layers import runs_of


def profile_for(plan: gp.Plan, training: gp.Training) -> Profile:
    found = profile_of(plan._bound, plan.decisions, training)
    assert isinstance(found, Profile), found
    return found


def made_by(profile: Profile) -> list[tuple[str, int]]:
    return [(each.op, each.nbytes) for each in profile.allocations]


# -- what is around the question ----------------------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, value: torch.Tensor) -> Any:
        heads = self.linear(value).view(2, 32, 4, 16).transpose(1, 2)
        return F.softmax(F.scaled_dot_product_attention(heads, heads, heads), -1) * torch.ones(1)


TRAINING = gp.Training("sgd", inputs=(torch.ones(2, 32, 64),))


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_profile_is_of_torchs_settings(setting: str, device: str) -> None:
    plan = gp.trace(Attending).to(device)
    before = profile_for(plan, TRAINING)
    with SETTINGS[setting]():
        inside, alone = profile_for(plan, TRAINING), profile_for(gp.trace(Attending).to(device), TRAINING)
    assert made_by(inside) == made_by(alone) != made_by(before)
    assert profile_for(plan, TRAINING) is before


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_step_has_gradients_where_there_are_none_around_the_question(off: Callable[[], AbstractContextManager[Any]]) -> None:
    plans = [gp.trace(Attending), gp.trace(Attending).shard({"dp": 2})]
    usual = [[each.memory(TRAINING, tier=tier).phases for tier in ("T0", "T1")] for each in plans]
    plans = [gp.trace(Attending), gp.trace(Attending).shard({"dp": 2})]
    with off():
        assert [[each.memory(TRAINING, tier=tier).phases for tier in ("T0", "T1")] for each in plans] == usual
        assert not torch.is_grad_enabled()


# -- inputs -------------------------------------------------------------------------------------------------------------


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> Any:
        return self.linear(one) + other


def test_one_tensor_given_twice_is_not_two() -> None:
    plan, one = gp.trace(Adding), torch.ones(2, 8)
    twice, two = (profile_for(plan, gp.Training(inputs=(one, other))) for other in (one, one.clone()))
    assert [len(each.inputs) for each in (twice, two)] == [1, 2]
    assert profile_for(plan, gp.Training(inputs=(one.clone(), torch.zeros(2, 8)))) is two


# -- layers that stand for others ---------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A layer that makes something larger in between, by a setting that is no number, or by a function."""

    def __init__(self, times: int, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.sizes, self.function = (times, 1), function

    def forward(self, value: torch.Tensor) -> Any:
        return self.function(self.linear(value).repeat(self.sizes))[: len(value)] * 1.0


class Stack(nn.Module):
    def __init__(self, layers: list[tuple[int, Callable[[torch.Tensor], torch.Tensor]]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(*each) for each in layers)

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = layer(value)
        return value


@pytest.mark.parametrize("odd", [(8, torch.exp), (1, F.gelu)], ids=["size", "function"])
def test_a_layer_with_another_setting_is_not_like_the_others(odd: Any) -> None:
    layers: list[Any] = [(1, torch.exp)] * 9
    assert len(runs_of(Stack(layers))) == 1
    layers[5] = odd
    assert not any("layers.5" in run.layers for run in runs_of(Stack(layers)))
    plan, training = gp.trace(Stack, layers), gp.Training("sgd", batch_size=16)
    assert plan.memory(training).phases["step"] == plan.memory(training, tier="T1").phases["step"]


class Asking(Stack):
    """Raises an error of its own where a layer was not called."""

    def forward(self, value: torch.Tensor) -> Any:
        called: list[Any] = []
        linears = [each for each in self.modules() if isinstance(each, nn.Linear)]
        handles = [each.register_forward_hook(lambda *_: called.append(None)) for each in linears]
        out = super().forward(value)
        for handle in handles:
            handle.remove()
        if len(called) != len(self.layers):
            raise LookupError("a layer was not called")
        return out


def test_what_the_modules_code_raises_for_skipped_layers_has_them_run() -> None:
    plan, training = gp.trace(Asking, [(1, torch.exp)] * 9), gp.Training("sgd", batch_size=16)
    assert plan.memory(training).phases["step"] == plan.memory(training, tier="T1").phases["step"]


class Penalized(Stack):
    """Looks at the parameters of all layers, besides running them."""

    def forward(self, value: torch.Tensor) -> Any:
        penalty = sum(each.pow(2).sum() for each in self.parameters())
        return super().forward(value) * penalty


def test_layers_whose_parameters_are_looked_at_elsewhere_are_not_skipped() -> None:
    plan, training = gp.trace(Penalized, [(1, torch.exp)] * 9), gp.Training("sgd", batch_size=16)
    assert plan.memory(training).phases["step"] == plan.memory(training, tier="T1").phases["step"]
    assert not profile_for(plan, training).repeated


def around(layer: nn.Module, times: int) -> None:
    """Give a layer a forward of its own, as tensor parallelism does, which knows the layer and a number."""
    own = layer.forward

    def forward(value: torch.Tensor) -> Any:
        return own(value.repeat(times, 1))[: len(value)]

    layer.forward = forward


@pytest.mark.parametrize("number", [3, 2])
def test_forwards_of_their_own_are_alike_if_what_they_know_is(number: int) -> None:
    stack = Stack([(1, torch.exp)] * 9)
    for layer in stack.layers:
        around(layer, 2)
    around(stack.layers[5], 1)
    stack.layers[5].forward = Layer.forward.__get__(stack.layers[5])
    around(stack.layers[5], number)
    assert any("layers.5" in run.layers for run in runs_of(stack)) == (number == 2)


def test_layers_divided_by_tensor_parallelism_are_alike() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=64, num_hidden_layers=9
    )
    plan = gp.trace(transformers.LlamaForCausalLM, config).shard({"tp": 2}, tensor="auto")
    (run,) = profile_for(plan, gp.Training("sgd", batch_size=1, seq_len=8)).repeated
    assert len(run.layers) == 9


def test_an_error_of_the_profiles_own_is_not_taken_for_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> Any:
        raise KeyError("a bug")

    monkeypatch.setattr(profiling, "cut", cut)
    made: list[nn.Module] = []

    def build() -> nn.Module:
        with torch.device("meta"):
            made.append(Stack([(1, torch.exp)] * 9))
        return made[-1]

    with pytest.raises(KeyError, match="a bug"):
        profiling.profile(build, lambda _: (torch.ones(16, 8),), gp.Training("sgd"))
    assert len(made) == 1
