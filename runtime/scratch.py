"""The table of corrections: what torch's CPU kernels take beside their results, which no dispatch mode sees.

Each entry gives the bytes of one call, with its source; `tests/test_fake_step.py` holds it against `torch.profiler`. Measured
with torch 2.13. Entries are for the CPU alone: where a plan's device is CUDA, none is added. oneDNN's kernels are not in the
table, as what they take depends on the machine's instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

Entry = Callable[[Any, Any], int]
"""The bytes that a call takes while it runs, by its arguments and its result."""


def scratch_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """The bytes that one call takes beside its results, for as long as it runs."""
    entry = TABLE.get(func)
    return _numbers(func, args) + (entry(args, out) if entry is not None else 0)


# -- numbers ------------------------------------------------------------------------------------------------------------


def kept_number(func: Any, args: tuple[Any, ...]) -> int:
    """The bytes that autograd keeps of a number: `x * 2.0` makes a tensor of it, which the derivative needs again.

    tools/autograd/derivatives.yaml: `mul.Tensor` and `div.Tensor` save `other`. A saved number calls no pack hook.
    """
    if func not in _KEEPING or not torch.is_grad_enabled() or not isinstance(args[0], torch.Tensor):
        return 0
    return _number_bytes(args[1]) if args[0].requires_grad else 0


_KEEPING = {aten.mul.Tensor, aten.div.Tensor}

_SCALAR = ("add", "sub", "rsub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge", "add_", "sub_", "mul_", "div_")


def _numbers(func: Any, args: tuple[Any, ...]) -> int:
    """A number that takes a tensor's place: the tensor made of it, and another where it is converted to the common dtype.

    aten/src/ATen/ScalarOps.h `wrapped_scalar_tensor`, aten/src/ATen/TensorIterator.cpp `compute_types`. Kept or not, it is there
    while the kernel runs.
    """
    largest = 0
    for position in _places_of_numbers(func):
        if position < len(args) and (nbytes := _number_bytes(args[position])):
            other = next((each for each in tree_leaves(args) if isinstance(each, torch.Tensor)), None)
            largest = max(largest, nbytes + _converted(args[position], other))
    return largest


@cache
def _places_of_numbers(func: Any) -> tuple[int, ...]:
    """The positions of arguments that a number is made into a tensor for."""
    arguments, name = func._schema.arguments, func.overloadpacket.__name__
    found = [index for index, each in enumerate(arguments) if str(each.type) in ("Tensor", "Optional[Tensor]")]
    if func._overloadname in ("Scalar", "ScalarList") and name.removeprefix("_foreach_") in _SCALAR:
        found.append(1)
    return tuple(found)


def _number_bytes(value: Any) -> int:
    if isinstance(value, list):  # one of `_foreach_div_`'s at a time
        return max(map(_number_bytes, value), default=0)
    if isinstance(value, bool):
        return 1
    return 8 if isinstance(value, int | float) else 16 if isinstance(value, complex) else 0


def _converted(number: Any, other: torch.Tensor | None) -> int:
    if other is None:
        return 0
    number = number[0] if isinstance(number, list) else number
    dtype = torch.result_type(other, number)
    own = torch.float64 if isinstance(number, float) else torch.bool if isinstance(number, bool) else torch.int64
    return 0 if dtype == own else dtype.itemsize


# -- results ------------------------------------------------------------------------------------------------------------


def corrected(func: Any, args: tuple[Any, ...], out: Any, on_cpu: bool) -> Any:
    """The result of a fake op as the real one has it, where the two differ."""
    if func in _NORMS and out[0].dtype in _HALVES:
        return _statistics(args[_NORMS[func]], out, on_cpu)
    if func is aten.native_group_norm_backward.default and out[0] is not None:
        return out[0].to(args[1].dtype), *out[1:]  # the fake one has the dtype that it is computed in
    if func is aten.native_layer_norm_backward.default and out[0] is not None:
        return out[0].contiguous(), *out[1:]  # layer_norm.cpp `layer_norm_backward_cpu`; the fake one has its argument's strides
    return out


def _statistics(weight: torch.Tensor | None, out: Any, on_cpu: bool) -> Any:
    """A norm's mean and deviation, which fake norms keep in the input's dtype.

    Real ones are in float32 where the weights are, or on CUDA: aten/src/ATen/native/layer_norm.cpp `layer_norm_cpu`,
    group_norm.cpp `native_group_norm`, Normalization.cpp `batch_norm_cpu`, cuda/layer_norm_kernel.cu `layer_norm_cuda`.
    """
    if on_cpu and (weight is None or weight.dtype == out[0].dtype):
        return out
    return out[0], *(each.to(torch.float32) for each in out[1:])


_HALVES = (torch.bfloat16, torch.float16)

_NORMS = {aten.native_layer_norm.default: 2, aten.native_group_norm.default: 1, aten.native_batch_norm.default: 1}
"""The norms, with the position of their weight."""


# -- kernels ------------------------------------------------------------------------------------------------------------


def _mean(args: Any, out: Any) -> int:
    """A sum, divided in place by a number; halves are summed as float32: aten/src/ATen/native/ReduceOps.cpp `mean_out`."""
    if out.dtype in _HALVES:
        return 4 * int(args[0].numel() + out.numel())
    return 8 + int(out.dtype.itemsize)


_BLOCK, _BYTE_BLOCK = 60, 120


def _transposed_copy(source: torch.Tensor, target: torch.Tensor) -> int:
    """A block that a matrix is transposed by: aten/src/ATen/native/Copy.cpp `copy_same_type_transpose_`."""
    same = source.dtype == target.dtype and source.shape == target.shape and source.dim() == 2
    if not same or source.numel() < _BLOCK**2 or source.stride() != (1, source.shape[0]) or not target.is_contiguous():
        return 0
    side = _BYTE_BLOCK if source.dtype.itemsize == 1 else _BLOCK
    return side * side * source.dtype.itemsize


def _addmm(args: Any, out: Any) -> int:
    """The summand is copied into the result first: LinearAlgebra.cpp `addmm_impl_cpu_`."""
    return max(_gemm(args, out), _transposed_copy(args[0], out))


def _gemm(args: Any, out: Any) -> int:
    """Copies of operands that are laid out neither by rows nor by columns: LinearAlgebra.cpp `addmm_impl_cpu_`."""
    return sum(_bytes(each) for each in args[-2:] if not _is_gemm_layout(each))


def _is_gemm_layout(matrix: torch.Tensor) -> bool:
    (rows, columns), (down, right) = matrix.shape[-2:], matrix.stride()[-2:]
    return (down == 1 and right >= max(1, rows)) or (right == 1 and down >= max(1, columns))


def _made_contiguous(*positions: int) -> Entry:
    """Copies of arguments that are not contiguous, which the kernel wants."""
    return lambda args, out: sum(_bytes(args[each]) for each in positions if not args[each].is_contiguous())


def _common_dtype(args: Any, out: Any) -> int:
    """Copies of operands that have another dtype than the common one: aten/src/ATen/TensorIterator.cpp `compute_types`."""
    operands = [each for each in args[:2] if isinstance(each, torch.Tensor)]
    common = torch.result_type(*operands) if len(operands) == 2 else out.dtype
    converted = [each for each in (*operands, out) if each.dtype != common]
    return sum(each.numel() * int(common.itemsize) for each in converted)


def _roll(args: Any, out: Any) -> int:
    """One dimension after the other: aten/src/ATen/native/TensorTransformations.cpp `roll_common`."""
    return _bytes(out) if len(args[1]) > 1 else 0


def _batch_norm(args: Any, out: Any) -> int:
    """A factor and a summand per channel: aten/src/ATen/native/cpu/batch_norm_kernel.cpp `batch_norm_cpu_kernel_impl`."""
    return 2 * int(args[0].shape[1]) * _accumulated(args[0])


def _cumsum(args: Any, out: Any) -> int:
    """The input in the result's dtype: ReduceOps.cpp `cumsum`."""
    return _bytes(out) if args[0].dtype != out.dtype else 0


