"""A run as a drawing needs it: bytes by kind on one device, at no more moments than can be told apart.

Each phase keeps its first and last moments, its peak, where most is reserved, and the highest and lowest moment of every stretch
of it in between. Nothing is averaged: what is kept is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from .allocations import Kind, Timeline
from .changes import Change

POINTS = 1500
"""About as many moments are kept: more than a drawing has columns of pixels for."""

TENSORS = "tensors"
"""The kind of what is known only to be held because of a tensor, as in tier T0."""

_LEAST = 24  # points of a phase, however short it is beside the others

Bytes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Point:
    """What is there after the first `at` moments: bytes by kind, in the order of `Series.kinds`, and what is reserved."""

    at: int
    held: tuple[int, ...]
    reserved: int | None = None

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(self.held)


@dataclass(frozen=True, slots=True)
class Stretch:
    """A phase from its beginning to its end: the points that are kept of its `moments`, at least one."""

    phase: str
    moments: int
    points: tuple[Point, ...]

    @property
    def peak(self) -> Point:
        """Where most is there, for the first time."""
        return max(self.points, key=lambda point: point.total)


@dataclass(frozen=True)
class Series:
    """The bytes of each kind on a device over time, phase by phase."""

    device: str
    kinds: tuple[str, ...]
    stretches: tuple[Stretch, ...]

    @cached_property
    def peak(self) -> tuple[Stretch, Point]:
        """The phase and the point where most is there."""
        stretch = max(self.stretches, key=lambda each: each.peak.total)
        return stretch, stretch.peak

    @cached_property
    def highest(self) -> int:
        """The most bytes at any point, reserved ones included."""
        return max(max(each.total, each.reserved or 0) for stretch in self.stretches for each in stretch.points)

    @property
    def has_reserved(self) -> bool:
        """Whether it is known what is reserved."""
        return self.stretches[0].points[0].reserved is not None

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data: of each phase, a list of moments, lists of bytes by kind, and of reserved bytes."""
        return {"device": self.device, "kinds": list(self.kinds), "phases": [_stretch_json(each) for each in self.stretches]}


def _stretch_json(stretch: Stretch) -> dict[str, Any]:
    points = stretch.points
    columns = [list(column) for column in zip(*(point.held for point in points), strict=True)]
    found = {"phase": stretch.phase, "moments": stretch.moments, "at": [point.at for point in points], "bytes": columns}
    return found if points[0].reserved is None else found | {"reserved": [point.reserved for point in points]}


# -- of a run -----------------------------------------------------------------------------------------------------------


def series_of_run(run: Timeline, device: str, reserved: Sequence[int] | None = None, points: int = POINTS) -> Series:
    """What a run holds on a device; `reserved` are bytes before its first moment and after each (`ReplayedRun.reserved`).

    >>> from .allocations import START, STEP, Allocation, Moment
    >>> weight, gradient = Allocation("parameter", 24, "cpu"), Allocation("gradient", 8, "cpu")
    >>> run = Timeline((weight, gradient), (Moment(START, 0, True), Moment(STEP, 1, True)))
    >>> [(each.phase, each.peak.held) for each in series_of_run(run, "cpu").stretches]
    [('start', (24, 0)), ('step', (24, 8))]
    """
    bounds = _bounds(run)
    kinds, numbers, changes = _changes(run, device)
    totals = _summed(changes)
    held = None if reserved is None else np.asarray(reserved, dtype=np.int64)
    kept = [_kept(totals[first : last + 1], held, first, _share(last - first, len(changes), points)) for _, first, last in bounds]
    columns = [_summed(np.where(numbers == number, changes, 0)) for number in range(len(kinds))]
    stretches = (
        Stretch(phase, last - first, tuple(_points(at, columns, held)))
        for (phase, first, last), at in zip(bounds, kept, strict=True)
    )
    return Series(device, kinds, tuple(stretches))


def _bounds(run: Timeline) -> list[tuple[str, int, int]]:
    """Each phase with how many moments were before it, and up to its end."""
    found, at = [], 0
    for phase, moments in run.by_phase():
        first, at = at, at + sum(1 for _ in moments)
        found.append((phase, first, at))
    return found


def _changes(run: Timeline, device: str) -> tuple[tuple[str, ...], Bytes, Bytes]:
    """The kinds that there are on the device; for each moment, the kind's number, and the bytes that come or go."""
    present = {each.kind for each in run.allocations if each.device == device and each.nbytes}
    kinds = tuple(kind for kind in get_args(Kind) if kind in present)
    places = {kind: number for number, kind in enumerate(kinds)}
    number = np.array([places.get(each.kind, -1) for each in run.allocations], dtype=np.int64)
    nbytes = np.array([each.nbytes * (each.device == device) for each in run.allocations], dtype=np.int64)
    of = np.fromiter((moment.allocation for moment in run.moments), np.int64, len(run.moments))
    sign = np.fromiter((1 if moment.born else -1 for moment in run.moments), np.int64, len(run.moments))
    return kinds, number[of], nbytes[of] * sign


def _summed(changes: Bytes) -> Bytes:
    """Running sums, before the first change and after each."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(changes)])


def _share(moments: int, of: int, points: int) -> int:
    return max(_LEAST, points * moments // max(of, 1))


def _kept(totals: Bytes, reserved: Bytes | None, first: int, points: int) -> list[int]:
    """The places in `totals`, counted from `first`, that are kept of a phase."""
    if len(totals) <= points:
        return list(range(first, first + len(totals)))
    kept = {0, len(totals) - 1}
    if reserved is not None:
        kept.add(int(reserved[first : first + len(totals)].argmax()))
    edges = np.linspace(0, len(totals), points // 2 + 1, dtype=np.int64)
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        piece = totals[start:end]
        kept |= {start + int(piece.argmax()), start + int(piece.argmin())}
    return sorted(first + place for place in kept)


def _points(places: Sequence[int], columns: Sequence[Bytes], reserved: Bytes | None) -> Iterator[Point]:
    for at in places:
        yield Point(at, tuple(int(column[at]) for column in columns), None if reserved is None else int(reserved[at]))


# -- of tier T0 ---------------------------------------------------------------------------------------------------------


def series_of_changes(timelines: Mapping[str, Iterable[Change]], device: str, points: int = POINTS) -> Series:
    """What the phases of tier T0 hold on a device: each for itself, beginning with nothing, and of one kind.

    >>> [each.peak.held for each in series_of_changes({"load": [Change("cpu", "a", 8), Change("cpu", "a", -8)]}, "cpu").stretches]
    [(8,)]
    """
    sums = {phase: _summed_changes(changes, device) for phase, changes in timelines.items()}
    of = sum(map(len, sums.values()))
    stretches = []
    for phase, totals in sums.items():
        kept = _kept(totals, None, 0, _share(len(totals), of, points))
        stretches.append(Stretch(phase, len(totals) - 1, tuple(_points(kept, [totals], None))))
    return Series(device, (TENSORS,), tuple(stretches))


def _summed_changes(changes: Iterable[Change], device: str) -> Bytes:
    return _summed(np.array([change.nbytes for change in changes if change.device == device], dtype=np.int64))
