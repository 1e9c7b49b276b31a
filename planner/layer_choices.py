"""What each layer that repeats may do, as the mixed-integer program (`choices.py`) takes it: seconds, and bytes at each moment.

From steps in which every layer does the same (`Pure`) it is known how far each block raises the running sum, and where it leaves
it. The blocks of a step in which layers do different things are the same, in the order of `mixed.mixed`; so what is there at any
moment of it is linear in how many layers do what. A moment is the highest point within one block.

But for one thing: FSDP gathers, in a layer's backward, the parameters of the layer before it, if that does not have them still.
Such a buffer counts for the layer that it is of. It is there from the backward of the layer after it (`Choice.ahead`) to its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic

from .choices import Choice, Chosen, LayerClass
from .mixed import TRACED, Key, Place, places_of, rounds_of
from .profile import Profile
from .step_form import Script, rise_and_net

_MIDDLE = 1
"""The profile's round that stands for those in the middle."""

_LATER = 1e-9
"""The share of its time by which a round is dearer: of choices that cost the same, what keeps least goes to the first layers."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The scripts of a micro-batch, the first or a later one, whose gradients are `added` to those that are there.

    `base` are the bytes of those. Where layers differ in whether they stay gathered, `other` are the scripts in which the layers
    before are the other way.
    """

    scripts: Sequence[Script]
    added: bool = False
    other: Sequence[Script] = ()
    base: int = 0


@dataclass(frozen=True, slots=True)
class Pure:
    """A step in which every layer does the same: its profile, its passes, and the seconds of each of the profile's blocks.

    `edge` are the seconds that come on top where the step begins and ends (`block_time.edges`), which the first layer bears.
    `gathered` says that its layers stay so after their forward.
    """

    profile: Profile
    passes: tuple[Pass, ...]
    seconds: Sequence[float]
    edge: float = 0.0
    gathered: bool = False


@dataclass(frozen=True, slots=True)
class _Item(Generic[Key]):
    """A block in one of its forms: how far it raises the running sum, and where it leaves it, if it gathers nothing ahead.

    With what it gathers for the layer before it, it raises the sum by `ahead` more, and leaves it by `fetched` higher.
    """

    moment: str
    place: Place
    key: Key
    rise: int
    net: int
    ahead: int = 0
    fetched: int = 0


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


def bases(classes: Sequence[LayerClass], passes: Sequence[Pass]) -> dict[str, int]:
    """Every moment that a choice says something of, with what is there before the layers come."""
    moments = dict.fromkeys(moment for each in classes for choice in each.choices for moment in choice.held)
    return {moment: passes[int(moment.partition(":")[0])].base for moment in moments}


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
            moment = f"{number}:{index}:{key}"
            if not found.other or place.forward or not place.inside:
                yield _Item(moment, place, key, rise, net)
                continue
            other = rise_and_net(found.other[index], found.added)
            alone, ahead = ((rise, net), other) if pure[key].gathered else (other, (rise, net))
            yield _Item(moment, place, key, *alone, ahead[0] - alone[0], ahead[1] - alone[1])


def _choice(pure: Mapping[Key, Pure], key: Key, run: int, traced: int, passes: Sequence[Sequence[_Item[Key]]]) -> Choice:
    """A form of a round, with what is beside it: what each such round holds at every moment, and what one needs in its own."""
    found = _Bytes()
    for items in passes:
        _add_bytes(found, items, (run, traced, key), fetched=not pure[key].gathered)
    places = places_of(pure[key].profile)
    own = [index for index, place in enumerate(places) if (place.run, place.traced) == (run, traced)]
    seconds = sum(pure[key].seconds[index] for index in own) + (pure[key].edge if run == traced == 0 else 0.0)
    seconds *= 1 + _LATER * (traced - list(pure).index(key) * (traced > 1))
    return Choice(str(key), seconds, found.held, found.needed, found.between, found.ahead, not pure[key].gathered)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Of a choice: bytes by moment."""

    held: dict[str, int] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)
    between: dict[str, int] = field(default_factory=dict)
    ahead: dict[str, int] = field(default_factory=dict)


def _add_bytes(found: _Bytes, items: Sequence[_Item[Key]], own: tuple[int, int, Key], fetched: bool) -> None:
    """Those of a round in one micro-batch; its buffer, if it is `fetched` ahead, comes in the block of the round after it."""
    level = buffer = 0
    for item in items:
        comes = item.fetched if fetched and _follows(item.place, *own[:2]) else 0
        if (item.place.run, item.place.traced, item.key) != own:
            found.held[item.moment] = level + (0 if comes or own[1] == _MIDDLE else buffer)
            if _has_border(item):
                found.held[_between(item)] = level
        elif _has_border(item):
            level += _add_in_the_middle(found, item, level, buffer)
            buffer = 0
        else:
            found.held[item.moment] = level + buffer + max(item.net, 0)
            found.needed[item.moment] = item.rise - max(item.net, 0)
            found.ahead[item.moment] = item.ahead
            level, buffer = level + buffer + item.net, 0
        buffer = comes or buffer


def _add_in_the_middle(found: _Bytes, item: _Item[Key], level: int, buffer: int) -> int:
    """Those in the block of a round in the middle, the first of which may follow another kind; what each round leaves."""
    net = item.net + buffer
    needed = buffer + item.rise
    found.held[item.moment], found.held[_between(item)] = level + net, level + max(net, 0)
    found.needed[item.moment], found.ahead[item.moment] = needed - net, item.ahead
    found.between[_between(item)] = needed + (item.ahead if buffer else 0) - 2 * max(net, 0)
    return net


def _follows(place: Place, run: int, traced: int) -> bool:
    """Whether it is the backward of the round after that one."""
    after = (run, traced + 1) if traced + 1 < TRACED else (run + 1, 0)
    return place.inside and not place.forward and (place.run, place.traced) == after


def _has_border(item: _Item[Key]) -> bool:
    """Whether a round in the middle needs something else where it follows one of another kind."""
    return item.place.inside and item.place.traced == _MIDDLE and item.fetched > 0


def _between(item: _Item[Key]) -> str:
    """The moment within a round that follows one of the same kind."""
    return f"{item.moment}:between"
