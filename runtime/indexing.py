"""Which part of a tensor an index means: integers, slices and `...`, as in `tensor[index]`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..tracer.errors import MaterializeError
from .boxes import Box, whole_box


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a tensor; `dropped` are the dims that an integer picked one element of."""

    box: Box
    dropped: tuple[int, ...]
    is_whole: bool

    def without_dims(self, piece: torch.Tensor) -> torch.Tensor:
        """The box's tensor without the dims that an integer index takes away."""
        for dim in reversed(self.dropped):
            piece = piece.select(dim, 0)
        return piece


def box_of(name: str, shape: tuple[int, ...], index: Any) -> Part:
    """The part of a tensor called `name` that `index` means; raises `MaterializeError` for what is no part of it."""
    entries = list(index) if isinstance(index, tuple) else [index]
    if ... in entries:
        place = entries.index(...)
        entries[place : place + 1] = [slice(None)] * (len(shape) - len(entries) + 1)
    entries += [slice(None)] * (len(shape) - len(entries))
    if len(entries) > len(shape) or ... in entries:
        raise _refused(name, shape, index, f"it has {len(shape)} dims")
    box = tuple(_range(name, shape, index, dim, entry) for dim, entry in enumerate(entries))
    dropped = tuple(dim for dim, entry in enumerate(entries) if isinstance(entry, int))
    return Part(box, dropped, box == whole_box(shape) and not dropped)


def _range(name: str, shape: tuple[int, ...], index: Any, dim: int, entry: Any) -> range:
    size = shape[dim]
    if isinstance(entry, int) and not isinstance(entry, bool):
        if not -size <= entry < size:
            raise _refused(name, shape, index, f"dim {dim} has {size} elements")
        return range(entry % size, entry % size + 1)
    if not isinstance(entry, slice):
        raise _refused(name, shape, index, f"{entry!r} is neither an integer nor a slice")
    try:
        found = range(size)[entry]
    except (TypeError, ValueError) as error:
        raise _refused(name, shape, index, str(error)) from None
    if found.step < 1:
        raise _refused(name, shape, index, "a step must be positive, as for torch")
    return found


def _refused(name: str, shape: tuple[int, ...], index: Any, why: str) -> MaterializeError:
    return MaterializeError(
        f"{name}, of shape {list(shape)}, has no part [{index!r}]: {why}. Give integers, slices and ..., as in tensor[index]"
    )
