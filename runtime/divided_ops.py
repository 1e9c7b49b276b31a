"""What single ops do to a division: in which dim their results are divided, if each rank runs them on its part alone.

An op is known to keep a division, or it does not: what is not written here does not. `tests/test_divided_ops.py` runs every
rule on parts and on the whole and compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..planner.sharding import Cut
from ..planner.tensor_groups import viewed

aten = torch.ops.aten

CutOf = Callable[[torch.Tensor], Cut | None]


class NotKept(Exception):
    """An op that cannot run on each part by itself; says why."""


def cut_after(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, cut_of: CutOf) -> Cut:
    """How the results of `func(*args, **kwargs)` are divided, where `cut_of` says how its operands are: one of them is.

    Raises `NotKept` where running it on parts does not give the parts of what it gives.
    """
    given = arguments(func, args, kwargs)
    operands = [each for each in tree_leaves(list(given.values())) if isinstance(each, torch.Tensor)]
    rule = _elementwise if torch.Tag.pointwise in func.tags or func.overloadpacket in _LIKE else _RULES.get(func.overloadpacket)
    if rule is None:
        raise NotKept("is not known to work on each part by itself")
    found: Cut = rule(given, operands, out, cut_of)
    if func._schema.is_mutable and any(cut_of(given[name]) != found for name in mutated(func)):
        raise NotKept("writes it into a tensor that is not divided so")
    for each in operands:
        if cut_of(each) is None and each.requires_grad:
            raise NotKept(f"joins it with a whole tensor {list(each.shape)}, whose gradient would be of a rank's part alone")
    return found


def arguments(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the op's schema."""
    named = {each.name: each.default_value for each in func._schema.arguments if each.has_default_value()}
    return named | dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | dict(kwargs)


def mutated(func: Any) -> list[str]:
    """The names of the arguments that an op writes to."""
    return [each.name for each in func._schema.arguments if each.alias_info is not None and each.alias_info.is_write]


# -- ops ----------------------------------------------------------------------------------------------------------------


