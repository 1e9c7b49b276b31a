"""Opaque tensors: sparse, quantized and nested ones, which have no plain memory that a view could describe.

While tracing they are computed for real, from replayed values; what comes back from them to ordinary tensors is a constant on the
tape. A module that holds one is built like any other, by running its constructor; only their recipes are not told.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .arguments import frozen, frozen_kwargs, mapped, mapped_kwargs, tensors_in, written
from .errors import TraceError
from .graph import View
from .ledger import Ledger, bytes_of, host_write
from .schema import is_random
from .sites import here
from .traced import Traced, meta_over, wrap
from .values import Values


def is_opaque(tensor: torch.Tensor) -> bool:
    """Whether a view of a storage does not say all there is to say about the tensor."""
    return not isinstance(tensor, Traced) and (tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested)


def opaque_kind(tensor: torch.Tensor) -> str:
    """Its kind, dtype and shape: `sparse_coo float32[3, 3]`."""
    if tensor.is_nested:
        kind = "nested"
    elif tensor.is_quantized:
        kind = "quantized"
    else:
        kind = str(tensor.layout).removeprefix("torch.")
    shape = "" if tensor.is_nested else str(list(tensor.shape))
    return f"{kind} {str(tensor.dtype).removeprefix('torch.')}{shape}"


class NotStrided(Exception):
    """A result turned out to be opaque: the call has to be made for real."""


class Opaque:
    """Makes the calls of one trace that have an opaque operand or result."""

    def __init__(self, ledger: Ledger, values: Values) -> None:
        self._ledger = ledger
        self._values = values
        self._made: dict[int, torch.Tensor] = {}

    def call(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The call's result; ordinary tensors in it are constants on the tape."""
        if is_random(func):
            raise TraceError(f"{func} draws into a tensor of another kind, which a trace cannot follow ({here()})")
        tensors = [each for each in tensors_in(args, kwargs) if not is_opaque(each)]
        changed = written(func, args, kwargs)
        self._check_own(func, changed)
        views = {id(each): self._ledger.view(each) for each in tensors}

        def view(tensor: torch.Tensor) -> View | None:
            return views.get(id(tensor))

        self._ledger.write_down(func, frozen(args, view), frozen_kwargs(kwargs, view), reads=tuple(views.values()), sensed=True)
        with self._values.real(views.values()) as real, torch.no_grad():
            copies = {id(each): real.open(views[id(each)]).clone() for each in tensors}
            originals = {id(copies[id(each)]): each for each in tensors}

            def copy_of(tensor: torch.Tensor) -> torch.Tensor:
                return copies.get(id(tensor), tensor)

            out = func(*mapped(args, copy_of), **mapped_kwargs(kwargs, copy_of))
        for each in changed:
            if id(each) in copies:
                self._write_back(each, copies[id(each)])
        return mapped(out, lambda each: originals[id(each)] if id(each) in originals else self._received(each))

    def _check_own(self, func: Any, changed: list[torch.Tensor]) -> None:
        for each in changed:
            if is_opaque(each) and id(each) not in self._made:
                raise TraceError(
                    f"{func} changes a {opaque_kind(each)} tensor from outside the constructor, which a trace cannot undo "
                    f"({here()})"
                )

    def _received(self, result: torch.Tensor) -> torch.Tensor:
        if is_opaque(result):
            self._made[id(result)] = result
            return result
        return wrap(meta_over(self._ledger.outside(result.untyped_storage(), result).handle, result), result.device)

    def _write_back(self, target: torch.Tensor, value: torch.Tensor) -> None:
        """Put down as a constant what the call has written into an ordinary tensor."""
        view = self._ledger.view(target)
        memory = bytes_of(value.contiguous().untyped_storage())
        source = self._ledger.adopt_constant(memory, value, value.device)
        content = View(source.index, view.dtype, view.size, value.contiguous().stride())
        self._ledger.write_down(host_write, (view, content), reads=(content,), writes=(view,), overwrites=True)
        self._values.refresh((view,))
