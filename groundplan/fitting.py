"""The verb behind `Plan.fit`: serving is fitted to the devices of one node, training to all ranks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .planner.cluster import Cluster
from .planner.decisions import Decisions, Move
from .planner.inference import Inference
from .planner.workload import Training
from .tracer.errors import DecisionError

if TYPE_CHECKING:
    from .plan import Plan

_MADE = (
    ("sharding", "shards"),
    ("placing", "places tensors"),
    ("quantizing", "quantizes"),
    ("checkpointing", "checkpoints activations"),
)


def fit(plan: Plan, cluster: Cluster, workload: object, serving: Mapping[str, Any], training: Mapping[str, Any]) -> Plan:
    """The plan with what is decided for `cluster`; `Plan.fit` says what the options of each workload mean, and what is raised."""
    from .fitting_serving import fit_serving_plan
    from .fitting_training import FitTraining, TrainingOptions

    _check(plan, workload)
    if isinstance(workload, Training):
        _check_none_given(serving, {"disk": False, "together": None}, workload)
        found = FitTraining(plan, cluster, workload, TrainingOptions(**training)).decisions()
        return replace(plan, _decided=found, _workload=replace(workload, **_chosen(found)))
    defaults = vars(TrainingOptions())
    _check_none_given(training, defaults, workload)
    assert isinstance(workload, Inference)
    return replace(plan, _decided=fit_serving_plan(plan, cluster, workload, **serving), _workload=workload)


def _chosen(decisions: Decisions) -> dict[str, Any]:
    """What of the workload the search decided: micro-batches; and that checkpointing is the plan's now."""
    assert decisions.fitted is not None
    chosen = decisions.fitted.workload
    return {"batch_size": chosen.batch_size, "accumulate": chosen.accumulate, "checkpointing": "none"}


def _check_none_given(given: Mapping[str, object], defaults: Mapping[str, object], workload: object) -> None:
    """Raise `DecisionError` for options that are for the other workload."""
    strange = next((name for name, value in given.items() if value != defaults[name]), None)
    if strange is not None:
        raise DecisionError(f"{strange}={given[strange]!r} is not for {type(workload).__name__}; leave it out")


def _check(plan: Plan, workload: object) -> None:
    """Raise `DecisionError` for what is no workload, and for a plan that has decided what the search is to decide."""
    if not isinstance(workload, Inference | Training):
        raise DecisionError(f"plan.fit decides for gp.Training(...) or gp.Inference(...), not for {workload!r}")
    made = next((does for name, does in _MADE if getattr(plan.decisions, name)), None)
    moved = any(isinstance(step, Move) for step in plan.decisions.steps)
    if made is not None or moved:
        raise DecisionError(
            f"the plan {made or 'moves to a device'} already, which plan.fit is to decide; fit the plan before that"
        )


def has(cluster: Cluster) -> str:
    """What a cluster has too much or too little of for one node's device map."""
    return f"{cluster.nodes} nodes" if cluster.nodes > 1 else "no devices"
