"""Fitted plans hold when they are carried out: measured peaks under a limit that the default breaks, and the same loss."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import groundplan as gp

from .fit_ranks import CASES, launch


@cache
def plan_of(name: str) -> gp.Plan:
    return CASES[name].fitted()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank has found, by case."""
    folder: Path = tmp_path_factory.mktemp("fit")
    for name in CASES:
        plan_of(name).save(folder / f"{name}.json")
    ranks = [rank for world in (2, 4) for rank in launch(world, folder)]
    return {name: [each for rank in ranks for each in rank if each["case"] == name] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_stays_under_a_limit_that_the_default_breaks(found: dict[str, list[Any]], name: str) -> None:
    limit, ranks = CASES[name].limit(), found[name]
    assert len(ranks) == CASES[name].world
    for rank in ranks:
        assert max(rank["default"].values()) > 1.1 * limit
        assert max(rank["fitted"].values()) <= limit


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured_is_what_was_said(found: dict[str, list[Any]], name: str) -> None:
    fitted = plan_of(name).decisions.fitted
    assert fitted is not None and fitted.tier == "T1" and fitted.verdict == "fits"
    assert max(max(rank["fitted"].values()) for rank in found[name]) == pytest.approx(fitted.peak, rel=0.03)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_a_single_process(found: dict[str, list[Any]], name: str) -> None:
    for rank in found[name]:
        assert rank["loss"] == pytest.approx(rank["single"], rel=1e-5)
        assert rank["gradients"] < 1e-4


def test_what_was_decided_is_what_the_limit_asks_for() -> None:
    """FSDP where copies are too large, checkpoints where activations are, a tensor axis where both are."""
    sharded = {name: plan_of(name).decisions.sharding for name in CASES}
    axes = {name: {axis.role: axis.size for axis in each.axes if axis.size > 1} for name, each in sharded.items() if each}
    assert axes["DDP is too large"] == {"shard": 2} and not plan_of("DDP is too large").decisions.checkpointing
    assert axes["checkpoints"] == {"shard": 2} and plan_of("checkpoints").decisions.checkpointing
    assert axes["a tensor axis"] == {"tensor": 2}
    assert axes["two axes"]["tensor"] == 2
