"""Training steps on fake tensors: equal to the byte to what real ones allocate, with what is where at the peak."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import groundplan as gp
from groundplan.planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, START, STEP, Allocation, Moment, Timeline
from groundplan.runtime.scratch import TABLE, kept_number, scratch_bytes

from .measured_steps import MODELS, SETTINGS, measured_peaks, memory_events, plain_kernels, table_share

aten = torch.ops.aten
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


def run_of(plan: gp.Plan, training: gp.Training) -> Timeline:
    run = plan.memory(training, tier="T1").run
    assert run is not None
    return run


def peaks_of(plan: gp.Plan, training: gp.Training) -> Mapping[str, int]:
    return {phase: devices["cpu"] for phase, devices in run_of(plan, training).peaks.items()}


# -- equal to the byte --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_a_fake_step_takes_what_a_real_one_does(model: str, setting: str) -> None:
    case = MODELS[model]
    plan, training = gp.trace(case.build), gp.Training(inputs=case.inputs, **SETTINGS[setting])
    run = run_of(plan, training)
    assert {phase: devices["cpu"] for phase, devices in run.peaks.items()} == measured_peaks(plan, training)
    for phase in (FIRST_STEP, STEP, FIRST_OPTIMIZER, OPTIMIZER):  # the first step is one without an optimizer's state, as SGD's
        assert table_share(run, phase) <= 0.01


@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer": name} for name in ("sgd", "sgd-momentum", "adam")),
        *({"implementation": name} for name in ("foreach", "fused", "for-loop")),
        {"optimizer": "sgd-momentum", "implementation": "foreach"},
        {"clip_grad_norm": 1.0},
        {"loss": lambda output: output.logits.square().mean()},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items() if key != "loss") or "loss",
)
def test_so_it_does_with_every_option(options: dict[str, Any]) -> None:
    case = MODELS["Llama"]
    plan, training = gp.trace(case.build), gp.Training(**{"inputs": case.inputs, **options})
    assert peaks_of(plan, training) == measured_peaks(plan, training)


def test_a_cast_plan() -> None:
    plan = gp.trace(MODELS["GPT-2"].build).cast(torch.bfloat16)
    training = gp.Training(inputs=MODELS["GPT-2"].inputs)
    assert peaks_of(plan, training) == measured_peaks(plan, training)


class Tangled(nn.Module):
    """A tie, a buffer that views another, and a plain tensor attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Buffer(torch.ones(300))
        self.part = nn.Buffer(self.scale[:8])
        self.table = torch.arange(8)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.embed(tokens) * self.part + self.table)


def test_ties_views_and_plain_attributes() -> None:
    plan, training = gp.trace(Tangled), gp.Training("sgd", inputs=lambda: (torch.ones(2, 3, dtype=torch.int64),))
    assert peaks_of(plan, training) == measured_peaks(plan, training)
    assert run_of(plan, training).peaks[START]["cpu"] == 50 * 8 * 4 + 300 * 4 + 8 * 8 + 6 * 8


