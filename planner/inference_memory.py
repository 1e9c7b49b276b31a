"""How many bytes serving takes, phase by phase: the weights' phases in closed form, the others from a run on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from ..tracer.graph import ParamGraph
from .allocations import FIRST_STEP, STEP, Allocation, Timeline
from .cuda_left_out import left_out_of
from .decisions import Decisions
from .estimate import largest_of, memory
from .inference import Inference
from .inference_parts import as_planned
from .local_parts import distinct_ranks
from .memory import Binding, Memory
from .rank_memory import weights_of
from .replayed_run import Allocator, is_cuda
from .reserved import with_reserved
from .sharding import Sharding


def inference_memory(
    graph: ParamGraph,
    decisions: Decisions,
    inference: Inference,
    runs: Callable[[int], Timeline],
    allocator: Allocator,
    left_out: tuple[str, ...] = (),
) -> Memory:
    """The memory of serving by `decisions`, of the worst rank if they shard; `runs` gives each one's run, by rule or as it was.

    What is reserved on CUDA devices is there in every tier: a cache that grows leaves holes. Raises what `memory` raises.
    """

    def of_rank(rank: int) -> Memory:
        found = _of_rank(graph, decisions, inference, runs, allocator, left_out, rank)
        return found if found.ranks == 1 else replace(found, of_rank=of_rank)

    return _worst(decisions, of_rank)


def _worst(decisions: Decisions, of_rank: Callable[[int], Memory]) -> Memory:
    return max(map(of_rank, distinct_ranks(decisions.sharding)), key=lambda each: each.peak)


def _of_rank(
    graph: ParamGraph,
    decisions: Decisions,
    inference: Inference,
    runs: Callable[[int], Timeline],
    allocator: Allocator,
    left_out: tuple[str, ...],
    rank: int,
) -> Memory:
    run, weights = runs(rank), memory(graph, decisions).rank(rank)
    by_device = _with_steps(weights, {phase: run.peaks[phase] for phase in (FIRST_STEP, STEP)})
    found = replace(
        weights,
        by_device=by_device,
        binding=_binding(by_device, run, weights),
        notes=(*weights.notes, *_notes(decisions, inference)),
        of_rank=None,
        left_out=(*left_out, *left_out_of(each.op for each in run.allocations if is_cuda(each.device))),
        run=run,
    )
    if any(map(is_cuda, found.devices)):
        held = _sums(each for each in run.allocations if each.kind in ("parameter", "buffer"))
        found = replace(with_reserved(found, allocator), certain=held)
    return found


def by_rule(graph: ParamGraph, decisions: Decisions, inference: Inference, run: Timeline, allocator: Allocator) -> Memory:
    """The same with the plan applied by rule to `run`, which is one of the module whole, on one device."""
    found = inference_memory(
        graph, decisions, inference, lambda rank: as_planned(run, graph, decisions, rank), allocator, tuple(_not_ruled(decisions))
    )
    return replace(found, notes=(*found.notes, *_rule_notes(decisions)))


def _not_ruled(decisions: Decisions) -> Iterator[str]:
    """What no rule says of a plan that shards."""
    sharding = decisions.sharding
    if sharding is not None and sharding.shards:
        yield "gathered units"
    if sharding is not None and (sharding.shards or _undivided(sharding)):
        yield "communication buffers"


def _undivided(sharding: Sharding) -> list[str]:
    """The axes whose ranks a run is not divided between."""
    return [axis.name for axis in sharding.axes if axis.role in ("pipeline", "context", "expert")]


def _with_steps(weights: Memory, steps: Mapping[str, Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """The phases of the weights, with those of running before that of saving."""
    by_device = dict(weights.by_device)
    saved = by_device.pop("checkpoint")
    return {**by_device, **steps, "checkpoint": saved}


def weights_alone(graph: ParamGraph, decisions: Decisions, reason: str) -> Memory:
    """The same where the module cannot be run without memory: what the weights take, the rest being left out."""

    def of_rank(rank: int) -> Memory:
        found = _weights_alone(graph, decisions, reason, rank)
        return found if found.ranks == 1 else replace(found, of_rank=of_rank)

    return _worst(decisions, of_rank)


def _weights_alone(graph: ParamGraph, decisions: Decisions, reason: str, rank: int) -> Memory:
    closed = memory(graph, decisions).rank(rank)
    held = [Allocation("parameter", each.nbytes, each.device, each.tensor) for each in weights_of(graph, decisions, rank)]
    return replace(
        closed,
        by_device=_with_steps(closed, dict.fromkeys((FIRST_STEP, STEP), _sums(held))),
        notes=(*closed.notes, f"inference: the weights alone, as {reason}"),
        of_rank=None,
        left_out=("the KV cache", "activations"),
    )


def _binding(by_device: Mapping[str, Mapping[str, int]], run: Timeline, weights: Memory) -> Binding:
    places = [(phase, device) for phase, devices in by_device.items() for device in devices]
    phase, device = max(places, key=lambda place: by_device[place[0]][place[1]])
    if phase not in (FIRST_STEP, STEP):
        return weights.binding
    return Binding(phase, device, by_device[phase][device], largest_of(run.at_peak(phase, device)))


def _sums(allocations: Iterable[Allocation]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in allocations:
        found[each.device] = found.get(each.device, 0) + each.nbytes
    return found


# -- assumptions --------------------------------------------------------------------------------------------------------


def _notes(decisions: Decisions, inference: Inference) -> Iterator[str]:
    yield "first_step and step are from a run of forward on fake tensors, in every tier"
    yield f"{FIRST_STEP} reads the prompt, {STEP} decodes the last of {inference.new_tokens} new; checkpoint saves the weights"


def _rule_notes(decisions: Decisions) -> Iterator[str]:
    if decisions.quantizing:
        yield "inference: layers compute as they do unquantized, and the largest weight is converted back whole while it does"
    if decisions.placing is not None:
        yield "inference: what a module makes is on its device; the copies between devices come on top"
    if decisions.sharding is not None and (names := _undivided(decisions.sharding)):
        yield f"inference: activations and the KV cache are those of the module whole, not divided along {', '.join(names)}"
    if decisions.sharding is not None and decisions.sharding.size("tensor") > 1:
        yield "inference: the KV cache and activations between divided matrices are divided with them, others are whole"
