"""A plan's sharding, placing, quantizing and checkpointing in words, for reports and explanations."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from .fold import fold_names
from .planner.checkpointing import matched_modules
from .planner.decisions import Decisions, final_dtype
from .planner.local_parts import LocalParts, shard_dim
from .planner.quantizing import Quantizing, Size, quantized_names
from .planner.records import dtype_named
from .planner.sharding import Pipeline, Sharding
from .planner.stages import stages_of, tied_between
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
    if sharding.pipeline is not None:
        yield from _pipeline_lines(graph, sharding.pipeline, sharding.size("pipeline"))
    if sharding.experts:
        left = f", and by FSDP between the {sharding.expert_shard_ranks} that hold the same" if sharding.shards else ""
        yield f"experts divided between {sharding.size('expert')} ranks, not by the tensor axis{left}: {_list(sharding.experts)}"
    if sharding.shards:
        yield from _unit_lines(sorted(sharding.unit_names(graph)), sharding)
        dtypes = [("computes in", sharding.compute_dtype), ("reduces gradients in", sharding.reduce_dtype)]
        yield from (f"{verb} {dtype}" for verb, dtype in dtypes if dtype)
        if sharding.offload:
            yield "keeps its shards in host memory"
    for rule in sharding.tensor:
        yield f"{rule.pattern}: {rule.style}"
    if sharding.sequence_parallel:
        yield "sequence parallel: norms and residuals are divided along the sequence between the ranks of the tensor axis"
    if sharding.loss_parallel:
        yield "loss parallel: logits are divided along the vocabulary between the ranks of the tensor axis"


def _unit_lines(units: Sequence[str], sharding: Sharding) -> Iterator[str]:
    """Units, those together that do the same after their forward."""
    if not sharding.reshard_rules:
        yield f"units gathered one at a time, {_after_forward(sharding.reshard)}: {_list(units)}, and all else together"
        return
    yield f"units gathered one at a time: {_list(units)}, and all else together"
    together: dict[str, list[str]] = {}
    for unit in (*units, ""):
        together.setdefault(_after_forward(sharding.reshard_of(unit)), []).append(unit or "all else together")
    yield from (f"{after}: {_list(names)}" for after, names in together.items())


def _after_forward(reshard: bool | int) -> str:
    if isinstance(reshard, bool):
        return "freed after the forward pass" if reshard else "kept until the backward pass"
    return f"kept in shares of {reshard} ranks after the forward pass"


def _pipeline_lines(graph: ParamGraph, pipeline: Pipeline, ranks: int) -> Iterator[str]:
    each = len(pipeline.stages) // ranks
    yield f"{pipeline.schedule}: {pipeline.microbatches} micro-batches through {len(pipeline.stages)} stages, {each} on a rank"
    for number, names in enumerate(pipeline.stages[:_SHOWN]):
        yield f"stage {number}, on rank {number % ranks} of the pipeline: {_list(names)}"
    if len(pipeline.stages) > _SHOWN:
        yield f"… and {len(pipeline.stages) - _SHOWN} more stages"
    for tensor, stages in tied_between(pipeline, graph):
        yield f"{' and '.join(tensor.names)} are tied, and on {_stages(stages)}: their gradients have to be added up"


def _stages(stages: tuple[int, ...]) -> str:
    return f"stage{'s' * (len(stages) != 1)} {', '.join(map(str, stages))}"


_PURPOSES = {
    "pipeline": "have layers of their own",
    "context": "divide every sequence, and with FSDP the parameters",
    "expert": "divide the experts of a layer, the same ranks as those of the axes before it",
    "replicate": "hold the same",
    "shard": "divide every parameter along its first dim (FSDP)",
    "tensor": "divide single layers by rule",
}


def tensor_placement(tensor: TensorNode, graph: ParamGraph, decisions: Decisions) -> str | None:
    """How one tensor is divided, and what the first rank holds of it; None where one process builds it all."""
    sharding = decisions.sharding
    if sharding is None:
        return None
    local, parts = LocalParts.of_rank(sharding, graph, 0), []
    if sharding.pipeline is not None:
        on = stages_of(tensor, sharding.pipeline)
        parts.append("on every stage" if len(on) == len(sharding.pipeline.stages) else f"on {_stages(on)}")
    divided = list(_divisions(tensor, local))
    if divided:
        parts.append(f"divided {', then '.join(divided)}")
    elif sharding.pipeline is None:
        return "every rank holds all of it"
    rank, shape = _first_holding(tensor, sharding, graph)
    return f"{', '.join(parts)}; rank {rank} holds {list(shape)}"


def _divisions(tensor: TensorNode, local: LocalParts) -> Iterator[str]:
    sharding, cut, expert = local.sharding, local.cut(tensor), local.expert(tensor)
    if cut is not None:
        pieces = f" of each of {cut.split} pieces" if cut.split > 1 else ""
        yield f"along dim {cut.dim}{pieces} between {sharding.size('tensor')} ranks"
    if expert is not None:
        which = (
            f"along dim 0, {expert.total} experts" if expert.number is None else f"as expert {expert.number} of {expert.total},"
        )
        yield f"{which} between {sharding.size('expert')} ranks"
    if local.is_sharded(tensor):
        ranks = sharding.shard_ranks if expert is None else sharding.expert_shard_ranks
        dim = 0 if expert is None else shard_dim(expert, sharding)
        yield f"along dim {dim} between {ranks} ranks (FSDP)"


def _first_holding(tensor: TensorNode, sharding: Sharding, graph: ParamGraph) -> tuple[int, tuple[int, ...]]:
    """The first rank that holds some of it, and what it holds."""
    for rank in range(sharding.ranks):
        shape = LocalParts.of_rank(sharding, graph, rank).shape(tensor)
        if shape is not None:
            return rank, shape
    raise AssertionError(f"no rank holds {tensor.name}")


def checkpointing_line(decisions: Decisions) -> str | None:
    """One line on what the plan checkpoints; None where it says nothing of it."""
    rules = ", ".join(f"{rule.pattern} {rule.level}" for rule in decisions.checkpointing)
    return f"checkpoint activations of {rules}" if rules else None


def checkpointing_lines(graph: ParamGraph, decisions: Decisions) -> Iterator[str]:
    """What each rule decides about."""
    matched = matched_modules(decisions.checkpointing, graph)
    for rule in decisions.checkpointing:
        names = [name for name, found in matched.items() if found == rule]
        yield f"{rule.pattern}: {_list(names)}: {_LEVELS[rule.level]}"


_LEVELS = {
    "full": "keep their inputs alone, and run again in the backward pass",
    "selective": "keep their inputs and what attention and every other matrix product give, and run again in the backward pass",
    "none": "keep what they compute",
}


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
