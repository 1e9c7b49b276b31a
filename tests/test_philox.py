"""Positions in CUDA's random streams: against a plain model here, against the device itself where there is one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from groundplan.tracer import philox
from groundplan.tracer.philox import Grid, Piece, increment, offset_of, pieces, placed, seed_of

from . import philox_model
from .philox_model import REACH, Array, Fill

aten = torch.ops.aten
from_to = getattr(aten.random_, "from")
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
A100, H100, A4000 = Grid(108, 2048), Grid(132, 2048), Grid(48, 1536)
SMALL = Grid(1, 1024)

grids = st.builds(Grid, st.integers(1, 3), st.sampled_from([256, 512, 600, 1024]))
dtypes = st.sampled_from(FLOATS)
reaches = st.sampled_from([REACH, REACH, 1999, 8192])  # with a small one, what a test can afford to draw is already split
checked = settings(max_examples=200, deadline=None, derandomize=True)


# -- the model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "counter", "thread", "words"),
    [
        (0, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x0370734413198A2E, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_known_answers_of_random123(key: int, counter: int, thread: int, words: list[int]) -> None:
    assert philox_model.philox(key, counter, thread).tolist() == words


# What devices printed for the first and last elements of `randn`, as published in torch's issues 143086 and 97097 (there with
# a mean of 5 and a variance of 5), and for a few elements that are the same on all of them.
PRINTED = {
    "H100": (Fill(9_483_264, torch.float32, H100, seed=1), [-0.2963, 2.6764, -0.1408, -0.6970, -0.7780, 0.3267]),
    "A100": (Fill(9_483_264, torch.float32, A100, seed=1), [-0.2963, 2.6764, -0.1408, 0.1549, -0.6797, -0.1656]),
    "A4000": (
        Fill(100_000, torch.float32, A4000, seed=14),
        [(value - 5) / 5**0.5 for value in (2.8731, 5.2727, 2.9889, 8.2207, 6.5395, 4.2604)],
    ),
    "any": (Fill(64, torch.float32, A4000, seed=0), [-0.9247, -0.4253, -2.6438, 0.1210, 0.4730, -1.0823]),
}


@pytest.mark.parametrize(("fill", "values"), PRINTED.values(), ids=PRINTED)
def test_the_model_gives_what_devices_print(fill: Fill, values: list[float]) -> None:
    index = np.array([0, 1, 2, fill.numel - 3, fill.numel - 2, fill.numel - 1])
    np.testing.assert_allclose(fill.normal(index), values, atol=1e-4)


def test_two_fills_in_a_row_give_what_devices_print() -> None:
    moved = increment(aten.rand.default, torch.float32, 9, H100)
    assert moved is not None
    first, second = (Fill(9, torch.float32, H100, seed=0, offset=offset) for offset in (0, moved))
    np.testing.assert_allclose(first.uniform(np.arange(4)), [0.3990, 0.5167, 0.0249, 0.9401], atol=1e-4)
    np.testing.assert_allclose(second.uniform(np.arange(4)), [0.9722, 0.7910, 0.4690, 0.3300], atol=1e-4)


@checked
@given(numel=st.integers(1, 6000), dtype=dtypes, grid=grids)
def test_the_model_is_the_kernel(numel: int, dtype: torch.dtype, grid: Grid) -> None:
    fill = Fill(numel, dtype, grid)
    loops, places = philox_model.kernel(numel, fill.unroll, grid), fill.places(fill.everything)
    for name in ("counter", "thread", "lane"):
        assert np.array_equal(getattr(loops, name), getattr(places, name)), name


# -- increments ---------------------------------------------------------------------------------------------------------


@checked
@given(
    numels=st.lists(st.integers(0, 6000), min_size=2, max_size=4),
    dtype=dtypes,
    grid=grids,
    reach=reaches,
    func=st.sampled_from([aten.uniform_.default, aten.normal_.default]),
)
def test_fills_in_a_row_share_no_number(numels: list[int], dtype: torch.dtype, grid: Grid, reach: int, func: Any) -> None:
    offset, taken = 0, set[tuple[int, int, int]]()
    for numel in numels:
        fill = Fill(numel, dtype, grid, reach=reach)
        places = fill.places(fill.everything)
        mine = set(zip((places.counter + offset // 4).tolist(), places.thread.tolist(), places.lane.tolist(), strict=True))
        assert len(mine) == numel
        assert not mine & taken
        taken |= mine
        with mock.patch.object(philox, "_REACH", reach):
            moved = increment(func, dtype, numel, grid)
        assert moved == (4 * (int(places.counter.max()) + 1) if numel else 0)  # to the first counter that no element has used
        offset += moved


WIDE, NARROW = 12, 8  # what 4097 elements move the offset by on SMALL: two elements of each call to the engine, or four
FLOATING = [
    aten.uniform_.default,
    aten.normal_.default,
    aten.exponential_.default,
    aten.cauchy_.default,
    aten.log_normal_.default,
    aten.geometric_.default,
    aten.bernoulli_.float,
    aten.random_.default,
    aten.rand.default,
    aten.rand.generator,
    aten.randn.default,
    aten.randn.generator,
]
MOVES = [
    *((func, dtype, (), WIDE if dtype == torch.float64 else NARROW) for func in FLOATING for dtype in FLOATS),
    (aten.random_.default, torch.int64, (), WIDE),
    (aten.random_.default, torch.int32, (), NARROW),
    (aten.random_.default, torch.bool, (), NARROW),
    (aten.random_.to, torch.int64, (2**28 - 1,), NARROW),
    (aten.random_.to, torch.int64, (2**28,), WIDE),
    (aten.random_.to, torch.int8, (100,), NARROW),
    (aten.random_.to, torch.float64, (2**53 + 1,), WIDE),
    (from_to, torch.int32, (-(2**27), 2**27 - 1), NARROW),
    (from_to, torch.int32, (-(2**27), 2**27), WIDE),
    (from_to, torch.int64, (-(2**63), None), WIDE),
    (from_to, torch.int64, (0, None), WIDE),
    (from_to, torch.int32, (2**30, None), WIDE),
    (from_to, torch.int16, (0, None), NARROW),
    (from_to, torch.bool, (0, None), NARROW),
    (from_to, torch.float32, (-(2**24), None), NARROW),
    (from_to, torch.float64, (0, None), WIDE),
    (from_to, torch.bfloat16, (-256, 257), NARROW),
    (aten.geometric_.default, torch.int64, (), NARROW),
    (aten.bernoulli_.float, torch.bool, (), NARROW),
]


@pytest.mark.parametrize(("func", "dtype", "args", "moved"), MOVES)
def test_elements_of_a_call_by_operator_and_dtype(func: Any, dtype: torch.dtype, args: tuple[Any, ...], moved: int) -> None:
    assert increment(func, dtype, 4097, SMALL, args) == moved


@pytest.mark.parametrize(
    ("func", "dtype", "args"),
    [
        (aten.uniform_.default, torch.complex64, ()),
        (aten.normal_.default, torch.int64, ()),
        (aten.uniform_.default, torch.float8_e4m3fn, ()),
        (aten.random_.to, torch.int64, ()),
        (from_to, torch.float32, (0, 2**24 + 2)),
        (from_to, torch.bfloat16, (-258, 0)),
        (aten.bernoulli_.Tensor, torch.float32, ()),
        (aten.fill_.Scalar, torch.float32, ()),
    ],
)
def test_what_is_not_certain_is_none(func: Any, dtype: torch.dtype, args: tuple[Any, ...]) -> None:
    assert increment(func, dtype, 10, SMALL, args) is None
    assert pieces(func, dtype, 10, 0, 10, SMALL, args) is None


def test_nothing_takes_nothing() -> None:
    assert increment(aten.normal_.default, torch.float32, 0, H100) == 0
    assert pieces(aten.normal_.default, torch.float32, 0, 0, 0, H100) == []
    assert pieces(aten.normal_.default, torch.float32, 10, 4, 4, H100) == []


def test_what_32_bits_cannot_address_reserves_for_the_whole_and_for_each_half() -> None:
    def once(numel: int) -> int:
        return 4 * -(-numel // (4 * 132 * 2048))

    assert increment(aten.uniform_.default, torch.float32, 2**29, H100) == once(2**29)
    split = once(2**29 + 1) + once(2**28) + once(2**28 + 1)
    assert increment(aten.uniform_.default, torch.float32, 2**29 + 1, H100) == split


# -- pieces -------------------------------------------------------------------------------------------------------------


@checked
@given(
    fill=st.builds(Fill, st.integers(0, 9000), dtypes, grids, st.just(11), st.integers(0, 2**40).map(lambda n: 4 * n), reaches),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    largest=st.integers(0, 9000),
    name=st.sampled_from(["uniform", "normal"]),
)
def test_pieces_give_the_slice(fill: Fill, ends: tuple[float, float], largest: int, name: str) -> None:
    start, stop = sorted(round(end * fill.numel) for end in ends)
    func = getattr(aten, f"{name}_").default
    with mock.patch.object(philox, "_REACH", fill.reach):
        found = pieces(func, fill.dtype, fill.numel, start, stop, fill.grid, largest=largest)
    assert found is not None
    check_cover(found, start, stop, max(largest, fill.unroll * fill.grid.threads(fill.numel)))
    if found:
        alone = [fill_of(piece, fill) for piece in found]
        values = np.concatenate([getattr(part, name)(part.everything) for part in alone])
        assert np.array_equal(values[start - found[0].start :], getattr(fill, name)(fill.everything)[start:stop])


def fill_of(piece: Piece, fill: Fill) -> Fill:
    """The call that a piece of `fill` asks for."""
    return Fill(piece.stop - piece.start, fill.dtype, fill.grid, fill.seed, fill.offset + piece.offset, fill.reach)


def check_cover(found: list[Piece], start: int, stop: int, largest: int) -> None:
    assert bool(found) == (start < stop)
    assert all(before.stop == after.start for before, after in pairwise(found))
    for piece in found:
        assert 0 < piece.stop - piece.start <= largest
        assert piece.offset % 4 == 0
    if found:
        assert found[0].start <= start < found[0].stop
        assert found[-1].stop == stop


@pytest.mark.parametrize("grid", [A100, H100, A4000], ids=["A100", "H100", "A4000"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0.0, 0.2, 0.25, 0.5, 0.9, 1.0])
def test_pieces_of_what_32_bits_cannot_address(grid: Grid, dtype: torch.dtype, place: float) -> None:
    fill = Fill(5 * 2**30 // dtype.itemsize + 7, dtype, grid, seed=3)
    start, stop = around(place, fill.numel)
    found = pieces(aten.uniform_.default, dtype, fill.numel, start, stop, grid)
    assert found
    values = [fill_of(piece, fill).uniform(np.arange(max(start, piece.start), piece.stop) - piece.start) for piece in found]
    assert np.array_equal(np.concatenate(values), fill.uniform(np.arange(start, stop)))


def around(place: float, numel: int) -> tuple[int, int]:
    """A thousand elements about a place, which is 0 at the start and 1 at the end."""
    middle = int(place * numel)
    return max(middle - 500, 0), min(middle + 500, numel)


# -- states -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_a_state_is_placed(seed: int) -> None:
    state = torch.tensor([*seed.to_bytes(8, "little"), 4, *[0] * 7], dtype=torch.uint8)
    before = state.clone()
    moved = placed(state, 2**40)
    assert (seed_of(moved), offset_of(moved)) == (seed, 2**40 + 4)
    assert torch.equal(state, before)
    assert torch.equal(placed(moved, -(2**40)), state)


def test_a_state_of_the_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="16 bytes, this one has 5056"):
        placed(torch.Generator().get_state(), 4)


# -- the device ---------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A fill to run on the device."""

    func: Any
    dtype: torch.dtype
    args: tuple[Any, ...] = ()

    def draw(self, numel: int, generator: torch.Generator) -> torch.Tensor:
        """The bytes that it fills, a row for each element."""
        target = torch.empty(numel, 1, dtype=self.dtype, device="cuda")
        self.func(target, *self.args, generator=generator)
        return target.view(torch.uint8)

    def moves(self, numel: int) -> int:
        """How far it should move the offset."""
        moved = increment(self.func, self.dtype, numel, Grid.of(torch.device("cuda")), self.args)
        assert moved is not None
        return moved

    def by_pieces(self, numel: int, start: int, stop: int, state: torch.Tensor) -> torch.Tensor:
        """The bytes of the elements [start, stop) of a fill of `numel` from `state` on."""
        generator = torch.Generator("cuda")
        found = pieces(self.func, self.dtype, numel, start, stop, Grid.of(generator.device), self.args)
        assert found
        parts = []
        for piece in found:
            generator.set_state(placed(state, piece.offset))
            parts.append(self.draw(piece.stop - piece.start, generator))
        return torch.cat(parts)[start - found[0].start :]


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SIZES = [1, 255, 256, 1000, 10**6, 10**7 + 3]
FILLS = [
    (aten.uniform_.default, (-2.0, 3.0)),
    (aten.normal_.default, (0.5, 2.0)),
    (aten.exponential_.default, (1.5,)),
    (aten.cauchy_.default, (0.5, 2.0)),
    (aten.log_normal_.default, (0.5, 2.0)),
    (aten.geometric_.default, (0.3,)),
    (aten.bernoulli_.float, (0.3,)),
    (aten.random_.default, ()),
    (aten.random_.to, (100,)),
    (from_to, (-50, 200)),
]
CALLS = [
    *(Call(func, dtype, args) for func, args in FILLS for dtype in FLOATS),
    Call(aten.random_.default, torch.int64),
    Call(aten.random_.default, torch.int32),
    Call(aten.random_.default, torch.bool),
    Call(aten.random_.to, torch.int64, (2**28 - 1,)),
    Call(aten.random_.to, torch.int64, (2**28,)),
    Call(from_to, torch.int64, (-(2**63), None)),
    Call(from_to, torch.int32, (5, None)),
    Call(from_to, torch.float32, (0, None)),
    Call(aten.geometric_.default, torch.int32, (0.3,)),
    Call(aten.bernoulli_.float, torch.bool, (0.3,)),
]


