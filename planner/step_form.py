"""The peak of a forward and backward in closed form: a profile's blocks, with what communication adds between their stretches.

Blocks that happen many times in a row are alike, so that the running sum is linear in the number of times: of each block only the
first and the last need be looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .allocations import Kind
from .profile import Event, Profile, Stretch, Sums


@dataclass(frozen=True, slots=True)
class Extra:
    """Bytes that come (or, with a `count` below 0, go) between two stretches, for what is called `name`."""

    kind: Kind
    name: str
    nbytes: int
    count: int = 1

    def times(self, number: int) -> Extra:
        """So many times as many of it."""
        return Extra(self.kind, self.name, self.nbytes, self.count * number)


@dataclass(frozen=True, slots=True)
class Between:
    """What comes and goes between two stretches, in order, with its sums."""

    steps: tuple[Event | Extra, ...]
    sums: Sums


def between(steps: Iterable[Event | Extra], profile: Profile) -> Between:
    """Steps with their sums."""
    found = tuple(steps)
    now = most = 0
    for step in found:
        now += _size(step, profile)
        most = max(most, now)
    return Between(found, Sums(most, now))


@dataclass(frozen=True, slots=True)
class Script:
    """A part of the step that happens `times` times in a row: stretches of a profile, and what comes and goes between them."""

    times: int
    parts: tuple[Stretch | Between, ...]


class Held(NamedTuple):
    """Bytes that are there at the peak: what they are and what they are of."""

    kind: Kind
    name: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Peak:
    """The highest running sum: in which script, and after how many times of it in full."""

    nbytes: int
    script: int
    times: int


def plain(profile: Profile) -> list[Script]:
    """A profile as it is: nothing is communicated."""
    return [Script(block.times, tuple(part for part in block.parts if isinstance(part, Stretch))) for block in profile.blocks]


def peak_of(scripts: Sequence[Script], added: bool = False) -> Peak:
    """Where most is held; `added` where new gradients are added to old ones, which are not counted."""
    best, level = Peak(0, 0, 0), 0
    for index, script in enumerate(scripts):
        rise, net = rise_and_net(script, added)
        times = 0 if net <= 0 else script.times - 1
        found = level + times * net + rise
        if found > best.nbytes:
            best = Peak(found, index, times)
        level += script.times * net
    return best


def rise_and_net(script: Script, added: bool) -> tuple[int, int]:
    now = most = 0
    for part in script.parts:
        sums = part.sums if isinstance(part, Between) else part.added if added else part.fresh
        most = max(most, now + sums.rise)
        now += sums.net
    return most, now


# -- what is there ------------------------------------------------------------------------------------------------------


def held_at(profile: Profile, scripts: Sequence[Script], peak: Peak, added: bool = False) -> list[Held]:
    """What makes the peak, largest first; of layers that repeat, what each has is put together."""
    counts: Counter[int | Extra] = Counter()
    for script in scripts[: peak.script]:
        _count(profile, script, script.times, added, counts)
    if not scripts:
        return []
    last = scripts[peak.script]
    _count(profile, last, peak.times, added, counts)
    now, rise = 0, rise_and_net(last, added)[0]
    for step in _steps(profile, last, added):
        if now == rise:
            break
        now += _size(step, profile)
        counts[_key(step)] += step.count
    sums: Counter[tuple[Kind, str]] = Counter()
    for key, count in counts.items():
        for held in _of_extra(profile, key, count) if isinstance(key, Extra) else _of_allocation(profile, key, count):
            sums[held.kind, held.name] += held.nbytes
    found = (Held(kind, name, nbytes) for (kind, name), nbytes in sums.items() if nbytes)
    return sorted(found, key=lambda held: -held.nbytes)


def _count(profile: Profile, script: Script, times: int, added: bool, counts: Counter[int | Extra]) -> None:
    for part in script.parts if times else ():
        if isinstance(part, Between):
            for step in part.steps:
                counts[_key(step)] += times * step.count
        else:
            for index, count in part.counts.items():
                goes = added and profile.allocations[index].kind == "gradient"  # at once, into the one that is there
                counts[index] += 0 if goes else times * count


def _key(step: Event | Extra) -> int | Extra:
    return Extra(step.kind, step.name, step.nbytes) if isinstance(step, Extra) else step.allocation


def _steps(profile: Profile, script: Script, added: bool) -> Iterator[Event | Extra]:
    for part in script.parts:
        if isinstance(part, Between):
            yield from part.steps
            continue
        for event in part.events:
            yield event
            if added and profile.allocations[event.allocation].kind == "gradient":
                yield Event(event.allocation, -event.count)


def _size(step: Event | Extra, profile: Profile) -> int:
    return step.count * (step.nbytes if isinstance(step, Extra) else profile.allocations[step.allocation].nbytes)


def _of_extra(profile: Profile, extra: Extra, count: int) -> Iterator[Held]:
    if extra.kind == "gradient" and count > 0:
        yield from (Held(extra.kind, name, extra.nbytes) for name in profile.gradients_of[extra.name][-count:])
    else:
        yield Held(extra.kind, extra.name, count * extra.nbytes)


def _of_allocation(profile: Profile, index: int, count: int) -> Iterator[Held]:
    """A gradient for each parameter that has one by then, the last layers first; of others all that are alike."""
    each = profile.allocations[index]
    if each.kind == "gradient" and count > 0:
        yield from (Held(each.kind, name, each.nbytes) for name in profile.gradients_of[each.name][-count:])
    else:  # below 0 where the next layer's turn lets it go: it is that of the layer before, which has the same name here
        yield Held(each.kind, profile.labels[index], count * each.nbytes)
