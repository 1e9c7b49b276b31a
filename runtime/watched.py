"""A real step looked at op by op: which module, op and source line each piece of memory comes from, and what it is for.

The same records that a run on fake tensors leaves, made of a real one: where both run, they can be held side by side.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ..planner.allocations import Allocation
from ..planner.verification import KERNELS, Held, held_of
from ..tracer.collect import roots_of
from ..tracer.graph import Frame
from .allocations import Allocations, parts_of
from .fake_tensors import tensors_of
from .memory_events import Lifetimes, MemoryEvent, Peak, living_at

_OUTSIDE = "outside ops"


class Watched(Allocations):
    """Follows a real step, and when and where each piece of memory was seen, so that it can be found among the memory events."""

    skips_waiting = False

    def __init__(self) -> None:
        super().__init__(on_cpu=False)  # nothing is added from the table of what kernels take: that is what is looked for
        self._seen: dict[int, tuple[int, int]] = {}

    def _born(self, storage: torch.UntypedStorage, op: str, module: str, source: Frame | None) -> int:
        index = super()._born(storage, op, module, source)
        self._seen[index] = (time.time_ns(), storage.data_ptr())
        return index

    def resized(self, storage: torch.UntypedStorage) -> None:
        """The same piece is somewhere else now."""
        super().resized(storage)
        index = self._living.get(storage._cdata)
        if index is not None:
            self._seen[index] = (time.time_ns(), storage.data_ptr())

    def label_all(self, module: nn.Module, inputs: Any) -> None:
        """Say what is there before the first step."""
        for kind, name, tensor in tensors_of(module):
            self.label(tensor, kind, name)
        for path, value in tree_flatten_with_path(inputs)[0]:
            if isinstance(value, torch.Tensor):
                self.label(value, "input", ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path))

    def label_gradients(self, module: nn.Module) -> None:
        """Say what a backward has left."""
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self.label(parameter.grad, "gradient", name)

    def label_state(self, module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Say what the optimizers hold."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        entries = (pair for optimizer in optimizers for pair in optimizer.state.items())
        for parameter, state in entries:
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    self.label(value, "optimizer state", names[id(parameter)])

    def pieces(self, spans: Lifetimes) -> dict[MemoryEvent, Allocation]:
        """Every piece by the memory event that handed it out."""
        made = self.timeline("", "").allocations
        found = ((living_at(spans, address, when), made[index]) for index, (when, address) in self._seen.items())
        return {event: piece for event, piece in found if event is not None}


def held_at(peak: Peak, known: Mapping[MemoryEvent, Allocation], unknown: str = KERNELS) -> list[Held]:
    """What is there at a peak; what no tensor shows that was seen is of the kind `unknown`, by its op."""
    return [_held(event, known.get(event), unknown) for event in peak.living]


def _held(event: MemoryEvent, piece: Allocation | None, unknown: str) -> Held:
    if piece is None:
        return Held(unknown, event.op or _OUTSIDE, event.nbytes, event.nbytes)
    return held_of(piece, event.nbytes)


def built(peak: Peak, module: Any, spans: Lifetimes, when: int) -> list[Held]:
    """What is there at the peak of building: what stays, by its name, and what is there only meanwhile, by its op."""
    names = {living_at(spans, address, when): name for name, address in _addresses(module)}
    return [
        Held("tensor", names[event], event.nbytes, event.nbytes)
        if event in names
        else Held("temporary", f"{event.op or _OUTSIDE}, while building", event.nbytes, event.nbytes)
        for event in peak.living
    ]


def _addresses(module: Any) -> Iterator[tuple[str, int]]:
    for prefix, root in roots_of(module).items():
        for _, name, tensor in reversed(list(tensors_of(root))):
            for part in parts_of(tensor.detach()):
                yield f"{prefix}.{name}".strip("."), part.untyped_storage().data_ptr()
