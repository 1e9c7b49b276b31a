"""Fills: which calls draw a number for each element in turn, so that any stretch of elements can be drawn by itself.

That their parts have the bits of the whole is tried for each operator and dtype when it is first used (`check_parts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..tracer.draws import draw_of_call, is_random_fill, is_static, is_trunc_normal
from ..tracer.graph import Op
from ..tracer.places import Draw, Place
from ..tracer.schema import aten
from .pens import Pen, pen_for


@dataclass(frozen=True, slots=True)
class Fill:
    """A call of `func` with scalars `args` that draws `numel` elements of `dtype`, `draw` in all.

    `contiguous` says whether torch takes the tensor for contiguous. The elements are drawn in the order of memory.
    """

    func: Any
    args: tuple[Any, ...]
    dtype: torch.dtype
    numel: int
    contiguous: bool
    draw: Draw
    quantum: ClassVar[int] = 1024
    """Where threads divide a fill between them: at multiples of this many elements."""

    @classmethod
    def of(cls, func: Any, args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Fill | None:
        """The fill that a call is; None where its elements' places in the stream are not certain."""
        if not is_random_fill(func) or not numel or dtype.is_complex:
            return None
        draw = draw_of_call(func, (None, *args), dtype, numel, contiguous)
        if draw is None or not check_parts(func, dtype, args, draw.words // numel):
            return None
        return cls(func, args, dtype, numel, contiguous, draw)

    @classmethod
    def of_op(cls, op: Op) -> Fill | None:
        """The same for a recorded op: one that fills in place, creates a filled tensor, or is a `trunc_normal_` of one round."""
        call = as_fill(op)
        if call is None:
            return None
        view = op.targets[0]
        return cls.of(*call, view.dtype, view.numel, view.is_contiguous)

    def pen(self, place: Place, first: int = 0) -> Pen:
        """A pen at element `first`, where the fill as a whole starts from `place`."""
        pen = pen_for(self, place)
        pen.skip(first)
        return pen


def as_fill(op: Op) -> tuple[Any, tuple[Any, ...]] | None:
    """The in-place operator, and its scalars, that a recorded op comes down to."""
    func, args = op.func, op.args
    if is_random_fill(func):
        return (func, args[1:]) if all(name == "generator" for name, _ in op.kwargs) else None
    if is_trunc_normal(func):
        return (aten.normal_.default, args[1:3]) if is_static(op) else None
    if func in _NEW:
        operator, arguments = _NEW[func]
        return operator, arguments(args)
    return None


def created(op: Op, args: Any, kwargs: dict[str, Any]) -> tuple[torch.Tensor, Any, tuple[Any, ...]] | None:
    """The new tensor of a call such as `torch.randn`, not filled yet, with the operator and scalars that fill it."""
    if op.func not in _NEW or torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return None
    func, scalars = _NEW[op.func]
    options = {name: value for name, value in kwargs.items() if name != "generator"} | {"dtype": op.targets[0].dtype}
    if isinstance(args[0], torch.Tensor):
        return (torch.empty_like(args[0], **options), func, scalars(args)) if args[0].device.type == "cpu" else None
    size = next(each for each in args if isinstance(each, list | tuple))
    return torch.empty(size, **options), func, scalars(args)


_UNIFORM: tuple[Any, Any] = (aten.uniform_.default, lambda args: (0.0, 1.0))
_NORMAL: tuple[Any, Any] = (aten.normal_.default, lambda args: (0.0, 1.0))
_NEW: dict[Any, tuple[Any, Any]] = {
    aten.rand.default: _UNIFORM,
    aten.rand.generator: _UNIFORM,
    aten.rand_like.default: _UNIFORM,
    aten.randn.default: _NORMAL,
    aten.randn.generator: _NORMAL,
    aten.randn_like.default: _NORMAL,
    aten.normal.float_float: (aten.normal_.default, lambda args: args[:2]),
    aten.randint.default: (getattr(aten.random_, "from"), lambda args: (0, args[0])),
    aten.randint.generator: (getattr(aten.random_, "from"), lambda args: (0, args[0])),
    aten.randint.low: (getattr(aten.random_, "from"), lambda args: args[:2]),
    aten.randint.low_generator: (getattr(aten.random_, "from"), lambda args: args[:2]),
}


def in_order(tensor: torch.Tensor) -> torch.Tensor | None:
    """The elements in the order in which a fill visits them, that of memory, as one row; None where memory has gaps."""
    order = sorted(range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True)
    ordered = tensor.permute(order)
    return ordered.view(-1) if ordered.is_contiguous() else None


# -- the parts tried ----------------------------------------------------------------------------------------------------

_CUTS = (0, 5, 40, 41, 64, 97, 113)


def check_parts(func: Any, dtype: torch.dtype, args: tuple[Any, ...], words_each: int) -> bool:
    """Whether parts of a small tensor, filled one by one, have the bits that one call gives, for an operator and a dtype here."""
    return _parts_are_whole(func, dtype, args if func is getattr(aten.random_, "from") or func in _BOUNDED else (), words_each)


_BOUNDED = (aten.random_.to, aten.geometric_.default, aten.bernoulli_.float)


@cache
def _parts_are_whole(func: Any, dtype: torch.dtype, args: tuple[Any, ...], words_each: int) -> bool:
    with _disable_current_modes(), torch.no_grad():
        try:
            return all(_same_parts(func, dtype, args, numel, step) for numel in (_CUTS[-1], 9, 96) for step in (1, 2))
        except (RuntimeError, NotImplementedError, TypeError):
            return False


def _same_parts(func: Any, dtype: torch.dtype, args: tuple[Any, ...], numel: int, step: int) -> bool:
    generator = torch.Generator().manual_seed(numel)
    place = Place.at(generator.get_state())
    whole = torch.empty(numel, step, dtype=dtype, device="cpu")[:, 0]
    draw = draw_of_call(func, (None, *args), dtype, numel, whole.is_contiguous())
    func(whole, *args, generator=generator)
    if draw is None:
        return False
    fill, parts = Fill(func, args, dtype, numel, whole.is_contiguous(), draw), torch.empty(numel, dtype=dtype, device="cpu")
    for first, last in pairwise(_CUTS):
        stretch = parts[first : min(last, numel)]
        if len(stretch):
            fill.pen(place, first).write(stretch)
    return torch.equal(parts.view(torch.uint8), whole.contiguous().view(torch.uint8))
