"""Attention as CUDA runs it: which of its kernels `scaled_dot_product_attention` takes, and the op of that kernel.

On the CPU attention without dropout takes a flash kernel of the CPU's own, whatever its dtype and mask; CUDA chooses between
several, which keep different things for the backward. The rules are those of
aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (`select_sdp_backend`) for dense tensors on devices of compute capability
8.0 and up; what a kernel returns is said by torch's own meta functions (torch/_meta_registrations.py). The user's settings
(`torch.nn.attention.sdpa_kernel`) count as they do there.

One rule needs the device: Hopper and Blackwell, with cuDNN above 9.15, try cuDNN first. It keeps what flash keeps, and where it
takes a mask with fewer heads of keys than of queries, which leaves others the kernel of plain operations, it takes less than
what is said here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from ..tracer.errors import MemoryRunError

aten = torch.ops.aten

_HALVES = (torch.float16, torch.bfloat16)
_MASK_ALIGNMENT = 8
"""Elements that a mask's rows are padded to a multiple of: transformers/attention.cpp `preprocess_mask`."""


@dataclass(frozen=True, slots=True)
class Attended:
    """The arguments of one call. Shapes are [batch, heads, length, size]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    grouped: bool

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.query, self.key, self.value


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention` on CUDA: aten/src/ATen/native/transformers/attention.cpp, the function of that name."""
    call = Attended(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _RUNS[backend_of(call)](call)


def backend_of(call: Attended) -> SDPBackend:
    """The first kernel, in the order of `torch._C._get_sdp_priority_order()`, that is allowed and takes the call."""
    for number in torch._C._get_sdp_priority_order():
        backend = SDPBackend(number)
        if backend in _ALLOWED and _ALLOWED[backend]() and _TAKES[backend](call):
            return backend
    raise MemoryRunError(
        f"CUDA has no kernel for attention of {call.query.dtype} {tuple(call.query.shape)} among those that are allowed; allow "
        "more of them (torch.nn.attention.sdpa_kernel)"
    )


# -- what kernels take --------------------------------------------------------------------------------------------------


def _takes_flash(call: Attended) -> bool:
    """`can_use_flash_attention`."""
    sizes = {each.shape[-1] for each in call.operands}
    square = not call.causal or call.query.shape[-2] == call.key.shape[-2]
    fits = call.mask is None and square and len(sizes) == 1 and max(sizes) <= 256
    return fits and call.query.dtype in _HALVES and _is_plain(call) and _heads_match(call, grouped=True)


def _takes_efficient(call: Attended) -> bool:
    """`can_use_mem_efficient_attention`."""
    alignment = 8 if call.query.dtype in _HALVES else 4  # `minimum_gemm_alignment`
    aligned = all(each.shape[-1] > 0 and each.shape[-1] % alignment == 0 for each in call.operands)
    fits = aligned and call.query.shape[-1] == call.key.shape[-1] and call.query.dtype in (*_HALVES, torch.float32)
    return fits and _is_plain(call) and _heads_match(call, grouped=False)


def _takes_cudnn(call: Attended) -> bool:
    """`can_use_cudnn_attention`, as far as it does not depend on the device."""
    aligned = all(each.shape[-1] <= 256 and each.shape[-1] % 8 == 0 for each in call.operands)
    return aligned and call.query.dtype in _HALVES and _is_plain(call) and _heads_match(call, grouped=True)


def _takes_math(call: Attended) -> bool:
    return True


def _is_plain(call: Attended) -> bool:
    """`check_tensor_shapes`, `check_last_dim_stride_equals_1_dense`, `check_nonzero_sequence_lengths_dense`."""
    if any(each.dim() != 4 or each.stride(-1) != 1 for each in call.operands):
        return False
    return call.query.shape[-2] > 0 and call.key.shape[-2] > 0


def _heads_match(call: Attended, grouped: bool) -> bool:
    """`check_batch_size_and_num_heads_dense`."""
    if len({each.shape[0] for each in call.operands}) > 1:
        return False
    queries, keys, values = (each.shape[1] for each in call.operands)
    if call.grouped and grouped:
        return keys == values and queries % keys == 0
    return queries == keys == values


# -- what they are called with ------------------------------------------------------------------------------------------


def _flash(call: Attended) -> torch.Tensor:
    """Sizes are padded to a multiple of 8: `pad_last_dim`."""
    size = call.query.shape[-1]
    more = -size % 8
    operands = [torch.constant_pad_nd(each, (0, more)) if more else each for each in call.operands]
    scale = 1 / math.sqrt(size) if call.scale is None else call.scale
    out: torch.Tensor = aten._scaled_dot_product_flash_attention(*operands, call.dropout, call.causal, False, scale=scale)[0]
    return out[..., :size] if more else out


def _efficient(call: Attended) -> torch.Tensor:
    mask = None if call.mask is None else _expanded(_added(call), call)
    options = (_needs_sums(call), call.dropout, call.causal)
    out: torch.Tensor = aten._scaled_dot_product_efficient_attention(*call.operands, mask, *options, scale=call.scale)[0]
    return out


def _cudnn(call: Attended) -> torch.Tensor:
    mask = None if call.mask is None else _added(call)
    options = (_needs_sums(call), call.dropout, call.causal, False)
    out: torch.Tensor = aten._scaled_dot_product_cudnn_attention(*call.operands, mask, *options, scale=call.scale)[0]
    return out


def _math(call: Attended) -> torch.Tensor:
    mask = None if call.mask is None else _added(call)
    options = (call.dropout, call.causal, None)
    out: torch.Tensor = aten._scaled_dot_product_attention_math(
        *call.operands, mask, *options, scale=call.scale, enable_gqa=call.grouped
    )[0]
    return out


def _needs_sums(call: Attended) -> bool:
    """`should_compute_logsumexp`: for a backward only."""
    return torch.is_grad_enabled() and any(each.requires_grad for each in call.operands)


def _added(call: Attended) -> torch.Tensor:
    """A mask that is added: `convert_boolean_attn_mask`."""
    assert call.mask is not None
    if call.mask.dtype != torch.bool:
        return call.mask
    return torch.where(call.mask, 0.0, torch.scalar_tensor(-math.inf, dtype=call.query.dtype, device=call.mask.device))


def _expanded(mask: torch.Tensor, call: Attended) -> torch.Tensor:
    """The mask of every head, its rows aligned in memory: `preprocess_mask`, `pad_bias`."""
    columns = mask.shape[-1]
    if columns % _MASK_ALIGNMENT:
        mask = torch.constant_pad_nd(mask, (0, -columns % _MASK_ALIGNMENT))[..., :columns]
    return mask.expand(*call.query.shape[:3], call.key.shape[2])


_ALLOWED: Mapping[SDPBackend, Callable[[], bool]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}

_TAKES: Mapping[SDPBackend, Callable[[Attended], bool]] = {
    SDPBackend.FLASH_ATTENTION: _takes_flash,
    SDPBackend.EFFICIENT_ATTENTION: _takes_efficient,
    SDPBackend.CUDNN_ATTENTION: _takes_cudnn,
    SDPBackend.MATH: _takes_math,
}

_RUNS: Mapping[SDPBackend, Callable[[Attended], torch.Tensor]] = {
    SDPBackend.FLASH_ATTENTION: _flash,
    SDPBackend.EFFICIENT_ATTENTION: _efficient,
    SDPBackend.CUDNN_ATTENTION: _cudnn,
    SDPBackend.MATH: _math,
}
