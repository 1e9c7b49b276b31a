"""Repeated layers on one line: `layers.{0-125}.self_attn.q_proj.weight` for 126 names that differ in a number only."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:(?<=\.)|(?<=\[)|(?<== )|^)(\d+)(?=[\].]| =|$)")
"""A number that is a whole component of a name: `layers.3.weight`, `tables[3]`."""

_SHOWN_RUNS = 6

Indices = tuple[int, ...]
Product = tuple[frozenset[int], ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Names that are the same but for their numbers, and all of the combinations of those: `name` says which."""

    name: str
    members: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.members)


def fold_names(names: Sequence[str], keys: Sequence[Hashable] | None = None, together: bool = False) -> list[Fold]:
    """Fold the names that differ only in numbers and have equal keys, in the order of their first members.

    `members` are positions in `names`. With `together`, numbers that are equal within each name of a fold count as one, so that
    `a.0 = b.0` and `a.1 = b.1` fold to `a.{0-1} = b.{0-1}`. Linear time but for sorting.

    >>> [fold.name for fold in fold_names(["a.0.w", "a.1.w", "a.2.b", "a.4.w"])]
    ['a.{0-1,4}.w', 'a.2.b']
    """
    groups: dict[tuple[str, Hashable, Indices], dict[Indices, list[int]]] = {}
    for position, name in enumerate(names):
        parts = _NUMBER.split(name)
        indices = tuple(map(int, parts[1::2]))
        pattern = tuple(map(indices.index, indices)) if together else tuple(range(len(indices)))
        own = tuple(each for at, each in enumerate(indices) if pattern[at] == at) if together else indices
        key = ("\0".join(parts[::2]), keys[position] if keys else None, pattern)
        groups.setdefault(key, {}).setdefault(own, []).append(position)
    folds = [fold for (template, _, pattern), group in groups.items() for fold in _folded(template, pattern, group)]
    return sorted(folds, key=lambda fold: fold.members[0])


def _folded(template: str, pattern: Indices, group: dict[Indices, list[int]]) -> Iterator[Fold]:
    own = sorted(set(pattern))
    for product in _products(list(group)):
        members = sorted(position for indices in _combinations(product) for position in group[indices])
        numbers = [_runs(product[own.index(at)]) for at in pattern]
        yield Fold(_filled(template, numbers), tuple(members))


def _filled(template: str, numbers: Sequence[str]) -> str:
    parts = template.split("\0")
    return "".join(part + number for part, number in zip(parts, [*numbers, ""], strict=True))


def _products(tuples: Sequence[Indices]) -> list[Product]:
    """The tuples as a disjoint union of products of sets: exactly these tuples, no other combination."""
    if not tuples[0]:
        return [()]
    rest: dict[int, list[Indices]] = {}
    for first, *others in tuples:
        rest.setdefault(first, []).append(tuple(others))
    alike: dict[tuple[Product, ...], list[int]] = {}
    for first, tails in rest.items():
        alike.setdefault(tuple(_products(tails)), []).append(first)
    return [(frozenset(firsts), *product) for products, firsts in alike.items() for product in products]


def _combinations(product: Product) -> Iterator[Indices]:
    if not product:
        yield ()
        return
    for first in product[0]:
        for rest in _combinations(product[1:]):
            yield first, *rest


def _runs(numbers: Iterable[int]) -> str:
    """A set of numbers: `3`, or `{0-2,5}`; long ones lose their middle."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    texts = ["-".join(str(end) for end in run) for run in runs]
    if len(texts) > _SHOWN_RUNS:
        texts = [*texts[: _SHOWN_RUNS - 2], "…", texts[-1]]
    return texts[0] if len(runs) == 1 and len(runs[0]) == 1 else f"{{{','.join(texts)}}}"
