"""A real step looked at op by op: which module, op and source line each piece of memory comes from, and what it is for.

The same records that a run on fake tensors leaves, made of a real one: where both run, they can be held side by side.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ..planner.allocations import Allocation
from ..planner.verification import KERNELS, Held, held_of
from .allocations import Allocations
from .fake_tensors import tensors_of
from .memory_events import Lifetimes, MemoryEvent, Peak, living_at

_OUTSIDE = "outside ops"


class Watched(Allocations):
    """Follows a real step, and when and where each piece of memory was seen, so that it can be found among the memory events."""

    def __init__(self) -> None:
        super().__init__(on_cpu=False)  # nothing is added from the table of what kernels take: that is what is looked for
        self._seen: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(_is_dtensor(each) for each in types):
            return NotImplemented  # DTensor takes it apart first, and its local ops come here
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _born(self, storage: torch.UntypedStorage, *place: Any) -> int:
        index = super()._born(storage, *place)
        self._seen[index] = (time.time_ns(), storage.data_ptr())
        return index

    def label_all(self, module: nn.Module, inputs: Any) -> None:
        """Say what is there before the first step."""
        for kind, name, tensor in tensors_of(module):
            self.label(local_part(tensor), kind, name)
        for path, value in tree_flatten_with_path(inputs)[0]:
            if isinstance(value, torch.Tensor):
                self.label(value, "input", ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path))

    def label_gradients(self, module: nn.Module) -> None:
        """Say what a backward has left."""
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                self.label(local_part(parameter.grad), "gradient", name)

    def label_state(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Say what the optimizer holds."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for parameter, entries in optimizer.state.items():
            for value in entries.values():
                if isinstance(value, torch.Tensor):
                    self.label(local_part(value), "optimizer state", names[id(parameter)])

    def pieces(self, spans: Lifetimes) -> dict[MemoryEvent, Allocation]:
        """Every piece by the memory event that handed it out."""
        made = self.timeline("", "").allocations
        found = ((living_at(spans, address, when), made[index]) for index, (when, address) in self._seen.items())
        return {event: piece for event, piece in found if event is not None}


def _is_dtensor(kind: type) -> bool:
    return kind.__name__ == "DTensor" and kind.__module__.startswith("torch.distributed.tensor")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if _is_dtensor(type(tensor)) else tensor  # type: ignore[attr-defined]


def held_at(peak: Peak, known: Mapping[MemoryEvent, Allocation]) -> list[Held]:
    """What is there at a peak; what no tensor shows is inside the kernel of its op."""
    return [_held(event, known.get(event)) for event in peak.living]


def _held(event: MemoryEvent, piece: Allocation | None) -> Held:
    if piece is None:
        return Held(KERNELS, event.op or _OUTSIDE, event.nbytes, event.nbytes)
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
    from ..tracer.collect import roots_of

    for prefix, root in roots_of(module).items():
        for _, name, tensor in reversed(list(tensors_of(root))):
            yield f"{prefix}.{name}".strip("."), local_part(tensor.detach()).untyped_storage().data_ptr()
