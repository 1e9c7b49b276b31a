"""Some tensors only: their recipes are run, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..planner.check import check_decisions
from ..planner.decisions import Decisions, final_device
from ..planner.quantizing import quantized_names
from ..tracer.ambient import host_random_from, one_at_a_time
from ..tracer.errors import MaterializeError
from ..tracer.graph import ParamGraph
from ..tracer.streams import generator_states, generators_kept
from .build import Build
from .check import check_devices, check_rng, check_uninitialized
from .filler import Threaded
from .indexing import Part, box_of
from .keyed import KeyedReplay, Keys, drawn_seed
from .parts import PartialReplay
from .steps import traced_with_casts
from .workers import Workers


def materialize_state(
    build: Build,
    decisions: Decisions,
    names: Iterable[str] | Mapping[str, Any],
    seed: int | None = None,
    uninitialized: str = "error",
    threads: int | None = None,
    rng: str = "eager",
) -> dict[str, torch.Tensor]:
    """The tensors called `names`, with the values that a full build would give them, by name; every one has memory of its own,
    except that names of one storage share it. A mapping gives an index for each name: the part of the tensor that is wanted.

    The global generators are left alone; `seed=None` means the values that a build from their present states would give.
    Raises `UnknownNameError` for a name that the graph does not have, and `UninitializedError`.
    """
    check_decisions(decisions, build.graph)
    check_devices(build.graph, decisions)
    check_rng(rng, build.graph)
    _check_not_quantized([names] if isinstance(names, str) else names, build.graph, decisions)
    indices = dict(names) if isinstance(names, Mapping) else {}
    names = [names] if isinstance(names, str) else list(names)
    with one_at_a_time, generators_kept(), host_random_from(build.origin.host), Workers(threads) as workers:
        if rng == "keyed" and seed is None:
            seed = drawn_seed()
        elif rng == "eager" and seed is not None:
            torch.manual_seed(seed)
        build = build.under_current_state()
        boxes = {name: box_of(name, build.graph.tensor(name).shape, indices.get(name, ...)) for name in names}
        check_uninitialized(build.graph, uninitialized, set(names))
        graph = traced_with_casts(build, decisions)[0].graph if decisions.casts else build.graph
        options = (graph.ops, graph.storages, generator_states(), uninitialized == "zero", Threaded(workers))
        keys = Keys.of(seed or 0, build.graph) if rng == "keyed" else None
        replay = PartialReplay(*options) if keys is None else KeyedReplay(keys, *options)
        found = _replayed(graph, boxes, replay)
    return {name: _placed(name, each, build.graph, decisions) for name, each in found.items()}


def _check_not_quantized(names: Iterable[str], graph: ParamGraph, decisions: Decisions) -> None:
    for name in names if decisions.quantizing else ():
        if name in quantized_names(graph.tensor(name), decisions.quantizing):
            raise MaterializeError(f"{name} is quantized with its layer; take it from a plan before .quantize(...)")


def _replayed(graph: ParamGraph, parts: Mapping[str, Part], replay: PartialReplay) -> dict[str, torch.Tensor]:
    nodes = {name: graph.tensor(name) for name in parts}
    for name, node in nodes.items():
        if node.opaque:
            raise MaterializeError(
                f"{name} is a {node.type} tensor, which has no recipe of its own; take it from plan.materialize()"
            )
    whole = {name: node for name, node in nodes.items() if parts[name].is_whole}
    found = dict(zip(whole, replay.run_whole([node.view for node in whole.values()]), strict=True))
    cut = {name: part for name, part in parts.items() if not part.is_whole}
    pieces = replay.run_parts([(nodes[name].view, part.box) for name, part in cut.items()])[0] if cut else []
    found |= {name: part.without_dims(piece) for (name, part), piece in zip(cut.items(), pieces, strict=True)}
    return {name: found[name].requires_grad_(node.requires_grad) for name, node in nodes.items()}


def _placed(name: str, tensor: torch.Tensor, graph: ParamGraph, decisions: Decisions) -> torch.Tensor:
    node = graph.tensor(name)
    device = torch.device(final_device(node, graph.storages[node.view.storage], decisions))
    if tensor.device == device:
        return tensor
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)
