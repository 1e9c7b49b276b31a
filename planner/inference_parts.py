"""What a run of serving on one device says of a plan that divides, places or quantizes: the run's allocations, by its rules.

The weights are those that a rank holds in closed form. Of the rest, what modules make that tensor parallelism divides is divided
with them; what a module makes is on the device that runs it; replicas have DDP's buckets besides; and a quantized layer takes its
weight's bytes once more while it runs, as it is converted back (torchao's `Int8Tensor` on `linear`, bitsandbytes'
`dequantize_4bit`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ..tracer.graph import ParamGraph
from .allocations import FIRST_STEP, START, Allocation, Kind, Moment, Timeline
from .changes import HOST
from .decisions import Decisions, final_dtype
from .held import computing_device
from .placing import DISK, Placing, device_map
from .quantizing import quantized_names
from .rank_memory import is_ddp, weights_of
from .sharding import Sharding, parameters_by_module

_BUCKET = "DDP's bucket"
_Rule = Callable[[Allocation], Allocation]


def as_planned(run: Timeline, graph: ParamGraph, decisions: Decisions, rank: int = 0) -> Timeline:
    """The timeline of one rank, or of the one process, of a plan; `run` is that of the module whole, on one device, any."""
    rule = _rule(graph, decisions)
    if decisions.sharding is None and decisions.placing is None and not decisions.quantizing:
        return Timeline(tuple(map(rule, run.allocations)), run.moments)
    added = [*_weights(graph, decisions, rank), *_buckets(graph, decisions)]
    added += [*_fetched(graph, decisions), *_converted(graph, decisions)]
    kept = [index for index, each in enumerate(run.allocations) if each.kind not in ("parameter", "buffer")]
    places = {index: len(added) + position for position, index in enumerate(kept)}
    moments = [Moment(FIRST_STEP if each.op == _BUCKET else START, index, True) for index, each in enumerate(added)]
    moments += [replace(each, allocation=places[each.allocation]) for each in run.moments if each.allocation in places]
    in_order = sorted(moments, key=lambda each: each.phase != START)
    return Timeline((*added, *(rule(run.allocations[index]) for index in kept)), tuple(in_order))


def _weights(graph: ParamGraph, decisions: Decisions, rank: int) -> Iterator[Allocation]:
    kinds = {tensor.name: tensor.kind for tensor in graph.tensors}
    for each in weights_of(graph, decisions, rank):
        kind: Kind = "parameter" if kinds.get(each.tensor) == "parameter" else "buffer"
        yield Allocation(kind, each.nbytes, each.device, each.tensor)


def _rule(graph: ParamGraph, decisions: Decisions) -> _Rule:
    if decisions.placing is not None:
        return _placed(graph, decisions.placing)
    device = computing_device(graph, decisions)

    def moved(each: Allocation) -> Allocation:
        return each if each.device in (HOST, device) else replace(each, device=device)

    if decisions.sharding is not None and decisions.sharding.size("tensor") > 1:
        divided = _divided(graph, decisions.sharding)
        return lambda each: divided(moved(each))
    return moved


# -- replicas -----------------------------------------------------------------------------------------------------------


def _buckets(graph: ParamGraph, decisions: Decisions) -> Iterator[Allocation]:
    """What DDP reduces gradients in: a bucket for each dtype from the first forward on, also where no gradient is asked for."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in graph.parameters if is_ddp(decisions) else ():
        if tensor.requires_grad:
            dtype = final_dtype(tensor, decisions)
            sizes[dtype] = sizes.get(dtype, 0) + tensor.numel * dtype.itemsize
    for nbytes in sizes.values():
        yield Allocation("communication buffer", nbytes, computing_device(graph, decisions), op=_BUCKET)


# -- tensor parallelism -------------------------------------------------------------------------------------------------


