"""A plan's sharding, placing and quantizing in words, for reports and explanations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from .fold import fold_names
from .planner.decisions import Decisions, final_dtype
from .planner.quantizing import Quantizing, Size, quantized_names
from .planner.rank_memory import coordinate_of, local_shape
from .planner.records import dtype_named
from .planner.sharding import Sharding
from .tracer.graph import ParamGraph, TensorNode
from .units import format_bytes

_SHOWN = 8


def layout_line(decisions: Decisions) -> str | None:
    """One line on how the plan divides or places the module; None where it does neither."""
    if decisions.sharding is not None:
        ranks = decisions.sharding.ranks
        return f"shard between {ranks:,} rank{'s' * (ranks != 1)} ({decisions.sharding.describe()})"
    if decisions.placing is not None:
        return "place " + ", ".join(f"{rule.pattern} on {rule.device}" for rule in decisions.placing.rules)
    if decisions.quantizing:
        return "; ".join(map(_quantizing_line, decisions.quantizing))
    return None


def _quantizing_line(found: Quantizing) -> str:
    count = len(found.layers)
    return f"quantize {count:,} layer{'s' * (count != 1)} by {found.describe()}"


def layout_lines(graph: ParamGraph, decisions: Decisions) -> Iterator[str]:
    """What the layout does, one thing a line."""
    if decisions.sharding is not None:
        yield from _sharding_lines(graph, decisions.sharding)
    elif decisions.placing is not None:
        for rule in decisions.placing.rules:
            matched = [tensor.name for tensor in graph.tensors if decisions.placing.rule_for(tensor) is rule]
            yield f"{rule.pattern} on {rule.device}: {_list(matched)}"
    for found in decisions.quantizing:
        yield f"{found.describe()}: {_list(found.layers)}"
        yield from (f"{size.dtype}{list(size.shape)}: {quantized_size(size)}" for size in found.sizes)


def quantized_size(size: Size) -> str:
    """What becomes of a weight, in words."""
    before = math.prod(size.shape) * dtype_named(size.dtype).itemsize
    if size.nbytes is None:
        return f"{format_bytes(before)}, quantized it is unknown here"
    return (
        f"{format_bytes(before)} → {format_bytes(size.nbytes)}" if size.nbytes != before else f"stays at {format_bytes(before)}"
    )


def _sharding_lines(graph: ParamGraph, sharding: Sharding) -> Iterator[str]:
    for axis in sharding.axes:
        yield f"{axis.name}: {axis.size} ranks, to {_PURPOSES[axis.role]}"
    if sharding.axis("shard") is not None:
        units = sharding.unit_names(graph)
        after = "freed after the forward pass" if sharding.reshard is True else "kept until the backward pass"
        if not isinstance(sharding.reshard, bool):
            after = f"kept in shares of {sharding.reshard} ranks after the forward pass"
        yield f"units gathered one at a time, {after}: {_list(sorted(units))}, and all else together"
        dtypes = [("computes in", sharding.compute_dtype), ("reduces gradients in", sharding.reduce_dtype)]
        yield from (f"{verb} {dtype}" for verb, dtype in dtypes if dtype)
        if sharding.offload:
            yield "keeps its shards in host memory"
    for rule in sharding.tensor:
        yield f"{rule.pattern}: {rule.style}"


_PURPOSES = {
    "replicate": "hold the same",
    "shard": "divide every parameter along its first dim (FSDP)",
    "tensor": "divide single layers by rule",
}


def tensor_placement(tensor: TensorNode, graph: ParamGraph, decisions: Decisions) -> str | None:
    """How one tensor is divided, and what the first rank holds of it; None where one process builds it all."""
    sharding = decisions.sharding
    if sharding is None:
        return None
    cuts, parts = sharding.cuts(graph), []
    cut = next((cuts[name] for name in tensor.names if name in cuts), None)
    if cut is not None:
        pieces = f" of each of {cut.split} pieces" if cut.split > 1 else ""
        parts.append(f"along dim {cut.dim}{pieces} between {sharding.size('tensor')} ranks")
    sharded = tensor.kind == "parameter" and sharding.axis("shard") is not None
    if sharded:
        parts.append(f"along dim 0 between {sharding.size('shard')} ranks (FSDP)")
    if not parts:
        return "every rank holds all of it"
    shape = local_shape(tensor.shape, cut, sharded, sharding, coordinate_of(sharding, 0))
    return f"divided {', then '.join(parts)}; rank 0 holds {list(shape)}"


def tensor_quantizing(tensor: TensorNode, decisions: Decisions) -> str | None:
    """What becomes of a weight that is quantized, under which of its names; None for a tensor that is not."""
    lines = []
    for name, found in quantized_names(tensor, decisions.quantizing).items():
        size = found.size_of(tensor.shape, final_dtype(tensor, decisions))
        lines.append(f"as {name}, by {found.describe()}" + (f": {quantized_size(size)}" if size is not None else ""))
    return "; ".join(lines) or None


def _list(names: Iterable[str]) -> str:
    folds = [fold.name for fold in fold_names(list(names))]
    more = f", … and {len(folds) - _SHOWN} more" if len(folds) > _SHOWN else ""
    return (", ".join(folds[:_SHOWN]) or "none") + more
