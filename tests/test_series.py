"""Runs made thin for drawings: no phase loses its peak, and every point that is kept is exact."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from groundplan.planner.allocations import STEP, Allocation, Kind, Moment, Timeline
from groundplan.planner.changes import Change
from groundplan.planner.replayed_run import replay_run
from groundplan.planner.series import POINTS, TENSORS, Point, Series, series_of_changes, series_of_run

from .test_reserved_run import memory, run_of, timelines

KINDS: tuple[Kind, ...] = ("activation", "temporary", "gradient")


def naive(run: Timeline, device: str, at: int) -> dict[str, int]:
    """Bytes of each kind after the first `at` moments, counted one by one."""
    held: dict[str, int] = {}
    for moment in run.moments[:at]:
        piece = run.allocations[moment.allocation]
        if piece.device == device:
            held[piece.kind] = held.get(piece.kind, 0) + (piece.nbytes if moment.born else -piece.nbytes)
    return {kind: nbytes for kind, nbytes in held.items() if nbytes}


def shown(series: Series, point: Point) -> dict[str, int]:
    return {kind: nbytes for kind, nbytes in zip(series.kinds, point.held, strict=True) if nbytes}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(timelines(), st.sampled_from(["cuda:0", "cpu"]), st.sampled_from([2, 24, 30, POINTS]))
def test_every_phase_keeps_its_peak_by_kind(run: Timeline, device: str, points: int) -> None:
    series = series_of_run(run, device, points=points)
    assert [each.phase for each in series.stretches] == list(run.peaks)
    for stretch in series.stretches:
        peak = stretch.peak
        assert peak.total == run.peaks[stretch.phase].get(device, 0)
        if peak.total:
            assert shown(series, peak) == {kind: held for kind, held in run.by_kind(stretch.phase, device).items() if held}


def long_run(moments: int) -> Timeline:
    """Saws of many sizes: more moments than are drawn."""
    count = moments // 2
    sizes = (1 + (number * 7919) % 100_003 for number in range(count))
    pieces = tuple(Allocation(KINDS[number % 3], nbytes, "cuda:0") for number, nbytes in enumerate(sizes))
    order = [(number, True) for number in range(20)]
    for number in range(20, count):
        order += [(number, True), (number - 20, False)]
    phases = ["first_step"] * (moments // 5) + [STEP] * len(order)
    return Timeline(pieces, tuple(Moment(phase, *each) for phase, each in zip(phases, order, strict=False)))


def test_a_long_run_becomes_short_and_stays_exact() -> None:
    run = long_run(40_000)
    reserved = replay_run(run).reserved["cuda:0"]
    series = series_of_run(run, "cuda:0", reserved)
    kept = [point for stretch in series.stretches for point in stretch.points]
    assert 1000 < len(kept) <= POINTS + 10
    for point in kept[:: len(kept) // 40]:
        assert shown(series, point) == naive(run, "cuda:0", point.at) and point.reserved == reserved[point.at]
    for stretch in series.stretches:
        assert stretch.peak.total == run.peaks[stretch.phase]["cuda:0"]
        assert [point.at for point in stretch.points] == sorted({point.at for point in stretch.points})
    assert max(point.reserved or 0 for point in kept) == max(reserved), "where most is reserved is kept as well"


def test_a_phase_that_reserves_most_beside_its_peak_keeps_that() -> None:
    run = long_run(20_000)
    reserved = array("q", range(len(run.moments) + 1))
    reserved[6789] = 10**9
    series = series_of_run(run, "cuda:0", reserved, points=50)
    assert max(point.reserved or 0 for stretch in series.stretches for point in stretch.points) == 10**9


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_a_real_step(device: str) -> None:
    found = memory()
    series, run = found.series(device), run_of(found)
    assert series is not None
    for stretch in series.stretches:
        assert stretch.peak.total == run.peaks[stretch.phase].get(device, 0)
    assert series.peak[1].total == max(peaks.get(device, 0) for peaks in run.peaks.values())
    assert series.has_reserved is (device == "cuda:0")
    data = series.to_json()
    assert [phase["phase"] for phase in data["phases"]] == list(run.peaks)
    assert all(len(column) == len(phase["at"]) for phase in data["phases"] for column in phase["bytes"])


def test_the_phases_of_the_closed_form() -> None:
    changes = {"load": [Change("cpu", "a", 8), Change("cpu", "a", -8)], "step": [Change("cuda:0", "a", 5), Change("cpu", "b", 3)]}
    series = series_of_changes(changes, "cpu")
    assert series.kinds == (TENSORS,)
    assert [[point.held for point in each.points] for each in series.stretches] == [[(0,), (8,), (0,)], [(0,), (3,)]]
    assert not series.has_reserved and series.highest == 8
