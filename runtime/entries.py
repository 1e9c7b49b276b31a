"""The tensors of a checkpoint: what they are, and how a part of one is read.

An `Entry` reads any box of itself into a tensor that is there already, converting where the dtypes differ, and nothing else of
the file. `Stored` lies in a file, `Pieced` is made of several that do, `Held` is in memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.nn.parameter import is_lazy

from ..tracer.errors import CheckpointError
from .boxes import Box, whole_box
from .files import File, bytes_of

_SHORTEST = 512  # bytes; shorter stretches are not read one by one, but cut out of the rows that they lie in
_ROWS = 2**22  # bytes of such rows at a time
_CONVERTED = 2**22  # bytes that are read, and then converted, at a time: they stay in the cache in between


class Entry(Protocol):
    """One tensor of a checkpoint; `where` is its file, and `divisible` says that a part of it costs no more than its share."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def where(self) -> str: ...
    @property
    def divisible(self) -> bool: ...
    @property
    def position(self) -> tuple[str, int]:
        """File and offset, by which reads are put in order."""

    @property
    def elements(self) -> Any:
        """What says where the elements lie: two entries for which it is equal hold the same."""

    def expect(self, box: Box) -> None:
        """The box is read soon; to say so may make that faster."""

    def read(self, box: Box, out: torch.Tensor) -> None:
        """Write the box into `out`, of the box's shape; raises `CheckpointError`."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its first element at byte `start`, the others `stride` elements apart, as in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: File
    start: int
    stride: tuple[int, ...]

    divisible = True

    @property
    def where(self) -> str:
        """The file."""
        return str(self.file.path)

    @property
    def position(self) -> tuple[str, int]:
        """As an `Entry`."""
        return self.where, self.start

    @property
    def elements(self) -> Any:
        """As an `Entry`."""
        return self.where, self.start, self.shape, self.stride, self.dtype

    @property
    def end(self) -> int:
        """The first byte after the last element."""
        if 0 in self.shape:
            return self.start
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.start + (last + 1) * self.dtype.itemsize

    @cached_property
    def _order(self) -> list[int]:
        """The dims from the one whose elements lie farthest apart to the one whose lie nearest."""
        return sorted(range(len(self.shape)), key=lambda dim: (-self.stride[dim], dim))

    @cached_property
    def _is_dense(self) -> bool:
        expected = 1
        for dim in reversed(self._order):
            if self.shape[dim] > 1 and self.stride[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True

    def expect(self, box: Box) -> None:
        """As an `Entry`: where the box is one stretch of the file."""
        if not all(box) or not self._is_dense:
            return
        order = self._order
        run = _run(tuple(self.shape[dim] for dim in order), tuple(box[dim] for dim in order))
        if run.count == 1:
            item = self.dtype.itemsize
            self.file.expect(self.start + next(run.starts()) * item, run.length * item)

    def read(self, box: Box, out: torch.Tensor) -> None:
        """As an `Entry`."""
        if not all(box):
            return
        if not self._is_dense:
            self._read_loose(box, out)
            return
        order = self._order
        size, box, out = tuple(self.shape[dim] for dim in order), tuple(box[dim] for dim in order), out.permute(order)
        if _takes_bytes(out, self.dtype):
            self._read_dense(size, box, out)
        else:
            self._read_converted(size, box, out)

    def _read_converted(self, size: tuple[int, ...], box: Box, out: torch.Tensor) -> None:
        """The box into `out`, which has another dtype or device, or gaps, by way of a little memory that is used again."""
        limit = min(out.numel(), max(1, _CONVERTED // self.dtype.itemsize))
        scratch = torch.empty(limit, dtype=self.dtype)
        for part, piece in cut(box, out, limit):
            read = scratch[: piece.numel()].view(piece.shape)
            self._read_dense(size, part, read)
            piece.copy_(read)

    def _read_dense(self, size: tuple[int, ...], box: Box, out: torch.Tensor) -> None:
        """The box into `out`, without gaps on either side."""
        item, run = self.dtype.itemsize, _run(size, box)
        if run.count > 1 and run.length * item < _SHORTEST:
            self._read_rows(size, box, run, out)
            return
        memory, length = bytes_of(out), run.length * item
        for number, first in enumerate(run.starts()):
            self.file.read(self.start + first * item, memory[number * length : (number + 1) * length], self.name)

    def _read_rows(self, size: tuple[int, ...], box: Box, run: _Run, out: torch.Tensor) -> None:
        """The same where stretches are short: whole rows, and the box out of them."""
        cut = run.dim if run.dim < len(box) and box[run.dim] != range(size[run.dim]) else run.dim - 1
        wider = tuple(part if dim < cut else range(size[dim]) for dim, part in enumerate(box))
        if cut == 0:  # a few of the rows of a dim with gaps
            wider = (range(box[0].start, box[0][-1] + 1), *wider[1:])
        inside = tuple(
            slice(None) if dim < cut else slice(p.start - w.start, p.stop - w.start, p.step)
            for dim, (p, w) in enumerate(zip(box, wider, strict=True))
        )
        each = math.prod(map(len, wider[1:])) * self.dtype.itemsize
        rows = max(1, _ROWS // each) if cut > 0 else len(wider[0])
        for at in range(0, len(wider[0]), rows):
            part = (wider[0][at : at + rows], *wider[1:])
            scratch = torch.empty([len(each) for each in part], dtype=self.dtype)
            self._read_dense(size, part, scratch)
            out[at : at + rows if cut > 0 else None].copy_(scratch[inside])

    def _read_loose(self, box: Box, out: torch.Tensor) -> None:
        """The box of a tensor with gaps, or with elements that lie on top of each other."""
        first = sum(part.start * stride for part, stride in zip(box, self.stride, strict=True))
        last = sum(part[-1] * stride for part, stride in zip(box, self.stride, strict=True))
        scratch = torch.empty(last - first + 1, dtype=self.dtype)
        self.file.read(self.start + first * self.dtype.itemsize, bytes_of(scratch), self.name)
        stride = [stride * part.step for part, stride in zip(box, self.stride, strict=True)]
        out.copy_(scratch.as_strided(out.shape, stride))


@dataclass(frozen=True, slots=True)
class _Run:
    """The stretches that a box is made of: `length` elements each, side by side from dim `dim` on."""

    dim: int
    length: int
    count: int
    size: tuple[int, ...]
    box: Box

    def starts(self) -> Iterator[int]:
        """The number of each one's first element."""
        strides = [math.prod(self.size[dim + 1 :]) for dim in range(len(self.size))]
        offsets = [[index * strides[dim] for index in self.box[dim]] for dim in range(self.dim)]
        rest = sum(part.start * stride for part, stride in zip(self.box[self.dim :], strides[self.dim :], strict=True))
        for found in itertools.product(*offsets):
            yield sum(found) + rest


