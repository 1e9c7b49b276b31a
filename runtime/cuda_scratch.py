"""The table of corrections, CUDA's part: what kernels take there and give back while they run, which no dispatch mode sees.

Each entry gives the bytes of one call, with its source, by its arguments and its result. What an entry does not know is in
`planner/cuda_left_out.py`. `tests/test_cuda_kernels.py` holds the entries against sizes said in torch's sources and, where there
is a GPU, against `torch.cuda.memory_stats`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from .scratch import TABLE as CPU_TABLE
from .scratch import Entry

aten = torch.ops.aten

_ROWS_PER_THREAD = 10
"""aten/src/ATen/native/cuda/EmbeddingBackwardKernel.cu `NROWS_PER_THREAD`."""

_UNSORTED = 3072
"""Indices that an embedding's backward does not sort: aten/src/ATen/native/cuda/Embedding.cu `embedding_dense_backward_cuda`."""

_CHUNK = 65_536
"""aten/src/ATen/native/cuda/MultiTensorApply.cuh `kChunkSize`."""


def cuda_scratch_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """The bytes that one call takes on CUDA beside its results, for as long as it runs."""
    entry = TABLE.get(func)
    return 0 if entry is None else entry(args, out)


def _rounded(size: int, step: int) -> int:
    return -(-size // step) * step


def _flash_attention_backward(args: Any, out: Any) -> int:
    """The queries' gradient in float32, a number for each row, and every head's gradients where heads share keys and values.

    aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp `mha_bwd`: `dq_accum`, `softmax_d`, `dk_expanded`,
    `dv_expanded`; cuda/attention_backward.cu `_flash_attention_backward`: the output and its gradient are made contiguous.
    """
    gradient, query, key, result = args[0], args[1], args[2], args[4]
    batch, heads, length, size = query.shape
    rows, columns = _rounded(length, 128), _rounded(size, 32) if size <= 192 else 256
    found: int = 4 * batch * heads * rows * (columns + 1)
    if key.shape[1] != heads:
        found += 2 * batch * heads * key.shape[2] * size * query.dtype.itemsize
    return found + sum(_bytes(each) for each in (gradient, result) if not each.transpose(1, 2).is_contiguous())


def _efficient_attention_backward(args: Any, out: Any) -> int:
    """The sum of gradient times output of each row, and where the kernel does not take it itself, the products.

    cuda/attention_backward.cu `_efficient_attention_backward`: `delta`, `kKernelComputesDelta` (of halves only).
    """
    query, result = args[1], args[5]
    sums: int = 4 * math.prod(query.shape[:3])
    return sums if query.dtype.itemsize == 2 else sums + 4 * int(result.numel())


def _embedding_backward(args: Any, out: Any) -> int:
    """Sorted indices, and sums of ten rows each in float32: as many as there can be.

    aten/src/ATen/native/cuda/Embedding.cu `embedding_dense_backward_cuda`: `sorted_indices`, `orig_indices`; then
    EmbeddingBackwardKernel.cu `embedding_backward_cuda_kernel`: `segment_offsets`, `partials_per_segment`,
    `partials_per_segment_offset`, `partial_segment_offset`, `grad_weight_per_segment`. The sort is over by then.
    """
    gradient, indices, words = args[:3]
    copies = sum(_bytes(each) for each in (gradient, indices) if not each.is_contiguous())
    count, width = int(indices.numel()), int(gradient.shape[-1])
    if count <= _UNSORTED and not args[4]:
        return copies
    segments = min(count, int(words))
    partial = count // _ROWS_PER_THREAD + segments
    numbers = 3 * count + 2 * segments + partial
    return copies + numbers * int(indices.dtype.itemsize) + partial * width * max(4, int(gradient.dtype.itemsize))


def _foreach_norm(args: Any, out: Any) -> int:
    """A number for every chunk of the largest tensor, for each tensor.

    aten/src/ATen/native/cuda/ForeachReduceOp.cu `foreach_tensor_norm_cuda`: `output_per_tensor`.
    """
    largest = max((each.numel() for each in args[0]), default=0)
    return 4 * len(args[0]) * -(-largest // _CHUNK)


def _bytes(tensor: torch.Tensor) -> int:
    return int(math.prod(tensor.shape)) * int(tensor.dtype.itemsize)


_SHARED = (
    aten.mm.default,  # cuda/Blas.cpp `prepare_matrix_for_cublas`
    aten.roll.default,  # TensorTransformations.h `roll_common`
    aten.cumsum.default,  # ReduceOps.cpp `impl_func_cum_ops`
    aten.embedding.default,  # Embedding.cpp `embedding_symint`
    aten._safe_softmax.default,  # SoftMax.cpp `_safe_softmax`
    aten.native_layer_norm.default,  # cuda/layer_norm_kernel.cu `layer_norm_cuda`: `expect_contiguous`
)
"""Ops whose entry of the CPU's table is one of CUDA as well: functions of both, or the same copies."""

TABLE: Mapping[Any, Entry] = {
    **{op: CPU_TABLE[op] for op in _SHARED},
    aten.addmm.default: CPU_TABLE[aten.mm.default],
    aten._scaled_dot_product_flash_attention_backward.default: _flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward.default: _efficient_attention_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten._foreach_norm.Scalar: _foreach_norm,
}
