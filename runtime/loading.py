"""Reading what a module takes from a checkpoint: straight into the final memory, in the files' order, on several threads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..planner.rank_memory import READ_BYTES
from ..tracer.collect import roots_of
from ..tracer.errors import CheckpointError
from ..tracer.graph import ParamGraph, TensorNode
from .boxes import Box, whole_box
from .checkpoint import Checkpoint, open_checkpoint
from .entries import Entry, Held, cut, is_plain
from .hub import Converted, can_load, converted, finish_loading, is_transformers
from .matching import Matched, matched
from .meta import remembered
from .options import Load
from .pages import NewMemory
from .workers import Workers

_ANNOUNCED = 2**20  # bytes; what is shorter comes along when the disk is read


@dataclass(frozen=True)
class Loading:
    """An open checkpoint, and what of it goes where."""

    checkpoint: Checkpoint
    matched: Matched
    load: Load
    converted: Converted | None = None

    def entry(self, node: TensorNode) -> Entry | None:
        """What a tensor is read from; None for one that the checkpoint does not have."""
        return self.matched.entries.get(node.name)

    def says(self) -> str:
        """What ranks that load together have to agree on."""
        return f"{self.checkpoint.digest()} (missing={self.load.missing!r}, unexpected={self.load.unexpected!r})"

    def finish(self, module: nn.Module) -> None:
        """Give a model of a library what its directory says besides tensors."""
        if self.converted is not None and self.checkpoint.folder is not None:
            for each in (module, *module.children()):
                if can_load(each, self.checkpoint.folder):
                    finish_loading(each, self.checkpoint.folder, self.converted)
                    return


@contextmanager
def opened(load: Load, graph: ParamGraph, members: Mapping[str, torch.Tensor], likeness: Callable[[], Any]) -> Iterator[Loading]:
    """The checkpoint that the user names, for a module with `graph`; raises `CheckpointError` where it does not fit.

    `members` are the tensors that the module has now, by their names in the graph. `likeness()` is such a module of meta tensors
    before anybody has changed it, for libraries that look at theirs to say what a file holds.
    """
    with open_checkpoint(load.source) as checkpoint:
        checkpoint = checkpoint.renamed(load.rename)
        converted = _converted(checkpoint, likeness)
        if converted is not None:
            unexpected = {key: checkpoint.entries[key] for key in converted.unexpected}
            checkpoint = replace(checkpoint, entries=dict(converted.entries) | unexpected)
        optional = () if converted is None else converted.optional
        found = matched(graph, checkpoint, members, load.missing, load.unexpected, optional)
        check_ties(found)
        check_outside(found, graph, members)
        del members, likeness  # what they hold may go while this waits
        yield Loading(checkpoint, found, load, converted)


def _converted(checkpoint: Checkpoint, likeness: Callable[[], Any]) -> Converted | None:
    """What a hub's directory holds for a model of its library; None for any other."""
    if checkpoint.folder is None or not is_transformers(checkpoint.folder):
        return None
    roots = list(roots_of(likeness()).values())
    return converted(roots[0], checkpoint.entries) if len(roots) == 1 and can_load(roots[0], checkpoint.folder) else None


def all_members(graph: ParamGraph) -> dict[str, torch.Tensor]:
    """Members that say no more than that every tensor of the graph is there."""
    nothing = torch.empty(0, device="meta")
    return dict.fromkeys(graph.by_name, nothing)


def members_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers of a meta module, or of a part of one, by their names in the plan."""
    known = [(memory.name, each) for each in module.modules() if (memory := remembered(each)) is not None]
    return {
        f"{name}.{key}" if name else key: tensor
        for name, each in known
        for key, tensor in (*each._parameters.items(), *each._buffers.items())
        if tensor is not None
    }


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
        ahead = number + workers.count
        for read in batches[ahead] if ahead < len(batches) else ():
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
    if not read.entry.divisible or read.out.nbytes <= READ_BYTES:
        yield read
        return
    for box, out in cut(read.box, read.out, max(1, READ_BYTES // read.out.dtype.itemsize)):
        yield Read(read.entry, box, out)


def _batches(reads: Iterable[Read]) -> Iterator[list[Read]]:
    """Small ones together: handing each to a thread of its own would take longer than reading it."""
    batch: list[Read] = []
    nbytes = 0
    for read in reads:
        if batch and nbytes + read.out.nbytes > READ_BYTES:
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


def check_outside(matched: Matched, graph: ParamGraph, members: Mapping[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` for other values of a tensor that the constructor was given, which is not ours to write to."""
    for name, entry in matched.entries.items():
        tensor, storage = members.get(name), graph.storages[graph.by_name[name].view.storage]
        if storage.constant is None or tensor is None or tensor.is_meta or not is_plain(tensor):
            continue
        if _differ(entry, Held(name, tensor.detach())):
            raise CheckpointError(
                f"{entry.name} has another value in {matched.where} than in the module, where it was passed to the constructor "
                f"and stays as it is: load it before, or leave it out, rename={{r'^{re.escape(name)}$': None}}"
            )


def _differ(first: Entry, other: Entry, rows: int = 2**22) -> bool:
    if first.shape != other.shape:
        return True
    for box, like in cut(whole_box(first.shape), torch.empty(first.shape, device="meta"), rows):
        one, two = (torch.empty(like.shape, dtype=each.dtype) for each in (first, other))
        first.read(box, one)
        other.read(box, two)
        if not _equal(one, two):
            return True
    return False


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether they hold the same, with a NaN equal to a NaN."""
    if one.dtype == two.dtype and torch.equal(one.view(-1).view(torch.uint8), two.view(-1).view(torch.uint8)):
        return True
    kind = torch.promote_types(one.dtype, two.dtype) if one.dtype != two.dtype else one.dtype
    one, two = (each.to(torch.float32 if kind.itemsize == 1 and kind.is_floating_point else kind) for each in (one, two))
    return bool(((one == two) | ((one != one) & (two != two))).all())
