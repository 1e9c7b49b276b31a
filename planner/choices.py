"""Which choice for how many layers of each class costs least within a budget of bytes: a mixed-integer program, by HiGHS.

Layers of a class are alike, so that only how many of them take a choice matters, not which: the classes follow each other, and
within one the layers that take the first choice come first. At each *moment* (the end of the forward, the beginning or the end of
the backward, inside the optimizer) the bytes are those of a base, of all layers as they have chosen, and of the one layer that
then needs most. What that one needs may depend on the layer before it, which is fetched ahead or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ..tracer.errors import DecisionError

_SLACK = 1e-6  # the share of a budget by which HiGHS may be over it, as it counts to about seven digits
_DEAREST = 1000.0  # what the dearest choice costs HiGHS, to which costs that differ by a millionth of 1 are the same
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer may do: its cost in seconds; at each moment bytes that each such layer holds, and that one needs besides.

    `between` is what one needs that follows another of its kind in its class; `ahead` comes on top of `needed` for one that
    follows a layer that is `fetched` ahead.
    """

    name: str
    seconds: float
    held: Mapping[str, int] = field(default_factory=dict)
    needed: Mapping[str, int] = field(default_factory=dict)
    between: Mapping[str, int] = field(default_factory=dict)
    ahead: Mapping[str, int] = field(default_factory=dict)
    fetched: bool = False


@dataclass(frozen=True, slots=True)
class LayerClass:
    """`count` layers that are alike, and the choices that each of them has."""

    name: str
    count: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Chosen:
    """How many layers of each class take each of its choices, what that costs in seconds, and whether less is impossible."""

    counts: tuple[tuple[int, ...], ...]
    seconds: float
    proven: bool


def choose(
    classes: Sequence[LayerClass], base: Mapping[str, int], budget: Mapping[str, int], time_limit: float | None = None
) -> Chosen | None:
    """The cheapest choices with which every moment stays within its budget; None where there are none.

    Within `time_limit` seconds the best that was found (`proven` says whether it is known to be the best); raises
    `DecisionError` where that is not enough to find any.

    >>> keep, again = Choice("keep", 0.0, {"backward": 8}), Choice("run again", 1.0, {"backward": 1}, {"backward": 8})
    >>> choose([LayerClass("layer", 4, (keep, again))], {"backward": 2}, {"backward": 30}).counts
    ((2, 2),)
    """
    found = _solved(_Program(classes, base, budget), classes, time_limit)
    if found is not None and not is_within(bytes_of(classes, found.counts, base), budget):
        less = {moment: int(nbytes - abs(nbytes) * _SLACK) for moment, nbytes in budget.items()}
        found = _solved(_Program(classes, base, less), classes, time_limit)
    return found


def _solved(program: _Program, classes: Sequence[LayerClass], time_limit: float | None) -> Chosen | None:
    options = {} if time_limit is None else {"time_limit": time_limit}
    result = milp(
        program.costs,
        integrality=program.integral,
        bounds=Bounds(np.zeros(program.size), program.most),
        constraints=LinearConstraint(np.array(program.rows), np.array(program.low), np.array(program.high)),
        options={**options, "mip_rel_gap": 0.0},
    )
    if result.x is None:
        if result.status == _INFEASIBLE:
            return None
        raise DecisionError(f"no choice was found ({result.message}); give the search more time")
    counts = program.counts(result.x)
    return Chosen(counts, cost_of(classes, counts), result.status == _OPTIMAL)


def is_within(nbytes: Mapping[str, int], budget: Mapping[str, int]) -> bool:
    """Whether every moment that has a budget stays within it."""
    return all(nbytes.get(moment, 0) <= most for moment, most in budget.items())


def cost_of(classes: Sequence[LayerClass], counts: Sequence[Sequence[int]]) -> float:
    """The seconds of so many layers of each class with each of its choices."""
    pairs = zip(classes, counts, strict=True)
    return sum(number * choice.seconds for each, of in pairs for number, choice in zip(of, each.choices, strict=True))


