"""The second stage's checker: decisions that contradict the graph they are for."""

from __future__ import annotations

from ..tracer.errors import DecisionError, PlanFileError
from ..tracer.graph import ParamGraph
from .check_sharding import check_sharding
from .checkpointing import check_checkpointing
from .decisions import AmbientSettings, Cast, Decisions, Move, check_cast
from .placing import check_placing
from .quantizing import check_quantizing


def check_decisions(decisions: Decisions, graph: ParamGraph) -> None:
    """Raise where `decisions` contradict `graph`.

    `PlanFileError` where they were taken for another graph (reference device, ambient settings or fingerprint differ);
    `DecisionError` where a step cannot be done on this one.
    """
    _check_settings(decisions, graph)
    _check_fingerprint(decisions, graph)
    _check_bound(decisions, graph)
    for step in decisions.steps:
        if isinstance(step, Cast):
            check_cast(step, graph)
        else:
            _check_move(step, graph)
    if decisions.sharding is not None:
        check_sharding(decisions.sharding, graph)
    if decisions.placing is not None:
        check_placing(decisions.placing, graph)
    check_checkpointing(decisions.checkpointing, graph)
    for quantizing in decisions.quantizing:
        check_quantizing(quantizing, graph)


def _check_settings(decisions: Decisions, graph: ParamGraph) -> None:
    saved = {"reference device": decisions.reference, **decisions.ambient.model_dump()}
    found = {"reference device": graph.reference.partition(":")[0], **AmbientSettings.of(graph.ambient).model_dump()}
    for name, value in saved.items():
        if found[name] != value:
            raise PlanFileError(
                f"the plan for {decisions.constructor} was traced with {name} {value!r}, this graph with {found[name]!r}; "
                f"trace under the plan's setting, or take a new plan"
            )


def _check_fingerprint(decisions: Decisions, graph: ParamGraph) -> None:
    if decisions.fingerprint != graph.fingerprint:
        raise PlanFileError(
            f"the plan is for another constructor, or for other arguments: it was taken for {decisions.constructor} with the "
            f"fingerprint {decisions.fingerprint}, and this graph has {graph.fingerprint}; pass the constructor and arguments "
            f"that the plan was traced with, or trace a new plan"
        )


def _check_bound(decisions: Decisions, graph: ParamGraph) -> None:
    if graph.seed_dependent and decisions.bound_state is None:
        raise DecisionError(
            f"the constructor looked at random values at {graph.seed_dependent[0]}, so its tape holds for one generator state "
            f"only, and the decisions name none; give default_decisions the digest of that state as bound_state"
        )


def _check_move(move: Move, graph: ParamGraph) -> None:
    stuck = {storage.index for storage in graph.storages if storage.device == "meta"}
    for tensor in graph.tensors:
        if tensor.kind != "attribute" and tensor.view.storage in stuck:
            raise DecisionError(
                f"{tensor.name} is a meta tensor, made so by the constructor: module.to({move.device!r}) raises for it; "
                f"build it on a real device, or leave out .to({move.device!r})"
            )
