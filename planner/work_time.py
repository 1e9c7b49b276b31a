"""How long work and collectives take, by the speeds of a device and of its links: seconds, in closed form.

An op takes the longer of its operations and its bytes (Williams, Waterman and Patterson 2009, the roofline model). A collective
on a ring takes what nccl-tests calls the bus bandwidth (doc/PERFORMANCE.md), and the latency of its steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..tracer.errors import DecisionError
from .kept import kept_with
from .speeds import Link, Speeds
from .work import Collective, Op, Work


class Group(NamedTuple):
    """Ranks that talk to each other: how many, and how far apart neighbors are in the order of ranks."""

    ranks: int = 1
    stride: int = 1


ALONE = Group()


class Computing(NamedTuple):
    """Seconds of computation, and those of forwards that checkpoints run again."""

    first: float = 0.0
    again: float = 0.0

    @property
    def total(self) -> float:
        return self.first + self.again


def computing(work: Work, speeds: Speeds) -> Computing:
    """How long the ops of a stretch take; worked out once for each work and speeds."""
    known = kept_with(work)
    if (found := known.get(id(speeds))) is None or found[0] is not speeds:
        again = _seconds(((op, count) for op, count in work.ops if op.again), speeds)
        found = known[id(speeds)] = (
            speeds,
            Computing(_seconds(((op, count) for op, count in work.ops if not op.again), speeds), again),
        )
    seconds: Computing = found[1]
    return seconds


def _seconds(ops: Iterable[tuple[Op, int]], speeds: Speeds) -> float:
    device = host = 0.0
    for op, count in ops:
        device += count * op_seconds(op, speeds)
        host += count * (speeds.view if op.bound == "view" else speeds.launch)
    return max(device, host) if speeds.ahead else device + host


def op_seconds(op: Op, speeds: Speeds) -> float:
    """One op on the device: the longer of its operations and its bytes."""
    moved = speeds.memory.seconds(op.nbytes)
    if op.bound not in ("matmul", "attention"):
        return moved
    rate = speeds.attention_of(op.dtype) if op.bound == "attention" else speeds.flops_of(op.dtype)
    return max(moved, rate.seconds(op.flops - op.spared))


# -- collectives --------------------------------------------------------------------------------------------------------


def talking(kind: Collective, nbytes: float, group: Group, speeds: Speeds) -> float:
    """How long a collective of `nbytes`, of the whole, takes a group of ranks."""
    if group.ranks < 2 or nbytes <= 0:
        return 0.0
    sent = sent_by(kind, nbytes, group.ranks)
    measured = speeds.talk(kind, group.ranks)
    if measured is not None:
        return measured.latency + sent / measured.bandwidth
    inside, nodes = _placed(group, speeds.node)
    steps = (2 if kind == "all-reduce" else 1) * (group.ranks - nodes), (2 if kind == "all-reduce" else 1) * (nodes - 1)
    within, between = _links(speeds, group)
    latency = max(within.latency, between.latency if nodes > 1 else 0.0) + steps[0] * within.step + steps[1] * between.step
    if nodes == 1:
        return latency + sent / within.bandwidth
    if kind == "all-to-all":
        return latency + nbytes * (group.ranks - inside) / group.ranks / between.bandwidth
    ring = inside * between.bandwidth
    return latency + sent / (min(ring, within.bandwidth) if inside > 1 else ring)


def sent_by(kind: Collective, nbytes: float, ranks: int) -> float:
    """The bytes that each rank of a ring sends, for a collective of `nbytes` in all.

    >>> sent_by("all-gather", 1000, 4), sent_by("all-reduce", 1000, 4)
    (750.0, 1500.0)
    """
    if kind == "broadcast":
        return nbytes
    return nbytes * (2 if kind == "all-reduce" else 1) * (ranks - 1) / ranks


def _links(speeds: Speeds, group: Group) -> tuple[Link, Link]:
    """In a node and to others, the one standing in for the other."""
    link = speeds.within or speeds.between
    if link is None:
        raise DecisionError(
            f"{group.ranks} ranks talk to each other, and the speeds of {speeds.device} know no link; take those of a cluster "
            "with several devices, or measure them in a process group with gp.measure_speeds()"
        )
    return link, speeds.between or link


def _placed(group: Group, node: int) -> tuple[int, int]:
    """How many ranks of a group are in one node, each with a network card of its own, and in how many nodes it is."""
    inside = min(group.ranks, max(1, node // group.stride))
    return inside, -(-group.ranks // inside)
