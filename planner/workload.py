"""What a model is built for: the workload, whose bytes come on top of the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..tracer.errors import DecisionError, nearest

COPIES: Mapping[str, int] = {"sgd": 0, "sgd-momentum": 1, "adam": 2, "adamw": 2}
"""Copies of each parameter that the optimizer's state holds, in the parameter's dtype and on its device.

torch/optim/adam.py `_init_group`: `exp_avg` and `exp_avg_sq` are `zeros_like(p)`; torch/optim/sgd.py: `momentum_buffer` is a
clone of the gradient.
"""

STEP_BYTES = 4
"""Adam's `step`: a float32 scalar per parameter tensor, kept on the CPU (adam.py, "special device hosting for step")."""


Implementation = Literal["foreach", "fused", "for-loop"]
Checkpointing = Literal["none", "full"]


@dataclass(frozen=True, slots=True)
class Training:
    """Training with one of torch's optimizers at its default settings.

    `optimizer` is one of `sgd`, `sgd-momentum`, `adam`, `adamw`, its `implementation` one of `foreach`, `fused`, `for-loop`, or
    None for the one that torch takes on the device. `batch_size` counts samples on one device; `seq_len` counts tokens.

    What follows is for a run of the step (`plan.memory(..., tier="T1")`). `inputs` are example inputs: a mapping or a tuple of
    tensors, real or meta, or a callable that gives one; None makes them from the module's signature. `loss` is a function of the
    module's output; None takes the output's `.loss`, or the sum of the outputs. `autocast` is a dtype, `checkpointing` is `none`,
    or `full` for every layer that repeats, and `clip_grad_norm` is the largest norm of the gradients.

    Raises `DecisionError` for values that cannot be.

    >>> Training(optimizer="adamw", batch_size=2, seq_len=8192).optimizer
    'adamw'
    """

    optimizer: str = "adamw"
    batch_size: int = 1
    seq_len: int | None = None
    inputs: Any = None
    implementation: Implementation | None = None
    loss: Callable[[Any], torch.Tensor] | None = None
    autocast: torch.dtype | None = None
    checkpointing: Checkpointing = "none"
    clip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, str) or self.optimizer not in COPIES:
            hint = nearest(str(self.optimizer), COPIES)
            raise DecisionError(f"no optimizer is called {self.optimizer!r} (known: {', '.join(COPIES)}){hint}")
        _check_count("batch_size", self.batch_size)
        if self.seq_len is not None:
            _check_count("seq_len", self.seq_len)
        if self.implementation is not None:
            _check_choice("implementation", self.implementation, get_args(Implementation))
        _check_choice("checkpointing", self.checkpointing, get_args(Checkpointing))
        if self.autocast is not None and self.autocast not in (torch.bfloat16, torch.float16):
            raise DecisionError(f"autocast is {self.autocast!r}; torch.autocast takes torch.bfloat16 or torch.float16")
        if self.loss is not None and not callable(self.loss):
            raise DecisionError(f"loss is {self.loss!r}; it is a function of what the module returns")
        if self.clip_grad_norm is not None and not (_is_number(self.clip_grad_norm) and self.clip_grad_norm > 0):
            raise DecisionError(f"clip_grad_norm is {self.clip_grad_norm!r}; it is a number above 0")

    @property
    def state_copies(self) -> int:
        """Copies of each trainable parameter in the optimizer's state."""
        return COPIES[self.optimizer]

    @property
    def step_bytes(self) -> int:
        """Bytes on the CPU that the optimizer's state holds besides, per parameter tensor."""
        return STEP_BYTES if self.optimizer.startswith("adam") else 0

    def temporaries(self, parameters: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
        """What `optimizer.step()` allocates and frees, for parameters given as (device, bytes) in order, as (position, bytes).

        torch/optim/optimizer.py `_default_to_fused_or_foreach` takes the foreach implementation where every parameter is on CUDA,
        and the for-loop otherwise. SGD works in place in both. Adam's foreach (`_multi_tensor_adam`) holds the square roots of
        all `exp_avg_sq` at once; its loop (`_single_tensor_adam`) holds one parameter's square root and the quotient made of it,
        besides the previous parameter's quotient, whose name `denom` is still bound. The fused kernels hold nothing.
        """
        if not self.optimizer.startswith("adam") or self.implementation == "fused":
            return []
        default = "foreach" if all(device.startswith("cuda") for device, _ in parameters) else "for-loop"
        if (self.implementation or default) == "foreach":
            return [(position, nbytes) for position, (_, nbytes) in enumerate(parameters)]
        return [each for moment in _worst_moments(parameters).values() for each in moment]


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DecisionError(f"{name} is {value!r}; it counts from 1 up")


def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise DecisionError(f"{name} is {value!r}; known: {', '.join(known)}{nearest(str(value), known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _worst_moments(parameters: Sequence[tuple[str, int]]) -> dict[str, list[tuple[int, int]]]:
    """For each device, the turn of Adam's loop that holds most there."""
    worst: dict[str, list[tuple[int, int]]] = {}
    for position, (device, nbytes) in enumerate(parameters):
        moment = [(position, 2 * nbytes)]
        if position and parameters[position - 1][0] == device:
            moment.append((position - 1, parameters[position - 1][1]))
        worst[device] = max(worst.get(device, []), moment, key=lambda each: sum(held for _, held in each))
    return worst
