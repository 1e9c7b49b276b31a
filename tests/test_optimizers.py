"""What optimizers take in closed form: equal to the byte to the real ones, and to a run on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.adam import compiled_bytes, is_quantized
from groundplan.planner.alike import Alike, alike
from groundplan.planner.allocations import FIRST_OPTIMIZER, OPTIMIZER, Timeline
from groundplan.planner.optimizer import Implementation, Trained
from groundplan.planner.optimizers import OPTIMIZERS, clipping_pieces, state_pieces, working_pieces
from groundplan.planner.training_memory import hidden_names
from groundplan.runtime.optimizers import hidden_parameters, optimizers_of

from .measured_steps import MODELS, Case, measured_peaks, plain_kernels

F32, BF16 = torch.float32, torch.bfloat16
EVERY: list[tuple[str, Implementation]] = [(name, each) for name, known in OPTIMIZERS.items() for each in known.implementations]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


# -- the state, of random parameters ------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Parameters of given shapes, in layers of their own."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Bag.Layer(shape, dtype) for shape in shapes)

    class Layer(nn.Module):
        def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(shape, dtype=dtype))


def by_kind(*parameters: Trained) -> Alike[Trained]:
    return alike((f"parameter {number}", each) for number, each in enumerate(parameters))


def trained(module: nn.Module) -> list[Trained]:
    hidden = {id(each) for each in hidden_parameters(module)}
    return [Trained("cpu", tuple(each.shape), each.dtype, id(each) in hidden) for each in module.parameters()]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from tensors_in(getattr(value, name))
    elif isinstance(value, torch.Tensor):
        yield value


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The bytes of all tensors in an optimizer's state_dict: the state, and what param_groups hold."""
    saved = optimizer.state_dict()
    values = [*(each for entries in saved["state"].values() for each in entries.values())]
    values += [value for group in saved["param_groups"] for value in group.values()]
    return sum(part.nbytes for value in values for part in tensors_in(value))


