"""A profile put together of several: of the same module and workload, but in each of which the layers do something else.

A layer that repeats may be checkpointed or not. Of a module in which every layer is there is a profile, and of one in which none
is; this makes that of one in which some are, without another trace. In a profile of layers that repeat (`runtime/profile_blocks.py`)
the first, the last and the last but one have blocks of their own, and one in the middle stands for all others there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Generic, TypeVar

from .allocations import Allocation
from .profile import Block, Event, Mark, Profile, Repeated, Stretch, net_of, stretch

TRACED = 4
"""Rounds of a run that a profile has blocks of: the first, one in the middle, the last but one, the last."""

Key = TypeVar("Key", bound=Hashable)
"""What tells apart what layers may do."""


class NoMix(Exception):
    """Profiles that cannot be put together, and why."""


@dataclass(frozen=True, slots=True)
class Piece(Generic[Key]):
    """Rounds of a run that follow each other and do the same: `count` of them, from `start` on, by the profile's round `traced`."""

    key: Key
    traced: int
    start: int
    count: int


def pieces_of(keys: Sequence[Key]) -> list[Piece[Key]]:
    """The pieces of a run in which round `i` does `keys[i]`.

    >>> [(each.key, each.traced, each.start, each.count) for each in pieces_of("aaabbb")]
    [('a', 0, 0, 1), ('a', 1, 1, 2), ('b', 1, 3, 1), ('b', 2, 4, 1), ('b', 3, 5, 1)]
    """
    last = len(keys) - 1
    found = [Piece(keys[0], 0, 0, 1)]
    at = 1
    for key, same in groupby(keys[1 : last - 1]):
        count = len(list(same))
        found.append(Piece(key, 1, at, count))
        at += count
    return [*found, Piece(keys[-2], 2, last - 1, 1), Piece(keys[-1], 3, last, 1)]


