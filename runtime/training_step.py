"""Steps of training, as a training script takes them: forward, loss, backward, optimizer, on whatever tensors a module has.

`fake_step` runs it on fake tensors to see what it allocates; run on a real module it is what a fake run is compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, STEP
from ..planner.workload import Training
from ..tracer.errors import DecisionError
from .checkpointing import checkpoint_layers
from .clipping import clip_gradients
from .optimizers import optimizers_of


def run_training(
    module: nn.Module,
    inputs: Any,
    training: Training,
    phase: Callable[[str], None],
    made: Callable[[torch.optim.Optimizer], None] = lambda _: None,
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext,
    steps: int = 2,
    device: str = "cpu",
) -> None:
    """Prepare `module` as `training` says and take two steps; `phase` is called with the name of each phase as it begins.

    The first step makes the optimizer's state, so only the second is like all later ones. Outputs are let go once there is a
    loss, the loss after the backward, gradients after the optimizer; the micro-batches of a step add to the same gradients.
    `made` gets the optimizer, or each of two; they step within `around_step()`. `steps` beyond two are like the second;
    `device` is the type of device that autocast is for.
    """
    module.train()
    if training.checkpointing != "none":
        checkpoint_layers(module, training.checkpointing)
    optimizers = optimizers_of(module, training)
    for optimizer in optimizers:
        made(optimizer)
    for number in range(steps):
        stepping, updating = (STEP, OPTIMIZER) if number else (FIRST_STEP, FIRST_OPTIMIZER)
        phase(stepping)
        for _ in range(training.accumulate):
            forward_and_backward(module, inputs, training, device)
        phase(updating)
        if training.clip_grad_norm is not None:
            clip_gradients(module.parameters(), training.clip_grad_norm)
        with around_step():
            for optimizer in optimizers:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


def forward_and_backward(module: nn.Module, inputs: Any, training: Training, device: str = "cpu") -> None:
    """The loss of one batch, and its gradients."""
    with nullcontext() if training.autocast is None else torch.autocast(device, training.autocast):
        loss = _loss(module, inputs, training)
    if training.accumulate > 1:
        loss = loss / training.accumulate
    loss.backward()


def _loss(module: nn.Module, inputs: Any, training: Training) -> torch.Tensor:
    output = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    if training.loss is not None:
        return training.loss(output)
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return own if isinstance(own, torch.Tensor) else _sum_of(output)


def _sum_of(output: Any) -> torch.Tensor:
    """A loss for a module that has none: the sum of all that it returns and that a gradient flows to."""
    found = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not found:
        raise DecisionError(
            "the module returns no tensor that depends on its parameters; say gp.Training(loss=...) what the loss is"
        )
    return sum((each.sum() for each in found[1:]), start=found[0].sum())
