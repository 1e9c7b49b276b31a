"""Storages that wait: empty until something reads them, so that a model is never there twice.

In a run that ends with a cast, a large storage is emptied as soon as it is filled for the first time; its fills are noted with
the generator's state and done when something reads it (the cast does, one tensor at a time). The generator passes over a fill
that waits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..planner.memory import WAITING_BYTES
from ..tracer.draws import skip, words
from ..tracer.schema import is_random


@dataclass(frozen=True, slots=True)
class _Fill:
    """One fill that waits: a call on a view of the storage, and the state of the generator it starts from."""

    func: Any
    alias: Callable[[torch.UntypedStorage], torch.Tensor]
    args: tuple[Any, ...]
    generator: torch.Generator | None
    state: torch.Tensor | None

    def run(self, storage: torch.UntypedStorage) -> None:
        target = self.alias(storage)
        if self.generator is None or self.state is None:
            self.func(target, *self.args)
            return
        after = self.generator.get_state()
        self.generator.set_state(self.state)
        try:
            self.func(target, *self.args, generator=self.generator)
        finally:
            self.generator.set_state(after)


@dataclass(slots=True)
class _Waiting:
    storage: torch.UntypedStorage
    nbytes: int
    fills: list[_Fill] = field(default_factory=list)


class WaitingRoom:
    """The storages that wait at the moment, by their key; `filled` is told the bytes of each fill once it is done."""

    def __init__(self, filled: Callable[[int], None]) -> None:
        self._waiting: dict[int, _Waiting] = {}
        self._filled = filled

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: torch.Generator | None) -> bool:
        """Let a fill wait, if it can: on the CPU, large enough, with a draw that can be counted."""
        storage = target.untyped_storage()
        entry = self._waiting.get(storage._cdata)
        if entry is None and (storage.nbytes() < WAITING_BYTES or target.device.type != "cpu"):
            return False
        source = (generator or torch.default_generator) if is_random(func) else None
        count = words(func, target.dtype, target.numel(), target.is_contiguous()) if source is not None else 0
        if count is None:
            return False
        if entry is None:
            entry = self._waiting[storage._cdata] = _Waiting(storage, storage.nbytes())
            storage.resize_(0)
        entry.fills.append(_Fill(func, _aliaser(target), args, source, source.get_state() if source else None))
        if source is not None:
            skip(count, source)
        return True

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the storage of `tensor` waits."""
        return bool(self._waiting) and _key(tensor) in self._waiting

    def fill(self, tensor: torch.Tensor) -> None:
        """Fill the storage of `tensor`, if it waits."""
        if self.holds(tensor):
            self._fill(_key(tensor))

    def fill_all(self) -> None:
        """Fill whatever waits, one storage at a time."""
        for key in list(self._waiting):
            self._fill(key)

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
            for fill in entry.fills:
                fill.run(entry.storage)
        self._filled(entry.nbytes)


def _key(tensor: torch.Tensor) -> int:
    try:
        key: int = tensor.untyped_storage()._cdata
        return key
    except NotImplementedError:  # a sparse tensor has no storage of its own
        return -1


def _aliaser(target: torch.Tensor) -> Callable[[torch.UntypedStorage], torch.Tensor]:
    """Makes tensors like `target` over a storage: a write through one leaves the version counter of `target` alone."""
    dtype, offset, size, stride = target.dtype, target.storage_offset(), target.shape, target.stride()

    def alias(storage: torch.UntypedStorage) -> torch.Tensor:
        return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, offset, size, stride)

    return alias
