"""What would lower the peak of a layout and is not carried out by the runtime yet: known of memory, and said so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .planner.decisions import Decisions
from .planner.estimate import memory
from .planner.experts import found_experts
from .planner.fit_training import Layout
from .planner.memory import human_bytes
from .planner.profile import Profile
from .planner.sharding import Sharding, sharding
from .tracer.errors import DecisionError

if TYPE_CHECKING:
    from .fitting_training import FitTraining

_EXPERTS = 8  # ranks that experts are divided between, as many as a node usually has
_LESS = 0.95  # of the peak: what lowers it by less is not worth a line


def would_help(question: FitTraining, layout: Layout, decisions: Decisions, peak: int) -> Iterator[str]:
    """Ways of dividing the module that lower the `peak` of a plan, in bytes of a rank, with what it would be then."""
    if decisions.sharding is None:
        return
    for words, axes, options in _variants(decisions.sharding, _experts(question)):
        found = _peak(question, layout, decisions, axes, options)
        if found is not None and found < _LESS * peak:
            yield f"{words}: the peak of a rank would be {human_bytes(found)} instead of {human_bytes(peak)}"


def _experts(question: FitTraining) -> Sequence[str]:
    """Patterns of what an expert axis would divide; none where the model has no experts."""
    try:
        return found_experts(question.plan.graph)
    except DecisionError:
        return ()


def _variants(now: Sharding, experts: Sequence[str]) -> Iterator[tuple[str, dict[str, int], dict[str, Any]]]:
    """Words, axes, and options of `sharding`."""
    axes = {axis.name: axis.size for axis in now.axes}
    if now.size("tensor") > 1:
        yield "sequence_parallel=True and loss_parallel=True", axes, {"sequence_parallel": True, "loss_parallel": True}
    shard = now.axis("shard")
    if shard is not None and shard.size % 2 == 0:
        fewer = axes | {shard.name: shard.size // 2}
        yield "a context axis of 2 ranks", fewer | {"cp": 2}, {}
        yield "a pipeline of 2 stages", {"pp": 2} | fewer, {}
    if experts and now.size("tensor") == 1:
        yield f"an expert axis of {_EXPERTS} ranks", axes | {"ep": _EXPERTS}, {"experts": experts}


def _peak(
    question: FitTraining, layout: Layout, decisions: Decisions, axes: Mapping[str, int], options: Mapping[str, Any]
) -> int | None:
    """The peak of a rank in closed form; None where the module cannot be divided so, or nothing is known of it."""
    try:
        varied = replace(layout, decisions=decisions.shard(_divided(question, decisions, axes, options)))
        profile = question.profile_of(varied.decisions, varied.workload)
    except DecisionError:
        return None
    if not isinstance(profile, Profile):
        return None
    return memory(question.plan.graph, varied.decisions, varied.workload, profile).peak


def _divided(question: FitTraining, decisions: Decisions, axes: Mapping[str, int], options: Mapping[str, Any]) -> Sharding:
    now = decisions.sharding
    assert now is not None
    made = sharding(
        axes,
        question.plan.graph,
        now.units,
        tensor={rule.pattern: rule.style for rule in now.tensor},
        engine=now.engine,
        offload=now.offload,
        **options,
    )
    return made.model_copy(update={"compute_dtype": now.compute_dtype, "reduce_dtype": now.reduce_dtype})
