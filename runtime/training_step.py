"""Steps of training, as a training script takes them: forward, loss, backward, optimizer, on whatever tensors a module has.

`fake_step` runs it on fake tensors to see what it allocates; run on a real module it is what a fake run is compared with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, STEP
from ..planner.workload import Training
from ..tracer.errors import DecisionError

_LEARNING_RATE = 1e-3

_KINDS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "sgd-momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def run_training(
    module: nn.Module,
    inputs: Any,
    training: Training,
    phase: Callable[[str], None],
    made: Callable[[torch.optim.Optimizer], None] = lambda _: None,
    steps: int = 2,
    device: str = "cpu",
) -> None:
    """Prepare `module` as `training` says and take two steps; `phase` is called with the name of each phase as it begins.

    The first step makes the optimizer's state, so only the second is like all later ones. Outputs are let go once there is a
    loss, the loss after the backward, gradients after the optimizer. `made` gets the optimizer. `steps` beyond two are like the
    second; `device` is the type of device that autocast is for.
    """
    module.train()
    if training.checkpointing == "full":
        checkpoint_layers(module)
    optimizer = optimizer_of(module, training)
    made(optimizer)
    for number in range(steps):
        stepping, updating = (STEP, OPTIMIZER) if number else (FIRST_STEP, FIRST_OPTIMIZER)
        phase(stepping)
        _forward_and_backward(module, inputs, training, device)
        phase(updating)
        if training.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), training.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_of(module: nn.Module, training: Training) -> torch.optim.Optimizer:
    """The optimizer of torch.optim that `training` names, over the parameters that require a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise DecisionError("no parameter of the module requires a gradient, so there is nothing to train")
    chosen = training.implementation
    options = {} if chosen is None else {"foreach": chosen == "foreach", "fused": chosen == "fused"}
    return _KINDS[training.optimizer](trained, lr=_LEARNING_RATE, **options)


def _forward_and_backward(module: nn.Module, inputs: Any, training: Training, device: str) -> None:
    with nullcontext() if training.autocast is None else torch.autocast(device, training.autocast):
        loss = _loss(module, inputs, training)
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


# -- activation checkpointing -------------------------------------------------------------------------------------------


def checkpoint_layers(module: Any) -> None:
    """Have every layer that repeats keep its inputs alone, and run again in the backward.

    A transformers model that knows how does it itself; of others, the members of one class in an `nn.ModuleList` or
    `nn.Sequential` go through `torch.utils.checkpoint`. Raises `DecisionError` where nothing repeats.
    """
    if getattr(module, "supports_gradient_checkpointing", False):
        _checkpoint_transformers(module)
        return
    layers = list(_repeated(module))
    if not layers:
        raise DecisionError('checkpointing="full" goes by layers that repeat, and the module has none: say checkpointing="none"')
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def _checkpoint_transformers(module: Any) -> None:
    """Under the new name where transformers has one (5.24; the old one goes in 6)."""
    options = {"use_reentrant": False}
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of containers that hold at least two modules of one class, with parameters."""
    for child in module.children():
        members = list(child.children()) if isinstance(child, nn.ModuleList | nn.Sequential) else []
        classes = [type(each) for each in members if any(True for _ in each.parameters())]
        if classes and max(map(classes.count, classes)) > 1:
            yield from (each for each in members if classes.count(type(each)) > 1)
        else:
            yield from _repeated(child)
