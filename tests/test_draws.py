"""Places in the random stream: arithmetic moves a generator exactly as the calls do that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundplan.tracer.draws import check_draws, draw_of_call
from groundplan.tracer.places import Place, skip

aten = torch.ops.aten
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
NUMBERS = [*FLOATS, torch.int64, torch.int32, torch.uint8]
CALLS: dict[Any, tuple[list[torch.dtype], tuple[Any, ...]]] = {
    aten.uniform_.default: (FLOATS, (-1.0, 3.0)),
    aten.normal_.default: (FLOATS, (0.5, 2.0)),
    aten.log_normal_.default: (FLOATS, ()),
    aten.cauchy_.default: (FLOATS, ()),
    aten.exponential_.default: (FLOATS, ()),
    aten.geometric_.default: (NUMBERS, (0.2,)),
    aten.bernoulli_.float: (NUMBERS, (0.4,)),
    aten.random_.default: (NUMBERS, ()),
    aten.random_.to: (NUMBERS, (100,)),
    getattr(aten.random_, "from"): ([torch.int64, torch.float64], (-5, 2**33)),
}
SIZES = st.integers(0, 300) | st.sampled_from([65_535, 65_536, 65_537, 200_000])


@st.composite
def calls(draw: Any) -> tuple[Any, torch.dtype, int, int]:
    func = draw(st.sampled_from(list(CALLS)))
    return func, draw(st.sampled_from(CALLS[func][0])), draw(SIZES), draw(st.sampled_from([1, 1, 2]))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(program=st.lists(calls(), min_size=1, max_size=6), before=st.integers(0, 1300), kept=st.booleans())
def test_a_place_moves_as_the_generator_does(program: list[Any], before: int, kept: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    if kept:
        torch.empty(3).normal_(generator=generator)  # leaves the second number of a pair
    torch.empty(before).uniform_(generator=generator)
    place = Place.at(generator.get_state())
    for func, dtype, numel, step in program:
        target, args = torch.empty(numel * step, dtype=dtype)[::step], CALLS[func][1]
        draw = draw_of_call(func, (None, *args), dtype, numel, target.is_contiguous())
        func(target, *args, generator=generator)
        assert draw is not None, (func, dtype, numel)
        place = place.after(draw)
    assert torch.equal(place.state(), generator.get_state())


@pytest.mark.parametrize("words", [1, 623, 624, 625, 100_000, 700_000, 8_000_003])
def test_any_place_can_be_gone_to(words: int) -> None:
    generator = torch.Generator().manual_seed(9)
    place = Place.at(generator.get_state())
    skip(words, generator)
    assert torch.equal(place.moved(words).state(), generator.get_state())
    again = place.moved(words)  # the second time a jump's polynomial is known
    assert torch.equal(again.moved(800_000).state(), Place.at(generator.get_state()).moved(800_000).state())


def test_far_places_add_up() -> None:
    start = Place.at(torch.Generator().manual_seed(1).get_state())
    near, far = start.moved(405 * 10**9), start.moved(810 * 10**9 + 7)
    assert torch.equal(Place.at(near.state()).moved(405 * 10**9 + 7).state(), far.state())


def test_a_known_state_keeps_what_was_found_out() -> None:
    state = torch.Generator().manual_seed(3).get_state()
    Place.known(state).stream.lengths["x"] = 2
    assert Place.known(state.clone()).stream.lengths == {"x": 2}
    assert Place.at(state).stream.lengths == {}


def test_the_common_fills_can_be_counted() -> None:
    for func, (dtypes, args) in CALLS.items():
        for dtype in dtypes:
            assert draw_of_call(func, (None, *args), dtype, 112, True) is not None, (func, dtype)


def test_what_is_not_certain_is_not_counted() -> None:
    assert draw_of_call(aten.poisson.default, (), torch.float32, 100, True) is None  # depends on the values
    assert draw_of_call(aten.rrelu_with_noise.default, (), torch.float32, 100, True) is None
    assert draw_of_call(aten.random_.to, (None, 2**28), torch.float32, 100, True) is None  # torch moves the bound
    assert draw_of_call(aten.uniform_.default, (), torch.int64, 100, True) is None


def test_figures_that_are_wrong_here_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    from groundplan.tracer import draws

    check_draws.cache_clear()
    monkeypatch.setitem(draws.FIGURES, aten.uniform_.default, draws._doubles)
    try:
        assert draw_of_call(aten.uniform_.default, (None,), torch.float32, 100, True) is None
    finally:
        check_draws.cache_clear()