def _elementwise(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    dims = _first(out).ndim
    found = {_aligned(cut, each, dims) for each in operands if (cut := cut_of(each)) is not None}
    if len(found) > 1:
        raise NotKept("joins tensors that are divided along different dims")
    cut = next(iter(found))
    for each in operands:
        place = cut.dim - (dims - each.ndim)
        if cut_of(each) is None and place >= 0 and each.shape[place] != 1:
            raise NotKept(f"joins it with a tensor {list(each.shape)} that is not divided")
        if cut_of(each) is not None and each.shape[place] != _first(out).shape[cut.dim]:
            raise NotKept("joins parts of different sizes")
    return cut


def _aligned(cut: Cut, value: torch.Tensor, dims: int) -> Cut:
    return Cut(cut.dim + dims - value.ndim, cut.split)


def _view(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    value = operands[0]
    found = viewed(_cut(value, cut_of), value.shape, out.shape)
    if found is None:
        raise NotKept(f"makes {list(out.shape)} of {list(value.shape)}, in which the parts are not along one dim")
    return found


def _permute(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    cut, dims = _cut(operands[0], cut_of), operands[0].ndim
    return Cut([dim % dims for dim in given["dims"]].index(cut.dim), cut.split)


def _transpose(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    cut, dims = _cut(operands[0], cut_of), operands[0].ndim
    one, other = given.get("dim0", 0) % dims, given.get("dim1", 1) % dims
    return Cut({one: other, other: one}.get(cut.dim, cut.dim), cut.split)


def _t(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    cut = _cut(operands[0], cut_of)
    return Cut(operands[0].ndim - 1 - cut.dim, cut.split)


def _unsqueeze(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    cut, dim = _cut(operands[0], cut_of), given["dim"] % out.ndim
    return Cut(cut.dim + (dim <= cut.dim), cut.split)


def _over_dims(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    """Sums, means, softmax, slices and the like: along other dims than the divided one, which may go."""
    value = operands[0]
    cut, dims = _cut(value, cut_of), _dims(given, value)
    if cut.dim in dims:
        raise NotKept("works along the divided dim")
    goes = _first(out).ndim < value.ndim
    return Cut(cut.dim - (sum(dim < cut.dim for dim in dims) if goes else 0), cut.split)


def _dims(given: Mapping[str, Any], value: torch.Tensor) -> set[int]:
    dims = given.get("dim")
    if dims is None or dims == []:
        return set(range(value.ndim))
    return {dim % value.ndim for dim in ([dims] if isinstance(dims, int) else dims)}


def _slice(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    value = operands[0]
    if out.shape == value.shape and given["step"] == 1:
        return _cut(value, cut_of)
    return _over_dims(given, operands, out, cut_of)


def _squeeze(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    value = operands[0]
    cut = _cut(value, cut_of)
    gone = [dim for dim in _dims(given, value) if value.shape[dim] == 1]
    return Cut(cut.dim - sum(dim < cut.dim for dim in gone), cut.split)


def _cat(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    some = [each for each in operands if each.shape != (0,)]  # torch.cat leaves these out
    found = {cut_of(each) for each in some}
    cut = next((each for each in found if each is not None), None)
    if cut is None or len(found) > 1:
        raise NotKept("joins it with tensors that are not divided so")
    if given["dim"] % out.ndim == cut.dim:
        raise NotKept("works along the divided dim")
    return cut


def _stack(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    found = {cut_of(each) for each in operands}
    cut = next(iter(found))
    if cut is None or len(found) > 1:
        raise NotKept("joins it with tensors that are not divided so")
    return Cut(cut.dim + (given["dim"] % out.ndim <= cut.dim), cut.split)


def _batched(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    """Products of as many matrices as there are heads, each of one head."""
    found = {cut_of(each) for each in operands if each.shape[0] != 1}
    cut = next(iter(found))
    if cut is None or len(found) > 1:
        raise NotKept("multiplies it with a tensor that is not divided so")
    if cut.dim != 0:
        raise NotKept("multiplies matrices that are themselves divided")
    return cut


def _attention(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    found = {cut_of(given[name]) for name in ("query", "key", "value")}
    if found != {Cut(1)}:
        raise NotKept("attends with queries, keys and values that are not all divided by heads")
    mask = given.get("attn_mask")
    if mask is not None and (
        cut_of(mask) not in (None, Cut(1)) or (cut_of(mask) is None and mask.ndim > 2 and mask.shape[-3] != 1)
    ):
        raise NotKept("attends with a mask of its own for each head")
    return Cut(1)


def _normalize(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    value = operands[0]
    cut = _cut(value, cut_of)
    if cut.dim >= value.ndim - len(given["normalized_shape"]):
        raise NotKept("works along the divided dim")
    return cut


def _as_complex(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    cut = _cut(operands[0], cut_of)
    if cut.dim >= out.ndim:
        raise NotKept("works along the divided dim")
    return cut


def _same(given: Mapping[str, Any], operands: Sequence[torch.Tensor], out: Any, cut_of: CutOf) -> Cut:
    return _cut(operands[0], cut_of)


def _cut(value: torch.Tensor, cut_of: CutOf) -> Cut:
    found = cut_of(value)
    if found is None:
        raise NotKept("goes by it for what it does with another tensor")
    return found


def _first(out: Any) -> torch.Tensor:
    return next(each for each in tree_leaves(out) if isinstance(each, torch.Tensor))


_LIKE = frozenset(
    {
        *(aten._to_copy, aten.detach, aten.alias, aten.lift_fresh, aten.copy_, aten.fill_, aten.zero_, aten.masked_fill_),
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.empty_like, aten.rand_like, aten.randn_like),
        *(aten.bernoulli, aten.bernoulli_, aten.native_dropout, aten.contiguous),
    }
)
"""Ops that work element by element, and are not tagged so."""

_RULES: dict[Any, Any] = (
    dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), _view)
    | dict.fromkeys((aten.bmm, aten.baddbmm), _batched)
    | dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _normalize)
    | dict.fromkeys((aten._scaled_dot_product_flash_attention_for_cpu,), _attention)
    | dict.fromkeys((aten._softmax, aten._log_softmax, aten._safe_softmax, aten.sum, aten.mean, aten.amax, aten.amin), _over_dims)
    | dict.fromkeys((aten.var, aten.std, aten.var_mean, aten.linalg_vector_norm, aten.cumsum, aten.logsumexp), _over_dims)
    | dict.fromkeys((aten.select, aten.split, aten.split_with_sizes, aten.unbind), _over_dims)
    | {aten.slice: _slice, aten.squeeze: _squeeze, aten.unsqueeze: _unsqueeze, aten.expand: _elementwise}
    | {aten.permute: _permute, aten.transpose: _transpose, aten.t: _t, aten.cat: _cat, aten.stack: _stack}
    | {aten.view_as_complex: _as_complex, aten.view_as_real: _same}
)
