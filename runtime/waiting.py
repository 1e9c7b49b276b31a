"""Storages that wait: empty until something reads them, so that a model is never there twice.

In a run that ends with a cast, a large storage is emptied as soon as it is filled for the first time; its fills are noted with
their places in the random stream and done when something reads it. The generator passes over a fill that waits. The cast itself
need not even have the storage filled: the numbers are converted as they are drawn, a piece at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..planner.construct import WAITING_BYTES
from ..tracer.graph import View
from ..tracer.traced import view_of
from .sources import Pending


@dataclass(slots=True)
class _Waiting:
    storage: torch.UntypedStorage
    nbytes: int
    fills: list[tuple[View, Pending]] = field(default_factory=list)


class WaitingRoom:
    """The storages that wait at the moment, by their key; `filled` is told the bytes of each fill once it is done."""

    def __init__(self, filled: Callable[[int], None]) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._filled = filled

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, target: torch.Tensor, put_off: Callable[[], Pending | None]) -> bool:
        """Let a fill of `target` wait, if it can: on the CPU, large enough, and `put_off` makes something of it."""
        storage = target.untyped_storage()
        entry = self._waiting.get(storage._cdata)
        if entry is None and (storage.nbytes() < WAITING_BYTES or target.device.type != "cpu"):
            return False
        fill = put_off()
        if fill is None:
            return False
        if entry is None:
            entry = self._waiting[storage._cdata] = _Waiting(storage, storage.nbytes())
            storage.resize_(0)
        entry.fills.append((view_of(target, 0), fill))
        return True

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of `tensor` waits."""
        return bool(self._waiting) and _key(tensor) in self._waiting

    def fill(self, tensor: torch.Tensor) -> None:
        """Fill the storage of `tensor`, if it waits."""
        if self.holds(tensor):
            self._fill(_key(tensor))

    def fill_all(self) -> None:
        """Fill whatever waits, one storage at a time; what nobody else refers to any more is forgotten."""
        for key, entry in list(self._waiting.items()):
            if torch._C._storage_Use_Count(entry.storage._cdata) > 1:
                self._fill(key)
            else:
                del self._waiting[key]

    def converted(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """`tensor.to(dtype)` for a waiting tensor, which goes on waiting; None where its last fill is not all there is to it."""
        entry = self._waiting[_key(tensor)]
        view, last = entry.fills[-1]
        if view != view_of(tensor, 0) or tensor.nbytes != entry.nbytes:
            return None
        out = torch.empty_like(tensor, dtype=dtype)
        if not last.convert(tensor, out):
            return None
        self._filled(entry.nbytes)
        return out

    @contextmanager
    def geometry_only(self, tensors: list[torch.Tensor]) -> Iterator[None]:
        """Give waiting storages their size, without touching the memory, while a view of them is taken."""
        entries = [self._waiting[_key(tensor)] for tensor in tensors if self.holds(tensor)]
        for entry in entries:
            entry.storage.resize_(entry.nbytes)
        try:
            yield
        finally:
            for entry in entries:
                entry.storage.resize_(0)

    def _fill(self, key: int) -> None:
        entry = self._waiting.pop(key)
        entry.storage.resize_(entry.nbytes)
        with torch.no_grad():
            for view, fill in entry.fills:
                fill.fill(view.over(entry.storage))
        self._filled(entry.nbytes)


def _key(tensor: torch.Tensor) -> int:
    try:
        key: int = tensor.untyped_storage()._cdata
        return key
    except NotImplementedError:  # a sparse tensor has no storage of its own
        return -1