# -- the table of corrections -------------------------------------------------------------------------------------------


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def rows(*shape: int) -> torch.Tensor:
    """A tensor that is not contiguous: its last two dimensions are swapped."""
    return ones(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


ATTENTION = (ones(2, 4, 17, 8),) * 3
HALF_ATTENTION = (ones(2, 4, 200, 8, dtype=BF16),) * 3
CONVOLVED = ([1, 1], [1, 1], [1, 1], False, [0, 0])
CONTIGUOUS = {"memory_format": torch.contiguous_format}
MASK = [True, True, True]


WHOLE = [(5, False, False), (40, False, False), (40, True, False), (40, False, True), (5, True, True)]
"""The tokens, and whether there is a mask and weights are asked for."""


def whole_attention(length: int, masked: bool, weights: bool) -> tuple[Any, ...]:
    """The arguments of attention with all of its projections, of 4 heads."""
    value, mask = ones(2, length, 32), torch.zeros(length, length, dtype=torch.bool)
    matrices = ones(96, 32), ones(96), ones(32, 32), ones(32)
    return (*(value,) * 3, 32, 4, *matrices, mask if masked else None, weights, True, 0 if masked else None)


def attended(*operands: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of attention's backward."""
    out, sums = aten._scaled_dot_product_flash_attention_for_cpu(*operands)
    return ones(*out.shape, dtype=out.dtype), *operands, out, sums, 0.0, False


def normalized(value: torch.Tensor) -> tuple[Any, ...]:
    """The arguments of layer norm's backward."""
    _, mean, deviation = aten.native_layer_norm(value, [value.shape[-1]], None, None, 1e-5)
    width = ones(value.shape[-1])
    return torch.ones_like(value), value, [value.shape[-1]], mean, deviation, width, width, MASK


CALLS: list[tuple[Any, ...]] = [
    (aten.add.Tensor, lambda: (ones(5, 7), ones(5, 7, dtype=BF16))),
    (aten.sub.Tensor, lambda: (ones(5, 7, dtype=BF16), ones(7))),
    (aten.mul.Tensor, lambda: (ones(5, 7), 2.0)),
    (aten.mul.Tensor, lambda: (ones(5, 7, dtype=BF16), ones(5, 7))),
    (aten.div.Tensor, lambda: (ones(5, 7), 3)),
    (aten.div.Scalar, lambda: (ones(5, 7), 3)),
    (aten.add.Tensor, lambda: (torch.arange(9), 1)),
    (aten._foreach_mul_.Scalar, lambda: ([ones(5), ones(7)], 2.0)),
    (aten.mean.dim, lambda: (ones(5, 7), [1])),
    (aten.mean.dim, lambda: (ones(5, 7, dtype=BF16), [1])),
    (aten.mean.default, lambda: (ones(5, 7),)),
    (aten.mm.default, lambda: (ones(1, 1).expand(5, 7), ones(7, 9))),
    (aten.mm.default, lambda: (rows(5, 7), rows(7, 9))),
    (aten.addmm.default, lambda: (ones(9), ones(5, 7), ones(1, 1).expand(7, 9))),
    (aten.add_.Tensor, lambda: (ones(5, 7), ones(5, 7, dtype=BF16))),
    (aten.add_.Tensor, lambda: (ones(5, 7, dtype=BF16), ones(5, 7))),
    (aten.add_.Tensor, lambda: (ones(5, 7, dtype=BF16), ones(7))),
    (aten.addmm.default, lambda: (rows(64, 80), ones(64, 7), ones(7, 80))),
    (aten.clone.default, lambda: (rows(64, 80),)),
    (aten.clone.default, lambda: (rows(64, 80),), CONTIGUOUS),
    (aten.clone.default, lambda: (rows(8, 80),), CONTIGUOUS),
    (aten.clone.default, lambda: (rows(160, 180).to(torch.uint8),), CONTIGUOUS),
    (aten.copy_.default, lambda: (ones(64, 80, dtype=BF16), rows(64, 80).to(BF16))),
    (aten.cumsum.default, lambda: (ones(5, 7, dtype=torch.bool), 1)),
    (aten.roll.default, lambda: (ones(2, 8, 8, 3), [2, 2], [1, 2])),
    (aten.roll.default, lambda: (ones(2, 8, 8, 3), [2], [1])),
    (aten.embedding.default, lambda: (ones(9, 4), torch.ones(1, 5, dtype=torch.int64).expand(3, 5))),
    (aten.embedding_dense_backward.default, lambda: (rows(3, 5, 4), torch.ones(3, 5, dtype=torch.int64), 9, -1, False)),
    *((aten._native_multi_head_attention.default, lambda options=options: whole_attention(*options)) for options in WHOLE),
    (aten._safe_softmax.default, lambda: (ones(2, 4, 5, 7), -1)),
    (aten.native_layer_norm.default, lambda: (rows(2, 5, 8), [8], ones(8), ones(8), 1e-5)),
    (aten.native_layer_norm_backward.default, lambda: normalized(ones(2, 5, 8))),
    (aten.native_batch_norm.default, lambda: (ones(2, 8, 4, 4), *(ones(8),) * 4, True, 0.1, 1e-5)),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, lambda: ATTENTION),
    (aten._scaled_dot_product_flash_attention_for_cpu.default, lambda: HALF_ATTENTION),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, lambda: attended(*ATTENTION)),
    (aten._scaled_dot_product_flash_attention_for_cpu_backward.default, lambda: attended(*HALF_ATTENTION)),
    (aten.convolution.default, lambda: (ones(2, 4, 8, 8), ones(6, 4, 3, 3), ones(6), *CONVOLVED, 1)),
    (aten.convolution.default, lambda: (ones(2, 4, 8, 8), ones(6, 4, 1, 1), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)),
    (aten.convolution.default, lambda: (ones(2, 4, 8, 8), ones(8, 2, 3, 3), ones(8), *CONVOLVED, 2)),
    (aten.convolution.default, lambda: (channels_last(2, 4, 8, 8), ones(6, 4, 3, 3), ones(6), *CONVOLVED, 1)),
    (aten.convolution.default, lambda: (rows(2, 4, 9), ones(6, 4, 3), None, [2], [0], [1], False, [0], 1)),
    (
        aten.convolution_backward.default,
        lambda: (ones(2, 6, 8, 8), ones(2, 4, 8, 8), ones(6, 4, 3, 3), [6], *CONVOLVED, 1, MASK),
    ),
    (
        aten.convolution_backward.default,
        lambda: (channels_last(2, 6, 8, 8), ones(2, 4, 8, 8), ones(6, 4, 3, 3), [6], *CONVOLVED, 1, MASK),
    ),
    (
        aten.convolution_backward.default,
        lambda: (ones(2, 8, 8, 8), ones(2, 4, 8, 8), ones(8, 2, 3, 3), [8], *CONVOLVED, 2, MASK),
    ),
]


