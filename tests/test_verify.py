"""Plans that are built and trained for real: what is measured is what was predicted, the difference taken apart exactly."""

from __future__ import annotations

import json
import mmap
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.verification import KERNELS, ROUNDING, WATCHING, Check, Held, attributed, built_at, worst
from groundplan.runtime.memory_events import MemoryEvent, lifetimes, living_at, memory_events, memory_profile, peaks_of
from groundplan.runtime.process_peak import can_restart, peak_bytes, restart_peak

from .jobs import launch
from .measured_steps import MODELS, plain_kernels

MIB = 2**20
STEPS = ("first_step", "step", "optimizer")


def verified(model: str, **options: Any) -> gp.Verification:
    with plain_kernels():
        return gp.trace(MODELS[model].build).verify(gp.Training(inputs=MODELS[model].inputs, **options), seed=0)


def adds_up(found: gp.Verification) -> bool:
    """Whether the parts of every difference are all of it, and so is what comes beyond the tensors."""
    return all(
        sum(part.difference for part in check.parts) == check.difference
        and sum(check.beyond.values()) == check.whole - check.measured
        for rank in found.ranks
        for check in rank.checks
    )


# -- predicted and measured ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "options"),
    [("Llama", {}), ("ViT", {"optimizer": "sgd"}), ("nn.Transformer", {}), ("GPT-2", {"checkpointing": "full"})],
)
def test_a_step_takes_what_was_predicted(model: str, options: dict[str, Any]) -> None:
    found = verified(model, **options)
    for phase in STEPS:
        check = found.check(phase)
        assert check.tier == "T1" and check.difference == 0 and check.percent == 0, (phase, check.parts)
        assert sum(part.measured for part in check.parts) == check.measured
    assert adds_up(found) and [check.phase for check in found.checks] == ["construct", *STEPS, "checkpoint"]
    built, saved = found.check("construct"), found.check("checkpoint")
    assert built.tier == "T0" and 0 <= built.difference < MIB
    assert saved.difference == sum(part.measured for part in saved.parts if part.name == "input"), "saved weights and state"


def test_every_step_is_measured() -> None:
    found = gp.trace(nn.Linear, 30, 40).verify(gp.Training("sgd", batch_size=2), steps=5, seed=0)
    assert len(found.check("step").repeats) == 4 and len(set(found.check("step").repeats)) == 1
    assert len(found.check("first_step").repeats) == 1 and len(found.check("optimizer").repeats) == 5