def rounds_of(profile: Profile) -> list[int]:
    """How many rounds each run of a profile has."""
    return [len(run.layers) // run.period for run in profile.repeated]


def check_mixable(profiles: Mapping[Key, Profile]) -> None:
    """Raise `NoMix` where profiles are not of the same runs in the same order."""
    shapes = {key: [block.run for block in profile.blocks] for key, profile in profiles.items()}
    first = next(iter(profiles))
    if not profiles[first].repeated:
        raise NoMix("no layers repeat often enough")
    for key, profile in profiles.items():
        if shapes[key] != shapes[first] or profile.repeated != profiles[first].repeated:
            raise NoMix(f"layers run in another order with {key} than with {first}")


def mixed(profiles: Mapping[Key, Profile], keys: Sequence[Sequence[Key]]) -> Profile:
    """The profile of a module in which round `i` of run `r` does `keys[r][i]`, by the profile of that key.

    What is beside a run is by the profile of the layer there. Raises `NoMix` where the profiles differ in more than what layers
    keep.
    """
    check_mixable(profiles)
    used = {key: profile for key, profile in profiles.items() if any(key in each for each in keys)}
    made = _Mixed(used, [pieces_of(each) for each in keys])
    return _evened(made.profile(), made.outer)


def _evened(found: Profile, pure: Profile) -> Profile:
    """The same, where forward ends, with what its last layers let go there and its first ones still need, or the other way round.

    What goes into the first layer, for example, is let go by a forward without checkpoints; checkpointed, that layer keeps it.
    """
    off = _left(found) - _left(pure)
    if not off:
        return found
    if abs(off) > max(abs(net_of(block)) for block in found.blocks if block.run >= 0):
        raise NoMix(f"{abs(off)} bytes do not come out even")
    turn = _turn([block.run for block in found.blocks]) - 1
    extra = Allocation("activation", abs(off), found.allocations[0].device)
    allocations = (*found.allocations, extra)
    kept = stretch([Event(len(found.allocations), -1 if off > 0 else 1)], allocations)
    middle = replace(found.blocks[turn], parts=(kept, *found.blocks[turn].parts))
    return replace(found, allocations=allocations, blocks=(*found.blocks[:turn], middle, *found.blocks[turn + 1 :]))


def _left(profile: Profile) -> int:
    return sum(block.times * net_of(block) for block in profile.blocks)


@dataclass(frozen=True, slots=True)
class Place:
    """What a block of a profile is of: a round of a run, by `traced`; or, if not `inside`, what is beside that round."""

    run: int
    traced: int
    forward: bool
    inside: bool


def places_of(profile: Profile) -> list[Place]:
    """What each block of a profile is of. What comes before all runs, and after all, is beside the first round of the first."""
    runs = [block.run for block in profile.blocks]
    turn, seen = _turn(runs), [0] * len(profile.repeated)
    found = []
    for place, run in enumerate(runs):
        forward = place < turn
        if run >= 0:
            traced = seen[run] if forward else 2 * TRACED - 1 - seen[run]
            seen[run] += 1
            found.append(Place(run, traced, forward, inside=True))
        else:
            beside = [each for each in (reversed(runs[:place]) if forward else runs[place:]) if each >= 0]
            found.append(Place(*((beside[0], TRACED - 1) if beside else (0, 0)), forward, inside=False))
    return found


class _Mixed(Generic[Key]):
    """Profiles side by side in one table of allocations, each with names of its own."""

    def __init__(self, profiles: Mapping[Key, Profile], pieces: Sequence[Sequence[Piece[Key]]]) -> None:
        self.outer = next(iter(profiles.values()))
        self._pieces = pieces
        self._profiles = profiles
        self._allocations: list[Allocation] = []
        self._first: dict[Key, int] = {}
        self._renamed: dict[Key, dict[str, str]] = {}
        for key, profile in profiles.items():
            self._first[key] = len(self._allocations)
            self._renamed[key] = self._names(key)
            self._allocations += [self._of_key(each, self._renamed[key]) for each in profile.allocations]

    def profile(self) -> Profile:
        outer = self.outer
        early = {self._rename(name, key) for key, profile in self._profiles.items() for name in profile.early}
        repeated = tuple(
            Repeated(run.layers, run.period, tuple((each.start, range(each.start, each.start + each.count)) for each in pieces))
            for run, pieces in zip(outer.repeated, self._pieces, strict=True)
        )
        return replace(
            outer,
            allocations=tuple(self._allocations),
            blocks=tuple(self._blocks()),
            repeated=repeated,
            early=frozenset(early),
        )

    # -- names ----------------------------------------------------------------------------------------------------------

    def _names(self, key: Key) -> dict[str, str]:
        """What the layers of a key's blocks are called: by the first round of each piece, so that no two have one name."""
        found: dict[str, str] = {}
        for run, pieces in zip(self.outer.repeated, self._pieces, strict=True):
            last = len(run.layers) // run.period - 1
            for piece in (each for each in pieces if each.key == key):
                traced = last if piece.traced == TRACED - 1 else piece.traced
                for place in range(run.period):
                    named, layer = run.layers[traced * run.period + place], run.layers[piece.start * run.period + place]
                    found.setdefault(named, layer)
        return found

    def _rename(self, name: str, key: Key) -> str:
        return _renamed(name, self._renamed[key])

    @staticmethod
    def _of_key(each: Allocation, names: Mapping[str, str]) -> Allocation:
        name, module = _renamed(each.name, names), _renamed(each.module, names)
        return each if (name, module) == (each.name, each.module) else replace(each, name=name, module=module)

    # -- blocks ---------------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[Block]:
        for place, of in enumerate(places_of(self.outer)):
            pieces = [each for each in self._pieces[of.run] if each.traced == of.traced]
            for piece in pieces if of.forward else reversed(pieces):
                yield self._block(piece.key, place, piece.count if of.inside else 1)

    def _block(self, key: Key, place: int, times: int) -> Block:
        block = self._profiles[key].blocks[place]
        return Block(times, tuple(self._part(part, key) for part in block.parts), block.run)

    def _part(self, part: Mark | Stretch, key: Key) -> Mark | Stretch:
        if isinstance(part, Mark):
            return replace(part, unit=self._rename(part.unit, key))
        first = self._first[key]
        return replace(part, events=tuple(Event(each.allocation + first, each.count) for each in part.events))


def _turn(runs: Sequence[int]) -> int:
    """The place of the first block of the backward: the first of a run that has been there before, with other blocks between."""
    return next(place for place, run in enumerate(runs) if run >= 0 and run != runs[place - 1] and run in runs[:place])


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A name with the layer that it is in called otherwise."""
    for layer, other in names.items():
        if name == layer or name.startswith(f"{layer}."):
            return other + name[len(layer) :]
    return name
