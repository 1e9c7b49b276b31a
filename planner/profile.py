"""What forward and backward of a module allocate, once traced: the data from which the closed form knows activations.

A `Profile` is a sequence of `Block`s. A block happens `times` times in a row: a layer that repeats is traced once, and stands for
all that are like it. Within a block there are *stretches*, of which only the rise and the net change of the running sum are
looked at, and *marks* between them, where a module begins or ends its forward or backward: there FSDP gathers and reduces.

`runtime/profiling.py` makes profiles; this file is data and sums. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from .allocations import Allocation
from .work import NOTHING, Exchange, Op, Work, work_of

Turn = Literal["forward", "forward ends", "backward", "backward ends"]


@dataclass(frozen=True, slots=True)
class Mark:
    """Here the module called `unit` begins or ends its forward or backward; "" is the module as a whole."""

    turn: Turn
    unit: str


@dataclass(frozen=True, slots=True)
class Event:
    """An allocation, by its index, comes or (`count` below 0) goes; more than once for one that each layer of a run has."""

    allocation: int
    count: int


@dataclass(frozen=True, slots=True)
class Sums:
    """How far the running sum rises above where it was, at most, and where it ends."""

    rise: int = 0
    net: int = 0


@dataclass(frozen=True)
class Stretch:
    """Events between two marks, with their sums: where gradients are new, and where they are added to those that are there.

    `work` is what the ops between the marks do meanwhile.
    """

    events: tuple[Event, ...]
    fresh: Sums
    added: Sums
    work: Work = NOTHING

    @cached_property
    def counts(self) -> Mapping[int, int]:
        """How many times each allocation has come, or gone, in all of it."""
        found: dict[int, int] = {}
        for event in self.events:
            found[event.allocation] = found.get(event.allocation, 0) + event.count
        return found


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the step that happens `times` times in a row. `run` is the index of the run of layers that it is of, or -1."""

    times: int
    parts: tuple[Mark | Stretch, ...]
    run: int = -1


@dataclass(frozen=True, slots=True)
class Repeated:
    """Layers that repeat, `period` of them a round; `rounds` says which rounds one that the profile names stands for."""

    layers: tuple[str, ...]
    period: int
    rounds: tuple[tuple[int, range], ...]

    def names(self, name: str) -> list[str]:
        """What a tensor's name stands for in the profile."""
        for of_profile, stands_for in self.rounds:
            for place in range(self.period):
                layer = self.layers[of_profile * self.period + place]
                if name.startswith(f"{layer}."):
                    return [self.layers[each * self.period + place] + name[len(layer) :] for each in stands_for]
        return [name]


@dataclass(frozen=True, eq=False)
class Profile:
    """Forward and backward of one step, without the optimizer.

    `inputs` are the names and bytes of the step's inputs, `early` the marked modules whose backward ends before all of it does,
    which FSDP knows by inputs that require a gradient. `passed` is what one layer hands to the next.

    >>> saved, gradient = Allocation("activation", 8, "cpu", op="mm"), Allocation("gradient", 4, "cpu", "w")
    >>> up = stretch([Event(0, 1)], (saved, gradient))
    >>> down = stretch([Event(1, 1), Event(0, -1)], (saved, gradient))
    >>> profile = Profile((saved, gradient), (Block(1, (up, down)),), ())
    >>> profile.gradients
    {'w': 4}
    """

    allocations: tuple[Allocation, ...]
    blocks: tuple[Block, ...]
    inputs: tuple[tuple[str, int], ...]
    repeated: tuple[Repeated, ...] = ()
    early: frozenset[str] = field(default_factory=frozenset)
    passed: int = 0

    @cached_property
    def gradients(self) -> Mapping[str, int]:
        """The bytes of each parameter's gradient, where it gets one."""
        found: dict[str, int] = {}
        for each in self.allocations:
            if each.kind == "gradient":
                for name in self.gradients_of[each.name]:
                    found[name] = each.nbytes
        return found

    def names_of(self, name: str) -> list[str]:
        """The tensors that one in the profile stands for."""
        for run in self.repeated:
            names = run.names(name)
            if names != [name]:
                return names
        return [name]

    @cached_property
    def gradients_of(self) -> Mapping[str, Sequence[str]]:
        """The same for each parameter that gets a gradient."""
        return {each.name: self.names_of(each.name) for each in self.allocations if each.kind == "gradient"}

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What each allocation is, layers that repeat taken together."""
        return tuple(replace(each, module=self.class_of(each.module)).describe() or each.kind for each in self.allocations)

    def class_of(self, module: str) -> str:
        """The name of a module, with a `*` for the number of a layer that repeats."""
        at_or_above = (module[:end] for end in (*(at for at, letter in enumerate(module) if letter == "."), len(module)))
        layer = min((name for name in at_or_above if name in self._layers), key=self._layers.__getitem__, default=None)
        return module if layer is None else f"{layer.rpartition('.')[0]}.*".lstrip(".") + module[len(layer) :]

    @cached_property
    def _layers(self) -> Mapping[str, int]:
        """The layers that repeat, numbered."""
        return {layer: number for number, layer in enumerate(layer for run in self.repeated for layer in run.layers)}


@dataclass(frozen=True, slots=True)
class NoProfile:
    """Why there is no profile, in a sentence with the way out."""

    reason: str


def stretch(events: list[Event], allocations: tuple[Allocation, ...], noted: Iterable[Op | Exchange] = ()) -> Stretch:
    """Events with their sums, and what was noted of the ops meanwhile."""
    return Stretch(tuple(events), _sums(events, allocations, False), _sums(events, allocations, True), work_of(noted))


def _sums(events: list[Event], allocations: tuple[Allocation, ...], added: bool) -> Sums:
    """`added`: a gradient that comes is added at once to the one that is there."""
    now = most = 0
    for event in events:
        each = allocations[event.allocation]
        now += each.nbytes * event.count
        most = max(most, now)
        if added and each.kind == "gradient":
            now -= each.nbytes * event.count
    return Sums(most, now)


def net_of(block: Block) -> int:
    """How much more there is after a block than before it, in one of its times."""
    return sum(part.fresh.net for part in block.parts if isinstance(part, Stretch))