def _name(call: Call) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in call)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("call", CALLS, ids=_name)
def test_the_device_moves_as_foretold(call: Call) -> None:
    generator = torch.Generator("cuda").manual_seed(2**63 + 5)
    for numel in SIZES:
        state = generator.get_state()
        call.draw(numel, generator)
        assert torch.equal(generator.get_state(), placed(state, call.moves(numel))), numel


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("call", CALLS, ids=_name)
def test_the_device_fills_by_pieces(call: Call) -> None:
    generator = torch.Generator("cuda").manual_seed(5)
    generator.set_offset(2**35 + 8)
    for numel in SIZES:
        state = generator.get_state()
        whole = call.draw(numel, generator)
        for start, stop in [(0, numel), (numel // 3, numel // 2 + 1), (numel - 1, numel)]:
            assert torch.equal(call.by_pieces(numel, start, stop, state), whole[start:stop]), (numel, start, stop)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("create", "fill"), [(aten.rand, aten.uniform_.default), (aten.randn, aten.normal_.default)])
def test_creation_moves_and_fills_alike(create: Any, fill: Any, dtype: torch.dtype) -> None:
    created, filled = (torch.Generator("cuda").manual_seed(7) for _ in range(2))
    for numel in SIZES:
        state = created.get_state()
        tensor = create.generator([numel], generator=created, dtype=dtype, device="cuda")
        assert torch.equal(tensor, fill(torch.empty_like(tensor), generator=filled))
        assert torch.equal(created.get_state(), placed(state, Call(create.generator, dtype).moves(numel)))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1000, 10**6, 10**7 + 3])
