"""Forward and backward of a step as changes in memory: what a profile says, by the plan's sharding, on top of what is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache

from ..tracer.graph import ParamGraph
from .changes import Change
from .fsdp_form import Fsdp, with_fsdp
from .profile import Profile
from .step_form import Held, Script, held_at, peak_of, plain
from .training_memory import Stepped, training_phases
from .workload import Training


def trained(
    graph: ParamGraph,
    weights: Sequence[Change],
    stepped: Sequence[Stepped],
    workload: Training,
    profile: Profile | None,
    device: str,
    fsdp: Fsdp | None = None,
) -> tuple[dict[str, list[Change]], list[Change]]:
    """The phases of a training step, and the optimizer's state by itself, on a rank that computes on `device`."""
    if profile is None:
        return training_phases(weights, stepped, workload)
    stepped = reached(graph, profile, stepped)
    active = activity(profile, [each.gradient for each in stepped], device, workload.accumulate, fsdp)
    return training_phases([*weights, *inputs(profile, device)], stepped, workload, active)


def reached(graph: ParamGraph, profile: Profile, stepped: Sequence[Stepped]) -> list[Stepped]:
    """Those that get a gradient: the others have no state either."""
    names = {graph.by_name[name].name for name in profile.gradients if name in graph.by_name}
    return [each for each in stepped if each.gradient.tensor in names]


def activity(
    profile: Profile, gradients: Sequence[Change], device: str, accumulate: int = 1, fsdp: Fsdp | None = None
) -> list[Change]:
    """What is there when most is, what goes after that, and the gradients that stay.

    With several micro-batches, the same once more for a later one, which adds to the gradients of those before.
    """
    found = [*_passing(_held(profile, fsdp, False), device), *gradients]
    return found if accumulate == 1 else [*found, *_passing(_held(profile, fsdp, True), device)]


def inputs(profile: Profile, device: str) -> list[Change]:
    """The inputs of the step, which are there all the time."""
    return [Change(device, name, nbytes) for name, nbytes in profile.inputs]


def _held(profile: Profile, fsdp: Fsdp | None, later: bool) -> tuple[Held, ...]:
    if fsdp is None:
        return _plain(profile, later)
    scripts = with_fsdp(profile, replace(fsdp, accumulates=later))
    return _at_peak(profile, scripts, False)


@lru_cache(maxsize=64)
def _plain(profile: Profile, later: bool) -> tuple[Held, ...]:
    return _at_peak(profile, plain(profile), later)


def _at_peak(profile: Profile, scripts: Sequence[Script], added: bool) -> tuple[Held, ...]:
    return tuple(held_at(profile, scripts, peak_of(scripts, added), added))


def _passing(held: Sequence[Held], device: str) -> Iterator[Change]:
    """Come, and go; what is below 0, let go under another name than it came, first and last."""
    rising = sorted(held, key=lambda each: each.nbytes >= 0)
    yield from (Change(device, _name(each), each.nbytes) for each in rising)
    yield from (Change(device, _name(each), -each.nbytes) for each in reversed(rising))


def _name(held: Held) -> str:
    if held.kind == "gradient":
        return held.name
    return held.name if held.kind in ("activation", "temporary") else f"{held.kind} of {held.name}"