class Hiding(nn.Module):
    """A linear layer whose forward takes memory that a run on fake tensors knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.extra = nn.Linear(8, 8), MIB

    def forward(self, value: torch.Tensor) -> Any:
        found = self.linear(value)
        if type(found) is torch.Tensor:
            hidden = torch.empty(self.extra, dtype=torch.uint8)
            return found + hidden[0]
        return found


def test_a_planted_difference_is_named() -> None:
    found = gp.trace(Hiding).verify(gp.Training("sgd", inputs=(torch.ones(4, 8),)), seed=0)
    check = found.check("step")
    assert check.difference >= MIB - 1000 and adds_up(found)
    largest = [each for part in check.parts for each in part.largest]
    what, nbytes = max(largest, key=lambda each: each[1])
    assert nbytes == MIB and "empty" in what and "test_verify.py" in what
    assert "step on cpu: +1.05 MB against T1" in str(found) and found.worst is not None and found.worst.percent > 100


def test_what_onednn_takes_is_inside_kernels() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch is built without oneDNN")
    plan = gp.trace(MODELS["LSTM"].build)
    found = plan.verify(gp.Training("sgd", inputs=MODELS["LSTM"].inputs), seed=0)
    assert adds_up(found)
    part = next(part for part in found.check("step").parts if part.name == KERNELS)
    assert part.measured > part.predicted and any("mkldnn" in what for what, _ in part.largest)


def test_the_closed_form_is_compared_where_the_step_cannot_be_run() -> None:
    class Looking(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            found = super().forward(value)
            return found if bool(found.detach().sum() > -1e9) else value

    found = gp.trace(Looking, 300, 300).verify(gp.Training("sgd", batch_size=2), seed=0)
    check = found.check("step")
    assert check.tier == "T0" and check.run is None and adds_up(found)
    counted = next(part for part in check.parts if part.name == "counted by the closed form")
    assert counted.predicted == check.closed_form == 2 * (300 * 300 + 300) * 4
    assert counted.difference == -300 * 4, "the bias's gradient is not there yet when the weight's is made"
    assert any("T1 could not be run" in note and "looks at values" in note for note in found.notes)


def test_loading_is_measured_in_place_of_building(tmp_path: Path) -> None:
    plan = gp.trace(nn.Linear, 1000, 1000)
    plan.save_checkpoint(0, tmp_path / "model.safetensors")
    found = plan.verify(checkpoint=tmp_path / "model.safetensors")
    assert [check.phase for check in found.checks] == ["load", "checkpoint"]
    assert abs(found.check("load").difference) < 100_000 and adds_up(found)
    tensors = next(part for part in found.check("load").parts if part.name == "tensor")
    assert tensors.predicted == tensors.measured == 1001 * 1000 * 4
    with pytest.raises(KeyError, match="step on any device was not run; there are load, checkpoint"):
        found.check("step")


# -- what stays as it was -----------------------------------------------------------------------------------------------


class Drawing(nn.Dropout):
    """A dropout that draws from every generator there is on the host, as augmentations do."""

    def forward(self, value: torch.Tensor) -> Any:
        return super().forward(value) * (1 + random.random() + float(np.random.rand()))


def test_the_users_state_is_left_alone() -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before, plan = torch.get_rng_state(), gp.trace(lambda: nn.Sequential(nn.Linear(3, 3), Drawing(), nn.Linear(3, 3)))
    expected = (random.random(), np.random.rand())
    random.seed(5)
    np.random.seed(5)
    threads = torch.get_num_threads()
    found = plan.verify(gp.Training(inputs=(torch.ones(2, 3),)))
    assert torch.equal(torch.get_rng_state(), before) and (random.random(), np.random.rand()) == expected
    assert found.module is None and torch.get_num_threads() == threads and torch.is_grad_enabled()


def test_the_module_is_kept_when_asked_for() -> None:
    found = gp.trace(nn.Linear, 3, 4).verify(gp.Training("sgd", batch_size=2), seed=0, keep=True)
    torch.manual_seed(0)
    assert isinstance(found.module, nn.Linear) and not torch.equal(found.module.weight, nn.Linear(3, 4).weight)


def test_a_failure_comes_out_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            if not value.is_meta and type(value) is torch.Tensor:
                raise RuntimeError("my own")
            return super().forward(value)

    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="my own"):
        gp.trace(Fails, 3, 4).verify(gp.Training("sgd", batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_is_written_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("groundplan.runtime.verify.SAVED_AT_MOST", 10)
    plan = gp.trace(nn.Linear, 30, 40)
    without = plan.verify()
    assert [check.phase for check in without.checks] == ["construct"]
    assert any("no checkpoint was written" in note for note in without.shown_rank.notes)
    assert [check.phase for check in plan.verify(saving=True).checks] == ["construct", "checkpoint"]
    assert not plan.verify(saving=False).shown_rank.notes


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (lambda: gp.trace(nn.Linear, 3, 4), {"steps": 1}, "steps is 1; it takes 2"),
        (
            lambda: gp.trace(nn.Linear, 3, 4).place({"*": "cpu"}),
            {"workload": gp.Training()},
            "places tensors.*without a workload",
        ),
        (lambda: gp.trace(lambda: (nn.Linear(3, 4), nn.ReLU())), {"workload": gp.Training()}, "one nn.Module"),
    ],
)
def test_what_cannot_be_verified_is_refused(plan: Callable[[], gp.Plan], options: dict[str, Any], message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        plan().verify(**options)


def test_a_plan_for_cuda_is_refused_without_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(gp.GroundplanError, match="torch finds no CUDA device here"):
        gp.trace(nn.Linear, 3, 4).to("cuda").verify()


# -- forms --------------------------------------------------------------------------------------------------------------


def test_text_and_json(tmp_path: Path) -> None:
    found = gp.trace(nn.Linear, 300, 400).verify(gp.Training("adamw", batch_size=2), seed=0)
    text = str(found)
    lines = [line.split() for line in text.splitlines()]
    assert ["phase", "T0", "T1", "measured", "off", "%", "whole"] in lines and max(map(len, text.splitlines())) <= 100
    data = found.to_json(tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == data and data["machine"] == "cpu"
    step = next(each for each in data["ranks"][0]["checks"] if each["phase"] == "step")
    assert step["predicted"]["T1"] == step["measured"] and step["difference"] == sum(p["difference"] for p in step["parts"])


# -- several ranks ------------------------------------------------------------------------------------------------------


def test_ranks_verify_together(tmp_path: Path) -> None:
    ranks = launch("tests.verify_ranks", tmp_path)
    assert all(rank["kept"] for rank in ranks)
    one, other = (rank["trained"]["ranks"] for rank in ranks)
    assert one == other and [each["rank"] for each in one] == [0, 1]
    for rank in one:
        checks = {check["phase"]: check for check in rank["checks"]}
        assert list(checks) == ["construct", *STEPS, "checkpoint"]
        for check in checks.values():
            assert sum(part["difference"] for part in check["parts"]) == check["difference"]
        for phase in STEPS:
            assert checks[phase]["tier"] == "T1" and abs(checks[phase]["percent"]) < 2, checks[phase]
        kinds = {part["name"]: part["measured"] for part in checks["step"]["parts"]}
        assert kinds["gathered parameter"] >= (256 * 256 + 256) * 4 and "communication buffer" in kinds
        assert 0 <= checks["construct"]["difference"] < 100_000
    assert "of 2, which is off most" in ranks[0]["text"]
    for rank in ranks:
        assert rank["saved"] == [["construct"], ["construct", "checkpoint"]], "together, or not at all"
        assert "ValueError: no" in rank["failing"]


# -- memory events ------------------------------------------------------------------------------------------------------


def test_events_say_when_where_and_in_which_op() -> None:
    with memory_profile() as profiler:
        one = torch.ones(1000)
        del one
    born, gone = memory_events(profiler)
    assert (born.nbytes, gone.nbytes, born.address, born.device) == (4000, -4000, gone.address, "cpu")
    assert born.time <= gone.time and born.op in ("ones", "empty")


EVENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=30)


@given(EVENTS, st.integers(0, 30))
def test_peaks_are_the_highest_sums_and_what_was_there_then(pairs: list[tuple[int, int]], cut: int) -> None:
    """An address is taken and given back by turns; the first span lasts until `cut`."""
    held: dict[int, int] = {}
    events, sums = [], [0]
    for time, (address, nbytes) in enumerate(pairs):
        change = -held.pop(address) if address in held else held.setdefault(address, nbytes)
        events.append(MemoryEvent(time, address, change, "cpu", ""))
        sums.append(sums[-1] + change)
    first, second = peaks_of(events, [0, cut])
    split = min(cut, len(events))
    assert (first["cpu"].nbytes if first else 0) == max(sums[: split + 1])
    assert (second["cpu"].nbytes if second else 0) == max(sums[split:])
    for peaks in (first, second):
        for peak in peaks.values():
            assert sum(each.nbytes for each in peak.living) == peak.nbytes


def test_memory_that_was_there_before_is_none_of_it() -> None:
    events = [MemoryEvent(1, 8, -50, "cpu", ""), MemoryEvent(2, 8, 70, "cpu", "")]
    assert [peaks["cpu"].nbytes for peaks in peaks_of(events, [0])] == [70]


def test_what_lay_at_an_address() -> None:
    first, second = MemoryEvent(1, 8, 50, "cpu", "a"), MemoryEvent(5, 8, 70, "cpu", "b")
    spans = lifetimes([first, MemoryEvent(3, 8, -50, "cpu", ""), second])
    assert [living_at(spans, 8, time) for time in (0, 1, 2, 3, 4, 5, 9)] == [None, first, first, None, None, second, second]
    assert living_at(spans, 9, 2) is None


@pytest.mark.skipif(not can_restart, reason="the peak of resident memory cannot start anew here")
def test_the_process_s_peak_starts_anew() -> None:
    before = restart_peak()
    with mmap.mmap(-1, 64 * MIB) as block:  # new memory for certain, which what was freed before cannot serve
        block.write(b"1" * (64 * MIB))
    high = peak_bytes()
    assert high - before > 50 * MIB
    assert peak_bytes() == high and restart_peak() < high - 50 * MIB


# -- the difference, apart ----------------------------------------------------------------------------------------------

HELD = st.builds(
    lambda kind, what, nbytes, more: Held(kind, what, nbytes, nbytes + more),
    st.sampled_from(["activation", "gradient", KERNELS]),
    st.sampled_from("abc"),
    st.integers(1, 99),
    st.integers(0, 9),
)


@given(st.lists(HELD), st.lists(HELD), st.integers(-999, 999))
def test_parts_add_up(predicted: list[Held], found: list[Held], difference: int) -> None:
    parts = attributed(predicted, found, difference)
    assert sum(part.difference for part in parts) == difference
    for part in parts:
        if part.name not in (ROUNDING, WATCHING):
            assert part.measured == sum(each.nbytes for each in found if each.kind == part.name)


def test_the_worst_is_off_most() -> None:
    checks = [Check("a", "cpu", 100, None, 103, (103,), (), 103, {}), Check("b", "cpu", 100, None, 95, (95,), (), 95, {})]
    assert worst(checks) is checks[1] and worst([]) is None


def test_what_building_is_predicted_to_hold() -> None:
    plan = gp.trace(nn.Linear, 600, 600).cast({"bias": torch.bfloat16})
    from groundplan.planner.estimate import timelines_of

    held = built_at(timelines_of(plan.graph, plan.decisions, None)["construct"], "cpu")
    assert sum(each.nbytes for each in held) == plan.memory().phases["construct"]
    assert {each.kind for each in held} == {"tensor", "temporary"}


# -- on a GPU -----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    plan = gp.trace(MODELS["Llama"].build).to("cuda")
    found = plan.verify(gp.Training(inputs=MODELS["Llama"].inputs), seed=0)
    assert adds_up(found) and found.machine == torch.cuda.get_device_name(0)
    for phase in STEPS:
        check = found.check(phase, "cuda:0")
        assert check.measured >= check.closed_form and check.reserved is not None and check.reserved >= check.measured
        assert set(check.beyond) == {"allocator's cache", "CUDA context, libraries, other processes"}
    assert any(part.name == ROUNDING for part in found.check("step", "cuda:0").parts)
    assert found.calibration().records
