"""Checkpoints in real processes: every rank reads its part, whoever saved it, and all raise where one cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import checkpoint_ranks as ranks
from .checkpoint_files import assert_same_values, eager
from .checkpoint_ranks import Found
from .layouts import MODELS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of every model."""
    found = Path(tmp_path_factory.mktemp("checkpoints"))
    ranks.write_forms(found)
    return found


@pytest.fixture(scope="module")
def of_two(folder: Path) -> list[Found]:
    """What two ranks find; they save their modules too, for other numbers of ranks."""
    return ranks.launch(2, folder, "load", "save", "again", "broken")


def assert_loaded(found: list[Found], what: str) -> None:
    for number, rank in enumerate(found):
        assert rank[what]
        for case in rank[what]:
            assert "error" not in case, f"rank {number}, {case['model']}, {case['layout']}, {case['form']}: {case['error']}"
            assert case["differing"] == [] and case["meta"] == [], case
            assert case["generator"], case


def test_two_ranks_load_every_form_and_random_parts(of_two: list[Found]) -> None:
    assert_loaded(of_two, "load")


def test_two_ranks_load_what_they_have_saved(of_two: list[Found]) -> None:
    assert_loaded(of_two, "again")


def test_a_device_alone_loads_what_two_have_saved(folder: Path, of_two: list[Found]) -> None:
    for name in ranks.NAMES:
        tensors, paths = ranks.state_for(name), sorted((folder / name).glob("saved by *"))
        assert len(paths) == 2
        for path in paths:
            found = ranks.plan_of(name).materialize(seed=ranks.SEED, checkpoint=path, missing="error")
            assert_same_values(eager(MODELS[name].build, tensors, ranks.SEED), found)


@pytest.mark.parametrize("world", [3, 4])
def test_other_numbers_of_ranks_load_what_two_have_saved(folder: Path, of_two: list[Found], world: int) -> None:
    found = ranks.launch(world, folder, "again", *(["load"] if world == 4 else []))
    assert_loaded(found, "again")
    if world == 4:
        assert_loaded(found, "load")


SAYS = {
    "cut short": ("CheckpointError", "copy it again"),
    "absent": ("CheckpointError", "there is no model.safetensors"),
    "other names": ("CheckpointError", "other [3] is not in the module"),
    "other shape": ("RanksError", "rank 1: checkpoint model.safetensors (3 tensors"),
    "other dtype": ("RanksError", "rank 1: checkpoint model.safetensors (2 tensors"),
    "fails while it is read": ("CheckpointError", "Input/output error"),
    "other options": ("RanksError", "unexpected='ignore'"),
}


@pytest.mark.parametrize("what", SAYS)
def test_all_ranks_raise_where_one_sees_another_file(of_two: list[Found], what: str) -> None:
    kind, says = SAYS[what]
    for number, rank in enumerate(of_two):
        case = rank["broken"][ranks.BROKEN.index(what)]
        assert case["error"] == (kind if number == 1 else "RanksError"), case
        assert says in case["message"], case
        assert all(case["meta"]) and case["generator"] and case["seconds"] < 25, case


def test_all_is_well_afterwards(of_two: list[Found]) -> None:
    for rank in of_two:
        case = rank["broken"][ranks.BROKEN.index("fine")]
        assert case["error"] is None and not any(case["meta"]) and case["generator"], case