def _divided(graph: ParamGraph, sharding: Sharding) -> _Rule:
    """Divides what is made within blocks whose matrices are all divided, from the columns of one to the rows of the next."""
    size, styles, blocks = sharding.size("tensor"), sharding.styles(graph), _blocks(graph, sharding)

    def rule(each: Allocation) -> Allocation:
        style = styles.get(each.module, "")
        if style in ("colwise_gather_output", "colwise_rep"):
            return replace(each, nbytes=each.nbytes + -(-each.nbytes // size))  # a part, and the whole that is gathered
        divided = style in ("colwise", "packed_colwise") or (not style and _within(each.module, blocks))
        return replace(each, nbytes=-(-each.nbytes // size)) if divided and each.kind != "input" else each

    return rule


def _blocks(graph: ParamGraph, sharding: Sharding) -> set[str]:
    """The modules that hold matrices of their own children alone, all divided, some by columns and some by rows."""
    own, cuts, styles = parameters_by_module(graph), sharding.cuts(graph), sharding.styles(graph)
    children: dict[str, list[str]] = {}
    for module in graph.modules:
        matrices = [name for name in own.get(module.name, ()) if name in graph.by_name and len(graph.by_name[name].shape) > 1]
        if module.name and matrices:
            children.setdefault(module.name.rpartition(".")[0], []).append(module.name)
            if not all(name in cuts for name in matrices):
                children[module.name.rpartition(".")[0]].append("")  # holds something whole
    kinds = {parent: {styles.get(child, "") for child in names} for parent, names in children.items()}
    columns, rows = {"colwise", "packed_colwise"}, {"rowwise", "packed_rowwise"}
    return {parent for parent, found in kinds.items() if found & columns and found & rows and found <= columns | rows}


def _within(module: str, blocks: set[str]) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:count]) in blocks for count in range(1, len(parts) + 1))


# -- several devices ----------------------------------------------------------------------------------------------------


def _placed(graph: ParamGraph, placing: Placing) -> _Rule:
    """Puts each allocation on the device that runs its module: accelerate's hooks bring inputs to the weights."""
    entries = {name: _cuda(device) for name, device in device_map(placing, graph).items()}
    main = _cuda(placing.main)

    def rule(each: Allocation) -> Allocation:
        parts = each.module.split(".") if each.module else []
        names = [".".join(parts[:count]) for count in range(len(parts), -1, -1)]
        device = next((entries[name] for name in names if name in entries), main)
        return replace(each, device=main if device in (DISK, HOST) else device)

    return rule


def _fetched(graph: ParamGraph, decisions: Decisions) -> Iterator[Allocation]:
    """The largest module whose weights are in host memory or on disk, on the device that they are brought to when it runs."""
    placing = decisions.placing
    if placing is None or placing.main == HOST:
        return
    sizes: dict[str, int] = {}
    for tensor in graph.parameters:
        if placing.device_for(tensor) in (DISK, HOST, None):
            module = tensor.name.rpartition(".")[0]
            sizes[module] = sizes.get(module, 0) + tensor.numel * final_dtype(tensor, decisions).itemsize
    if sizes:
        largest = max(sizes, key=sizes.__getitem__)
        yield Allocation("temporary", sizes[largest], _cuda(placing.main), module=largest, op="weights brought from the host")


def _cuda(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


# -- quantized layers ---------------------------------------------------------------------------------------------------


def _converted(graph: ParamGraph, decisions: Decisions) -> Iterator[Allocation]:
    """The largest quantized weight, as it is converted back."""
    if not decisions.quantizing:
        return
    sizes = {
        tensor.name: tensor.numel * final_dtype(tensor, decisions).itemsize
        for tensor in graph.parameters
        if quantized_names(tensor, decisions.quantizing)
    }
    if sizes:
        largest = max(sizes, key=sizes.__getitem__)
        device = next(each.device for each in weights_of(graph, decisions, 0) if each.tensor == largest)
        yield Allocation("temporary", sizes[largest], device, module=largest.rpartition(".")[0], op="weight converted back")