def _run(size: tuple[int, ...], box: Box) -> _Run:
    dim = max(0, len(size) - 1)
    while dim > 0 and box[dim] == range(size[dim]):
        dim -= 1
    if box and box[dim].step != 1 and len(box[dim]) > 1:
        dim += 1  # single rows of a dim with gaps
    length = math.prod(map(len, box[dim:]))
    return _Run(dim, length, math.prod(map(len, box[:dim])), size, box)


def _takes_bytes(out: torch.Tensor, dtype: torch.dtype) -> bool:
    plain = out.device.type == "cpu" and out.dtype == dtype and not out.is_conj() and not out.is_neg()
    return plain and out.is_contiguous()


@dataclass(frozen=True)
class Pieced:
    """A tensor that was saved in pieces: each is an entry, and `offsets` say where its first element belongs."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    pieces: Sequence[tuple[tuple[int, ...], Entry]]

    divisible = True

    @property
    def position(self) -> tuple[str, int]:
        """As an `Entry`."""
        return self.pieces[0][1].position if self.pieces else (self.where, 0)

    @property
    def elements(self) -> Any:
        """As an `Entry`."""
        return self.shape, [(offsets, piece.elements) for offsets, piece in self.pieces]

    def expect(self, box: Box) -> None:
        """As an `Entry`."""
        for piece, inside, _ in self._parts(box):
            piece.expect(inside)

    def read(self, box: Box, out: torch.Tensor) -> None:
        """As an `Entry`."""
        for piece, inside, place in self._parts(box):
            piece.read(inside, out[place])

    def _parts(self, box: Box) -> Iterator[tuple[Entry, Box, tuple[slice, ...]]]:
        """The pieces that the box has a part of, which part of each, and where it belongs in the box."""
        for offsets, piece in self.pieces:
            parts = list(zip(box, offsets, piece.shape, strict=True))
            places = tuple(_between(part, offset, offset + size) for part, offset, size in parts)
            common = [part[place] for part, place in zip(box, places, strict=True)]
            if all(common):
                yield piece, tuple(range(c.start - o, c.stop - o, c.step) for c, o in zip(common, offsets, strict=True)), places


def _between(part: range, start: int, stop: int) -> slice:
    """The places in `part` of its indices from `start` up to `stop`."""
    first, last = (min(max(0, -((part.start - each) // part.step)), len(part)) for each in (start, stop))
    return slice(first, last)


@dataclass(frozen=True)
class Held:
    """A tensor in memory."""

    name: str
    tensor: torch.Tensor
    where: str = "the state dict"

    divisible = True

    @property
    def shape(self) -> tuple[int, ...]:
        """As an `Entry`."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """As an `Entry`."""
        return self.tensor.dtype

    @property
    def position(self) -> tuple[str, int]:
        """As an `Entry`."""
        return "", 0

    @property
    def elements(self) -> Any:
        """As an `Entry`."""
        tensor = self.tensor
        return tensor.device, tensor.data_ptr(), self.shape, tensor.stride(), self.dtype, tensor.is_conj(), tensor.is_neg()

    def expect(self, box: Box) -> None:
        """As an `Entry`."""

    def read(self, box: Box, out: torch.Tensor) -> None:
        """As an `Entry`."""
        if all(box):
            out.copy_(self.tensor[tuple(slice(part.start, part.stop, part.step) for part in box)])


@dataclass(frozen=True)
class Strange:
    """A tensor that cannot be read in parts, such as a sparse one: `why` says what it is."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    why: str

    divisible = True
    position = ("", 0)
    elements = None

    def expect(self, box: Box) -> None:
        """As an `Entry`."""

    def read(self, box: Box, out: torch.Tensor) -> None:
        """As an `Entry`."""
        raise CheckpointError(f"{self.name} in {self.where} {self.why}")


PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is elements in memory and nothing else."""
    return type(tensor) in PLAIN and tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested


def held(name: str, tensor: torch.Tensor, where: str = "the state dict") -> Entry:
    """The entry of a tensor in memory."""
    return Held(name, tensor.detach(), where) if is_plain(tensor) and not tensor.is_meta else strange(name, tensor, where)


def strange(name: str, tensor: torch.Tensor, where: str) -> Strange:
    """The entry of a tensor that is not read."""
    if is_lazy(tensor):
        return Strange(name, (), tensor.dtype, where, "has no values yet: its module is lazy")
    kind = type(tensor).__name__ if type(tensor) not in PLAIN else "quantized" if tensor.is_quantized else _form(tensor)
    return Strange(name, tuple(tensor.shape), tensor.dtype, where, f"is a {kind} tensor, which cannot be read in parts")


def _form(tensor: torch.Tensor) -> str:
    if tensor.is_nested or tensor.is_meta:
        return "nested" if tensor.is_nested else "meta"
    return str(tensor.layout).removeprefix("torch.")


def cut(box: Box, out: torch.Tensor, limit: int) -> Iterator[tuple[Box, torch.Tensor]]:
    """The box and the memory for it in pieces of no more than `limit` elements."""
    if out.numel() <= limit:
        yield box, out
        return
    dim = next(dim for dim, part in enumerate(box) if len(part) > 1)
    rows = max(1, limit // (out.numel() // len(box[dim])))
    for start in range(0, len(box[dim]), rows):
        part = box[dim][start : start + rows]
        yield from cut((*box[:dim], part, *box[dim + 1 :]), out.narrow(dim, start, len(part)), limit)


def read_whole(entry: Entry) -> torch.Tensor:
    """All of an entry, in new memory."""
    out = torch.empty(entry.shape, dtype=entry.dtype)
    entry.read(whole_box(entry.shape), out)
    return out
