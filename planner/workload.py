"""What a model is built for: the workload, whose bytes come on top of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..tracer.errors import DecisionError, nearest
from .optimizer import Implementation
from .optimizers import OPTIMIZERS, check_implementation

Checkpointing = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Training:
    """Training with one optimizer at its default settings.

    `optimizer` is one of `sgd`, `sgd-momentum`, `adam`, `adamw`, `adafactor`, `adamw-8bit` (torchao's) and `muon` (for matrices
    inside the model, with AdamW for the rest); `planner/optimizers.py` says of each what it takes. Its `implementation` is one of
    `foreach`, `fused`, `for-loop`, or None for the one that it takes on the device by itself. `batch_size` counts samples on one
    device in one micro-batch, `seq_len` counts tokens; `accumulate` micro-batches make a step, and gradients stay between them.
    `clip_grad_norm` is the largest norm of the gradients (`torch.nn.utils.clip_grad_norm_`).

    `checkpointing` is `none`; `full` for every layer that repeats: it keeps its inputs and runs again in the backward; or
    `selective`, by op, as torchtitan has it: such a layer keeps besides what attention, reduce-scatter and every other matrix
    product give (`runtime/checkpointing.py`).

    What follows is for forward and backward, which every tier traces or runs. `inputs` are example inputs: a mapping or a tuple
    of tensors, real or meta, or a callable that gives one; None makes them from the module's signature. `loss` is a function of
    the module's output; None takes the output's `.loss`, or the sum of the outputs. `autocast` is a dtype.

    Raises `DecisionError` for values that cannot be, and for an implementation that the optimizer does not have.

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
    accumulate: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, str) or self.optimizer not in OPTIMIZERS:
            hint = nearest(str(self.optimizer), OPTIMIZERS)
            raise DecisionError(f"no optimizer is called {self.optimizer!r} (known: {', '.join(OPTIMIZERS)}){hint}")
        check_count("batch_size", self.batch_size)
        check_count("accumulate", self.accumulate)
        if self.seq_len is not None:
            check_count("seq_len", self.seq_len)
        if self.implementation is not None:
            check_choice("implementation", self.implementation, get_args(Implementation))
            check_implementation(self.optimizer, self.implementation)
        check_choice("checkpointing", self.checkpointing, get_args(Checkpointing))
        if self.autocast is not None and self.autocast not in (torch.bfloat16, torch.float16):
            raise DecisionError(f"autocast is {self.autocast!r}; torch.autocast takes torch.bfloat16 or torch.float16")
        if self.loss is not None and not callable(self.loss):
            raise DecisionError(f"loss is {self.loss!r}; it is a function of what the module returns")
        if self.clip_grad_norm is not None and not (_is_number(self.clip_grad_norm) and self.clip_grad_norm > 0):
            raise DecisionError(f"clip_grad_norm is {self.clip_grad_norm!r}; it is a number above 0")


def check_count(name: str, value: object) -> None:
    """Raise `DecisionError` for what is no number from 1 up."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DecisionError(f"{name} is {value!r}; it counts from 1 up")


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise `DecisionError` for a value that is none of the `known` ones."""
    if not isinstance(value, str) or value not in known:
        raise DecisionError(f"{name} is {value!r}; known: {', '.join(known)}{nearest(str(value), known)}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
