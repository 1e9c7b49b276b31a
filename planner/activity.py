"""Forward and backward of a step as changes in memory: what a profile says, by the plan's sharding, on top of what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..tracer.graph import ParamGraph
from .alike import Alike, alike
from .changes import Change, Changes
from .fsdp_form import Fsdp, with_fsdp
from .kept import kept
from .profile import Profile
from .step_form import Held, Script, held_at, peak_of, plain
from .training_memory import Stepped, gradients_of, training_phases
from .workload import Training


def trained(
    graph: ParamGraph,
    weights: Changes,
    stepped: Alike[Stepped],
    workload: Training,
    profile: Profile | None,
    device: str,
    fsdp: Fsdp | None = None,
) -> tuple[dict[str, Changes], Changes]:
    """The phases of a training step, and the optimizer's state by itself, on a rank that computes on `device`."""
    if profile is None:
        return training_phases(weights, stepped, workload)
    stepped = reached(graph, profile, stepped)
    stepped = stepped if fsdp is not None else as_traced(graph, profile, stepped)
    active = activity(profile, gradients_of(stepped), device, workload.accumulate, fsdp)
    return training_phases(weights + inputs(profile, device), stepped, workload, active)


def reached(graph: ParamGraph, profile: Profile, stepped: Alike[Stepped]) -> Alike[Stepped]:
    """Those that get a gradient: the others have no state either."""
    return stepped.named(_with_gradient(profile, graph))


def as_traced(graph: ParamGraph, profile: Profile, stepped: Alike[Stepped]) -> Alike[Stepped]:
    """The same with the bytes that gradients have in the trace: tensor parallelism leaves that of an embedding whole."""
    sizes = _traced_gradients(profile, graph)
    pairs = list(zip(stepped.names.tolist(), stepped.each, strict=True))
    if all(sizes.get(name, each.gradient) == each.gradient for name, each in pairs):
        return stepped
    return alike((name, each._replace(gradient=sizes.get(name, each.gradient))) for name, each in pairs)


@kept
def _traced_gradients(profile: Profile, graph: ParamGraph) -> Mapping[str, int]:
    return {graph.by_name[name].name: nbytes for name, nbytes in profile.gradients.items() if name in graph.by_name}


@kept
def _with_gradient(profile: Profile, graph: ParamGraph) -> frozenset[str]:
    return frozenset(_traced_gradients(profile, graph))


def activity(profile: Profile, gradients: Changes, device: str, accumulate: int = 1, fsdp: Fsdp | None = None) -> Changes:
    """What is there when most is, what goes after that, and the gradients that stay.

    With several micro-batches, the same once more for a later one, which adds to the gradients of those before.
    """
    found = _passing(_held(profile, fsdp, False), device) + gradients
    return found if accumulate == 1 else found + _passing(_held(profile, fsdp, True), device)


def inputs(profile: Profile, device: str) -> Changes:
    """The inputs of the step, which are there all the time."""
    return Changes.of(Change(device, name, nbytes) for name, nbytes in profile.inputs)


def _held(profile: Profile, fsdp: Fsdp | None, later: bool) -> tuple[Held, ...]:
    if fsdp is None:
        return _plain(profile, later)
    scripts = with_fsdp(profile, replace(fsdp, accumulates=later))
    return _at_peak(profile, scripts, False)


@kept
def _plain(profile: Profile, later: bool) -> tuple[Held, ...]:
    return _at_peak(profile, plain(profile), later)


def _at_peak(profile: Profile, scripts: Sequence[Script], added: bool) -> tuple[Held, ...]:
    return tuple(held_at(profile, scripts, peak_of(scripts, added), added))


def _passing(held: Sequence[Held], device: str) -> Changes:
    """Come, and go; what is below 0, let go under another name than it came, first and last."""
    rising = sorted(held, key=lambda each: each.nbytes >= 0)
    come = Changes.on_one(device, [_name(each) for each in rising], [each.nbytes for each in rising])
    go = Changes.on_one(device, [_name(each) for each in reversed(rising)], [-each.nbytes for each in reversed(rising)])
    return come + go


def _name(held: Held) -> str:
    if held.kind == "gradient":
        return held.name
    return held.name if held.kind in ("activation", "temporary") else f"{held.kind} of {held.name}"
