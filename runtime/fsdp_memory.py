"""What FSDP2 allocates, with its purpose: whole parameters, buffers of its collectives, the streams whose pools they are from.

Ops show where a tensor comes from, not what for; and storages that are emptied and filled again, by which FSDP2 frees whole
parameters (`UntypedStorage.resize_`), show nothing. So while a run lasts, FSDP2's own functions say that they are at it.
torch/distributed/fsdp/_fully_shard/: `_fsdp_param_group.py` (`unshard`, `wait_for_unshard`), `_fsdp_collectives.py`
(`foreach_reduce`), `_fsdp_param.py` ("[Note: FSDP tensors]").
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.overrides import TorchFunctionMode

from ..planner.allocations import Kind
from .allocations import Allocations, Origin

Named = Callable[[FSDPParam], str]
Change = Callable[[Callable[..., Any]], Callable[..., Any]]

_STREAMS = ("all_gather_copy_in", "all_gather", "reduce_scatter", "all_reduce")
"""FSDP2's streams (`FSDPCommContext.lazy_init`); what it allocates under another is from the computing stream's pool."""

_GATHERING = ("init_all_gather_outputs", "alloc_all_gather_outputs", "init_unsharded_param", "to_sharded_post_forward")
"""What makes of a parameter the whole, or the larger part that stays after the forward where `reshard` is a number."""


@contextmanager
def fsdp_followed(found: Allocations, module: nn.Module, copied: bool = False) -> Iterator[None]:
    """In the body, `found` learns what FSDP2 allocates for `module`, and what for.

    `copied`: shards stay in host memory and all else is on a device, so that FSDP2 copies from one to the other; in a run where
    both are the CPU it would not, and is made to.
    """
    owners = {id(each): name for name, each in module.named_modules()}

    def name_of(parameter: FSDPParam) -> str:
        info = parameter._module_info
        return f"{owners[id(info.module)]}.{info.param_name}".lstrip(".")

    gathered, buffers = _of_parameter(found, name_of, "gathered parameter"), _of_group(found, copied)
    changes: list[tuple[Any, str, Change]] = [
        (torch.UntypedStorage, "resize_", _resizing(found)),
        *((FSDPParam, name, gathered) for name in _GATHERING),
        *((FSDPParamGroup, name, buffers) for name in ("unshard", "wait_for_unshard", "post_backward")),
        (FSDPParam, "reset_sharded_param", _of_parameter(found, name_of, "parameter", copied)),
        (_fsdp_param_group, "foreach_reduce", _reducing(found, name_of, copied)),
    ]
    with ExitStack() as stack:
        for owner, name, change in changes:
            own = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, functools.wraps(own)(change(own))))
        yield


def _resizing(found: Allocations) -> Change:
    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            out = own(storage, size)
            if storage.nbytes() != before:
                found.resized(storage)
            return out

        return resize

    return change


def _of_parameter(found: Allocations, name_of: Named, kind: Kind, on_host: bool = False) -> Change:
    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def make(parameter: FSDPParam, *args: Any, **kwargs: Any) -> Any:
            with found.within(Origin(kind, name_of(parameter), on_host=on_host)):
                return own(parameter, *args, **kwargs)

        return make

    return change


def _of_group(found: Allocations, copied: bool) -> Change:
    """Of parameters that are gathered, and whose gradients are reduced, together: buffers, but for what is said above."""

    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def communicate(group: FSDPParamGroup, *args: Any, **kwargs: Any) -> Any:
            streams = {id(getattr(group.comm_ctx, f"{name}_stream", None)): name for name in _STREAMS}
            unit = group._module_fqn or ""
            origin = Origin("communication buffer", unit or "the module as a whole", unit, streams=streams)
            with found.within(origin), _Copies(found) if copied else nullcontext():
                return own(group, *args, **kwargs)

        return communicate

    return change


def _reducing(found: Allocations, name_of: Named, copied: bool) -> Change:
    """Of gradients, which are all there by then: those of whole parameters go in, those of this rank's parts come out."""

    def change(own: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(parameters: list[FSDPParam], gradients: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                found.label(gradient, "gradient", name_of(parameter))
            with _Copies(found, to_host=True) if copied else nullcontext():
                return own(parameters, gradients, *args, **kwargs)

        return reduce

    return change


class _Copies(TorchFunctionMode):
    """Takes `tensor.to(device)` for a copy between host and device, which it is on the plan's devices."""

    def __init__(self, found: Allocations, to_host: bool = False) -> None:
        super().__init__()
        self._found, self._to_host = found, to_host

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.to or not isinstance(args[1], torch.device):
            return func(*args, **(kwargs or {}))
        if not self._to_host:
            return args[0].clone()
        with self._found.within(Origin("communication buffer", on_host=True)):
            return args[0].clone()
