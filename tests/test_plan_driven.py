"""Plans that shard, in real processes: `plan.shard(...).materialize(...)` gives every rank its part of what eager builds.

One torchrun job for each number of processes does all the work (plan_driven.py); the tests read what its ranks have written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import plan_driven

WORLDS = (2, 4)
Job = Callable[[int], list[dict[str, Any]]]

every_case = pytest.mark.parametrize(("world", "case", "model"), [(n, *case) for n in WORLDS for case in plan_driven.cases(n)])


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """What the ranks of the job of so many processes have found; it runs once, even where it crashes."""

    @cache
    def outcome(world: int) -> list[dict[str, Any]] | str:
        try:
            return plan_driven.launch(world, Path(tmp_path_factory.mktemp("plans")))
        except RuntimeError as error:
            return str(error)

    def found(world: int) -> list[dict[str, Any]]:
        ranks = outcome(world)
        return pytest.fail(ranks, pytrace=False) if isinstance(ranks, str) else ranks

    return found


def of(ranks: list[dict[str, Any]], case: str, model: str) -> list[dict[str, Any]]:
    """What every rank has found in one case; fails with the error that one has met."""
    found = [each for rank in ranks for each in rank["cases"] if (each["case"], each["model"]) == (case, model)]
    errors = [f"rank {rank}: {each['error']}" for rank, each in enumerate(found) if "error" in each]
    if errors:
        pytest.fail(errors[0], pytrace=False)
    assert len(found) == len(ranks)
    return found


@every_case
def test_every_rank_has_eagers_values(job: Job, world: int, case: str, model: str) -> None:
    for rank in of(job(world), case, model):
        assert (rank["differing"], rank["meta"], rank["ties"], rank["generator"]) == ([], [], True, True)


@every_case
def test_every_rank_holds_what_the_planner_says(job: Job, world: int, case: str, model: str) -> None:
    for rank in of(job(world), case, model):
        assert rank["mispredicted"] == []
        assert rank["bytes"] == rank["predicted"]


@every_case
def test_a_step_of_training_does_what_it_does_on_a_single_device(job: Job, world: int, case: str, model: str) -> None:
    tolerance = plan_driven.CASES[case].tolerance
    for rank in of(job(world), case, model):
        before, after = rank["expected"]
        assert rank["losses"] == pytest.approx(rank["expected"], abs=tolerance * before)
        assert abs(before - after) > 2 * tolerance * before, "the step does too little to be compared"


@pytest.mark.parametrize("world", WORLDS)
def test_a_mesh_that_does_not_fit_is_refused_on_every_rank(job: Job, world: int) -> None:
    for rank in job(world):
        assert f"for a mesh dp={world}, and the one given is copies={world}" in rank["refused"]["names"]
        assert f"for {2 * world} ranks (dp={2 * world}), and the process group has {world}" in rank["refused"]["ranks"]
