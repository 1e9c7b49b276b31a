"""Ranks that do not agree, fail, die or never come: real processes, all of which raise, soon, and change nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp

from .faults import TIMEOUT
from .layouts import ROOT

Seen = dict[str, Any]
Told = tuple[tuple[Seen, ...] | None, ...]
"""What each rank has seen of its scenarios; None for one that was killed."""

DISAGREEMENTS = {
    "seed": "rank 1: seed 1, where rank 0 has 0",
    "state": "rank 1: seed none, and the generator state ",
    "size": "rank 1: constructor ",
    "decisions": "rank 1: decisions ",
    "mesh": "rank 1: mesh other=2, where rank 0 has dp=2",
    "numpy": "rank 1: numpy's and Python's random numbers ",
    "rng": "rank 1: rng keyed, where rank 0 has eager",
}
AGREEMENTS = ("fine", *DISAGREEMENTS, "plan of four", "fine")
SILENT = (("dies", 1, 3), ("dies late", 1, 2), ("first dies", 0, 3))  # the scenario, who dies, and of how many


def start(count: int, *scenarios: str) -> list[subprocess.Popen[str]]:
    """A process for each of `count` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.faults", *scenarios]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, cwd=ROOT, env=os.environ | common | {"RANK": str(rank)}, **pipes) for rank in range(count)]


def told(processes: list[subprocess.Popen[str]]) -> Told:
    """What they print; the first one is the last to end, as it holds the store of the others."""
    found: list[tuple[Seen, ...] | None] = []
    try:
        for process in reversed(processes):
            out, err = process.communicate(timeout=240)
            assert process.returncode <= 0, err
            found.append(tuple(map(json.loads, out.splitlines())) if process.returncode == 0 else None)
    finally:
        for process in processes:
            process.kill()
    return tuple(reversed(found))


@pytest.fixture(scope="module")
def run() -> Callable[..., Told]:
    """A job of so many ranks that goes through some scenarios; it runs once."""

    @cache
    def job(count: int, *scenarios: str) -> Told:
        return told(start(count, *scenarios))

    return job


@pytest.fixture(scope="module")
def silences() -> dict[str, Told]:
    """The jobs in which some wait for one that says nothing any more, side by side."""
    running = {scenario: start(count, scenario) for scenario, _, count in SILENT}
    return {scenario: told(processes) for scenario, processes in running.items()}


def check_unchanged(rank: Seen) -> None:
    """Nothing was left behind, and nobody waited long."""
    assert rank["meta"] and rank["generator"] and rank["seconds"] < 60, rank


# -- what the ranks agree on --------------------------------------------------------------------------------------------


def seen(ranks: Told, position: int) -> list[Seen]:
    """What every rank has seen of one of the scenarios; all live."""
    assert all(rank is not None and len(rank) > position for rank in ranks)
    return [rank[position] for rank in ranks if rank is not None]


@pytest.mark.parametrize("position", [0, len(AGREEMENTS) - 1])
def test_ranks_that_agree_are_done_even_after_they_did_not(run: Callable[..., Told], position: int) -> None:
    for rank in seen(run(2, *AGREEMENTS), position):
        assert rank["error"] is None and not rank["meta"], rank


@pytest.mark.parametrize("scenario", DISAGREEMENTS)
def test_what_differs_is_named_on_every_rank(run: Callable[..., Told], scenario: str) -> None:
    for rank in seen(run(2, *AGREEMENTS), AGREEMENTS.index(scenario)):
        assert rank["error"] == "RanksError" and DISAGREEMENTS[scenario] in rank["message"], rank
        check_unchanged(rank)


def test_a_plan_for_more_ranks_is_refused_on_every_one(run: Callable[..., Told]) -> None:
    for rank in seen(run(2, *AGREEMENTS), AGREEMENTS.index("plan of four")):
        assert rank["error"] == "MaterializeError", rank
        assert "for 4 ranks (dp=4)" in rank["message"] and "has 2" in rank["message"]
        check_unchanged(rank)


# -- ranks that fail ----------------------------------------------------------------------------------------------------

FAILURES = ("raises", "raises late", "first raises")


@pytest.mark.parametrize(("scenario", "failed"), [("raises", 1), ("raises late", 1), ("first raises", 0)])
def test_an_error_on_one_rank_ends_all(run: Callable[..., Told], scenario: str, failed: int) -> None:
    for number, rank in enumerate(seen(run(3, *FAILURES), FAILURES.index(scenario))):
        if number == failed:
            assert (rank["error"], rank["message"]) == ("ValueError", "the disk is on fire")
        else:
            assert rank["error"] == "RanksError", rank
            assert rank["message"] == f"rank {failed} failed: ValueError: the disk is on fire"
        check_unchanged(rank)


@pytest.mark.parametrize(("scenario", "dead", "count"), SILENT)
def test_a_rank_that_dies_ends_all(silences: dict[str, Told], scenario: str, dead: int, count: int) -> None:
    ranks = silences[scenario]
    assert [rank is None for rank in ranks] == [number == dead for number in range(count)]
    for rank in ranks:
        if rank is not None:
            assert rank[0]["error"] == "RanksError", rank
            assert re.search(f"rank {dead} is gone" if dead else "is gone", rank[0]["message"])
            check_unchanged(rank[0])


def test_a_rank_that_never_comes_is_named(run: Callable[..., Told]) -> None:
    first, late, third = seen(run(3, "never comes"), 0)
    assert late["error"] is None
    for rank in (first, third):
        assert rank["error"] == "RanksError" and f"rank 1 did not come within {TIMEOUT:g} s" in rank["message"], rank
        assert "timeout=SECONDS" in rank["message"]
        check_unchanged(rank)


# -- one process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["x", "all", ""])
def test_a_group_that_is_none_is_refused(group: str) -> None:
    module = gp.trace(nn.Linear, 3, 4).meta_module()
    with pytest.raises(gp.RanksError, match=f"group='{group}' is neither a process group"):
        gp.materialize(module, seed=0, group=group)
    assert module.weight.is_meta


@pytest.mark.parametrize("group", ["world", None])
def test_one_process_needs_no_group(group: Any) -> None:
    module = gp.materialize(gp.trace(nn.Linear, 3, 4).meta_module(), seed=0, group=group)
    torch.manual_seed(0)
    assert torch.equal(module.get_parameter("weight"), nn.Linear(3, 4).weight)
