"""What FSDP2 gathers, reduces and frees in a step, in closed form: a profile's marks turned into bytes that come and go.

torch/distributed/fsdp/_fully_shard/ says when, and which function of it is named at each turn:

* before a unit's forward its parameters are gathered (`FSDPParamGroup.unshard`, `wait_for_unshard`): the all-gather's buffer is
  there beside the whole parameters until the next unit has been gathered, in the backward only until it is copied out;
* after it they are freed (`reshard`), or kept, or a larger part of them is, by the unit's `reshard_after_forward`;
* when the backward comes to a unit they are gathered again, and into its buffer the unit that comes next (`_backward_prefetch`);
* after its backward (`post_backward`) its gradients are copied into the buffer of a reduce-scatter, which stays until the next
  unit's (`foreach_reduce`); what comes out is this rank's gradients, converted if they are reduced in another dtype.

A unit whose inputs need no gradient, such as the module as a whole, is reduced when all of the backward is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from .allocations import Kind
from .kept import kept
from .profile import Event, Mark, Profile, Stretch
from .step_form import Extra, Script, between


class Part(NamedTuple):
    """What a rank holds of a parameter: elements with their padding, and bytes of one as it is kept, and as it is gathered."""

    name: str
    numel: int
    itemsize: int
    gathered_itemsize: int


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered, and whose gradients are reduced, together; `reshard` is `reshard_after_forward`."""

    name: str
    parts: tuple[Part, ...]
    reshard: bool | int = True

    @cached_property
    def gathered(self) -> int:
        """Bytes of this rank's part in the dtype that it is gathered in."""
        return sum(part.numel * part.gathered_itemsize for part in self.parts)

    @property
    def is_converted(self) -> bool:
        return any(part.itemsize != part.gathered_itemsize for part in self.parts)


@dataclass(frozen=True, slots=True)
class Fsdp:
    """How FSDP2 is applied: to which units, over how many ranks, and by which settings.

    `reduce_itemsize` is None where gradients are reduced as they come. `copies` is the size of the axis that gradients are
    reduced along besides (HSDP); `offload` says that shards are in the memory of the host. `on_cpu` says that collectives are
    gloo's, which copies what it is given. `apart` are the numbers of ranks of those units that lie between others than the rest,
    as experts do, by their names.
    """

    units: Mapping[str, Unit]
    ranks: int
    reduce_itemsize: int | None = None
    copies: int = 1
    offload: bool = False
    accumulates: bool = False
    on_cpu: bool = False
    apart: Mapping[str, int] = field(default_factory=dict)

    def ranks_of(self, unit: Unit) -> int:
        """Between how many ranks a unit is divided."""
        return self.apart.get(unit.name, self.ranks)


def with_fsdp(profile: Profile, fsdp: Fsdp) -> list[Script]:
    """A profile's scripts with what FSDP2 adds to each.

    Of layers that repeat, what is added in the one that stands for others is the same for each of them: units alike are of one
    size and one resharding (`apart.py`), and each finds and leaves the same buffers.
    """
    turns = _Turns(fsdp, profile, _gradients(profile))
    found = []
    for block in profile.blocks:
        turns.times = block.times
        parts = [part if isinstance(part, Stretch) else between(turns.take(part), profile) for part in block.parts]
        found.append(Script(block.times, tuple(parts)))
    return found


@kept
def _gradients(profile: Profile) -> Mapping[str, int]:
    """The whole gradients of parameters, as indices of allocations, by name; those that the profile has."""
    return {each.name: index for index, each in enumerate(profile.allocations) if each.kind == "gradient"}


_BUFFER: Kind = "communication buffer"
_Step = Event | Extra


