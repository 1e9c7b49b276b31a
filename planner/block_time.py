"""How long one block of a profile takes under a sharding: seconds, by themselves, so that a search can add blocks up.

What FSDP2 gathers and reduces at a block's marks goes on beside the block's computation, as do the buckets of DDP: of the shorter
of both `Speeds.overlap` is hidden. That is so for layers in a row, where the next one is gathered while this one computes;
what it leaves out is the first gather, which nothing goes before, and the last reduction, which nothing follows: `edges`. Tensor
parallelism's collectives, within the layers, are waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from .fsdp_form import Fsdp, Part, Unit
from .profile import Block, Mark, Profile, Stretch
from .sharding import Role, Sharding
from .speeds import Speeds
from .work import Collective
from .work_time import ALONE, Group, computing, talking

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces at once: torch/nn/parallel/distributed.py `bucket_cap_mb`."""


@dataclass(frozen=True)
class Talking:
    """Who talks to whom: FSDP's units and how the mesh lies, or that gradients are reduced whole, by DDP."""

    fsdp: Fsdp | None = None
    shard: Group = ALONE
    replicate: Group = ALONE
    tensor: Group = ALONE
    ddp: bool = False

    @classmethod
    def of(cls, sharding: Sharding | None, fsdp: Fsdp | None) -> Talking:
        """The groups of a mesh whose last axis goes fastest."""
        if sharding is None:
            return cls()
        ddp = fsdp is None and sharding.size("replicate") > 1
        shard, replicate, tensor = (_group(sharding, role) for role in ("shard", "replicate", "tensor"))
        return cls(fsdp, shard, replicate, tensor, ddp)


def _group(sharding: Sharding, role: Role) -> Group:
    stride = 1
    for axis in reversed(sharding.dense_axes):
        if axis.role == role:
            return Group(axis.size, stride)
        stride *= axis.size
    return ALONE


@dataclass(frozen=True)
class BlockTime:
    """Seconds of one time of a block, or of several together.

    `compute`, and `again` of it for what checkpoints run a second time; `copies` into and out of the buffers of collectives;
    `waited` are tensor parallelism's collectives, `beside` those that computation goes on beside, and `transfers` between
    device and host, by kind. `hidden` is what of `beside` computation hides.
    """

    compute: float = 0.0
    again: float = 0.0
    copies: float = 0.0
    waited: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, float] = field(default_factory=dict)
    hidden: float = 0.0

    @cached_property
    def seconds(self) -> float:
        """All of it together."""
        return self.compute + self.again + self.copies + sum(self.waited.values()) + sum(self.beside.values()) - self.hidden


def block_time(block: Block, profile: Profile, talking_to: Talking, speeds: Speeds) -> BlockTime:
    """One time of a block. It looks at the profile for which modules are reduced early, and for gradients' bytes, only."""
    first = again = 0.0
    waited: dict[str, float] = {}
    for part in block.parts:
        if isinstance(part, Stretch):
            seconds = computing(part.work, speeds)
            first, again = first + seconds.first, again + seconds.again
            for each, count in part.work.exchanges:
                group = Group(each.ranks, talking_to.tensor.stride)
                waited[each.kind] = waited.get(each.kind, 0.0) + count * talking(each.kind, each.nbytes, group, speeds)
    beside: dict[str, float] = {}
    copied = 0.0
    for sent in _sent(block, profile, talking_to):
        beside[sent.kind] = beside.get(sent.kind, 0.0) + _seconds(sent, speeds)
        copied += sent.copied
    copies = speeds.memory.seconds(copied)
    overlap = speeds.overlap if speeds.ahead or talking_to.fsdp is None else 0.0
    hidden = overlap * min(first + again + copies, sum(beside.values()))
    return BlockTime(first, again, copies, waited, beside, hidden)


# -- what is sent -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sent:
    """Something on its way beside the computation, in `pieces`; `copied` bytes are read and written on the device for it."""

    kind: Collective | Literal["transfer"]
    nbytes: float
    group: Group
    copied: float = 0.0
    pieces: float = 1.0


def _seconds(sent: _Sent, speeds: Speeds) -> float:
    if sent.kind == "transfer":
        return sent.nbytes / (speeds.host or speeds.memory.at(sent.nbytes))
    return sent.pieces * talking(sent.kind, sent.nbytes / sent.pieces, sent.group, speeds)


