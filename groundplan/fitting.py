"""The verb behind `Plan.fit`: serving is fitted to the devices of one node, training to all ranks of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .planner.cluster import Cluster
from .planner.decisions import Decisions, Move
from .planner.fitted import Fitted, Given
from .planner.inference import Inference
from .planner.memory import human_bytes
from .planner.records import dtype_name
from .planner.speeds import Speeds
from .planner.workload import Training
from .tracer.errors import DecisionError

if TYPE_CHECKING:
    from .plan import Plan

PLENTY = 2**50
"""Bytes of host memory that are enough for whatever there is: to find out how much is needed."""

_MADE = (
    ("sharding", "shards"),
    ("placing", "places tensors"),
    ("quantizing", "quantizes"),
    ("checkpointing", "checkpoints activations"),
)
_SERVING: Mapping[str, object] = {"disk": False, "together": None}


def fit(plan: Plan, cluster: Cluster, workload: object, serving: Mapping[str, Any], training: Mapping[str, Any]) -> Plan:
    """The plan with what is decided for `cluster`; `Plan.fit` says what the options of each workload mean, and what is raised."""
    from .fitting_serving import fit_serving_plan
    from .fitting_training import FitTraining, TrainingOptions

    _check(plan, workload)
    if isinstance(workload, Training):
        _check_none_given(serving, _SERVING, workload)
        found = FitTraining(plan, cluster, workload, TrainingOptions(**training)).decisions()
        noted = _noted(plan, found, training, vars(TrainingOptions()))
        return replace(plan, _decided=noted, _workload=replace(workload, **_chosen(found)))
    _check_none_given(training, vars(TrainingOptions()), workload)
    assert isinstance(workload, Inference)
    found = fit_serving_plan(plan, cluster, workload, **serving)
    return replace(plan, _decided=_noted(plan, found, serving, _SERVING), _workload=workload)


def _chosen(decisions: Decisions) -> dict[str, Any]:
    """What of the workload the search decided: micro-batches; and that checkpointing is the plan's now."""
    assert isinstance(decisions.fitted, Fitted)
    chosen = decisions.fitted.workload
    return {"batch_size": chosen.batch_size, "accumulate": chosen.accumulate, "checkpointing": "none"}


def _noted(plan: Plan, found: Decisions, given: Mapping[str, object], defaults: Mapping[str, object]) -> Decisions:
    """What was found, with what the user said, and which of the steps were the search's own, in its record."""
    assert found.fitted is not None
    own = tuple(range(len(plan.decisions.steps), len(found.steps)))
    options = tuple(Given(name=name, value=_words(name, value)) for name, value in given.items() if value != defaults[name])
    return found.model_copy(update={"fitted": found.fitted.model_copy(update={"steps": own, "options": options})})


def _words(name: str, value: object) -> str:
    """An option's value as a reader knows it."""
    if name == "reserve" and isinstance(value, int):
        return human_bytes(value)
    if isinstance(value, Speeds):
        return f"those of {value.device}"
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {each}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return " or ".join("as it is" if each is None else _words(name, each) for each in value)
    return str(value)


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
