"""Reading what a module takes from a checkpoint: straight into the final memory, in the files' order, on several threads."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..tracer.errors import CheckpointError
from ..tracer.graph import ParamGraph, TensorNode
from .boxes import Box, whole_box
from .checkpoint import Checkpoint, Rename, Source, open_checkpoint
from .entries import Entry, cut
from .matching import Matched, matched
from .pages import NewMemory
from .workers import Workers

_AT_ONCE = 2**24  # bytes that a thread reads at a time: parts of large tensors, several small ones
_ANNOUNCED = 2**20  # bytes; what is shorter comes along when the disk is read


@dataclass(frozen=True)
class Load:
    """What the user says about a checkpoint: where it is, and what to do about names that it or the module does not have."""

    source: Source
    missing: str = "init"
    unexpected: str = "error"
    rename: Rename | None = None


@dataclass(frozen=True)
class Loading:
    """An open checkpoint, and what of it goes where."""

    checkpoint: Checkpoint
    matched: Matched
    load: Load

    def entry(self, node: TensorNode) -> Entry | None:
        """What a tensor is read from; None for one that the checkpoint does not have."""
        return self.matched.entries.get(node.name)

    def says(self) -> str:
        """What ranks that load together have to agree on."""
        return f"{self.checkpoint.digest()} (missing={self.load.missing!r}, unexpected={self.load.unexpected!r})"


@contextmanager
def opened(load: Load | None, graph: ParamGraph, modules: Any) -> Iterator[Loading | None]:
    """The checkpoint that the user names, for a module with `graph`; raises `CheckpointError` where it does not fit."""
    if load is None:
        yield None
        return
    with open_checkpoint(load.source) as checkpoint:
        checkpoint = checkpoint.renamed(load.rename)
        found = matched(graph, checkpoint, load.missing, load.unexpected)
        check_ties(found)
        yield Loading(checkpoint, found, load)


class Read(NamedTuple):
    """A box of an entry, and the memory for it."""

    entry: Entry
    box: Box
    out: torch.Tensor


def read_all(
    reads: Iterable[Read], checkpoint: Checkpoint, workers: Workers, done: Callable[[int], None] = lambda nbytes: None
) -> None:
    """Do all of them; `done` is told the bytes of each. Raises `CheckpointError`."""
    reads = sorted(reads, key=lambda read: read.entry.position)
    batches = list(_batches(piece for read in reads for piece in _pieces(read)))
    memory = NewMemory()

    def body(number: int) -> None:
        for read in itertools.chain.from_iterable(batches[number + workers.count : number + workers.count + 1]):
            if read.out.nbytes >= _ANNOUNCED:
                read.entry.expect(read.box)
        for read in batches[number]:
            memory.fetch(read.out)
            read.entry.read(read.box, read.out)
        done(sum(read.out.nbytes for read in batches[number]))

    workers.each(body, range(len(batches)))
    checkpoint.check_unchanged()


def _pieces(read: Read) -> Iterator[Read]:
    """The same in pieces for several threads."""
    if not read.entry.divisible or read.out.nbytes <= _AT_ONCE:
        yield read
        return
    for box, out in cut(read.box, read.out, _AT_ONCE // read.out.dtype.itemsize):
        yield Read(read.entry, box, out)


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Small ones together: handing each to a thread of its own would take longer than reading it."""
    batch: list[Read] = []
    nbytes = 0
    for read in reads:
        if batch and nbytes + read.out.nbytes > _AT_ONCE:
            yield batch
            batch, nbytes = [], 0
        batch.append(read)
        nbytes += read.out.nbytes
    if batch:
        yield batch


def check_ties(matched: Matched) -> None:
    """Raise `CheckpointError` where a checkpoint holds a tied tensor twice, with different values."""
    for name, first, other in matched.ties:
        if _differ(first, other):
            raise CheckpointError(
                f"{first.name} and {other.name} are one tensor in the module, and {matched.where} has different values for them; "
                f"untie them in the constructor, or leave one out: rename={{r'^{re.escape(name)}$': None}}"
            )


def _differ(first: Entry, other: Entry, rows: int = 2**22) -> bool:
    if first.shape != other.shape:
        return True
    for box, like in cut(whole_box(first.shape), torch.empty(first.shape, device="meta"), rows):
        one, two = (torch.empty(like.shape, dtype=each.dtype) for each in (first, other))
        first.read(box, one)
        other.read(box, two)
        if not torch.equal(one.to(two.dtype), two):
            return True
    return False