def _safe_softmax(args: Any, out: Any) -> int:
    """The mask of -inf, its rows' conjunction, and a zero: aten/src/ATen/native/SoftMax.cpp `_safe_softmax`."""
    return int(out.numel() + out.numel() // max(1, out.shape[args[1]]) + out.dtype.itemsize)


def _layer_norm_backward(args: Any, out: Any) -> int:
    """Partial sums of the weights' gradients for each thread: native/cpu/layer_norm_kernel.cpp `LayerNormBackwardKernelImpl`."""
    width = int(math.prod(args[2]))
    return 2 * torch.get_num_threads() * width * int(args[1].dtype.itemsize) + _made_contiguous(0, 1)(args, out)


def _flash_attention(args: Any, out: Any) -> int:
    """Each thread's blocks of scores: aten/src/ATen/native/cpu/FlashAttentionKernel.cpp `cpu_flash_attention`."""
    rows, columns = _flash_block(args[0], args[1])
    reduced = rows * columns * 2 if args[0].dtype in _HALVES else 0
    size = rows * columns + 2 * rows + rows * int(args[2].shape[-1])
    return torch.get_num_threads() * (size * _accumulated(args[0]) + reduced)


def _flash_attention_backward(args: Any, out: Any) -> int:
    """Each thread's blocks of scores and their gradients, and the output's gradient where it is laid out otherwise.

    FlashAttentionKernel.cpp `cpu_flash_attention_backward`.
    """
    rows, columns = _flash_block(args[1], args[2])
    reduced = 2 * rows * columns * 2 if args[1].dtype in _HALVES else 0
    copied = 0 if args[0].transpose(1, 2).is_contiguous() else _bytes(args[0])
    return torch.get_num_threads() * ((2 * rows * columns + rows) * _accumulated(args[1]) + reduced) + copied


def _whole_attention(args: Any, out: Any) -> int:
    """Queries, keys and values as they are projected and transposed, and whole scores, twice where there is a mask.

    aten/src/ATen/native/transformers/attention.cpp `native_multi_head_attention_cpu`, which layers of torch.nn take in inference.
    """
    states, weights = _bytes(args[0]), 0 if out[1] is None else _bytes(out[1])
    scores = args[0].shape[0] * args[4] * args[0].shape[1] ** 2 * int(args[0].dtype.itemsize)
    needed = max(6 * states, 3 * states + scores * (2 if len(args) > 9 and args[9] is not None else 1))
    if weights:
        needed = max(needed, 5 * states + scores, 4 * states + scores + weights)
    return int(needed - states - weights)


def _flash_block(query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    length = query.shape[2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[2])


# -- convolutions without oneDNN ----------------------------------------------------------------------------------------


def _convolution(args: Any, out: Any) -> int:
    """The columns that a convolution multiplies, and copies of operands that are laid out otherwise.

    aten/src/ATen/native/ConvolutionMM2d.cpp `slow_conv2d_forward_out_cpu`; with groups, Convolution.cpp
    `_convolution_nogroup_backend` takes one after the other and joins the results.
    """
    columns = _columns(args, args[0], args[1], out, 3)
    return columns if args[8] == 1 else max(columns, _bytes(out))


def _convolution_backward(args: Any, out: Any) -> int:
    """The same, with the gradient of the output: `slow_conv2d_backward_out_cpu`."""
    gradient, value, weight, groups = args[0], args[1], args[2], args[9]
    columns = _columns(args, value, weight, gradient, 4)
    layout = _layout(value) if groups == 1 else torch.contiguous_format
    columns += 0 if gradient.is_contiguous(memory_format=layout) else _bytes(gradient)
    if groups == 1:
        return columns
    columns += _bytes(gradient) // groups if gradient.shape[0] > 1 else 0
    return max(columns, sum(_bytes(each) for each in out if each is not None))


def _columns(args: Any, value: torch.Tensor, weight: torch.Tensor, result: torch.Tensor, first: int) -> int:
    """The columns of one group, with copies of its operands; `first` is the position of the strides."""
    strides, padding, transposed, groups = args[first], args[first + 1], args[first + 3], args[first + 5]
    if torch.backends.mkldnn.enabled or transposed or value.dim() > 4:
        return 0
    layout = _layout(value)
    copied = 0 if value.is_contiguous(memory_format=layout) else _bytes(value)
    if groups > 1:
        copied += _bytes(value) // groups if value.shape[0] > 1 else 0
    elif layout is torch.channels_last and not weight.is_contiguous(memory_format=layout):
        copied += _bytes(weight)
    if all(each == 1 for each in (*weight.shape[2:], *strides)) and not any(padding):
        return copied
    return copied + value.shape[0] * math.prod(weight.shape[1:]) * math.prod(result.shape[2:]) * value.dtype.itemsize


def _layout(value: torch.Tensor) -> torch.memory_format:
    channels_last = value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last and not value.is_contiguous() else torch.contiguous_format


# -- sizes --------------------------------------------------------------------------------------------------------------


def _accumulated(tensor: torch.Tensor) -> int:
    """The bytes of the type that sums are taken in."""
    return max(4, int(tensor.dtype.itemsize))


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


TABLE: Mapping[Any, Entry] = {
    aten.add.Tensor: _common_dtype,
    aten.sub.Tensor: _common_dtype,
    aten.mul.Tensor: _common_dtype,
    aten.div.Tensor: _common_dtype,
    aten.add_.Tensor: _common_dtype,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.roll.default: _roll,
    aten.native_batch_norm.default: _batch_norm,
    aten.native_layer_norm.default: _made_contiguous(0),
    aten.mean.dim: _mean,
    aten.mean.default: _mean,
    aten.mm.default: _gemm,
    aten.addmm.default: _addmm,
    aten.clone.default: lambda args, out: _transposed_copy(args[0], out),
    aten.copy_.default: lambda args, out: _transposed_copy(args[1], args[0]),
    aten.cumsum.default: _cumsum,
    aten.embedding.default: _made_contiguous(1),
    aten.embedding_dense_backward.default: _made_contiguous(0),
    aten._native_multi_head_attention.default: _whole_attention,
    aten._safe_softmax.default: _safe_softmax,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_attention_backward,
}