def channels_last(*shape: int) -> torch.Tensor:
    return ones(*shape).contiguous(memory_format=torch.channels_last)


def taken(func: Any, args: tuple[Any, ...], **options: Any) -> tuple[int, int, Any]:
    """The most bytes that a call takes, those of them that stay, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        out = func(*args, **options)
    now = most = 0
    for nbytes in memory_events(profiler):
        now += nbytes
        most = max(most, now)
    return most, now, out


@pytest.mark.parametrize("number", range(len(CALLS)), ids=lambda number: f"{CALLS[number][0]}-{number}")
def test_an_entry_of_the_table_is_what_the_kernel_takes(number: int) -> None:
    func, make, *options = CALLS[number]
    args = make()
    most, stays, out = taken(func, args, **dict(*options))
    assert scratch_bytes(func, args, out) == most - stays


def test_every_entry_is_tried() -> None:
    assert set(TABLE) <= {func for func, *_ in CALLS}


def test_a_number_is_kept_for_the_backward() -> None:
    weight = ones(3).requires_grad_()
    assert kept_number(aten.mul.Tensor, (weight, 2.0)) == 8
    assert kept_number(aten.mul.Tensor, (ones(3), 2.0)) == kept_number(aten.add.Tensor, (weight, 2.0)) == 0


# -- what is where ------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        return self.second(torch.tanh(self.first(value)))


def test_what_is_there_at_the_peak() -> None:
    run = run_of(gp.trace(Two), gp.Training(inputs=(ones(16, 4),)))
    kinds = run.by_kind(STEP, "cpu")
    assert sum(kinds.values()) == run.peaks[STEP]["cpu"]
    weights = (4 * 8 + 8 * 2) * 4
    assert kinds["parameter"] == weights and kinds["optimizer state"] == 2 * weights + 2 * 4 and kinds["input"] == 16 * 4 * 4
    found = {each.describe(): each for each in run.at_peak(STEP, "cpu")}
    assert {"first.weight", "second.weight", "optimizer state of first.weight", "0"} <= set(found)
    hidden = next(each for each in found.values() if each.op == "tanh")
    assert hidden.kind == "activation" and hidden.nbytes == 16 * 8 * 4
    assert hidden.source is not None and hidden.source.file == "test_fake_step.py" and hidden.source.function == "forward"


def test_gradients_have_the_names_of_their_parameters() -> None:
    run = run_of(gp.trace(Two), gp.Training(inputs=(ones(16, 4),)))
    gradients = {each.name: each for each in run.allocations if each.kind == "gradient"}
    assert {name: each.nbytes for name, each in gradients.items()} == {"first.weight": 128, "second.weight": 64}
    assert gradients["first.weight"].module == "first"


def test_a_run_ends_as_it_began() -> None:
    run = run_of(gp.trace(Two), gp.Training("sgd", inputs=(ones(16, 4),)))
    alive: dict[int, None] = {}
    for moment in run.moments:
        alive.pop(moment.allocation) if not moment.born else alive.setdefault(moment.allocation)
    assert {run.allocations[index].kind for index in alive} <= {"parameter", "input", "buffer"}


def test_a_peak_counts_what_was_there_before() -> None:
    big, small = Allocation("parameter", 100, "cpu", "w"), Allocation("temporary", 1, "cpu", op="add")
    run = Timeline((big, small), (Moment(START, 0, True), Moment(STEP, 0, False), Moment(STEP, 1, True)))
    assert run.peaks == {START: {"cpu": 100}, STEP: {"cpu": 100}}
    assert run.at_peak(STEP, "cpu") == [big]


def test_the_closed_form_stands_beside() -> None:
    plan, training = gp.trace(Two), gp.Training(inputs=(ones(16, 4),))
    memory = plan.memory(training, tier="T1")
    assert memory.tier == "T1" and memory.closed_form == plan.memory(training) and plan.memory(training).tier == "T0"
    assert str(memory).splitlines()[0].split("  ")[-1].strip() == "cpu, T0"
    assert memory.phases["construct"] == plan.memory().phases["construct"]
    assert memory.phases["step"] == plan.memory(training).phases["step"]
    found = memory.to_json()
    assert json.loads(json.dumps(found)) == found and found["tier"] == "T1"
    assert found["closed_form"] == plan.memory(training).to_json()
    assert sum(each["bytes"] for each in found["at_peak"]) == memory.peak


class Drawing(nn.Module):
    """A forward that draws from Python's and numpy's generators, as layer drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: torch.Tensor) -> Any:
        return self.linear(value) * (random.random() + np.random.rand())


