"""One rank of two: modules divided by inferred rules, beside the same on one device: outputs, gradients, and a step's result."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

import groundplan as gp

from .jobs import finish
from .tensor_models import DIVIDED, MORE, NAIVE, TRAPS, inputs_of, small


def compared(build: Callable[[], nn.Module], inputs: Any, rules: Any) -> dict[str, Any]:
    """The largest differences, in units of what the values themselves are, and how many parameters were divided."""
    plan = gp.trace(build).shard({"tp": dist.get_world_size()}, tensor=rules)
    divided = plan.materialize(seed=0)
    torch.manual_seed(0)
    whole = build()
    found: dict[str, Any] = {"divided": sum(isinstance(each, DTensor) for each in divided.parameters())}
    one, other = (stepped(module, inputs) for module in (whole, divided))
    return found | {kind: _apart(one[kind], other[kind]) for kind in one}


def compared_naively(name: str) -> dict[str, Any]:
    """The same of a trap that is divided as it looks; infinite where it does not run so."""
    build = TRAPS[name]
    rules = {each: style for each, style in NAIVE.items() if hasattr(build(), each)}
    try:
        return compared(build, inputs_of(name), rules)
    except (RuntimeError, gp.GroundplanError) as error:
        return {"outputs": float("inf"), "why": str(error)}


def stepped(module: nn.Module, inputs: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Outputs, gradients, and parameters after a step of SGD (Adam would make what rounding leaves of a 0 as large as any)."""
    module.train()
    out = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    outputs = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
    loss = out.loss if hasattr(out, "loss") else _loss(outputs[0])
    loss.backward()
    gradients = {name: _whole(each.grad) for name, each in module.named_parameters() if each.grad is not None}
    torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, foreach=False).step()
    after = {name: _whole(each) for name, each in module.named_parameters()}
    return {"outputs": {str(i): _whole(each) for i, each in enumerate(outputs)}, "gradients": gradients, "after": after}


def _loss(out: torch.Tensor) -> torch.Tensor:
    return (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def _apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of all; infinite where tensors are missing, or of other shapes, or not alike on all ranks."""
    if one.keys() != other.keys() or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    most = max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp_min(1e-3)) for name in one)
    return most if most == most else float("inf")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if "more" in sys.argv:
        more = {name: compared(partial(small, name), inputs_of(name), "infer") for name in MORE}
        finish(sys.argv[1], more)
    found = {name: compared(DIVIDED[name], inputs_of(name), "infer") for name in DIVIDED}
    finish(sys.argv[1], {"divided": found, "traps": {name: compared_naively(name) for name in TRAPS}})