@dataclass(slots=True)
class _Turns:
    """The state of FSDP2 while a step goes on: what is gathered, and which buffers are there."""

    fsdp: Fsdp
    profile: Profile
    gradients: Mapping[str, int]
    times: int = 1
    times_of: dict[str, int] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    larger: set[str] = field(default_factory=set)
    gathering: set[str] = field(default_factory=set)
    order: list[str] = field(default_factory=list)
    reduced: set[str] = field(default_factory=set)
    last_gathered: Unit | None = None
    last_reduced: Extra | None = None
    kept: list[Extra] = field(default_factory=list)

    def take(self, mark: Mark) -> Iterator[_Step]:
        """What comes and goes at a mark; nothing at those of modules that are no units."""
        unit = self.fsdp.units.get(mark.unit)
        if unit is None:
            return
        if mark.turn == "forward":
            yield from self._before_forward(unit)
        elif mark.turn == "forward ends":
            yield from self._after_forward(unit)
        elif mark.turn == "backward":
            yield from self._before_backward(unit)
        elif unit.name in self.profile.early:
            yield from self._reduce(unit)
        if mark.turn == "backward ends" and unit.name == "":
            yield from self._at_the_end()

    # -- forward --------------------------------------------------------------------------------------------------------

    def _before_forward(self, unit: Unit) -> Iterator[_Step]:
        self.times_of[unit.name] = self.times
        if not unit.parts or unit.name in self.whole:
            return
        yield from self._gather(unit)
        if self.last_gathered is not None:
            yield self._buffer(self.last_gathered, -1)
        yield self._whole(unit)
        self.gathering.discard(unit.name)
        self.last_gathered = unit if self.fsdp.ranks_of(unit) > 1 else None

    def _after_forward(self, unit: Unit) -> Iterator[_Step]:
        if unit.parts:
            if self._keeps_more(unit):
                yield self._more(unit, 1)
                self.larger.add(unit.name)
            if unit.reshard is not False:
                yield self._freed(unit)
            self.order.append(unit.name)
        if unit.name == "" and self.last_gathered is not None:
            yield self._buffer(self.last_gathered, -1)
            self.last_gathered = None

    # -- backward -------------------------------------------------------------------------------------------------------

    def _before_backward(self, unit: Unit) -> Iterator[_Step]:
        if not unit.parts:
            return
        if unit.name not in self.whole:
            yield from self._gather(unit)
            yield self._whole(unit)
            if unit.name in self.larger:
                self.larger.discard(unit.name)
                yield self._more(unit, -1)
            if self.fsdp.ranks_of(unit) > 1:
                yield self._buffer(unit, -1)
            self.gathering.discard(unit.name)
        place = len(self.order) - 1 - self.order[::-1].index(unit.name) if unit.name in self.order else 0
        if place > 0 and self.order[place - 1] not in self.whole:
            yield from self._gather(self.fsdp.units[self.order[place - 1]])

    def _reduce(self, unit: Unit) -> Iterator[_Step]:
        """`post_backward`: what a unit has gathered goes, and its gradients are reduced."""
        if unit.name in self.whole:
            yield self._freed(unit)
        yield from self._drop_last()
        self.reduced.add(unit.name)
        parts = tuple(part for part in unit.parts if part.name in self.gradients)
        if parts:
            sent = sum(part.numel * self._sent_itemsize(part) for part in parts)
            self.last_reduced = Extra(_BUFFER, self._label(unit), sent * self.fsdp.ranks_of(unit))
            yield self.last_reduced
            yield from (Event(self.gradients[part.name], -1) for part in parts)
            yield from self._scatter(replace(unit, parts=parts), sent)

    def _scatter(self, unit: Unit, sent: int) -> Iterator[_Step]:
        """`foreach_reduce`: what comes out of a reduce-scatter becomes this rank's gradients."""
        fsdp, made = self.fsdp, Extra(_BUFFER, self._label(unit), sent)
        yield made
        if fsdp.on_cpu and self.fsdp.ranks_of(unit) > 1:
            yield from _passing(Extra("temporary", self._label(unit), sent * self.fsdp.ranks_of(unit)))
        reduced = made
        if any(part.itemsize != self._sent_itemsize(part) for part in unit.parts):
            made = Extra(_BUFFER, self._label(unit), sum(part.numel * part.itemsize for part in unit.parts))
            yield made
        converted = made is not reduced
        stays = fsdp.copies > 1 and (converted or fsdp.accumulates or fsdp.offload)  # `_all_reduce_state`, if it is no gradient
        if stays:
            self.kept.append(reduced.times(self.times))
        yield from (each.times(-1) for each in ([reduced] if not stays else []) + ([made] if converted else []))
        if not fsdp.offload and not fsdp.accumulates:
            yield from (Extra("gradient", part.name, part.numel * part.itemsize) for part in unit.parts)

    def _at_the_end(self) -> Iterator[_Step]:
        """`_root_post_backward_final_callback`: the module as a whole first, then units that no gradient told."""
        for name in ["", *(name for name in self.fsdp.units if name)]:
            if name not in self.reduced and (name in self.order or name in self.whole):
                yield from (_times(step, self.times_of[name]) for step in self._reduce(self.fsdp.units[name]))
        yield from self._drop_last()
        yield from (each.times(-1) for each in self.kept)

    def _drop_last(self) -> Iterator[_Step]:
        if self.last_reduced is not None:
            yield self.last_reduced.times(-1)
            self.last_reduced = None

    # -- parameters -----------------------------------------------------------------------------------------------------

    def _gather(self, unit: Unit) -> Iterator[_Step]:
        """`foreach_all_gather`: this rank's part, converted or copied to the device, and the buffer that all parts come into."""
        if unit.name in self.gathering or self.fsdp.ranks_of(unit) == 1:
            return
        self.gathering.add(unit.name)
        copied = unit.gathered if unit.is_converted or self.fsdp.offload else 0
        if unit.name in self.larger:
            copied = self._more(unit, 1).nbytes if unit.is_converted else 0
        taken = Extra(_BUFFER, self._label(unit), copied)
        yield taken
        yield self._buffer(unit, 1)
        if self.fsdp.on_cpu:
            yield from _passing(Extra("temporary", self._label(unit), unit.gathered * self.fsdp.ranks_of(unit)))
        yield taken.times(-1)

    def _buffer(self, unit: Unit, count: int) -> Extra:
        return Extra(_BUFFER, self._label(unit), unit.gathered * self.fsdp.ranks_of(unit), count)

    def _whole(self, unit: Unit) -> Extra:
        self.whole.add(unit.name)
        return Extra("gathered parameter", self._label(unit), unit.gathered * self.fsdp.ranks_of(unit))

    def _freed(self, unit: Unit) -> Extra:
        self.whole.discard(unit.name)
        return Extra("gathered parameter", self._label(unit), unit.gathered * self.fsdp.ranks_of(unit), -1)

    def _keeps_more(self, unit: Unit) -> bool:
        """Whether a larger part than a rank's own stays after the forward: `reshard` is the number of ranks that share it."""
        return not isinstance(unit.reshard, bool) and unit.reshard != self.fsdp.ranks_of(unit)

    def _more(self, unit: Unit, count: int) -> Extra:
        nbytes = unit.gathered * self.fsdp.ranks_of(unit) // int(unit.reshard)
        return Extra("gathered parameter", self._label(unit), nbytes, count)

    def _sent_itemsize(self, part: Part) -> int:
        return self.fsdp.reduce_itemsize or part.gathered_itemsize

    def _label(self, unit: Unit) -> str:
        return self.profile.class_of(unit.name) or "the module as a whole"


def _passing(extra: Extra) -> tuple[Extra, Extra]:
    return extra, extra.times(-1)


def _times(step: _Step, times: int) -> _Step:
    return step.times(times) if isinstance(step, Extra) else Event(step.allocation, step.count * times)