def test_the_model_is_the_device(dtype: torch.dtype, numel: int) -> None:
    generator = torch.Generator("cuda").manual_seed(3)
    index = np.unique(np.r_[0:1000, np.random.default_rng(0).integers(0, numel, 20_000), numel - 1000 : numel])
    fill = Fill(numel, dtype, Grid.of(generator.device), seed=3)
    assert np.array_equal(fill.uniform(index), _on_device(fill, index, generator, "uniform_"))
    fill = Fill(numel, dtype, fill.grid, seed=3, offset=offset_of(generator.get_state()))
    np.testing.assert_allclose(fill.normal(index), _on_device(fill, index, generator, "normal_"), atol=1e-4)


def _on_device(fill: Fill, index: Array, generator: torch.Generator, name: str) -> Array:
    tensor = torch.empty(fill.numel, dtype=fill.dtype, device="cuda")
    getattr(tensor, name)(generator=generator)
    return np.asarray(tensor.cpu().numpy()[index])


@pytest.mark.gpu
@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("func", [aten.uniform_.default, aten.normal_.default])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_device_where_32_bits_cannot_address(func: Any, dtype: torch.dtype) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of the device's memory")
    call, numel = Call(func, dtype), 5 * 2**30 // dtype.itemsize + 7
    generator = torch.Generator("cuda").manual_seed(9)
    state = generator.get_state()
    whole = call.draw(numel, generator)
    assert torch.equal(generator.get_state(), placed(state, call.moves(numel)))
    for place in (0, 0.25, 0.5, 0.75, 1):
        start, stop = around(place, numel)
        assert torch.equal(call.by_pieces(numel, start, stop, state), whole[start:stop]), place
