"""How many bytes each phase takes on each device, before anything is built: in closed form, or from a run of the step.

A phase is a list of `Change`s: allocations and releases in the order in which they happen. Its peak on a device is the highest
running sum, and the tensors that make the peak are those resident at that moment. All sizes are bytes of tensor storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from ..tracer.graph import ParamGraph
from .activity import trained
from .alike import alike
from .allocations import FIRST_OPTIMIZER, OPTIMIZER, Allocation, Timeline
from .assumptions import closed_notes, rank_notes, run_notes
from .changes import HOST, Changes
from .construct import Walk, memory_device
from .cuda_left_out import left_out_of
from .decisions import Decisions, final_device, final_dtype
from .held import computing_device
from .kept import kept
from .local_parts import distinct_ranks
from .memory import Binding, Memory, run_phase
from .optimizer import Trained
from .profile import NoProfile, Profile
from .rank_memory import copied_to_host, rank_timelines, staged
from .replayed_run import is_cuda
from .training_memory import Stepped, hidden_names
from .workload import Training

_SHOWN_TENSORS = 10

RESERVED = "what CUDA's caching allocator reserves beside"
"""Left out of tier T1: a fifth of the active bytes and more (docs/decisions/021-published-runs.md). Tier T2 has it."""


# -- the verb -----------------------------------------------------------------------------------------------------------


def memory(
    graph: ParamGraph, decisions: Decisions, workload: Training | None = None, profile: Profile | NoProfile | None = None
) -> Memory:
    """The bytes of each phase for building `graph` by `decisions` and, with a `workload`, for training it.

    A `profile` of the module for that workload says what forward and backward take; without one that is left out.

    Devices are named as PyTorch reports them, so `cuda` without an index counts as `cuda:0`. Weights count each storage once.
    Raises `DecisionError` where a cast gives one tied tensor two dtypes.
    """
    if _is_of_a_rank(decisions):
        found = {rank: _of_rank(graph, decisions, workload, profile, rank) for rank in distinct_ranks(decisions.sharding)}
        most = max(found.values(), key=lambda each: each.peak)
        of_rank = most.of_rank
        assert of_rank is not None
        return replace(most, of_rank=lambda index: found[index] if index in found else of_rank(index))
    timelines = timelines_of(graph, decisions, workload, profile=profile)
    by_device = {phase: changes.peaks() or {HOST: 0} for phase, changes in timelines.items()}
    left_out = _left_out(workload, profile, by_device, "activations")
    notes = tuple(closed_notes(decisions, workload, profile, computing_device(graph, decisions)))
    return Memory(by_device, _binding(by_device, timelines), notes, left_out=left_out, changes=timelines)


def timelines_of(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training | None,
    rank: int = 0,
    profile: Profile | NoProfile | None = None,
) -> dict[str, Changes]:
    """What `memory` adds up: the allocations and releases of each phase, on one rank of a sharded plan."""
    known = profile if isinstance(profile, Profile) else None
    if _is_of_a_rank(decisions):
        return rank_timelines(graph, decisions, workload, rank, known)
    walk = Walk(graph)
    for step in decisions.steps:
        walk.take(step)
    walk.finish()
    return _timelines(graph, decisions, workload, walk, known)


def _is_of_a_rank(decisions: Decisions) -> bool:
    return decisions.sharding is not None or decisions.placing is not None or bool(decisions.quantizing)


def _of_rank(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None, rank: int
) -> Memory:
    """The same for one rank of a sharded plan, or the one process of a plan that places tensors or quantizes."""
    timelines = timelines_of(graph, decisions, workload, rank, profile)
    by_device = {phase: changes.peaks() or {HOST: 0} for phase, changes in timelines.items()}
    return Memory(
        by_device,
        _binding(by_device, timelines),
        tuple(rank_notes(decisions, workload, profile, rank, computing_device(graph, decisions))),
        1 if decisions.sharding is None else decisions.sharding.ranks,
        lambda index: _of_rank(graph, decisions, workload, profile, index),
        _left_out(workload, profile, by_device, "activations", "gathered units", "communication buffers"),
        _communicators(decisions),
        changes=timelines,
        distinct=distinct_ranks(decisions.sharding),
    )


def _left_out(
    workload: Training | None, profile: Profile | NoProfile | None, by_device: Mapping[str, Mapping[str, int]], *without: str
) -> tuple[str, ...]:
    """What is not counted: all that a profile would say, or what nobody knows of the kernels in it."""
    if workload is None:
        return ()
    if not isinstance(profile, Profile):
        return without
    return _left_out_of(profile) if any(map(is_cuda, by_device["step"])) else ()


@kept
def _left_out_of(profile: Profile) -> tuple[str, ...]:
    return left_out_of(each.op for each in profile.allocations)


def _communicators(decisions: Decisions) -> int:
    """One for each axis along which there are several ranks, and one for all ranks together where that is another group.

    Another for the shard and context axes as one, and for the ranks that FSDP divides the same experts between.
    """
    sharding = decisions.sharding
    if sharding is None:
        return 0
    axes = [axis for axis in sharding.axes if axis.size > 1]
    flattened = sharding.size("shard") > 1 and sharding.size("context") > 1
    between_experts = sharding.size("expert") > 1 and sharding.expert_shard_ranks > 1
    return len(axes) + (len(axes) > 1) + flattened + between_experts


def _timelines(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, walk: Walk, profile: Profile | None
) -> dict[str, Changes]:
    weights = Changes.of(walk.resident())
    found = {"construct": Changes.of(walk.changes), "load": weights + staged(weights)}
    state = Changes()
    if workload is not None:
        stepped = alike(_stepped(graph, decisions, workload))
        phases, state = trained(graph, weights, stepped, workload, profile, computing_device(graph, decisions))
        found.update(phases)
    saved = weights + state
    found["checkpoint"] = saved + copied_to_host(saved, besides=HOST)
    return found


def _stepped(graph: ParamGraph, decisions: Decisions, workload: Training) -> Iterator[tuple[str, Stepped]]:
    storages = {storage.index: storage for storage in graph.storages}
    hidden = hidden_names(graph) if workload.optimizer == "muon" else frozenset()
    for tensor in graph.parameters:
        device = memory_device(final_device(tensor, storages[tensor.view.storage], decisions))
        if tensor.requires_grad and device != "meta":
            trained = Trained(device, tensor.shape, final_dtype(tensor, decisions), tensor.name in hidden)
            yield tensor.name, Stepped(trained, trained.nbytes)


# -- tier T1 ------------------------------------------------------------------------------------------------------------


def memory_of_run(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training,
    run: Timeline,
    profile: Profile | NoProfile | None = None,
    rank: int = 0,
    of_rank: Callable[[int], Memory] | None = None,
) -> Memory:
    """The memory of training on one rank, with the phases of a step from a run of it, the others in closed form.

    `of_rank` gives that of any rank. Raises what `memory` raises.
    """
    closed = memory(graph, decisions, workload, profile).rank(rank)
    by_device = {phase: run.peaks.get(phase, devices) for phase, devices in closed.by_device.items()}
    by_device["optimizer"] = _worse(run.peaks[FIRST_OPTIMIZER], run.peaks[OPTIMIZER])
    timelines = {phase: changes for phase, changes in closed.changes.items() if phase not in run.peaks}
    binding = _binding(by_device, timelines)
    notes = tuple(run_notes(decisions, binding.device, workload))
    found = replace(closed, by_device=by_device, binding=binding, notes=notes, tier="T1", closed_form=closed, run=run)
    if binding.phase in run.peaks:
        binding = replace(binding, tensors=largest_of(run.at_peak(run_phase(found), binding.device)))
    on_cuda = any(map(is_cuda, by_device["step"]))
    left_out = (RESERVED, *left_out_of(each.op for each in run.allocations)) if on_cuda else ()
    return replace(found, binding=binding, left_out=left_out, of_rank=of_rank)


def largest_of(allocations: Iterable[Allocation]) -> tuple[tuple[str, int], ...]:
    """The largest of what a run holds at a moment, as (name, bytes); what has one name counts together."""
    held: dict[str, int] = {}
    for each in allocations:
        held[each.describe()] = held.get(each.describe(), 0) + each.nbytes
    return tuple(sorted(held.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_TENSORS])


def _worse(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {device: max(one.get(device, 0), other.get(device, 0)) for device in {**one, **other}}


# -- peaks --------------------------------------------------------------------------------------------------------------


def _binding(by_device: Mapping[str, Mapping[str, int]], timelines: Mapping[str, Changes]) -> Binding:
    places = [(phase, device) for phase, devices in by_device.items() for device in devices]
    phase, device = max(places, key=lambda place: by_device[place[0]][place[1]])
    peak = by_device[phase][device]
    held = timelines.get(phase, Changes()).tensors_at(device, peak)
    return Binding(phase, device, peak, _largest(held))


def _largest(held: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The largest that are shown, by size and then by name."""
    least = min(sorted(held.values(), reverse=True)[:_SHOWN_TENSORS], default=0)
    shown = ((name, nbytes) for name, nbytes in held.items() if nbytes and nbytes >= least)
    return tuple(sorted(shown, key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_TENSORS])
