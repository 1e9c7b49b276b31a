"""Ops whose fake kernels refuse what the real ones take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

aten = torch.ops.aten


def called(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an op on fake tensors.

    `_grouped_mm`, which layers of experts run, is written for bfloat16 alone in torch/_meta_registrations.py
    (`_meta_grouped_mm_common`); the CPU's kernel takes any dtype (aten/src/ATen/native/GroupedMMUtils.h), and so does CUDA's,
    group by group.
    """
    if func is not aten._grouped_mm.default or args[0].dtype == torch.bfloat16:
        return func(*args, **kwargs)
    halves = tuple(each.to(torch.bfloat16) if _is_floating(each) else each for each in args)
    return func(*halves, **{name: value for name, value in kwargs.items() if name != "out_dtype"}).to(args[0].dtype)


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
