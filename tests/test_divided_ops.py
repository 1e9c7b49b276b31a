"""The rules for single ops: run on each part, an op gives the parts of what it gives for the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from groundplan.planner.sharding import Cut
from groundplan.planner.tensor_groups import part_shape, viewed
from groundplan.runtime.divided_ops import _LIKE, _RULES, NotKept, cut_after

aten = torch.ops.aten
RANKS = 2


def part(value: torch.Tensor, cut: Cut | None, rank: int, ranks: int = RANKS) -> torch.Tensor:
    """One rank's part: of each of the pieces that lie one behind the other, its share."""
    if cut is None:
        return value
    pieces = value.unflatten(cut.dim, (cut.split, value.shape[cut.dim] // cut.split))
    found: torch.Tensor = pieces.chunk(ranks, cut.dim + 1)[rank].flatten(cut.dim, cut.dim + 1)
    return found


def one_part(operand: Of, rank: int) -> torch.Tensor:
    return part(operand.value, operand.cut, rank).clone()


# -- views --------------------------------------------------------------------------------------------------------------


def factored(number: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes of so many elements."""
    if number == 1:
        return st.sampled_from([(), (1,)])
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    return st.sampled_from(divisors).flatmap(
        lambda first: st.just((first,)) if first == number else factored(number // first).map(lambda rest: (first, *rest))
    )


@given(st.data())
def test_a_view_is_divided_where_it_says(data: st.DataObject) -> None:
    number = data.draw(st.sampled_from([16, 24, 48]))
    shape, new = data.draw(factored(number)), data.draw(factored(number))
    dims = [dim for dim, size in enumerate(shape) if size > 1 and size % RANKS == 0]
    if not dims:
        return
    dim = data.draw(st.sampled_from(dims))
    splits = [each for each in range(1, shape[dim]) if shape[dim] % (each * RANKS) == 0]
    cut = Cut(dim, data.draw(st.sampled_from(splits)))
    found = viewed(cut, shape, new)
    if found is None or new[found.dim] // found.split % RANKS:
        return  # the second is what a group's `largest` tells
    value = torch.arange(number).view(shape)
    for rank in range(RANKS):
        want = part(value.view(new), found, rank)
        assert torch.equal(part(value, cut, rank).reshape(part_shape(new, found, RANKS)), want)


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([2, 4, 6]), st.integers(1, 5))
def test_heads_are_found_when_the_last_dim_is_split_into_them_and_merged(batch: int, length: int, heads: int, size: int) -> None:
    whole, split = (batch, length, heads * size), (batch, length, heads, size)
    assert viewed(Cut(2), whole, split) == Cut(2)
    assert viewed(Cut(2), split, whole) == Cut(2)
    assert viewed(Cut(1), (batch, heads, length, size), (batch * heads, length, size)) == Cut(0, batch)


# -- ops ----------------------------------------------------------------------------------------------------------------


def op(func: Any, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return func, args, kwargs


class Of:
    """An operand: its shape, and how it is divided."""

    def __init__(self, *shape: int, cut: Cut | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.cut = cut
        self.value = torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape))).to(dtype)


HEADS = Of(3, 4, 5, 6, cut=Cut(1))
BATCHED = Of(12, 5, 6, cut=Cut(0, 3))
LAST = Of(3, 5, 8, cut=Cut(2))
WHOLE = Of(3, 5, 1)

KEPT = [
    op(aten.mul.Tensor, LAST, LAST),
    op(aten.mul.Tensor, LAST, WHOLE),
    op(aten.mul.Tensor, Of(8, cut=Cut(0)), LAST),
    op(aten.gelu.default, LAST),
    op(aten.where.self, Of(5, 1, dtype=torch.bool), LAST, LAST),
    op(aten.add.Tensor, HEADS, Of(3, 1, 5, 6)),
    op(aten._to_copy.default, LAST, dtype=torch.float64),
    op(aten.zeros_like.default, LAST),
    op(aten.transpose.int, HEADS, 1, 2),
    op(aten.transpose.int, HEADS, -2, -1),
    op(aten.permute.default, HEADS, [0, 2, 1, 3]),
    op(aten.permute.default, HEADS, [-1, 1, 0, 2]),
    op(aten.t.default, Of(4, 6, cut=Cut(1))),
    op(aten.unsqueeze.default, HEADS, 0),
    op(aten.unsqueeze.default, HEADS, -1),
    op(aten.squeeze.dim, Of(1, 4, 6, cut=Cut(1)), 0),
    op(aten.squeeze.dims, Of(1, 4, 1, cut=Cut(1)), [0, 2]),
    op(aten.select.int, HEADS, 0, 1),
    op(aten.select.int, HEADS, 2, -1),
    op(aten.slice.Tensor, HEADS, 3, 0, 3),
    op(aten.slice.Tensor, HEADS, 1, 0, 2**63 - 1),
    op(aten.split.Tensor, HEADS, 3, 3),
    op(aten.unbind.int, HEADS, 2),
    op(aten.cat.default, [HEADS, HEADS], 3),
    op(aten.cat.default, [Of(0), HEADS], -2),
    op(aten.stack.default, [HEADS, HEADS], 1),
    op(aten.stack.default, [HEADS, HEADS], -1),
    op(aten.bmm.default, BATCHED, Of(12, 6, 2, cut=Cut(0, 3))),
    op(aten.baddbmm.default, Of(1, 5, 5), BATCHED, Of(12, 6, 5, cut=Cut(0, 3))),
    op(aten._softmax.default, HEADS, -1, False),
    op(aten._safe_softmax.default, HEADS, 3),
    op(aten._log_softmax.default, HEADS, 2, False),
    op(aten.sum.dim_IntList, HEADS, [0, 3]),
    op(aten.mean.dim, HEADS, [-1], True),
    op(aten.amax.default, HEADS, [0]),
    op(aten.var.correction, HEADS, [3], correction=1, keepdim=True),
    op(aten.linalg_vector_norm.default, HEADS, 2, [-1], True),
    op(aten.cumsum.default, HEADS, 2),
    op(aten.native_layer_norm.default, HEADS, [5, 6], None, None, 1e-5),
    op(aten._scaled_dot_product_flash_attention_for_cpu.default, HEADS, HEADS, HEADS),
    op(aten._scaled_dot_product_flash_attention_for_cpu.default, HEADS, HEADS, HEADS, attn_mask=Of(3, 1, 5, 5)),
    op(aten._scaled_dot_product_flash_attention_for_cpu.default, Of(3, 4, 5, 6, cut=Cut(1)), *[Of(3, 2, 5, 6, cut=Cut(1))] * 2),
    op(aten.view_as_complex.default, Of(3, 4, 5, 2, cut=Cut(1))),
    op(aten.view_as_real.default, Of(3, 4, 5, cut=Cut(1), dtype=torch.complex64)),
]

REFUSED = [
    op(aten.mul.Tensor, LAST, Of(3, 5, 8)),
    op(aten.mul.Tensor, LAST, Of(8)),
    op(aten.add.Tensor, HEADS, Of(3, 4, 5, 6, cut=Cut(2))),
    op(aten.add.Tensor, LAST, Of(3, 5, 8, cut=Cut(2, 2))),
    op(aten.slice.Tensor, HEADS, 1, 0, 2),
    op(aten.select.int, HEADS, 1, 0),
    op(aten.split.Tensor, LAST, 4, -1),
    op(aten.unbind.int, HEADS, 1),
    op(aten.cat.default, [HEADS, HEADS], 1),
    op(aten.cat.default, [HEADS, Of(3, 4, 5, 6)], 3),
    op(aten.stack.default, [HEADS, Of(3, 4, 5, 6)], 0),
    op(aten.bmm.default, BATCHED, Of(12, 6, 2)),
    op(aten.bmm.default, Of(12, 5, 6, cut=Cut(2)), Of(12, 6, 2, cut=Cut(1))),
    op(aten._softmax.default, LAST, -1, False),
    op(aten._safe_softmax.default, LAST, 2),
    op(aten.sum.default, LAST),
    op(aten.sum.dim_IntList, LAST, [0, -1]),
    op(aten.cumsum.default, LAST, 2),
    op(aten.linalg_vector_norm.default, LAST),
    op(aten.native_layer_norm.default, LAST, [8], None, None, 1e-5),
    op(aten.view_as_complex.default, Of(3, 4, 2, cut=Cut(2))),
    op(aten.copy_.default, Of(3, 5, 8), LAST),
    op(aten.copy_.default, LAST, Of(3, 5, 8)),
    op(aten.flip.default, LAST, [2]),
    op(aten.roll.default, LAST, [1], [2]),
    op(aten.mm.default, Of(4, 8, cut=Cut(1)), Of(8, 4)),
    op(aten._scaled_dot_product_flash_attention_for_cpu.default, HEADS, Of(3, 4, 5, 6), Of(3, 4, 5, 6)),
    op(aten._scaled_dot_product_flash_attention_for_cpu.default, HEADS, HEADS, HEADS, attn_mask=Of(3, 4, 5, 5)),
]


def told(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> str:
    return f"{call[0].__name__}{[each.cut for each in tree_leaves(call[1:]) if isinstance(each, Of)]}"


def run(call: tuple[Any, tuple[Any, ...], dict[str, Any]], given: Callable[[Of], torch.Tensor]) -> tuple[Any, Any, Any]:
    func, args, kwargs = call

    def each(value: Any) -> Any:
        return [each(one) for one in value] if isinstance(value, list) else given(value) if isinstance(value, Of) else value

    made, named = [each(value) for value in args], {name: each(value) for name, value in kwargs.items()}
    return func(*made, **named), made, named


def cut_of(call: tuple[Any, tuple[Any, ...], dict[str, Any]]) -> tuple[Any, Cut]:
    """What the op gives for the whole, and how its rule says that this is divided."""
    known: list[tuple[torch.Tensor, Cut | None]] = []

    def whole(operand: Of) -> torch.Tensor:
        known.append((operand.value.clone(), operand.cut))
        return known[-1][0]

    out, args, kwargs = run(call, whole)
    return out, cut_after(call[0], args, kwargs, out, lambda value: next(cut for each, cut in known if each is value))


@pytest.mark.parametrize("call", KEPT, ids=told)
def test_parts_give_parts(call: Any) -> None:
    out, cut = cut_of(call)
    wholes = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
    for rank in range(RANKS):
        parts, *_ = run(call, partial(one_part, rank=rank))
        for one, other in zip(wholes, tree_leaves(parts), strict=True):
            torch.testing.assert_close(other, part(one, cut, rank))


@pytest.mark.parametrize("call", REFUSED, ids=told)
def test_what_goes_across_parts_is_refused(call: Any) -> None:
    with pytest.raises(NotKept):
        cut_of(call)


def test_a_whole_tensor_that_is_trained_is_refused() -> None:
    value, scale = torch.randn(3, 8), torch.ones(1, requires_grad=True)
    for whole, wrong in ((scale, True), (scale.detach(), False)):
        out = aten.mul.Tensor(value, whole)
        if wrong:
            with pytest.raises(NotKept, match="gradient"):
                cut_after(aten.mul.Tensor, (value, whole), {}, out, lambda each: Cut(1) if each is value else None)
        else:
            assert cut_after(aten.mul.Tensor, (value, whole), {}, out, lambda each: Cut(1) if each is value else None) == Cut(1)


def test_every_rule_is_tried() -> None:
    tried = {call[0].overloadpacket for call in KEPT}
    views = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}  # above
    alike = {aten.softmax: aten._softmax, aten.amin: aten.amax, aten.std: aten.var, aten.var_mean: aten.var}
    alike |= {aten.logsumexp: aten.sum, aten.split_with_sizes: aten.split, aten._fused_rms_norm: aten.native_layer_norm}
    assert {each for each in _RULES if alike.get(each, each) not in tried | views | {aten.expand}} == set()
    assert tried & _LIKE
