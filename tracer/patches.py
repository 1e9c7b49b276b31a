"""The few functions of torch that cannot take a traced tensor, replaced while a constructor is traced and no longer.

Each replacement does for a `Traced` tensor what the original does for an ordinary one, and hands everything else to the original.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from .errors import TraceError
from .imagined import cuda_imagined, replaced
from .sites import here
from .tape import Tape
from .traced import Traced, rewrap


@contextlib.contextmanager
def torch_patched(tape: Tape) -> Iterator[None]:
    """Make `trunc_normal_` one op on `tape`, let tensors be made into parameters of any class, and CUDA be there if it is not."""
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in (
            (nn.init, "_no_grad_trunc_normal_", _trunc_normal(tape)),
            (torch.Tensor, "_make_subclass", staticmethod(_make_subclass)),
            (nn.Parameter, "__new__", staticmethod(_new_parameter)),
            (torch.backends.cudnn, "is_acceptable", _is_acceptable),
        ):
            stack.enter_context(replaced(owner, name, replacement))
        for loader in _loaders():
            stack.enter_context(replaced(loader, "from_pretrained", classmethod(_refuse_to_load)))
        stack.enter_context(_cuda_seeds_kept())
        stack.enter_context(cuda_imagined(tape))
        yield


_original_trunc_normal = nn.init._no_grad_trunc_normal_
_original_make_subclass = torch.Tensor._make_subclass
_original_new_parameter = nn.Parameter.__new__
_original_is_acceptable = torch.backends.cudnn.is_acceptable


def _trunc_normal(tape: Tape) -> Any:
    def trunc_normal_(
        tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if not isinstance(tensor, Traced):  # an ordinary tensor, or another thread's
            return _original_trunc_normal(tensor, mean, std, a, b, generator=generator)
        return tape.trunc_normal(_original_trunc_normal, tensor, mean, std, a, b, generator=generator)

    return trunc_normal_


def _make_subclass(cls: type[Any], data: torch.Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    if isinstance(data, Traced) and not kwargs:
        return rewrap(data, cls, requires_grad)
    return _original_make_subclass(cls, data, requires_grad, **kwargs)


def _new_parameter(cls: type, data: Any = None, requires_grad: bool = True) -> Any:
    if not isinstance(data, Traced):
        return _original_new_parameter(cls, data, requires_grad)
    _check_gradients(data.dtype, requires_grad)
    if cls is not nn.Parameter:
        return rewrap(data, cls, requires_grad)
    parameter = rewrap(data, type(data), requires_grad)
    parameter._is_param = True  # as torch marks the parameters made of tensors of another class
    return parameter


def _is_acceptable(tensor: torch.Tensor) -> bool:
    """Recurrent layers on CUDA move their weights into one buffer if cuDNN is there: a second storage that only cuDNN sees."""
    return not isinstance(tensor, Traced) and bool(_original_is_acceptable(tensor))  # type: ignore[no-untyped-call]


@cache
def _check_gradients(dtype: torch.dtype, requires_grad: bool) -> None:
    """Raise what eager raises for a dtype that has no gradients."""
    with torch._C._DisableTorchDispatch():
        _original_make_subclass(torch.Tensor, torch.empty(0, dtype=dtype, device="cpu"), requires_grad)


def _loaders() -> list[type]:
    """The classes whose `from_pretrained` builds a module in its own way, on the meta device and in threads."""
    names = (("transformers.modeling_utils", "PreTrainedModel"), ("diffusers.models.modeling_utils", "ModelMixin"))
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return [each for each in found if each is not None]


def _refuse_to_load(cls: type, *_: Any, **__: Any) -> None:
    raise TraceError(
        f"{cls.__name__}.from_pretrained was called under a trace ({here()}): it fills the module from files, past every "
        f"initialization. Trace the architecture, {cls.__name__}(config) or AutoModel.from_config(config), and load the files "
        "into what plan.materialize() returns; or load outside and pass the module in"
    )


@contextlib.contextmanager
def _cuda_seeds_kept() -> Iterator[None]:
    """`torch.manual_seed` leaves a note for CUDA where it is not in use yet; a trace's seeds must not reach it."""
    queued, tracker = torch.cuda._queued_calls[:], dict(vars(torch.cuda._lazy_seed_tracker))
    try:
        yield
    finally:
        torch.cuda._queued_calls[:] = queued
        vars(torch.cuda._lazy_seed_tracker).update(tracker)
