"""A constructor with its arguments, and what a trace of it gave."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..tracer.ambient import ambient_applied
from ..tracer.graph import ParamGraph
from ..tracer.streams import generator_states
from ..tracer.trace import Origin, trace_and_keep


@dataclass(frozen=True)
class Build:
    """A constructor with its arguments, what a trace of it gave, and the random states it was traced from."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    graph: ParamGraph
    origin: Origin = field(repr=False)

    @classmethod
    def trace(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Build:
        """Trace `function(*args, **kwargs)`."""
        return cls.trace_and_keep(function, args, kwargs)[0]

    @classmethod
    def trace_and_keep(cls, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Build, Any]:
        """The same, and what the constructor returned, made of traced tensors."""
        graph, origin, built = trace_and_keep(function, *args, **kwargs)
        return cls(function, args, kwargs, graph, origin), built

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def under_current_state(self) -> Build:
        """The same constructor, traced for the generators' present states where its ops depend on them."""
        if not self.graph.seed_dependent or _same_states(self.origin.torch, generator_states()):
            return self
        with ambient_applied(self.graph.ambient):
            return Build.trace(self.function, self.args, self.kwargs)

    @property
    def bound_state(self) -> str | None:
        """The digest of the generator state that the graph holds for, where the constructor looked at random values."""
        return state_digest(self.origin.torch) if self.graph.seed_dependent else None


def _same_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(state, other[device]) for device, state in one.items() if device in other)


def state_digest(states: Mapping[str, torch.Tensor]) -> str:
    """A digest of generator states, under which a plan that depends on random values is bound to them."""
    digest = hashlib.sha256()
    for device in sorted(states):
        digest.update(device.encode() + b"\0" + states[device].numpy().tobytes())
    return digest.hexdigest()