shapes = st.lists(
    st.one_of(
        st.just(()), st.tuples(st.integers(1, 9000)), st.tuples(st.sampled_from([1, 3, 16, 64]), st.sampled_from([1, 5, 64, 256]))
    ).flatmap(lambda shape: st.sampled_from([shape, (*shape, 2, 3)] if len(shape) == 2 else [shape])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None)
@given(shapes=shapes, dtype=st.sampled_from([F32, BF16]), chosen=st.sampled_from(EVERY))
def test_the_state_is_that_of_the_real_optimizer(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, chosen: tuple[str, Implementation]
) -> None:
    name, implementation = chosen
    module = Bag(shapes, dtype)
    optimizers = optimizers_of(module, gp.Training(name, implementation=implementation))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        for optimizer in optimizers:
            optimizer.step()
    on_device, on_host = state_pieces(name, implementation, by_kind(*trained(module)))
    assert sum(nbytes for _, nbytes in [*on_device, *on_host]) == sum(map(state_bytes, optimizers))


# -- the step, of whole models ------------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Matrices that are large beside all else, as in real models: wide and tall ones."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(64, 512, dtype=dtype)
        self.down = nn.Linear(512, 64, bias=False, dtype=dtype)
        self.head = nn.Linear(64, 3, dtype=dtype)

    def forward(self, value: torch.Tensor) -> Any:
        return self.head(torch.relu(self.down(torch.relu(self.up(value)))))


SIX: dict[str, Case] = {
    **{name: MODELS[name] for name in ("Llama", "BERT", "LSTM", "ResNet")},
    "matrices": Case(lambda: Matrices(F32), lambda: (torch.ones(2, 64),)),
    "half": Case(lambda: Matrices(BF16), lambda: (torch.ones(2, 64, dtype=BF16),)),
}


def compared(plan: gp.Plan, training: gp.Training) -> tuple[gp.Memory, Timeline, gp.Memory]:
    found = plan.memory(training, tier="T1")
    assert found.run is not None and found.closed_form is not None
    return found, found.run, found.closed_form


def state_in(run: Timeline, device: str) -> int:
    return sum(each.nbytes for each in run.allocations if each.kind == "optimizer state" and each.device == device)


def state_of(closed: gp.Memory, device: str) -> int:
    return closed.by_device["step"].get(device, 0) - closed.by_device["first_step"].get(device, 0)


@pytest.mark.parametrize(
    "model",
    [
        "Llama",
        "matrices",
        *(pytest.param(name, marks=pytest.mark.conformance) for name in ("BERT", "LSTM", "ResNet", "half")),
    ],
)
def test_the_closed_form_is_what_a_run_takes(model: str) -> None:
    plan = gp.trace(SIX[model].build).to("cuda")
    for name, implementation in EVERY:
        _, run, closed = compared(plan, gp.Training(name, inputs=SIX[model].inputs, implementation=implementation))
        for device in ("cuda:0", "cpu"):
            assert state_of(closed, device) == state_in(run, device), (name, implementation, device)
        assert closed.by_device["optimizer"]["cuda:0"] == run.peaks[OPTIMIZER]["cuda:0"], (name, implementation)
        assert run.peaks[FIRST_OPTIMIZER]["cuda:0"] <= run.peaks[OPTIMIZER]["cuda:0"]


@pytest.mark.parametrize("model", ["matrices", "half"])
def test_on_the_cpu_what_kernels_take_comes_on_top(model: str) -> None:
    plan = gp.trace(SIX[model].build)
    for name, implementation in EVERY:
        training = gp.Training(name, inputs=SIX[model].inputs, implementation=implementation, clip_grad_norm=1.0)
        _, run, closed = compared(plan, training)
        scratch = max((each.nbytes for each in run.allocations if "scratch" in each.op), default=0)
        more = run.peaks[OPTIMIZER]["cpu"] - closed.by_device["optimizer"]["cpu"]
        assert 0 <= more <= scratch, (name, implementation)


@pytest.mark.parametrize("model", ["Llama", "matrices", "half"])
@pytest.mark.parametrize(
    ("name", "implementation"), [("adafactor", "for-loop"), ("adafactor", "foreach"), ("muon", "for-loop"), ("muon", "foreach")]
)
def test_a_run_takes_what_the_real_step_does(model: str, name: str, implementation: Implementation) -> None:
    plan = gp.trace(SIX[model].build)
    training = gp.Training(name, inputs=SIX[model].inputs, implementation=implementation)
    run = compared(plan, training)[1]
    assert {phase: devices["cpu"] for phase, devices in run.peaks.items()} == measured_peaks(plan, training)


class Small(nn.Module):
    """One matrix that torchao quantizes, and one that it does not, so that it compiles twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128, bias=False), nn.Linear(128, 3, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        return self.second(torch.relu(self.first(value)))


@pytest.mark.conformance
def test_a_run_takes_what_the_compiled_step_does() -> None:
    plan, training = gp.trace(Small), gp.Training("adamw-8bit", inputs=lambda: (torch.ones(2, 64),))
    run = compared(plan, training)[1]
    assert {phase: devices["cpu"] for phase, devices in run.peaks.items()} == measured_peaks(plan, training)
    assert any(each.op == "single_param_adam" and each.nbytes == 8 * (8192 + 32) for each in run.allocations)


# -- by hand ------------------------------------------------------------------------------------------------------------


def total(pieces: list[tuple[int, int]]) -> int:
    return sum(nbytes for _, nbytes in pieces)


def test_what_torchao_quantizes() -> None:
    assert [is_quantized(numel) for numel in (4095, 4096, 4097, 8192)] == [False, True, False, True]
    on_device, on_host = state_pieces(
        "adamw-8bit", None, by_kind(Trained("cuda:0", (64, 128), BF16), Trained("cuda:0", (9,), BF16))
    )
    assert on_device == [(0, 2 * (8192 + 8192 // 256 * 4 + 1024)), (1, 2 * 9 * 2)] and total(on_host) == 4 + 2 * 4
    assert compiled_bytes((64, 128), True) == compiled_bytes((64, 128), False) == 2 * 4 * (8192 + 32)
    assert compiled_bytes((32, 256), True) == compiled_bytes((8192,), True) == compiled_bytes((9,), False) == 0


def test_adafactor_keeps_rows_and_columns() -> None:
    on_device, on_host = state_pieces("adafactor", None, by_kind(Trained("cpu", (5, 8, 6), F32), Trained("cpu", (7,), BF16)))
    assert on_device == [(0, 4 * (5 * 8 + 5 * 6)), (1, 14)] and total(on_host) == 8
    whole = 4 * 8 * 6 * 5
    assert total(working_pieces("adafactor", None, [Trained("cpu", (5, 8, 6), F32)])) == whole + 4 * (5 * 8 + 5 * 6 + 5)
    assert total(working_pieces("adafactor", None, [Trained("cpu", (5, 8, 6), F32)] * 2)) == 2 * whole + 4 * (5 * 8 + 5 * 6 + 5)


def test_foreach_holds_two_groups_at_once() -> None:
    parameters = [Trained("cuda:0", (100,), F32), Trained("cuda:0", (100,), BF16), Trained("cuda:1", (100,), F32)]
    assert sorted(working_pieces("adamw", "foreach", parameters)) == [(0, 400), (1, 200), (2, 400)]
    assert working_pieces("adamw", "fused", parameters) == []


def test_muon_takes_a_matrix_in_halves() -> None:
    matrix = Trained("cuda:0", (100, 40), F32, hidden=True)
    assert total(working_pieces("muon", None, [matrix])) == 4 * 4000 + 2 * (2 * 4000 + 2 * 1600)
    assert state_pieces("muon", None, by_kind(matrix)) == ([(0, 16000)], [])
    assert total(working_pieces("muon", "fused", [Trained("cuda:0", (100, 40), F32)])) == 0


def test_clipping_takes_a_norm_for_each_gradient() -> None:
    large, small = (2**20,), (3,)
    assert total(clipping_pieces([Trained("cpu", large, F32), Trained("cpu", small, F32)])) == 8 + 8 + 4
    on_cuda = [Trained("cuda:0", large, F32), Trained("cuda:0", small, F32)]
    assert total(clipping_pieces(on_cuda)) == 2 * 16 * 4 + 8  # as many places for each as the largest has chunks
    assert clipping_pieces([]) == []


def test_fused_counts_are_on_the_device() -> None:
    assert state_pieces("adamw", "fused", by_kind(Trained("cuda:0", (5,), F32))) == ([(0, 40), (0, 4)], [])
    assert state_pieces("adamw", "foreach", by_kind(Trained("cuda:0", (5,), F32))) == ([(0, 40)], [(0, 4)])


# -- which matrices are hidden ------------------------------------------------------------------------------------------

HIDDEN = {
    "Llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "GPT-2": {"c_attn", "c_proj", "c_fc"},
    "ViT": {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"},
    "T5": {"q", "k", "v", "o", "wi", "wo"},
    "LSTM": set(),
    "ResNet": set(),
}


@pytest.mark.parametrize("model", HIDDEN)
def test_muon_is_for_the_matrices_inside(model: str) -> None:
    plan = gp.trace(MODELS[model].build)
    names = hidden_names(plan.graph)
    assert {name.split(".")[-2] for name in names} == HIDDEN[model]
    module = MODELS[model].build()
    found = {id(each) for each in hidden_parameters(module)}
    assert {name for name, each in module.named_parameters() if id(each) in found} == names


# -- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optimizer": "adafactor", "implementation": "fused"}, r'torch.optim.Adafactor has no implementation "fused"'),
        ({"optimizer": "adamw-8bit", "implementation": "foreach"}, r"torchao.optim.AdamW8bit has no .* \(it has: for-loop\)"),
        ({"optimizer": "adamw8bit"}, "did you mean adamw"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"checkpointing": "selected"}, "did you mean selective"),
    ],
)
def test_what_does_not_exist_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        gp.Training(**fields)


def test_adafactor_is_refused_where_parameters_are_divided() -> None:
    plan = gp.trace(MODELS["Llama"].build)
    with pytest.raises(gp.GroundplanError, match="DTensors, such as one of"):
        plan.shard({"dp": 2}).memory(gp.Training("adafactor"))
    assert plan.shard({"ddp": 2}).memory(gp.Training("adafactor")).phases["optimizer"] > 0


# -- accumulation -------------------------------------------------------------------------------------------------------


def test_gradients_stay_between_micro_batches() -> None:
    plan, inputs = gp.trace(Matrices, F32), lambda: (torch.ones(2, 64),)
    found = [compared(plan, gp.Training("sgd", inputs=inputs, accumulate=count)) for count in (1, 2, 3)]
    runs, closed = [run for _, run, _ in found], [each for _, _, each in found]
    for each, run in zip(closed, runs, strict=True):
        assert each.phases["step"] == pytest.approx(run.peaks["step"]["cpu"], rel=0.01)
    assert closed[2].phases["step"] - closed[0].phases["step"] >= 64 * 512 * 4  # the largest new gradient, before it is added
    assert closed[2].phases["optimizer"] == closed[0].phases["optimizer"]
    first, second, third = (run.peaks["first_step"]["cpu"] for run in runs)
    assert first < second == third
    assert second - first >= 64 * 512 * 4


@pytest.mark.parametrize(("model", "count"), [("Llama", 3), ("ViT", 2)])
def test_a_run_of_micro_batches_takes_what_real_ones_do(model: str, count: int) -> None:
    plan, training = gp.trace(MODELS[model].build), gp.Training(inputs=MODELS[model].inputs, accumulate=count)
    run = compared(plan, training)[1]
    assert {phase: devices["cpu"] for phase, devices in run.peaks.items()} == measured_peaks(plan, training)


# -- selective checkpointing --------------------------------------------------------------------------------------------


class Products(nn.Module):
    """Two layers of four products each, without biases."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.products = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(4))

        def forward(self, value: torch.Tensor) -> Any:
            for product in self.products:
                value = torch.sin(product(value))
            return value

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Products.Layer() for _ in range(2))

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = layer(value)
        return value.sum()


def products_run(checkpointing: Any) -> int:
    training = gp.Training("sgd", inputs=lambda: (torch.ones(8, 32),), checkpointing=checkpointing)
    return sum(each.op == "mm" for each in compared(gp.trace(Products), training)[1].allocations)


def test_every_other_product_runs_again() -> None:
    """Two steps of two layers: with full checkpointing four products of each run again, by op the second and the fourth."""
    once = products_run("none")
    assert products_run("full") - once == 2 * 2 * 4
    assert products_run("selective") - once == 2 * 2 * 2


def test_selective_is_between_none_and_full() -> None:
    peaks = []
    for checkpointing in ("full", "selective", "none"):
        training = gp.Training("sgd", inputs=MODELS["Llama"].inputs, checkpointing=checkpointing)
        run = compared(gp.trace(MODELS["Llama"].build), training)[1]
        peaks.append(run.peaks["step"]["cpu"])
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
