"""The bytes that one rank takes where a module is filled in place, in closed form: its part of every tensor.

A rank holds `ceil(n / D)` of the `n` rows of a parameter that FSDP shards between `D` ranks (the last ranks fewer, or none),
after the tensor axis has divided it. FSDP2 pads what it holds to the first rank's size when it first runs; gradients have that
size too (torch/distributed/fsdp/_fully_shard/_fsdp_param.py), the optimizer's state is that of the part alone.
"""

from __future__ import annotations

from ..tracer.graph import ParamGraph
from .activity import reached, trained
from .alike import Alike, changes_of
from .changes import HOST, Change, Changes
from .decisions import Cast, Decisions, dtype_after, final_dtype
from .exchanges import attention_output, ring_attention
from .expert_profile import on_rank
from .fsdp_form import Fsdp
from .fsdp_units import fsdp_of
from .held import Held, computing_device, held_by
from .kept import kept
from .local_parts import coordinate_of
from .optimizer import Trained
from .pipeline_memory import pipeline_activity, pipeline_inputs
from .profile import Profile
from .records import dtype_named
from .sharding import Sharding
from .training_memory import Stepped, gradients_of, hidden_names, training_phases
from .workload import Training

READ_BYTES = 2**24
"""The bytes of a checkpoint that one thread reads at a time."""

LOAD_NOTE = "load reads a checkpoint straight into the tensors; on other devices than the CPU a piece at a time, through the host"


def rank_timelines(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, rank: int, profile: Profile | None = None
) -> dict[str, Changes]:
    """What one rank allocates and releases in every phase."""
    held = held_by(graph, decisions, rank)
    weights = changes_of(held, lambda each: each.nbytes)
    whole = changes_of(held, lambda each: max(each.nbytes, each.working))  # a layer is read before it is quantized
    found = {
        "construct": changes_of(held, lambda each: each.working, lambda each: each.nbytes, lambda each: -each.working),
        "load": weights + (copied_to_host(whole) if decisions.quantizing else staged(weights)),
    }
    state = Changes()
    if workload is not None:
        phases, state = _training(graph, decisions, held, workload, rank, profile)
        found.update(phases)
    saved = weights + state
    found["checkpoint"] = saved + copied_to_host(saved, besides=HOST)
    return found


def _training(
    graph: ParamGraph, decisions: Decisions, held: Alike[Held], workload: Training, rank: int, profile: Profile | None
) -> tuple[dict[str, Changes], Changes]:
    """The phases of a training step, and the optimizer's state by itself."""
    sharding, device = decisions.sharding, computing_device(graph, decisions)
    stepped = held.to(lambda each: _stepped(each, graph, decisions, workload))
    weights = _padded(held) + (gradients_of(stepped) if is_ddp(decisions) else Changes())
    if profile is None or sharding is None:
        return trained(graph, weights, stepped, workload, profile, device)
    if sharding.size("expert") > 1:
        profile = on_rank(profile, sharding, graph, {name for own in held.names.tolist() for name in graph.by_name[own].names})
    fsdp = fsdp_of(graph, decisions, held, device)
    if sharding.pipeline is not None:
        stepped = reached(graph, profile, stepped)
        active = _in_pipeline(profile, sharding, rank, gradients_of(stepped), device, fsdp)
        given = _pipeline_inputs(profile, sharding, rank, device)
        phases, state = training_phases(weights + given, stepped, workload, active)
    else:
        phases, state = trained(graph, weights, stepped, workload, profile, device, fsdp)
    if sharding.size("context") > 1:
        ring = Changes.of([_ring(profile, graph, decisions, sharding, workload, device)])
        phases |= {name: ring + phases[name] + ring.released() for name in ("first_step", "step")}
    return phases, state


def _ring(
    profile: Profile, graph: ParamGraph, decisions: Decisions, sharding: Sharding, workload: Training, device: str
) -> Change:
    """What ring attention takes while it runs, taken to be there at the peak; with as many heads of keys as of queries."""
    computed = dtype_named(sharding.compute_dtype).itemsize if sharding.compute_dtype else _widest(graph, decisions.casts)
    itemsize = workload.autocast.itemsize if workload.autocast else computed
    output = attention_output(profile)
    peaks = ring_attention(2 * output, output, itemsize, sharding.size("context"))
    return Change(device, "ring attention's keys, values and gradients", max(peaks))


@kept
def _widest(graph: ParamGraph, casts: tuple[Cast, ...]) -> int:
    """The bytes of an element of the parameters that has most."""
    return max(dtype_after(each, casts).itemsize for each in graph.parameters)


def _in_pipeline(profile: Profile, sharding: Sharding, rank: int, gradients: Changes, device: str, fsdp: Fsdp | None) -> Changes:
    assert sharding.pipeline is not None
    place = coordinate_of(sharding, rank)["pipeline"]
    return pipeline_activity(profile, sharding.pipeline, sharding.size("pipeline"), place, gradients, device, fsdp)


def _pipeline_inputs(profile: Profile, sharding: Sharding, rank: int, device: str) -> Changes:
    assert sharding.pipeline is not None
    place = coordinate_of(sharding, rank)["pipeline"]
    return pipeline_inputs(profile, sharding.pipeline, sharding.size("pipeline"), place, device)


def _stepped(held: Held, graph: ParamGraph, decisions: Decisions, workload: Training) -> Stepped | None:
    """What the optimizer steps: a rank's part, without the padding that its gradient has."""
    if not held.trains:
        return None
    tensor = held.tensor
    hidden = workload.optimizer == "muon" and tensor.name in hidden_names(graph)
    whole = tensor.shape if held.divided else None
    return Stepped(Trained(held.device, held.shape, final_dtype(tensor, decisions), hidden, whole), held.padded * held.itemsize)


def rank_parts(graph: ParamGraph, decisions: Decisions, workload: Training, rank: int = 0) -> tuple[Fsdp | None, Alike[Trained]]:
    """How FSDP2 is applied to what a rank holds, and the parameters that its optimizer steps."""
    held = held_by(graph, decisions, rank)
    stepped = held.to(lambda each: _stepped(each, graph, decisions, workload))
    return fsdp_of(graph, decisions, held, computing_device(graph, decisions)), stepped.to(lambda each: each.parameter)


def weights_of(graph: ParamGraph, decisions: Decisions, rank: int) -> Changes:
    """What one rank holds of every tensor while the module runs: what FSDP shards is padded to the first rank's size."""
    return _padded(held_by(graph, decisions, rank))


def _padded(held: Alike[Held]) -> Changes:
    return changes_of(held, lambda each: each.padded * each.itemsize + each.quantized)


def is_ddp(decisions: Decisions) -> bool:
    """Whether gradients are reduced in buckets, which hold every one of them once more."""
    sharding = decisions.sharding
    return sharding is not None and not sharding.shards and sharding.axis("replicate") is not None


def staged(weights: Changes) -> Changes:
    """What a checkpoint's pieces take in host memory on their way to another device; what stays there is read in place."""
    largest = weights.largest(besides=HOST)
    return Changes.of([] if largest is None else [Change(HOST, largest.tensor, min(largest.nbytes, READ_BYTES))])


def copied_to_host(changes: Changes, besides: str | None = None) -> Changes:
    """A copy in host memory of the largest one, of those that are not on `besides`."""
    largest = changes.largest(besides)
    return Changes.of([] if largest is None else [largest._replace(device=HOST)])
