"""Ops that make each element of their result by itself, from the same element of their operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .graph import Op
from .schema import aten

# Every element of the result is made from the same element of the operands, by arithmetic that is exactly rounded: the same bits
# wherever in the tensor, and in however long a call, it stands.
_COPIES = {aten.copy_.default, aten.clone.default, aten._to_copy.default, aten.neg.default, aten.neg_.default, aten.abs.default}
_ROUNDED = {
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.mul_.Scalar),
    *(aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar, aten.div_.Scalar),
    *(aten.add.Tensor, aten.add_.Tensor, aten.add.Scalar, aten.add_.Scalar),
    *(aten.sub.Tensor, aten.sub_.Tensor, aten.sub.Scalar, aten.sub_.Scalar),
    *(aten.clamp.default, aten.clamp_.default, aten.clamp_min_.default, aten.clamp_max_.default),
}
_EXACT = (torch.float32, torch.float64)
CONSTANTS: Mapping[Any, Any] = {
    aten.zeros.default: lambda args: 0,
    aten.ones.default: lambda args: 1,
    aten.full.default: lambda args: args[1],
    aten.zeros_like.default: lambda args: 0,
    aten.ones_like.default: lambda args: 1,
    aten.full_like.default: lambda args: args[1],
    aten.new_zeros.default: lambda args: 0,
    aten.new_ones.default: lambda args: 1,
    aten.new_full.default: lambda args: args[2],
}
"""Operators that create a tensor of one value, and which one."""

FILLED = (aten.zero_.default, aten.fill_.Scalar)


def by_element(op: Op, random_by_element: Callable[[Op], bool]) -> bool:
    """Whether each element of what the op makes can be made by itself; `random_by_element` answers for one that draws."""
    views = [*op.reads, *op.targets]
    if len(op.targets) != 1 or any(view.conj or view.neg for view in views):
        return False
    if op.random:
        return random_by_element(op)
    if op.func in CONSTANTS or op.func in FILLED or op.func in _COPIES:
        return True
    if op.func not in _ROUNDED or any(view.dtype not in _EXACT for view in views):
        return False
    return dict(op.kwargs).get("alpha", 1) == 1 and len(op.args) == 2 if "clamp" not in str(op.func) else True
