"""Gradients clipped to a norm, of parameters that are divided in several ways, as a training script has to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """`torch.nn.utils.clip_grad_norm_` of all of them.

    Torch does not add up norms of tensors on several meshes, or of whole tensors and DTensors: each kind's norm is found by
    itself, gathered, and the norm of these norms is what all are clipped by.
    """
    kinds: dict[Any, list[nn.Parameter]] = {}
    for each in parameters:
        if each.grad is not None:
            kinds.setdefault(each.grad.device_mesh if isinstance(each.grad, DTensor) else None, []).append(each)
    if len(kinds) == 1:
        nn.utils.clip_grad_norm_(next(iter(kinds.values())), largest)
        return
    norms = [_whole(nn.utils.get_total_norm([each.grad for each in kind if each.grad is not None])) for kind in kinds.values()]
    total = nn.utils.get_total_norm(norms)
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, largest, total)


def _whole(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
