"""What a pipeline and a context axis make of a step's inputs, and which modules a profile watches for their sake."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planner.sharding import Sharding
from ..planner.workload import Training
from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph


def not_profiled(sharding: Sharding, training: Training) -> str | None:
    """Why activations cannot be known under a sharding; None where they can."""
    pipeline, parts = sharding.pipeline, sharding.size("context")
    if parts > 1 and (training.inputs is not None or training.seq_len is None or training.seq_len % parts):
        what = f"seq_len={training.seq_len}" if training.inputs is None else "inputs="
        return f"{what} does not divide into {parts} parts of the sequence; give a multiple as seq_len, and no inputs"
    if pipeline is not None and training.accumulate > 1:
        return "a pipeline accumulates over its micro-batches; leave accumulate out"
    if pipeline is not None and training.inputs is None and training.batch_size % pipeline.microbatches:
        many = pipeline.microbatches
        return f"batch_size={training.batch_size} does not divide into {many} micro-batches; give a multiple of {many}"
    return None


def first_of(inputs: Any, microbatches: int) -> Any:
    """One micro-batch of a step's inputs: a part of every tensor, along its first dim, as torch's schedules split them."""
    for each in tree_leaves(inputs):
        if isinstance(each, torch.Tensor) and (not each.dim() or each.shape[0] % microbatches):
            raise DecisionError(f"an input of shape {list(each.shape)} does not divide into {microbatches} micro-batches")
    return tree_map_only(torch.Tensor, lambda each: each[: each.shape[0] // microbatches].clone(), inputs)


def staged_modules(sharding: Sharding, graph: ParamGraph) -> list[str]:
    """The modules that a pipeline's stages name."""
    modules = {name: module.name for module in graph.modules for name in module.names}
    named = [] if sharding.pipeline is None else [name for names in sharding.pipeline.stages for name in names]
    return [modules[name] for name in named if name in modules]


def watch_first_layer(module: nn.Module, passed: list[int]) -> None:
    """Note the bytes that the first layer of a list puts out, each time it runs."""

    def note(_: nn.Module, __: Any, output: Any) -> None:
        tensors = [each for each in tree_leaves(output) if isinstance(each, torch.Tensor)]
        passed.append(sum(each.numel() * each.itemsize for each in tensors[:1]))

    for name, each in module.named_modules():
        if name.rpartition(".")[2] == "0":
            each.register_forward_hook(note)
