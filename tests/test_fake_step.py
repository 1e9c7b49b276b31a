"""Training steps on fake tensors: equal to the byte to what real ones allocate, with what is where at the peak."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import groundplan as gp
from groundplan.planner.allocations import Timeline

from .measured_steps import MODELS, SETTINGS, measured_peaks, plain_kernels


@pytest.fixture(autouse=True)
def kernels() -> Any:
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
@pytest.mark.parametrize("model", sorted(set(MODELS) - {"Swin"}))
def test_a_fake_step_takes_what_a_real_one_does(model: str, setting: str) -> None:
    case = MODELS[model]
    plan, training = gp.trace(case.build), gp.Training(inputs=case.inputs, **SETTINGS[setting])
    assert peaks_of(plan, training) == measured_peaks(plan, training)


@pytest.mark.parametrize(
    "options",
    [
        *({"optimizer": name} for name in ("sgd", "sgd-momentum", "adam")),
        {"clip_grad_norm": 1.0},
    ],
    ids=str,
)
def test_so_it_does_with_every_option(options: dict[str, Any]) -> None:
    case = MODELS["Llama"]
    plan, training = gp.trace(case.build), gp.Training(**{"inputs": case.inputs, **options})
    assert peaks_of(plan, training) == measured_peaks(plan, training)


def test_a_cast_plan() -> None:
    plan = gp.trace(MODELS["GPT-2"].build).cast(torch.bfloat16)
    training = gp.Training(inputs=MODELS["GPT-2"].inputs)
    assert peaks_of(plan, training) == measured_peaks(plan, training)
