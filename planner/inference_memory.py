"""How many bytes serving takes, phase by phase: the weights' phases in closed form, the others from a run on fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from ..tracer.graph import ParamGraph
from .allocations import FIRST_STEP, STEP, Allocation, Timeline
from .allocator import replay
from .allocator_events import Allocate
from .decisions import Decisions
from .inference import Inference
from .inference_parts import as_planned
from .memory import Binding, Memory, largest_of, memory
from .rank_memory import weights_of

_WEIGHTS = ("parameter", "buffer")


def inference_memory(graph: ParamGraph, decisions: Decisions, inference: Inference, run: Timeline, rank: int = 0) -> Memory:
    """The memory of serving by `decisions`, of one rank if they shard; `run` is one of the module whole, on one device.

    Raises what `memory` raises.
    """
    closed, planned = memory(graph, decisions), as_planned(run, graph, decisions, rank)
    weights = closed.rank(rank)
    by_device = dict(weights.by_device)
    saved = by_device.pop("checkpoint")
    by_device |= {phase: planned.peaks[phase] for phase in (FIRST_STEP, STEP)} | {"checkpoint": saved}
    held = [each for each in planned.allocations if each.kind in _WEIGHTS]
    return replace(
        weights,
        by_device=by_device,
        binding=_binding(by_device, planned, weights),
        notes=(*weights.notes, *_notes(decisions, inference)),
        of_rank=None if weights.ranks == 1 else lambda index: inference_memory(graph, decisions, inference, run, index),
        left_out=_left_out(decisions),
        run=planned,
        certain=_sums(held),
        rounding=_rounding(held),
    )


def weights_alone(graph: ParamGraph, decisions: Decisions, reason: str, rank: int = 0) -> Memory:
    """The same where the module cannot be run without memory: what the weights take, the rest being left out."""
    closed = memory(graph, decisions).rank(rank)
    held = [Allocation("parameter", each.nbytes, each.device, each.tensor) for each in weights_of(graph, decisions, rank)]
    by_device = dict(closed.by_device)
    saved = by_device.pop("checkpoint")
    by_device |= {phase: _sums(held) for phase in (FIRST_STEP, STEP)} | {"checkpoint": saved}
    return replace(
        closed,
        by_device=by_device,
        notes=(*closed.notes, f"inference: the weights alone, as {reason}"),
        of_rank=None if closed.ranks == 1 else lambda index: weights_alone(graph, decisions, reason, index),
        left_out=("the KV cache", "activations"),
    )


def _binding(by_device: Mapping[str, Mapping[str, int]], run: Timeline, weights: Memory) -> Binding:
    places = [(phase, device) for phase, devices in by_device.items() for device in devices]
    phase, device = max(places, key=lambda place: by_device[place[0]][place[1]])
    if phase not in (FIRST_STEP, STEP):
        return weights.binding
    return Binding(phase, device, by_device[phase][device], largest_of(run.at_peak(phase, device)))


def _left_out(decisions: Decisions) -> tuple[str, ...]:
    sharding = decisions.sharding
    return ("gathered units",) if sharding is not None and sharding.size("shard") > 1 else ()


# -- what is known without a margin -------------------------------------------------------------------------------------


def _sums(allocations: Iterable[Allocation]) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in allocations:
        found[each.device] = found.get(each.device, 0) + each.nbytes
    return found


def _rounding(held: list[Allocation]) -> dict[str, int]:
    """What the caching allocator reserves for the weights of each CUDA device beyond their bytes."""
    return {
        device: replay(_events(held, device)).peak.reserved - nbytes
        for device, nbytes in _sums(held).items()
        if device.startswith("cuda")
    }


def _events(held: list[Allocation], device: str) -> Iterator[Allocate]:
    sizes = (each.nbytes for each in held if each.device == device and each.nbytes)
    return (Allocate(number, nbytes) for number, nbytes in enumerate(sizes))


# -- assumptions --------------------------------------------------------------------------------------------------------


def _notes(decisions: Decisions, inference: Inference) -> Iterator[str]:
    yield "first_step and step are from a run of forward on fake tensors, in T0 and T1 alike"
    yield f"{FIRST_STEP} reads the prompt, {STEP} decodes the last of {inference.new_tokens} new; checkpoint saves the weights"
    yield "on CUDA the kernels' workspaces come on top, and kernels may be others than the CPU's, which the run chose"
    if decisions.quantizing:
        yield "inference: layers compute as they do unquantized, and the largest weight is converted back whole while it does"
    if decisions.placing is not None:
        yield "inference: what a module makes is on its device; the copies between devices come on top"
    if decisions.sharding is not None and decisions.sharding.size("tensor") > 1:
        yield "inference: the KV cache and activations between divided matrices are divided with them, others are whole"
