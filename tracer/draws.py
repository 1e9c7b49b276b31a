"""How many numbers a fill takes from the CPU's generator, and how to leave them out.

The figures hold for torch's CPU generator (mt19937, 32-bit words); what is not known for sure is `None`, and is then drawn.
"""

from __future__ import annotations

from typing import Any

import torch

from .graph import Op
from .schema import FILLS, aten

_SCRATCH = 1 << 16
_BLOCK = 16  # normal_ works in blocks of 16 elements where it is vectorized
_HALF = (torch.float16, torch.bfloat16)
_ROUNDS_UP = torch.__version__ >= "2.12"  # earlier ones draw an odd tail of half precision otherwise


def words(func: Any, dtype: torch.dtype, numel: int, contiguous: bool) -> int | None:
    """The 32-bit words that one fill of `numel` elements takes from the CPU's generator, where that is certain."""
    if func is aten.uniform_.default:
        return _uniform_words(dtype, numel)
    if func is aten.normal_.default and contiguous and numel >= _BLOCK:
        return _normal_words(dtype, numel)
    return 0 if numel == 0 and func in (aten.uniform_.default, aten.normal_.default) else None


def _uniform_words(dtype: torch.dtype, numel: int) -> int | None:
    if dtype == torch.float64:
        return 2 * numel
    return numel if dtype == torch.float32 or dtype in _HALF else None


def _normal_words(dtype: torch.dtype, numel: int) -> int | None:
    if dtype in _HALF:
        return _BLOCK * -(-numel // _BLOCK) if _ROUNDS_UP or not numel % _BLOCK else None
    whole = numel + (_BLOCK if numel % _BLOCK else 0)
    return {torch.float32: whole, torch.float64: 2 * whole}.get(dtype)


def is_counted_fill(op: Op) -> bool:
    """Whether it is a fill that can be put off: it reads nothing, and what it draws is known beforehand."""
    if op.func not in FILLS or any(name != "generator" for name, _ in op.kwargs):
        return False
    view = op.writes[0]
    return not op.random or words(op.func, view.dtype, view.numel, view.is_contiguous) is not None


def skip(count: int, generator: torch.Generator) -> None:
    """Take `count` words from a CPU generator; nothing else of its state changes (a cached normal sample stays)."""
    scratch = torch.empty(min(count, _SCRATCH), dtype=torch.int8, device="cpu")
    while count > 0:
        aten.random_.default(scratch[: min(count, _SCRATCH)], generator=generator)
        count -= _SCRATCH
