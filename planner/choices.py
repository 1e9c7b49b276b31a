"""Which choice for how many layers of each class costs least within a budget of bytes: a mixed-integer program, by HiGHS.

Layers of a class are alike, so that only how many of them take a choice matters, not which. At each *moment* (the end of the
forward, the beginning or the end of the backward, inside the optimizer) the bytes are those of a base, of all layers as they
have chosen, and of the one layer that then needs most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from ..tracer.errors import DecisionError

_SLACK = 1e-6  # the share of a budget by which HiGHS may be over it, as it counts to about seven digits
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Choice:
    """What a layer may do: its cost in seconds; at each moment bytes that each such layer holds, and that one needs besides."""

    name: str
    seconds: float
    held: Mapping[str, int] = field(default_factory=dict)
    needed: Mapping[str, int] = field(default_factory=dict)


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
    taken = [
        (number, choice)
        for each, of in zip(classes, counts, strict=True)
        for number, choice in zip(of, each.choices, strict=True)
    ]
    everything = {moment: 0 for _, choice in taken for moment in (*choice.held, *choice.needed)} | dict(base)
    return {
        moment: nbytes
        + sum(number * choice.held.get(moment, 0) for number, choice in taken)
        + max((choice.needed.get(moment, 0) for number, choice in taken if number), default=0)
        for moment, nbytes in everything.items()
    }


class _Program:
    """Variables: for each choice how many layers take it, and whether any does; for each moment what one layer needs besides."""

    def __init__(self, classes: Sequence[LayerClass], base: Mapping[str, int], budget: Mapping[str, int]) -> None:
        self._classes = classes
        self._choices = [(each, choice) for each in classes for choice in each.choices]
        self._moments = list(budget)
        count = len(self._choices)
        self.size = 2 * count + len(self._moments)
        self.costs = np.array([choice.seconds for _, choice in self._choices] + [0.0] * (count + len(self._moments)))
        self.integral = np.array([1] * (2 * count) + [0] * len(self._moments))
        self.most = np.array([each.count for each, _ in self._choices] + [1] * count + [np.inf] * len(self._moments))
        self.rows: list[np.ndarray] = []
        self.low: list[float] = []
        self.high: list[float] = []
        self._add_counts()
        self._add_moments(base, budget)

    def counts(self, found: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """The numbers of layers in a solution."""
        numbers = iter(round(float(value)) for value in found)
        return tuple(tuple(next(numbers) for _ in each.choices) for each in self._classes)

    def _add(self, low: float, high: float) -> np.ndarray:
        self.rows.append(np.zeros(self.size))
        self.low.append(low)
        self.high.append(high)
        return self.rows[-1]

    def _add_counts(self) -> None:
        """All layers of a class take some choice; none takes one that is not taken at all."""
        for each in self._classes:
            row = self._add(each.count, each.count)
            row[[index for index, (of, _) in enumerate(self._choices) if of is each]] = 1
        for index, (of, _) in enumerate(self._choices):
            row = self._add(-np.inf, 0)
            row[index], row[len(self._choices) + index] = 1, -of.count

    def _add_moments(self, base: Mapping[str, int], budget: Mapping[str, int]) -> None:
        count = len(self._choices)
        for number, moment in enumerate(self._moments, 2 * count):
            unit = max(abs(budget[moment]), 1)
            row = self._add(-np.inf, (budget[moment] - base.get(moment, 0)) / unit)
            row[:count] = [choice.held.get(moment, 0) / unit for _, choice in self._choices]
            row[number] = 1
            for index, (_, choice) in enumerate(self._choices):
                if choice.needed.get(moment, 0):
                    at_least = self._add(0, np.inf)
                    at_least[number], at_least[count + index] = 1, -choice.needed[moment] / unit