def _sent(block: Block, profile: Profile, talking_to: Talking) -> Iterator[_Sent]:
    if talking_to.ddp:
        yield from _buckets(block, profile, talking_to.replicate)
    if talking_to.fsdp is not None:
        for part in block.parts:
            if isinstance(part, Mark) and (unit := talking_to.fsdp.units.get(part.unit)) is not None and unit.parts:
                yield from _at_mark(part, unit, profile, talking_to, talking_to.fsdp)


def _buckets(block: Block, profile: Profile, group: Group) -> Iterator[_Sent]:
    """Gradients are copied into a bucket, reduced, and copied back: torch/csrc/distributed/c10d/reducer.cpp."""
    nbytes = sum(
        event.count * profile.allocations[event.allocation].nbytes
        for part in block.parts
        if isinstance(part, Stretch)
        for event in part.events
        if event.count > 0 and profile.allocations[event.allocation].kind == "gradient"
    )
    if nbytes:
        yield _Sent("all-reduce", nbytes, group, copied=4 * nbytes, pieces=nbytes / BUCKET if nbytes > BUCKET else 1.0)


def _at_mark(mark: Mark, unit: Unit, profile: Profile, talking_to: Talking, fsdp: Fsdp) -> Iterator[_Sent]:
    """The turns of `fsdp_form.py`, where parameters are gathered and gradients reduced."""
    if mark.turn == "forward":
        yield from gathered(unit, talking_to.shard, fsdp)
    elif mark.turn == "backward" and unit.reshard is not False:
        group = talking_to.shard if unit.reshard is True else Group(unit.reshard, talking_to.shard.stride)
        yield from gathered(unit, group, fsdp)
    elif mark.turn == "backward ends" and unit.name in profile.early:
        yield from reduced(unit, talking_to, fsdp)
    if mark.turn == "backward ends" and unit.name == "":
        for late, times in _late(profile, fsdp):
            yield from reduced(late, talking_to, fsdp, times)


def gathered(unit: Unit, group: Group, fsdp: Fsdp) -> Iterator[_Sent]:
    """What is read and written on the way: a rank's part, and the whole as it is copied out of the buffer."""
    whole = unit.gathered * fsdp.ranks
    if fsdp.offload:
        yield _Sent("transfer", sum(part.numel * part.itemsize for part in unit.parts), ALONE)
    if group.ranks > 1:
        yield _Sent("all-gather", whole, group, copied=2 * unit.gathered + 2 * whole)


def reduced(unit: Unit, talking_to: Talking, fsdp: Fsdp, times: int = 1) -> Iterator[_Sent]:
    """Gradients are copied into one buffer, in the dtype that they are reduced in; with HSDP what comes out is reduced again."""
    sent = times * sum(part.numel * _sent_itemsize(part, fsdp) for part in unit.parts)
    if talking_to.shard.ranks > 1:
        whole = sent * fsdp.ranks
        yield _Sent("reduce-scatter", whole, talking_to.shard, times * unit.gathered * fsdp.ranks + whole, pieces=times)
    if fsdp.copies > 1:
        yield _Sent("all-reduce", sent, talking_to.replicate, pieces=times)
    if fsdp.offload:
        yield _Sent("transfer", times * sum(part.numel * part.itemsize for part in unit.parts), ALONE)


def _sent_itemsize(part: Part, fsdp: Fsdp) -> int:
    return fsdp.reduce_itemsize or part.gathered_itemsize


def _late(profile: Profile, fsdp: Fsdp) -> Iterator[tuple[Unit, int]]:
    """Units that no gradient tells of their backward's end, and how many of each there are."""
    for block in profile.blocks:
        for part in block.parts:
            if isinstance(part, Mark) and part.turn == "forward" and part.unit not in profile.early:
                unit = fsdp.units.get(part.unit)
                if unit is not None and unit.parts:
                    yield unit, block.times


# -- the edges ----------------------------------------------------------------------------------------------------------


def edges(blocks: Iterable[tuple[Block, BlockTime]]) -> float:
    """What is not hidden after all: the first layer's gather, which nothing goes before, and the last reduction.

    `blocks` are in the order of the step.
    """
    found = [(block, time) for block, time in blocks if time.hidden]
    first = next((each for each in found if _has(each[0], "forward")), None)
    last = next((each for each in reversed(found) if set(each[1].beside) - {"all-gather", "transfer"}), None)
    return sum(time.hidden / max(1, _layers(block)) for block, time in filter(None, (first, last)))


def _has(block: Block, turn: str) -> bool:
    return any(isinstance(part, Mark) and part.turn == turn and part.unit for part in block.parts)


def _layers(block: Block) -> int:
    """How many modules have their forward, or their backward, in a block."""
    return sum(isinstance(part, Mark) and part.turn in ("forward", "backward") for part in block.parts)
