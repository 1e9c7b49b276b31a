"""The mixed-integer program: as cheap as the best of all choices, and within every budget to the byte."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from groundplan.planner.choices import Choice, LayerClass, bytes_of, choose, cost_of, is_within

MOMENTS = ("forward", "backward", "optimizer")


def random_class(chance: random.Random, name: str) -> LayerClass:
    def nbytes() -> dict[str, int]:
        return {moment: chance.randint(0, 10**9) for moment in MOMENTS if chance.random() < 0.7}

    choices = tuple(
        Choice(f"{name}{number}", chance.randint(0, 20) / 16, nbytes(), nbytes()) for number in range(chance.randint(1, 4))
    )
    return LayerClass(name, chance.randint(1, 5), choices)


def every(classes: Sequence[LayerClass]) -> Iterator[tuple[tuple[int, ...], ...]]:
    of_each = [
        [counts for counts in itertools.product(range(each.count + 1), repeat=len(each.choices)) if sum(counts) == each.count]
        for each in classes
    ]
    return itertools.product(*of_each)


@pytest.mark.parametrize("seed", range(200))
def test_nothing_is_cheaper(seed: int) -> None:
    chance = random.Random(seed)
    classes = [random_class(chance, f"class {number}") for number in range(chance.randint(1, 3))]
    base = {moment: chance.randint(0, 10**9) for moment in MOMENTS}
    budget = {moment: chance.randint(10**9, 8 * 10**9) for moment in MOMENTS}
    feasible = (counts for counts in every(classes) if is_within(bytes_of(classes, counts, base), budget))
    best = min((cost_of(classes, counts) for counts in feasible), default=None)
    found = choose(classes, base, budget)
    assert (None if found is None else found.seconds) == best
    if found is not None:
        assert found.proven and [sum(of) for of in found.counts] == [each.count for each in classes]
        assert is_within(bytes_of(classes, found.counts, base), budget)


def test_the_instances_are_of_both_kinds() -> None:
    """One that has an answer, one that has none, and one where the cheapest choices of all are not within the budget."""
    layer = LayerClass(
        "layer", 3, (Choice("keep", 0.0, {"backward": 10}), Choice("again", 1.0, {"backward": 2}, {"backward": 9}))
    )
    assert choose([layer], {}, {"backward": 30}).counts == ((3, 0),)  # type: ignore[union-attr]
    assert choose([layer], {}, {"backward": 15}).counts == ((0, 3),)  # type: ignore[union-attr]
    assert choose([layer], {}, {"backward": 14}) is None
