"""The table of corrections for plans on CUDA: where torch takes another kernel there than on the CPU, that kernel.

A run of a step is one on fake CPU tensors, whatever the plan's device: with fake CUDA tensors autograd aborts the process where
torch has no CUDA. So ops that ask for the device before they choose (they are composed of others, and no dispatch mode sees the
choice) are replaced, while a run lasts, by what they choose on CUDA. From there on it is torch's own: autograd saves what that
op's derivative needs, and its meta function says what it returns. A policy of selective checkpointing meets CUDA's ops, too.

Each entry of `CHOICES` names its source. What kernels take and give back while they run is in `cuda_scratch`, what autocast
converts on CUDA in `cuda_autocast`. `tests/test_cuda_kernels.py` holds each against what torch says of CUDA, and, where there is
a GPU, against `torch.cuda.memory_stats`.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._guards import active_fake_mode

from .cuda_attention import attention
from .cuda_autocast import AUTOCAST, op_named

aten = torch.ops.aten

Kernel = Callable[..., Any]

_COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd  # torch's own kernel, in C++

_one_run = threading.Lock()


@contextmanager
def cuda_kernels() -> Iterator[None]:
    """In the body, ops on this thread's fake CPU tensors choose as on CUDA; other threads, and real tensors, meet no change.

    Runs of other threads wait: torch has one table of kernels for the process.
    """
    with _one_run:
        library = torch.library.Library("aten", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel has been there before
                for name, kernel in CHOICES.items():
                    library.impl(name, _for_fakes(name, kernel), "AutogradCPU")
                for name, kernel in _converting().items():
                    library.impl(name, kernel, "AutocastCPU", with_keyset=True)
            yield
        finally:
            library._destroy()


@functools.cache
def _converting() -> Mapping[str, Kernel]:
    """The ops that only one of the CPU's and CUDA's autocast converts, by torch's own table of kernels, or each otherwise."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and has(name, "AutocastCPU"))
    on_cpu_only = [name.removeprefix("aten::") for name in names if not has(name, "AutocastCUDA")]
    return {name: _converting_fakes(name, AUTOCAST.get(name)) for name in (*AUTOCAST, *on_cpu_only)}


def _converting_fakes(name: str, kernel: Kernel | None) -> Kernel:
    """A kernel that converts fake tensors by `kernel` (None: not at all), and real ones as the CPU's autocast does."""
    op, key = op_named(name), torch._C.DispatchKey.AutocastCPU
    of_cpu = torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", key)
    own = torch.library.get_kernel(op, key).call_boxed if of_cpu else None
    after = torch._C._dispatch_keyset_full_after(key)

    def chosen(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if active_fake_mode() is None:
            return op.redispatch(keys & after, *args, **kwargs) if own is None else own(keys, *args, **kwargs)
        return op.redispatch(keys & after, *args, **kwargs) if kernel is None else kernel(*args, **kwargs)

    return chosen


def _for_fakes(name: str, kernel: Kernel) -> Kernel:
    op = op_named(name)

    @functools.wraps(kernel)
    def chosen(*args: Any, **kwargs: Any) -> Any:
        out = NotImplemented if active_fake_mode() is None else kernel(*args, **kwargs)
        return op._op_dk(_COMPOSED, *args, **kwargs) if out is NotImplemented else out

    return chosen


# -- dropout and softmax ------------------------------------------------------------------------------------------------


def _dropout(value: torch.Tensor, p: float, train: bool) -> Any:
    """One kernel with a mask of bools, where the CPU multiplies by numbers: aten/src/ATen/native/Dropout.cpp `dropout`."""
    if not train or not 0 < p < 1 or value.numel() == 0:  # `is_fused_kernel_acceptable`
        return NotImplemented
    return aten.native_dropout(value, p, train)[0]


def _softmax(value: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """float16 is read, float32 written, without a copy between: aten/src/ATen/native/SoftMax.cpp `softmax`."""
    return aten._softmax(value, dim, True) if _widens(value, dtype) else NotImplemented


def _log_softmax(value: torch.Tensor, dim: int, dtype: torch.dtype | None = None) -> Any:
    """The same: aten/src/ATen/native/SoftMax.cpp `log_softmax`."""
    return aten._log_softmax(value, dim, True) if _widens(value, dtype) else NotImplemented


def _widens(value: torch.Tensor, dtype: torch.dtype | None) -> bool:
    return value.dtype == torch.float16 and dtype == torch.float32


# -- RMSNorm ------------------------------------------------------------------------------------------------------------


def _rms_norm(
    value: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> Any:
    """One kernel, unless the weight has another dtype: aten/src/ATen/native/layer_norm.cpp `rms_norm_symint`."""
    channels_last = any(
        value.dim() == dim and value.is_contiguous(memory_format=layout) and not value.is_contiguous()
        for dim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d))
    )
    if channels_last or value.is_complex() or (weight is not None and weight.dtype != value.dtype):
        return NotImplemented
    return _FusedRMSNorm.apply(value, list(normalized_shape), weight, eps)  # type: ignore[no-untyped-call]


class _FusedRMSNorm(torch.autograd.Function):
    """tools/autograd/derivatives.yaml `_fused_rms_norm`, which a torch without CUDA has no autograd for.

    It keeps its input, its weight, and the reciprocal of the root of each row, [..., 1] of float32.
    """

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, reciprocal = aten._fused_rms_norm.default(value, shape, weight, eps)
        ctx.save_for_backward(value, weight, reciprocal)
        ctx.shape = shape
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        value, weight, reciprocal = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        with torch._C._AutoDispatchBelowAutograd():
            found = aten._fused_rms_norm_backward.default(gradients[0], value, ctx.shape, reciprocal, weight, mask)
        return found[0], None, found[1], None


CHOICES: Mapping[str, Kernel] = {
    "scaled_dot_product_attention": attention,
    "dropout": _dropout,
    "softmax.int": _softmax,
    "log_softmax.int": _log_softmax,
    "rms_norm": _rms_norm,
}
"""The ops that choose by the device, and what they do on CUDA; `NotImplemented` is what they do on the CPU."""
