"""Things of a few kinds: what is alike is looked at once, however many there are of it.

Layers repeat, so that the thousand tensors of a module are of some ten kinds. What is to be known of each is worked out for its
kind, and then put down for all of them as a column of numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar, cast

import numpy as np

from .changes import Changes, Ints, Names, names_of


class _OnDevice(Protocol):
    @property
    def device(self) -> str: ...


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Alike(Generic[T]):
    """Named things in their order: the kinds that there are, and for each thing the number of its kind.

    >>> found = alike([("embed", 100), ("layers.0", 7), ("layers.1", 7)])
    >>> found.kinds, found.of.tolist(), found.column(lambda size: 2 * size).tolist()
    ((100, 7), [0, 1, 1], [200, 14, 14])
    """

    kinds: tuple[T, ...]
    of: Ints
    names: Names

    def __len__(self) -> int:
        return len(self.of)

    @property
    def each(self) -> list[T]:
        """Every thing's kind."""
        kinds = self.kinds
        return [kinds[number] for number in self.of.tolist()]

    def column(self, number: Callable[[T], int]) -> Ints:
        """A number of each thing."""
        return np.array([number(kind) for kind in self.kinds], dtype=np.int64)[self.of]

    def to(self, other: Callable[[T], U | None]) -> Alike[U]:
        """The same things as what each kind becomes; those are left out that become nothing."""
        made = tuple(other(kind) for kind in self.kinds)
        here = np.array([kind is not None for kind in made], dtype=bool)
        every = Alike(made, self.of, self.names)
        found = every if here.all() else every._only(self.of[here[self.of]], self.names[here[self.of]])
        return cast("Alike[U]", found)

    def named(self, names: Iterable[str]) -> Alike[T]:
        """Those things that have one of the names, in the same order."""
        wanted = frozenset(names)
        here = np.fromiter((name in wanted for name in self.names.tolist()), dtype=bool, count=len(self))
        return self if here.all() else self._only(self.of[here], self.names[here])

    def _only(self, of: Ints, names: Names) -> Alike[T]:
        """Some of the things, with those of the kinds that there are of them, in the order in which they occur."""
        numbers, firsts = np.unique(of, return_index=True)
        left = numbers[np.argsort(firsts)]
        places = np.full(len(self.kinds), -1, dtype=np.int64)
        places[left] = np.arange(len(left))
        return Alike(tuple(self.kinds[number] for number in left.tolist()), places[of], names)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each thing's kind, by name."""
        return dict(zip(self.names.tolist(), self.of.tolist(), strict=True))


H = TypeVar("H", bound=Hashable)
D = TypeVar("D", bound=_OnDevice)


def alike(things: Iterable[tuple[str, H]]) -> Alike[H]:
    """Names with what each is; what is equal is of one kind, in the order in which kinds occur."""
    kinds: dict[H, int] = {}
    names, of = [], []
    for name, thing in things:
        names.append(name)
        of.append(kinds.setdefault(thing, len(kinds)))
    return Alike(tuple(kinds), np.array(of, dtype=np.int64), names_of(names))


def changes_of(things: Alike[D], *nbytes: Callable[[D], int]) -> Changes:
    """The changes that each thing makes on its device, one after the other; several of one thing follow one another.

    >>> from .optimizer import Trained
    >>> import torch
    >>> weights = alike([("a", Trained("cpu", (2,), torch.float32)), ("b", Trained("cpu", (3,), torch.float32))])
    >>> [each.nbytes for each in changes_of(weights, lambda each: each.nbytes, lambda each: -each.nbytes)]
    [8, -8, 12, -12]
    """
    columns = [things.column(number) for number in nbytes]
    many = len(columns)
    joined = columns[0] if many == 1 else np.stack(columns, axis=1).ravel()
    names, of = (things.names, things.of) if many == 1 else (np.repeat(things.names, many), np.repeat(things.of, many))
    return Changes.of_columns([kind.device for kind in things.kinds], of, names, joined)
