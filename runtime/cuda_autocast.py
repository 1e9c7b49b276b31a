"""What `torch.autocast("cuda")` converts, for a run on fake CPU tensors: its lists differ much from the CPU's.

On the CPU `softmax`, `sum`, `layer_norm` and many more go on in bfloat16, where on CUDA they are in float32 and keep float32 for
the backward. The lists are those of aten/src/ATen/autocast_mode.h (`AT_FORALL_FP32` and so on), the functions that of
aten/src/ATen/autocast_mode.cpp; a test reads the header of the torch that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

LOWER_PRECISION = (
    *("_convolution", "addmv", "addr", "chain_matmul", "convolution", "einsum", "linalg_multi_dot", "mv"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
    "_scaled_dot_product_flash_attention",
)
"""In autocast's dtype on CUDA, and not converted on the CPU. What both convert is left to torch."""

FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus"),
    *("layer_norm", "native_layer_norm", "rms_norm", "group_norm"),
    *("frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity"),
    *("poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss"),
    *("smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss"),
    *("triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits"),
    *("dist", "pdist", "cdist", "renorm", "logsumexp"),
    *("upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    *("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
)
"""In float32: operands in the lower precision are converted first."""

FLOAT32_OUT = (
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"),
)
"""With a result in float32, where the caller says no `dtype`; the operand is converted as it is read."""

FLOAT32_NORM: Mapping[str, str] = {"norm.Scalar": "norm.ScalarOpt_dtype", "norm.ScalarOpt_dim": "norm.ScalarOpt_dim_dtype"}
"""The same by another overload, which has a `dtype`."""

WIDEST = (
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot"),
    "scatter_add",
)
"""In the widest dtype of the operands."""


def op_named(name: str) -> Any:
    """The op of aten called so, as `softmax.int`."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _without_autocast() -> Any:
    """`c10::impl::ExcludeDispatchKeyGuard`: what an op is composed of is not converted again."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _is_eligible(value: Any) -> bool:
    """`is_eligible`: floating point, and not double."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float64


def _converted(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda each: each.to(dtype) if _is_eligible(each) else each, values)


def _in(op: Any, dtype: Callable[[Any], torch.dtype]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            args, kwargs = _converted((args, kwargs), dtype((args, kwargs)))
            return op(*args, **kwargs)

    return kernel


def _lower(_: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cpu")


def _float32(_: Any) -> torch.dtype:
    return torch.float32


def _widest(values: Any) -> torch.dtype:
    """`promote_type`: float32 as soon as one operand has it."""
    found = {each.dtype for each in tree_leaves(values) if _is_eligible(each)}
    return torch.float32 if torch.float32 in found else next(iter(found), _lower(values))


def _with_dtype(op: Any) -> Callable[..., Any]:
    """`fp32_set_opt_dtype`."""
    position = next((index for index, each in enumerate(op._schema.arguments) if each.name == "dtype"), None)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = args[position] if position is not None and position < len(args) else kwargs.get("dtype")
        with _without_autocast():
            if given is not None or not _is_eligible(args[0]):
                return op(*args, **kwargs)
            return op(*args[:position], **{**kwargs, "dtype": torch.float32})

    return kernel


def _appended(op: Any, other: Any) -> Callable[..., Any]:
    """`fp32_append_dtype`."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return other(*args, **kwargs, dtype=torch.float32 if _is_eligible(args[0]) else args[0].dtype)

    return kernel


def _known(names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Those that CUDA's autocast of the torch that is installed converts: its kernels are in a torch without CUDA, too."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return ((name, op_named(name)) for name in names if has(f"aten::{name}", "AutocastCUDA"))


def _kernels() -> Iterator[tuple[str, Callable[..., Any]]]:
    yield from ((name, _in(op, _lower)) for name, op in _known(LOWER_PRECISION))
    yield from ((name, _in(op, _float32)) for name, op in _known(FLOAT32))
    yield from ((name, _with_dtype(op)) for name, op in _known(FLOAT32_OUT))
    yield from ((name, _appended(op, op_named(FLOAT32_NORM[name]))) for name, op in _known(FLOAT32_NORM))
    yield from ((name, _in(op, _widest)) for name, op in _known(WIDEST))


AUTOCAST: Mapping[str, Callable[..., Any]] = dict(_kernels())
"""The ops that CUDA's autocast converts and the CPU's does not, or otherwise."""