@pytest.mark.parametrize(
    ("workload", "tier"), [(gp.Training(), "T0"), (gp.Training(), "T1"), (gp.Inference(), "T0"), (gp.Inference(), "T1")]
)
def test_pythons_and_numpys_generators_do_not_move(workload: Any, tier: Any) -> None:
    plan = gp.trace(Drawing)
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    plan.memory(workload, tier=tier)
    assert (random.random(), np.random.rand()) == expected


def test_nothing_is_allocated_and_no_generator_moves() -> None:
    plan, state = gp.trace(nn.Linear, 200_000, 200_000), torch.get_rng_state()
    memory = plan.memory(gp.Training(batch_size=2), tier="T1")  # 160 GB of weights
    assert memory.phases["optimizer"] > 4 * 160e9
    assert torch.equal(torch.get_rng_state(), state)
    dropped = gp.trace(lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    dropped.memory(gp.Training(), tier="T1")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plan_for_cuda_takes_its_optimizer_and_counts_nothing_of_the_cpu() -> None:
    plan, training = gp.trace(Two), gp.Training(inputs=(ones(16, 4),))
    memory = plan.to("cuda").memory(training, tier="T1")
    assert memory.by_device["optimizer"]["cpu"] == 2 * 4
    assert memory.by_device["first_step"].get("cpu", 0) == 0 and memory.binding.device == "cuda:0"
    assert memory.run is not None
    scratch = {each.op for each in memory.run.allocations if "scratch" in each.op or "number" in each.op}
    assert scratch == {"mm's scratch"}  # the expanded gradient of a sum, which cuBLAS takes copied as well
    assert any(each.op == "_foreach_sqrt" for each in memory.run.allocations)


# -- inputs -------------------------------------------------------------------------------------------------------------


def test_inputs_in_every_form_are_the_same() -> None:
    given: list[Any] = [(ones(16, 4),), [ones(16, 4)], ones(16, 4), {"value": ones(16, 4)}, lambda: (ones(16, 4),)]
    given.append((torch.empty(16, 4, device="meta"),))
    plan = gp.trace(Two)
    assert len({tuple(peaks_of(plan, gp.Training(inputs=each)).items()) for each in given}) == 1
    assert peaks_of(plan, gp.Training(batch_size=16)) == peaks_of(plan, gp.Training(inputs=given[0]))


@pytest.mark.parametrize("model", ["Llama", "BERT", "T5", "ViT", "Whisper", "Wav2Vec2", "LSTM"])
def test_inputs_are_made_from_the_signature(model: str) -> None:
    plan, length = gp.trace(MODELS[model].build), 640 if model == "Wav2Vec2" else 16
    made = peaks_of(plan, gp.Training(batch_size=2, seq_len=length))
    assert made == peaks_of(plan, gp.Training(inputs=MODELS[model].inputs))


# -- refused ------------------------------------------------------------------------------------------------------------


class Looking(nn.Module):
    """A forward that does what `look` says with what it computed."""

    def __init__(self, look: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.look = nn.Linear(4, 4), look

    def forward(self, value: torch.Tensor) -> Any:
        found = self.linear(value)
        self.look(found.detach())
        return found


@pytest.mark.parametrize(
    ("look", "op"),
    [
        (lambda value: bool(value.sum() > 0), "_local_scalar_dense"),
        (lambda value: value.sum().item(), "_local_scalar_dense"),
        (lambda value: value[value > 0], "nonzero"),
        (lambda value: value.numpy(), "Tensor.numpy"),
    ],
    ids=["bool", "item", "mask", "numpy"],
)
def test_a_step_that_looks_at_values_is_refused(look: Callable[[torch.Tensor], Any], op: str) -> None:
    plan = gp.trace(Looking, look)
    with pytest.raises(gp.MemoryRunError, match=rf"looks at values \(.*{op}.*T0"):
        plan.memory(gp.Training(), tier="T1")


def fails(_: torch.Tensor) -> None:
    raise RuntimeError("my own")


def test_the_modules_own_error_comes_out() -> None:
    with pytest.raises(RuntimeError, match="my own"):
        gp.trace(Looking, fails).memory(gp.Training(), tier="T1")


@pytest.mark.parametrize(
    ("plan", "training", "message"),
    [
        (lambda: gp.trace(Two), None, "runs a step: say plan.memory"),
        (lambda: gp.trace(nn.Bilinear, 2, 3, 4), gp.Training(), "no inputs can be made for Bilinear"),
        (lambda: gp.trace(MODELS["Llama"].build), gp.Training(), "seq_len"),
        (lambda: gp.trace(Two), gp.Training(inputs=3), "inputs is a int"),
        (lambda: gp.trace(Two), gp.Training(checkpointing="full"), "layers that repeat"),
        (lambda: gp.trace(lambda: Two().requires_grad_(False)), gp.Training(), "nothing to train"),
        (lambda: gp.trace(lambda: (Two(), Two())), gp.Training(), "one nn.Module"),
        (lambda: gp.trace(Two).place({"*": "cpu"}), gp.Training(), "the plan places tensors"),
    ],
)
def test_what_cannot_be_run_is_refused(plan: Callable[[], gp.Plan], training: gp.Training | None, message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        plan().memory(training, tier="T1")


def test_an_unknown_tier_is_refused() -> None:
    unknown: Any = "T9"
    with pytest.raises(gp.GroundplanError, match="'T9' is not known"):
        gp.trace(Two).memory(gp.Training(), tier=unknown)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"implementation": "foreeach"}, "did you mean foreach"),
        ({"checkpointing": "some"}, "known: none, selective, full"),
        ({"autocast": torch.float32}, "autocast is torch.float32"),
        ({"loss": 3}, "loss is 3"),
        ({"clip_grad_norm": 0}, "clip_grad_norm is 0"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        gp.Training(**fields)