def bytes_of(classes: Sequence[LayerClass], counts: Sequence[Sequence[int]], base: Mapping[str, int]) -> dict[str, int]:
    """The bytes at every moment of so many layers of each class with each of its choices."""
    pairs = zip(classes, counts, strict=True)
    taken = [(number, choice) for each, of in pairs for number, choice in zip(of, each.choices, strict=True) if number]
    held = dict(base)
    needed: dict[str, int] = {}
    before: Choice | None = None
    for number, choice in taken:
        for moment, nbytes in choice.held.items():
            held[moment] = held.get(moment, 0) + number * nbytes
        ahead = choice.ahead if before is not None and before.fetched else {}
        ones = [{moment: nbytes + ahead.get(moment, 0) for moment, nbytes in choice.needed.items()}]
        for moment, nbytes in (pair for one in (*ones, *([choice.between] if number > 1 else [])) for pair in one.items()):
            needed[moment] = max(needed.get(moment, 0), nbytes)
        before = choice
    return {moment: held.get(moment, 0) + needed.get(moment, 0) for moment in {**held, **needed}}


class _Program:
    """Variables: for each choice how many layers take it, whether any does, whether several do, and whether what the first of
    them follows is fetched ahead; for each moment what one layer needs besides."""

    def __init__(self, classes: Sequence[LayerClass], base: Mapping[str, int], budget: Mapping[str, int]) -> None:
        self._classes = classes
        self._choices = [(each, choice) for each in classes for choice in each.choices]
        self._moments = list(budget)
        count = len(self._choices)
        self._any, self._several, self._follows, needs = (count * number for number in (1, 2, 3, 4))
        self.size = needs + len(self._moments)
        unit = max((abs(choice.seconds) for _, choice in self._choices), default=0.0) / _DEAREST or 1.0
        self.costs = np.array([choice.seconds / unit for _, choice in self._choices] + [0.0] * (self.size - count))
        self.integral = np.array([1] * (3 * count) + [0] * (self.size - 3 * count))
        self.most = np.array([each.count for each, _ in self._choices] + [1] * (3 * count) + [np.inf] * len(self._moments))
        self.rows: list[np.ndarray] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self._add_counts()
        self._add_order()
        for number, moment in enumerate(self._moments, needs):
            self._add_moment(number, moment, base.get(moment, 0), budget[moment])

    def counts(self, found: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """The numbers of layers in a solution."""
        numbers = iter(round(float(value)) for value in found)
        return tuple(tuple(next(numbers) for _ in each.choices) for each in self._classes)

    def _add(self, low: float, high: float, values: Mapping[int, float]) -> np.ndarray:
        row = np.zeros(self.size)
        for index, value in values.items():
            row[index] = value
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)
        return row

    def _add_counts(self) -> None:
        """All layers of a class take some choice; none takes one that is not taken at all, nor any one that is."""
        for each in self._classes:
            self._add(each.count, each.count, {index: 1 for index, (of, _) in enumerate(self._choices) if of is each})
        for index, (of, choice) in enumerate(self._choices):
            self._add(-np.inf, 0, {index: 1, self._any + index: -of.count})
            if not choice.fetched:
                self._add(0, np.inf, {index: 1, self._any + index: -1})
            if choice.between:
                self._add(-np.inf, 1, {index: 1, self._several + index: 1 - of.count})

    def _add_order(self) -> None:
        """A layer follows one that is fetched ahead, where between them none takes a choice by which it is not."""
        for index, (of, choice) in enumerate(self._choices):
            earlier = self._before(index, of) if choice.ahead else []
            for place, other in enumerate(earlier):
                if self._choices[other][1].fetched:
                    apart = {self._any + each: -1.0 for each in earlier[:place] if not self._choices[each][1].fetched}
                    self._add(-np.inf, 0, {self._any + other: 1, self._follows + index: -1, **apart})

    def _before(self, index: int, of: LayerClass) -> list[int]:
        """The choices that the layer before may have taken, the nearest first: of its own class, and of the one before."""
        own = next(place for place, (each, _) in enumerate(self._choices) if each is of)
        above = self._choices[own - 1][0] if own else None
        return [*range(index - 1, own - 1, -1), *(each for each in range(own - 1, -1, -1) if self._choices[each][0] is above)]

    def _add_moment(self, number: int, moment: str, base: int, budget: int) -> None:
        unit = max(abs(budget), 1)
        held = {index: choice.held.get(moment, 0) / unit for index, (_, choice) in enumerate(self._choices)}
        self._add(-np.inf, (budget - base) / unit, {**held, number: 1})
        for index, (_, choice) in enumerate(self._choices):
            needed, ahead = choice.needed.get(moment, 0) / unit, choice.ahead.get(moment, 0) / unit
            if needed or ahead:
                self._add(-ahead, np.inf, {number: 1, self._any + index: -needed - ahead, self._follows + index: -ahead})
            if choice.between.get(moment, 0):
                self._add(0, np.inf, {number: 1, self._several + index: -choice.between[moment] / unit})
