"""A profile put together of several: of the same module and workload, but in each of which the layers do something else.

A layer that repeats may be checkpointed or not. Of a module in which every layer is there is a profile, and of one in which none
is; this makes that of one in which some are, without another trace. In one of layers that repeat (`runtime/profile_blocks.py`)
the first, the last and the last but one have blocks of their own, and one in the middle stands for all others there.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
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
    """Rounds of a run that follow each other and are alike: `count` of them, from `start` on, by the profile's round `traced`."""

    key: Key
    traced: int
    start: int
    count: int


def pieces_of(keys: Sequence[Key]) -> list[Piece[Key]]:
    """The pieces of a run in which round `i` does `keys[i]`.

    A round that follows one that does something else is a piece by itself: FSDP gathers ahead of it what those after it find.

    >>> [(each.key, each.traced, each.start, each.count) for each in pieces_of("aaabbbbb")]
    [('a', 0, 0, 1), ('a', 1, 1, 2), ('b', 1, 3, 1), ('b', 1, 4, 2), ('b', 2, 6, 1), ('b', 3, 7, 1)]
    """
    last = len(keys) - 1
    found = [Piece(keys[0], 0, 0, 1)]
    at = 1
    for key, same in groupby(keys[1 : last - 1]):
        count = len(list(same))
        alone = int(key != keys[at - 1])
        found += [Piece(key, 1, start, each) for start, each in ((at, alone), (at + alone, count - alone)) if each]
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
    """Blocks of several profiles in a row, with one table of all the allocations that they speak of."""

    def __init__(self, profiles: Mapping[Key, Profile], pieces: Sequence[Sequence[Piece[Key]]]) -> None:
        self.outer = next(iter(profiles.values()))
        self._pieces = pieces
        self._profiles = profiles
        self._allocations: list[Allocation] = []
        self._places: dict[object, int] = {}
        self._names = {(run, each): self._called(run, each) for run, several in enumerate(pieces) for each in several}

    def profile(self) -> Profile:
        outer = self.outer
        repeated = tuple(
            Repeated(run.layers, run.period, tuple((each.start, range(each.start, each.start + each.count)) for each in pieces))
            for run, pieces in zip(outer.repeated, self._pieces, strict=True)
        )
        blocks = tuple(self._blocks())
        return replace(outer, allocations=tuple(self._allocations), blocks=blocks, repeated=repeated, early=self._early())

    def _early(self) -> frozenset[str]:
        """Modules outside the layers, and in them by the pieces that these are in."""
        outside = {name for name in self.outer.early if self.outer.class_of(name) == name}
        inside = (
            _renamed(name, names)
            for (_, piece), names in self._names.items()
            for name in self._profiles[piece.key].early
            if _layer_of(name, names) is not None
        )
        return frozenset(outside.union(inside))

    def _called(self, number: int, piece: Piece[Key]) -> dict[str, str]:
        """What the layers of the profile's round are called in a piece: by its first round, so that no two have one name."""
        run = self.outer.repeated[number]
        traced = len(run.layers) // run.period - 1 if piece.traced == TRACED - 1 else piece.traced
        places = range(run.period)
        return {run.layers[traced * run.period + each]: run.layers[piece.start * run.period + each] for each in places}

    # -- blocks ---------------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[Block]:
        for index, of in enumerate(places_of(self.outer)):
            pieces = [each for each in self._pieces[of.run] if each.traced == of.traced]
            if not of.inside:
                yield self._block(of.run, pieces[-1 if of.forward else 0], index, 1)
                continue
            for piece in pieces if of.forward else reversed(pieces):
                yield self._block(of.run, piece, index, piece.count)

    def _block(self, run: int, piece: Piece[Key], index: int, times: int) -> Block:
        block = self._profiles[piece.key].blocks[index]
        return Block(times, tuple(self._part(part, run, piece) for part in block.parts), block.run)

    def _part(self, part: Mark | Stretch, run: int, piece: Piece[Key]) -> Mark | Stretch:
        if isinstance(part, Mark):
            return replace(part, unit=_renamed(part.unit, self._names[run, piece]))
        events = (Event(self._place(each.allocation, run, piece), each.count) for each in part.events)
        return replace(part, events=tuple(events))

    def _place(self, index: int, run: int, piece: Piece[Key]) -> int:
        """Where an allocation of a profile is in the table, as a piece speaks of it."""
        known = (index, run, piece)
        if known not in self._places:
            self._places[known] = self._added(index, piece.key, self._names[run, piece])
        return self._places[known]

    def _added(self, index: int, key: Key, names: Mapping[str, str]) -> int:
        """A gradient has one place, whichever profile it is of; so has what is in no layer of the piece, in each profile."""
        each = self._profiles[key].allocations[index]
        name, module = _renamed(each.name, names), _renamed(each.module, names)
        own = (each.name, each.module) != (name, module)
        place = ("gradient", name) if each.kind == "gradient" else (index, key, name, module)
        if place not in self._places:
            self._places[place] = len(self._allocations)
            self._allocations.append(replace(each, name=name, module=module) if own else each)
        return self._places[place]


def _turn(runs: Sequence[int]) -> int:
    """The place of the first block of the backward: the first of a run that has been there before, with other blocks between."""
    return next(place for place, run in enumerate(runs) if run >= 0 and run != runs[place - 1] and run in runs[:place])


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """A name with the layer that it is in called otherwise."""
    layer = _layer_of(name, names)
    return name if layer is None else names[layer] + name[len(layer) :]


def _layer_of(name: str, layers: Iterable[str]) -> str | None:
    return next((layer for layer in layers if name == layer or name.startswith(f"{layer}.")), None)
