"""What training adds to the weights, in closed form: gradients, the optimizer's state, and what its step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph
from .changes import HOST, Change
from .muon import Slot, hidden_matrices
from .optimizer import Implementation, Piece, Trained
from .optimizers import clipping_pieces, state_pieces, working_pieces
from .workload import Training


class Stepped(NamedTuple):
    """A parameter as the optimizer has it, and its gradient."""

    parameter: Trained
    gradient: Change


def training_phases(
    weights: Sequence[Change], stepped: Sequence[Stepped], workload: Training, active: Sequence[Change] | None = None
) -> tuple[dict[str, list[Change]], list[Change]]:
    """The phases of a training step, on top of `weights`, and the optimizer's state by itself.

    `active` is what forward and backward do (`activity.py`); without it only the gradients that they leave are counted. With
    several micro-batches in a step the gradients of the ones before stay, so that they are there from the beginning, and a new
    one is there in full before it is added to the old (torch/csrc/autograd/functions/accumulate_grad.h).
    """
    parameters, gradients = [each.parameter for each in stepped], [each.gradient for each in stepped]
    chosen = (workload.optimizer, _implementation(workload, parameters), parameters)
    on_device, on_host = state_pieces(*chosen)
    state = [*_changes(stepped, on_device), *(each._replace(device=HOST) for each in _changes(stepped, on_host))]
    clipped = [] if workload.clip_grad_norm is None else _changes(stepped, clipping_pieces(parameters))
    if active is None:
        active = [*gradients, *(_largest_by_device(gradients) if workload.accumulate > 1 else [])]
    phases = {
        "first_step": [*weights, *active],
        "step": [*weights, *state, *active],
        "optimizer": [*weights, *state, *gradients, *clipped, *_released(clipped), *_changes(stepped, working_pieces(*chosen))],
    }
    return phases, state


def _implementation(workload: Training, parameters: Sequence[Trained]) -> Implementation | None:
    """Of DTensors and whole tensors side by side torch takes the loop alone; raises `DecisionError` for another."""
    if len({each.whole is None for each in parameters}) <= 1:
        return workload.implementation
    if workload.implementation not in (None, "for-loop"):
        raise DecisionError(
            f"implementation={workload.implementation!r} steps all parameters in one op, and torch refuses one of DTensors and "
            'whole tensors, which tensor parallelism leaves side by side; say implementation="for-loop"'
        )
    return "for-loop"


def _changes(stepped: Sequence[Stepped], pieces: Sequence[Piece]) -> list[Change]:
    return [stepped[position].gradient._replace(nbytes=nbytes) for position, nbytes in pieces if nbytes]


def _released(changes: Sequence[Change]) -> list[Change]:
    return [each._replace(nbytes=-each.nbytes) for each in changes]


def _largest_by_device(changes: Sequence[Change]) -> list[Change]:
    found: dict[str, Change] = {}
    for each in changes:
        found[each.device] = max(found.get(each.device, each), each, key=lambda change: change.nbytes)
    return list(found.values())


def hidden_names(graph: ParamGraph) -> set[str]:
    """The names of the matrices that Muon is for."""
    own = {name: number for number, tensor in enumerate(graph.tensors) if tensor.kind == "parameter" for name in tensor.names}
    by_owner: dict[str, list[str]] = {}
    for name in own:
        by_owner.setdefault(name.rpartition(".")[0], []).append(name)
    slots = [
        Slot(own[name], name, len(graph.tensors[own[name]].shape), module.type)
        for module in graph.modules
        for name in by_owner.get(module.name, ())
    ]
    return {graph.tensors[number].name for number in hidden_matrices(slots)}
