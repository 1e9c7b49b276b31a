"""What kind of call an ATen operator is: decided once per operator from its schema and tags, never from a list of models."""

from __future__ import annotations

from enum import Enum, auto
from functools import cache
from typing import Any

import torch

aten = torch.ops.aten


class Kind(Enum):
    """How the tape treats an operator."""

    EMPTY = auto()  # creates a storage without values
    FILL = auto()  # overwrites its first argument in place, reading no tensor: no kernel need run to know the result
    COPY = auto()  # `copy_`: overwrites its first argument with its second
    LIFT = auto()  # brings a tensor from outside into the trace
    VIEW = auto()  # another geometry over the same storage: changes no value
    METADATA = auto()  # changes the geometry or the storage of its first argument in place (`unsqueeze_`, `set_`)
    GEOMETRY = auto()  # answers with numbers that depend on no value (`is_same_size`)
    VALUE = auto()  # answers with numbers instead of tensors (`.item()`, `torch.equal`): needs real values
    GENERAL = auto()  # everything else: run the meta kernel for the geometry, write the call down


_EMPTY = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}

#: in-place operators whose result depends on scalars and the random stream only
FILLS = {
    aten.zero_.default,
    aten.fill_.Scalar,
    aten.uniform_.default,
    aten.normal_.default,
    aten.exponential_.default,
    aten.cauchy_.default,
    aten.log_normal_.default,
    aten.geometric_.default,
    aten.bernoulli_.float,
    aten.random_.default,
    aten.random_.to,
    getattr(aten.random_, "from"),
}

_OVERWRITES = {aten.copy_.default, aten.fill_.Tensor, aten.bernoulli_.Tensor} | FILLS
_GEOMETRY = {
    "aten::is_same_size",
    "aten::_has_compatible_shallow_copy_type",
    "aten::_has_same_storage_numel",
    "aten::size",
    "aten::stride",
    "aten::storage_offset",
    "aten::numel",
    "aten::dim",
    "aten::is_contiguous",
    "aten::is_complex",
    "aten::is_floating_point",
    "aten::is_signed",
    "aten::result_type",
    "aten::can_cast",
}
_LIFT = {aten.lift_fresh.default, aten.lift.default}


@cache
def kind_of(func: Any) -> Kind:
    """The kind of the operator `func` (an `OpOverload`)."""
    if func in FILLS:
        return Kind.FILL
    if func in _EMPTY:
        return Kind.EMPTY
    if func in _LIFT:
        return Kind.LIFT
    if func is aten.copy_.default:
        return Kind.COPY
    if torch.Tag.inplace_view in func.tags:
        return Kind.METADATA
    if _answers_with_numbers(func):
        return Kind.GEOMETRY if func._schema.name in _GEOMETRY else Kind.VALUE
    if not mutated_arguments(func) and any(r.alias_info is not None for r in func._schema.returns):
        return Kind.VIEW
    return Kind.GENERAL


def _answers_with_numbers(func: Any) -> bool:
    """Whether it returns no tensor and changes none: a number, or nothing but the error that it may raise."""
    return not mutated_arguments(func) and not any("Tensor" in str(r.type) for r in func._schema.returns)


# What these operators change although their schemas do not say so.
_RUNNING = ("running_mean", "running_var")
_HIDDEN_WRITES = {
    "aten::native_batch_norm": _RUNNING,
    "aten::cudnn_batch_norm": _RUNNING,
    "aten::miopen_batch_norm": _RUNNING,
    "aten::batch_norm_update_stats": _RUNNING,
}

# Where collectives in place put what they receive.
_RECEIVED = ("tensors", "output", "outputs", "output_tensor", "output_tensors", "output_lists")

_CHECKING = {
    *("index", "index_put", "index_put_", "_unsafe_index", "index_select", "index_add_", "index_copy_", "index_fill_"),
    *("gather", "take", "embedding", "scatter", "scatter_", "scatter_add_"),
    *("multinomial", "poisson", "bernoulli", "bernoulli_", "binomial"),
    *("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_channel"),
}


@cache
def checks_values(func: Any) -> bool:
    """Whether the operator may refuse its operands because of their values, which a meta kernel does not see."""
    return func._schema.name.removeprefix("aten::") in _CHECKING


@cache
def quantizes(func: Any) -> bool:
    """Whether the result is quantized, which torch's meta kernels do not always tell."""
    name: str = func._schema.name.removeprefix("aten::")
    return name.startswith(("quantize_per", "_make_per", "_empty_affine", "_empty_per_channel_affine"))


@cache
def is_random(func: Any) -> bool:
    """Whether the operator may draw from a random stream."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


@cache
def mutated_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of every argument that the operator writes."""
    arguments = enumerate(func._schema.arguments)
    name: str = func._schema.name
    hidden = _RECEIVED if name.startswith("c10d::") and name.endswith("_") else _HIDDEN_WRITES.get(name, ())
    return tuple((i, a.name) for i, a in arguments if (a.alias_info is not None and a.alias_info.is_write) or a.name in hidden)


@cache
def overwrites(func: Any) -> bool:
    """Whether the written arguments' previous values are ignored: fills, copies, `out=` variants, and what is received."""
    if func._schema.name.startswith("c10d::"):
        return any(name.startswith("output") for _, name in mutated_arguments(func))
    return func in _OVERWRITES or any(argument.is_out for argument in func._schema.arguments)


@cache
def reads_geometry_only(func: Any) -> bool:
    """`zeros_like(t)`, `t.new_full(...)`: a tensor argument that is asked for its shape, never for its values."""
    name: str = func._schema.name.removeprefix("aten::")
    return name.endswith("_like") or name.startswith("new_")
