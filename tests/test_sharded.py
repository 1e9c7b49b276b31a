"""Sharded modules in real processes: whatever the layout, every rank holds its part of the model that a single device has.

One torchrun job for each number of processes does all the work (layouts.py); the tests read what its ranks have written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import layouts

WORLDS = (1, 2, 3, 4)
CASES = [(world, *case) for world in WORLDS for case in layouts.cases(world)]
Job = Callable[[int], list[dict[str, Any]]]

every_case = pytest.mark.parametrize(("world", "layout", "model"), CASES)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """What the ranks of the job of so many processes have found; it runs once, even where it crashes."""

    @cache
    def outcome(world: int) -> list[dict[str, Any]] | str:
        try:
            return layouts.launch(world, Path(tmp_path_factory.mktemp("ranks")))
        except RuntimeError as error:
            return str(error)

    def found(world: int) -> list[dict[str, Any]]:
        ranks = outcome(world)
        return pytest.fail(ranks, pytrace=False) if isinstance(ranks, str) else ranks

    return found


def of(check: str, ranks: list[dict[str, Any]], layout: str, model: str) -> list[dict[str, Any]]:
    """What every rank has found in one check of one case; fails with the error that one has met."""
    found = [each[check] for rank in ranks for each in rank["cases"] if (each["layout"], each["model"]) == (layout, model)]
    errors = [f"rank {rank}: {each['error']}" for rank, each in enumerate(found) if "error" in each]
    if errors:
        pytest.fail(errors[0], pytrace=False)
    assert len(found) == len(ranks)
    return found


@every_case
def test_every_rank_has_eagers_values(job: Job, world: int, layout: str, model: str) -> None:
    for rank in of("values", job(world), layout, model):
        assert rank == {"differing": [], "differing, wrapped": [], "meta": [], "ties": True, "generator": True}


@every_case
def test_keyed_values_are_those_of_a_single_device(job: Job, world: int, layout: str, model: str) -> None:
    for rank in of("keyed", job(world), layout, model):
        assert rank == {"differing": [], "meta": [], "generator": True}


@every_case
def test_a_step_of_training_does_what_it_does_on_a_single_device(job: Job, world: int, layout: str, model: str) -> None:
    kind = layouts.LAYOUTS[layout]
    if kind.no_step:
        pytest.skip(kind.no_step)
    for rank in of("step", job(world), layout, model):
        before, after = rank["expected"]
        assert rank["losses"] == pytest.approx(rank["expected"], abs=kind.tolerance * before)
        assert abs(before - after) > 5 * kind.tolerance * before, "the step does too little to be compared"


def test_what_is_usually_done_gives_other_values(job: Job) -> None:
    for rank in job(2):
        assert [row["model"] for row in rank["recipe"]] == list(layouts.MODELS)
        for row in rank["recipe"]:
            assert row["recipe: differ"] > 0, row
            assert row["groundplan: differ"] == 0, row
