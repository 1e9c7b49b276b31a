"""Counted draws: leaving out a fill moves the generator exactly as the fill does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundplan.tracer.draws import skip, words

aten = torch.ops.aten
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    func=st.sampled_from([aten.uniform_.default, aten.normal_.default]),
    dtype=st.sampled_from(FLOATS),
    numel=st.integers(0, 300) | st.sampled_from([65_535, 65_536, 65_537, 200_000]),
    before=st.integers(0, 40),
    step=st.sampled_from([1, 1, 2]),
)
def test_skipping_is_drawing(func: Any, dtype: torch.dtype, numel: int, before: int, step: int) -> None:
    target = torch.empty(numel * step, dtype=dtype)[::step]
    count = words(func, dtype, numel, target.is_contiguous())
    if count is None:
        return
    drawn, skipped = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    for generator in (drawn, skipped):
        torch.empty(before % 15).normal_(generator=generator)  # may leave a cached sample
        torch.empty(before).uniform_(generator=generator)
    func(target, generator=drawn)
    skip(count, skipped)
    assert torch.equal(drawn.get_state(), skipped.get_state())


def test_the_common_fills_can_be_counted() -> None:
    for dtype in FLOATS:
        assert words(aten.uniform_.default, dtype, 112, True) is not None
        assert words(aten.normal_.default, dtype, 112, True) is not None


@pytest.mark.parametrize("func", [aten.exponential_.default, aten.random_.default])
def test_what_is_not_known_for_sure_is_not_counted(func: Any) -> None:
    assert words(func, torch.float32, 100, True) is None
    assert words(aten.normal_.default, torch.float32, 100, False) is None
    assert words(aten.uniform_.default, torch.complex64, 100, True) is None
