"""The verb of the first stage: run a constructor without allocating, and return the graph of what it creates.

1. the generators' states and torch's settings are noted; the user's come back at the end, also on error
2. the constructor runs on traced tensors, the tape writes down what it calls
3. the finished module's tensors get their names, the tape its dead ops
4. the graph is checked
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .ambient import HostRandom, ambient_kept, ambient_now, host_random_now, one_at_a_time, restore_host_random
from .collect import collect
from .graph import ModuleNode, ParamGraph, StreamPosition, TensorNode
from .patches import torch_patched
from .streams import generators_kept
from .tape import Tape


class Origin(NamedTuple):
    """The random states that a constructor was traced from: torch's generators by device, Python's and numpy's."""

    torch: dict[str, torch.Tensor]
    host: HostRandom


def trace_constructor(build: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[ParamGraph, Origin]:
    """The graph of what `build(*args, **kwargs)` creates, and the random states it was traced from.

    Errors of the constructor come out as they are. Raises `TraceError` for what a trace cannot follow.
    """
    graph, origin, _ = trace_and_keep(build, *args, **kwargs)
    return graph, origin


def trace_and_keep(build: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[ParamGraph, Origin, Any]:
    """The same, and what the constructor returned, made of traced tensors."""
    ambient, host = ambient_now(), host_random_now()
    with one_at_a_time, generators_kept() as states, ambient_kept():
        tape = Tape(states)
        try:
            built, modules, tensors, ends = _recorded(tape, build, args, kwargs)
            moved = not host_random_now().same(host)
            ops, storages = tape.finish(tensor.view.storage for tensor in tensors)
        finally:
            restore_host_random(host)
            tape.values.give_back()
    graph = ParamGraph(
        modules,
        tensors,
        storages,
        ops,
        ambient,
        "cuda" if ambient.default_device.startswith("cuda") else "cpu",
        tuple(tape.values.seed_dependent),
        moved,
        ends=ends,
    )
    graph.check()
    return graph, Origin(states, host), built


def _recorded(
    tape: Tape, build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[ModuleNode, ...], tuple[TensorNode, ...], tuple[StreamPosition, ...]]:
    """What the constructor returns, made of traced tensors, what that holds, and where the generators then stand.

    It is looked through while the tape still records: asking a view for its `grad_fn` may make autograd take the view again.
    """
    streams = tape.ledger.streams
    streams.start_default()
    with streams.private_generators_kept(), torch_patched(tape), tape.recording():
        built = run_constructor(build, args, kwargs)
        ends = streams.ends()
        return built, *collect(built, tape.ledger), ends


def run_constructor(build: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the user's constructor; the frames of a site end here."""
    return build(*args, **kwargs)
