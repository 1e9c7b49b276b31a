"""Activation checkpointing: layers that run again in the backward, instead of keeping what they computed."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..planner.workload import Checkpointing
from ..tracer.errors import DecisionError

aten = torch.ops.aten

KEPT = {
    aten.mm.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    aten.abs.default,
    aten.max.default,
}
"""The ops whose results selective checkpointing keeps, of `mm` every other one, the first included.

torchtitan at the end of 2024 (torchtitan/parallelisms/parallelize_llama.py `_save_list`), with the CPU's attention beside CUDA's.
Products with a bias are `addmm`, which is not on torchtitan's list, and run again.
"""


def checkpoint_layers(module: Any, checkpointing: Checkpointing) -> None:
    """Have every layer that repeats keep its inputs alone, or by op (`selective`), and run again in the backward.

    A transformers model that knows how does it itself; of others, the members of one class in an `nn.ModuleList`,
    `nn.ModuleDict` or `nn.Sequential` go through `torch.utils.checkpoint`. Raises `DecisionError` where nothing repeats.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        options["context_fn"] = selective_contexts
    if getattr(module, "supports_gradient_checkpointing", False):
        _checkpoint_transformers(module, options)
        return
    layers = list(_repeated(module))
    if not layers:
        raise DecisionError(
            f'checkpointing="{checkpointing}" goes by layers that repeat, and the module has none: say checkpointing="none"'
        )
    for layer in layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **options)


def _checkpoint_transformers(module: Any, options: dict[str, Any]) -> None:
    """Under the new name where transformers has one (5.24; the old one goes in 6)."""
    if hasattr(module, "activation_checkpointing_enable"):
        module.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost members of containers that hold at least two modules of one class, with parameters."""
    for child in module.children():
        members = list(child.children()) if isinstance(child, _CONTAINERS) else []
        classes = [type(each) for each in members if any(True for _ in each.parameters())]
        if classes and max(map(classes.count, classes)) > 1:
            yield from (each for each in members if classes.count(type(each)) > 1)
        else:
            yield from _repeated(child)


# -- by op --------------------------------------------------------------------------------------------------------------


def selective_contexts() -> Any:
    """The two contexts of one layer's forward, and of its second one: `context_fn` of `torch.utils.checkpoint.checkpoint`.

    Products are counted anew in each layer, and apart in each of the two, as torchtitan does.
    """
    products: dict[bool, int] = defaultdict(int)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is aten.mm.default:
            products[context.is_recompute] += 1
        kept = op in KEPT and not (op is aten.mm.default and products[context.is_recompute] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
