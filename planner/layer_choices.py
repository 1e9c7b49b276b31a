"""What each layer that repeats may do, as the mixed-integer program (`choices.py`) takes it: seconds, and bytes at each moment.

From steps in which every layer does the same (`Pure`) it is known how far each block raises the running sum, and where it leaves
it. The blocks of a step in which layers do different things are the same, in the order of `mixed.mixed`; so what is there at any
moment of it is linear in how many layers do what. A moment is the highest point within one block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from .choices import Choice, Chosen, LayerClass
from .mixed import TRACED, Key, Place, places_of, rounds_of
from .profile import Profile
from .step_form import Script, rise_and_net


_LATER = 1e-9
"""The share of its time by which a round is dearer: among choices that cost the same, those that keep least go to the first layers."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The scripts of a micro-batch, the first or a later one, whose gradients are `added` to those that are there."""

    scripts: Sequence[Script]
    added: bool = False


@dataclass(frozen=True, slots=True)
class Pure:
    """A step in which every layer does the same: its profile, its passes, and the seconds of each of the profile's blocks.

    `edge` are the seconds that come on top where the step begins and ends (`block_time.edges`), which the first layer bears.
    """

    profile: Profile
    passes: tuple[Pass, ...]
    seconds: Sequence[float]
    edge: float = 0.0


@dataclass(frozen=True, slots=True)
class _Item(Generic[Key]):
    """A block in one of its forms: how far it raises the running sum, and where it leaves it."""

    moment: str
    place: Place
    key: Key
    rise: int
    net: int


def layer_classes(pure: Mapping[Key, Pure]) -> list[LayerClass]:
    """The classes of layers: of each run the first round, those in the middle, the last but one and the last, in that order.

    Each may do what any of `pure` does, in their order, which is that of the layers as well: those that do the first come first.
    """
    profile = next(iter(pure.values())).profile
    items = [list(_items(pure, number)) for number in range(len(next(iter(pure.values())).passes))]
    return [
        LayerClass(
            f"round {traced} of run {run}",
            count,
            tuple(_choice(pure, key, run, traced, items) for key in pure),
        )
        for run, rounds in enumerate(rounds_of(profile))
        for traced, count in enumerate((1, rounds - TRACED + 1, 1, 1))
    ]


def moments(classes: Sequence[LayerClass]) -> list[str]:
    """Every moment that a choice says something of."""
    return list(dict.fromkeys(moment for each in classes for choice in each.choices for moment in choice.held))


def keys_chosen(chosen: Chosen, keys: Sequence[Key]) -> list[list[Key]]:
    """What each round of each run does: `mixed.mixed`'s `keys`."""
    spread = [[key for key, count in zip(keys, counts, strict=True) for _ in range(count)] for counts in chosen.counts]
    return [[key for each in spread[first : first + TRACED] for key in each] for first in range(0, len(spread), TRACED)]


def _items(pure: Mapping[Key, Pure], number: int) -> Iterator[_Item[Key]]:
    """All blocks in all their forms, in order; only one form of each is there, but of those in the middle."""
    keys = list(pure)
    for index, place in enumerate(places_of(pure[keys[0]].profile)):
        for key in keys if place.forward else reversed(keys):
            found = pure[key].passes[number]
            rise, net = rise_and_net(found.scripts[index], found.added)
            yield _Item(f"{number}:{index}:{key}", place, key, rise, net)


def _choice(pure: Mapping[Key, Pure], key: Key, run: int, traced: int, passes: Sequence[Sequence[_Item[Key]]]) -> Choice:
    """A form of a round, with what is beside it: what each such round holds at every moment, and what one needs in its own."""
    held: dict[str, int] = {}
    needed: dict[str, int] = {}
    for items in passes:
        level = 0
        for item in items:
            if (item.place.run, item.place.traced, item.key) != (run, traced, key):
                held[item.moment] = level
                continue
            held[item.moment] = level + max(item.net, 0)
            needed[item.moment] = item.rise - max(item.net, 0)
            level += item.net
    places = places_of(pure[key].profile)
    own = [index for index, place in enumerate(places) if (place.run, place.traced) == (run, traced)]
    seconds = sum(pure[key].seconds[index] for index in own) + (pure[key].edge if run == traced == 0 else 0.0)
    return Choice(str(key), seconds * (1 + _LATER * (traced - list(pure).index(key) * (traced > 1))), held, needed)
