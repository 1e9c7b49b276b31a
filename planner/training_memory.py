"""What training adds to the weights, in closed form: gradients, the optimizer's state, and what its step takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph
from .alike import Alike, changes_of
from .changes import HOST, Changes
from .kept import kept
from .muon import Slot, hidden_matrices
from .optimizer import Implementation, Piece, Trained
from .optimizers import clipping_pieces, state_pieces, working_pieces
from .workload import Training


class Stepped(NamedTuple):
    """A parameter as the optimizer has it, and the bytes of its gradient."""

    parameter: Trained
    gradient: int

    @property
    def device(self) -> str:
        return self.parameter.device


def training_phases(
    weights: Changes, stepped: Alike[Stepped], workload: Training, active: Changes | None = None
) -> tuple[dict[str, Changes], Changes]:
    """The phases of a training step, on top of `weights`, and the optimizer's state by itself.

    `active` is what forward and backward do (`activity.py`); without it only the gradients that they leave are counted. With
    several micro-batches in a step the gradients of the ones before stay, so that they are there from the beginning, and a new
    one is there in full before it is added to the old (torch/csrc/autograd/functions/accumulate_grad.h).
    """
    gradients = gradients_of(stepped)
    kinds = stepped.to(lambda kind: kind.parameter)
    chosen, parameters = (workload.optimizer, _implementation(workload, kinds.kinds)), kinds.each
    on_device, on_host = state_pieces(*chosen, kinds)
    state = _changes(stepped, on_device) + _changes(stepped, on_host, HOST)
    clipped = Changes() if workload.clip_grad_norm is None else _changes(stepped, clipping_pieces(parameters))
    if active is None:
        active = gradients + (_largest_by_device(gradients) if workload.accumulate > 1 else Changes())
    working = _changes(stepped, working_pieces(*chosen, parameters))
    phases = {
        "first_step": weights + active,
        "step": weights + state + active,
        "optimizer": weights + state + gradients + clipped + clipped.released() + working,
    }
    return phases, state


def gradients_of(stepped: Alike[Stepped]) -> Changes:
    """The gradients that come to be, in the order of the parameters."""
    return changes_of(stepped, lambda kind: kind.gradient)


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


def _changes(stepped: Alike[Stepped], pieces: Sequence[Piece], device: str | None = None) -> Changes:
    """Pieces as changes on the device of each parameter, or on one for all."""
    there = [piece for piece in pieces if piece[1]]
    positions, nbytes = (np.array(column, dtype=np.int64) for column in (zip(*there, strict=True) if there else ((), ())))
    devices = [device or kind.device for kind in stepped.kinds]
    return Changes.of_columns(devices, stepped.of[positions], stepped.names[positions], nbytes)


def _largest_by_device(changes: Changes) -> Changes:
    return Changes.of(found for device in changes.devices() if (found := changes.on(device).largest()) is not None)


@kept
def hidden_names(graph: ParamGraph) -> frozenset[str]:
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
    return frozenset(graph.tensors[number].name for number in hidden_matrices(slots))
