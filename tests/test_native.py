"""The compiled accelerator: every function gives the bits that torch, or plain arithmetic, gives."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from groundplan.tracer import jump
from groundplan.tracer import native as module
from groundplan.tracer.native import (
    DEGREE,
    PACKED,
    WORDS,
    Kind,
    Native,
    Polynomial,
    Words,
    generator_at,
    native,
    state_of,
    untempered,
    why_not,
)

COMPILER = shutil.which("gcc") or shutil.which("clang")
FOUND = native()
SOURCE = Path(__file__).parents[1] / "tracer" / "mersenne.c"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: list[Kind] = ["uniform", "normal"]
SAME_KERNEL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SAME_AS_TORCH = SAME_KERNEL and torch.__version__ >= "2.12"  # before, `normal_` of float32 alone has the same bits

needed = pytest.mark.skipif(FOUND is None, reason=str(why_not()))
filling = pytest.mark.skipif(FOUND is None or not SAME_AS_TORCH, reason=str(why_not()))
compiling = pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs a C compiler, on x86-64")
checked = settings(max_examples=60, deadline=None, derandomize=True)

seeds, consumed = st.integers(0, 2**32 - 1), st.integers(0, 1_300)


@pytest.fixture
def found() -> Native:
    assert FOUND is not None
    return FOUND


def drawn_from(seed: int, drawn: int) -> torch.Generator:
    """A generator that has drawn so many words."""
    generator = torch.Generator().manual_seed(seed)
    draw(generator, drawn)
    return generator


def draw(generator: torch.Generator, count: int) -> None:
    torch.empty(count, dtype=torch.int8).random_(generator=generator)


def same_place(generator: torch.Generator, block: Words, next: int) -> bool:
    wanted, there = state_of(generator)
    return next == there and np.array_equal(block, wanted)


# -- whether it is there ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux" or platform.machine() != "x86_64", reason="built for x86-64 Linux")
@pytest.mark.skipif(COMPILER is None or module.library_path() is None, reason="not built")
@pytest.mark.skipif(os.environ.get("GROUNDPLAN_NATIVE") == "0", reason="turned off")
def test_what_was_built_is_used() -> None:
    assert FOUND is not None, why_not()
    assert FOUND.fills(torch.float32, "normal") == SAME_KERNEL
    if SAME_AS_TORCH:
        assert why_not() is None
        assert all(FOUND.fills(dtype) and FOUND.fills(dtype, kind) for dtype in DTYPES for kind in KINDS)
    assert not FOUND.fills(torch.float64)


@pytest.fixture
def anew() -> Iterator[Callable[[], tuple[Native | None, str | None]]]:
    """Looks for the accelerator once more; what is found does not outlive the test."""

    def look() -> tuple[Native | None, str | None]:
        module._found.cache_clear()
        return native(), why_not()

    yield look
    module._found.cache_clear()


def test_it_can_be_turned_off(anew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUNDPLAN_NATIVE", "0")
    assert anew() == (None, "the environment variable GROUNDPLAN_NATIVE is 0")


def test_a_library_that_was_not_built(anew: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GROUNDPLAN_NATIVE", raising=False)
    monkeypatch.setattr(module, "library_path", lambda: None)
    missing, reason = anew()
    assert missing is None
    assert "compiler" in reason


def test_a_library_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "_mersenne.so").write_text("no library")
    broken, reason = module.load(tmp_path / "_mersenne.so")
    assert broken is None
    assert "cannot be loaded" in str(reason)


class Refuses(TorchDispatchMode):
    """Lets nothing through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(func)


@needed
def test_the_test_at_first_use_sees_no_modes_and_leaves_no_trace() -> None:
    path, before = module.library_path(), torch.get_rng_state()
    assert path is not None
    with Refuses(), torch.device("meta"), torch.inference_mode():  # type: ignore[no-untyped-call]
        loaded, reason = module.load(path)
    assert loaded is not None
    assert reason == why_not()
    assert torch.equal(before, torch.get_rng_state())


def compiled(folder: Path, *changes: tuple[str, str], flags: tuple[str, ...] = ("-O0",)) -> tuple[Native | None, str | None]:
    """What is found in a library of the source with some changes."""
    text = SOURCE.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "changed.c").write_text(text)
    common = ["-std=gnu11", "-ffp-contract=off", "-shared", "-fPIC", "-o", str(folder / "changed.so")]
    subprocess.run([str(COMPILER), *flags, *common, str(folder / "changed.c")], check=True)
    return module.load(folder / "changed.so")


@compiling
@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("0x9908b0df", "0x9908b0de", "does not give the generator's words"),
        ("bit += PIECE;", "bit += PIECE + 1;", "does not give the generator's words"),
        ("from[j]", "from[j]", "another version"),
    ],
)
def test_other_words_are_noticed(tmp_path: Path, old: str, new: str, reason: str) -> None:
    version = ("return 2; }", "return 99; }") if old == new else (old, new)
    other, why = compiled(tmp_path, version, flags=("-O0", "-DPORTABLE"))
    assert other is None
    assert reason in str(why)


@compiling
@pytest.mark.skipif(not SAME_AS_TORCH, reason="torch itself does not use AVX2, or has other bits before 2.12")
@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("3.3333331174E-1f", "3.3333334155E-1f", [("normal", dtype) for dtype in DTYPES]),  # the next float
        ("all_ints(0x7fff)", "all_ints(0x8000)", [(kind, torch.bfloat16) for kind in KINDS]),
        ("_MM_FROUND_TO_NEAREST_INT", "_MM_FROUND_TO_ZERO", [(kind, torch.float16) for kind in KINDS]),
        ("_CMP_EQ_OQ", "_CMP_FALSE_OQ", [("uniform", dtype) for dtype in DTYPES]),
    ],
)
def test_only_what_differs_is_turned_off(tmp_path: Path, old: str, new: str, wrong: list[Any]) -> None:
    other, why = compiled(tmp_path, (old, new))
    assert other is not None
    assert [(kind, dtype) for kind in KINDS for dtype in DTYPES if not other.fills(dtype, kind)] == wrong
    assert all(f"{kind}_ of {dtype}" in str(why) for kind, dtype in wrong)


@compiling
def test_without_avx2_the_rest_remains(tmp_path: Path) -> None:
    portable, why = compiled(tmp_path, flags=("-O0", "-DPORTABLE"))
    assert portable is not None
    assert "AVX2" in str(why)
    assert not any(portable.fills(dtype, kind) for dtype in DTYPES for kind in KINDS)
    with pytest.raises(ValueError, match="no compiled uniform fill"):
        portable.uniform(*state_of(torch.Generator()), torch.empty(16), 0.0, 1.0)


# -- words --------------------------------------------------------------------------------------------------------------


@needed
@checked
@given(seed=seeds, drawn=consumed, count=st.integers(0, 3_000))
def test_skipping_is_drawing(seed: int, drawn: int, count: int) -> None:
    assert FOUND is not None
    generator = drawn_from(seed, drawn)
    block, next = state_of(generator)
    next = FOUND.skip(block, next, count)
    draw(generator, count)
    assert same_place(generator, block, next)


@needed
@checked
@given(seed=seeds, count=st.integers(0, 20))
def test_twists_are_drawn_blocks(seed: int, count: int) -> None:
    assert FOUND is not None
    generator = torch.Generator().manual_seed(seed)
    block, next = state_of(generator)
    FOUND.twist(block, count)
    draw(generator, WORDS * count)
    assert same_place(generator, block, next)


# -- jumps --------------------------------------------------------------------------------------------------------------

polynomials = st.integers(0, 2**32 - 1).map(lambda seed: random_polynomial(seed))
few = settings(max_examples=8, deadline=None, derandomize=True)


def packed(number: int) -> Polynomial:
    return np.frombuffer(number.to_bytes(PACKED, "little"), np.uint8)


def unpacked(polynomial: Polynomial) -> int:
    return int.from_bytes(polynomial.tobytes(), "little")


def random_polynomial(seed: int) -> Polynomial:
    bits = np.random.default_rng(seed).integers(0, 256, PACKED, np.uint8)
    return packed(unpacked(bits) % (1 << DEGREE))


def twisted_block(seed: int) -> Words:
    block, _ = state_of(drawn_from(seed, 1))
    return block


def sum_of_windows(block: Words, polynomial: Polynomial) -> Words:
    """What a jump is, word for word."""
    stream = jump._words_from(block, DEGREE + WORDS)
    windows = np.lib.stride_tricks.sliding_window_view(stream, WORDS)
    starts = np.flatnonzero(np.unpackbits(polynomial, bitorder="little"))
    total = np.zeros(WORDS, np.uint32)
    for first in range(0, len(starts), 256):
        total ^= np.bitwise_xor.reduce(windows[starts[first : first + 256]], axis=0)
    return total


CHARACTERISTIC = sum(1 << int(term) for term in module.characteristic_terms())


def times_plainly(a: int, b: int) -> int:
    """A product over GF(2), modulo the characteristic polynomial, bit by bit."""
    product = 0
    while a:
        low = a & -a
        product ^= b << (low.bit_length() - 1)
        a ^= low
    while product.bit_length() > DEGREE:
        product ^= CHARACTERISTIC << (product.bit_length() - DEGREE - 1)
    return product


def test_the_closed_form_is_the_polynomial_of_the_recurrence() -> None:
    """The words whose distances are the exponents add up to nothing, wherever in the stream."""
    terms = module.characteristic_terms()
    assert (len(terms), terms[0], terms[-1]) == (135, DEGREE, 0)
    words = np.concatenate([jump.twisted(twisted_block(3), count) for count in range(33)])
    for start in (0, 1, 500):
        assert np.bitwise_xor.reduce(words[start + terms]) == 0


@needed
@few
@given(seed=seeds, polynomial=polynomials)
def test_a_jump_is_a_sum_of_windows(seed: int, polynomial: Polynomial) -> None:
    assert FOUND is not None
    block = twisted_block(seed)
    assert np.array_equal(FOUND.jump(block, polynomial), sum_of_windows(block, polynomial))


@needed
@checked
@given(seed=seeds, exponents=st.sets(st.integers(0, DEGREE - 1) | st.sampled_from([0, 1, 1_247, 1_248, 19_936]), max_size=6))
def test_a_jump_of_few_terms(seed: int, exponents: set[int]) -> None:
    assert FOUND is not None
    block, polynomial = twisted_block(seed), packed(sum(1 << each for each in exponents))
    assert np.array_equal(FOUND.jump(block, polynomial), sum_of_windows(block, polynomial))


@needed
@few
@given(a=polynomials, b=polynomials | st.integers(0, DEGREE - 1).map(lambda power: packed(1 << power)))
def test_products(a: Polynomial, b: Polynomial) -> None:
    assert FOUND is not None
    assert unpacked(FOUND.multiply(a, b)) == times_plainly(unpacked(a), unpacked(b))
    assert np.array_equal(FOUND.square(a), FOUND.multiply(a, a))


@needed
def test_extreme_products(found: Native) -> None:
    for number in (0, 1, 1 << (DEGREE - 1), (1 << DEGREE) - 1):
        wanted = times_plainly(number, number)
        assert unpacked(found.square(packed(number))) == unpacked(found.multiply(packed(number), packed(number))) == wanted


@needed
def test_a_far_jump_is_two_jumps(found: Native) -> None:
    power = packed(1 << 19_000)
    for _ in range(30):
        power = found.square(power)
    block = twisted_block(7)
    assert np.array_equal(found.jump(block, found.square(power)), found.jump(found.jump(block, power), power))


@compiling
def test_portable_arithmetic_is_the_same(tmp_path: Path, found: Native) -> None:
    portable, _ = compiled(tmp_path, flags=("-O0", "-DPORTABLE"))
    assert portable is not None
    a, b, block = random_polynomial(1), random_polynomial(2), twisted_block(3)
    assert np.array_equal(portable.multiply(a, b), found.multiply(a, b))
    assert np.array_equal(portable.square(a), found.square(a))
    assert np.array_equal(portable.jump(block, a), found.jump(block, a))


# -- fills --------------------------------------------------------------------------------------------------------------

UNIFORM_SIZES = st.integers(1, 3_000) | st.sampled_from([15, 16, 17, 2_495, 2_496, 2_497, 5_000])
GROUPS = st.integers(1, 200) | st.sampled_from([155, 156, 157, 311, 312, 313])  # a chunk is 156 groups
singles = st.floats(width=32, allow_nan=False, allow_infinity=False)


def bounds(dtype: torch.dtype) -> st.SearchStrategy[tuple[float, float]]:
    """From and to that `uniform_` accepts of a dtype, the ones that rounding to it changes among them."""
    most = torch.finfo(dtype).max / 2
    usual = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.1, -(2048**-0.5), 2048**-0.5, 1e-40, -1e-45, 3e-8, most, -most])
    numbers = usual | st.floats(-most, most) | st.floats(-2.0, 2.0)
    return st.tuples(numbers, numbers).map(lambda pair: (min(pair), max(pair)))


def moments() -> st.SearchStrategy[tuple[float, float]]:
    usual = st.sampled_from([(0.0, 0.02), (0.1, 0.02), (0.0, 1.0), (1.0, 0.0), (-3.0, 7.0), (0.0, 1e-42), (1e38, 3e38)])
    return usual | st.tuples(singles | st.floats(-1e3, 1e3), (singles | st.floats(-10.0, 10.0)).map(abs))


@st.composite
def fills(draw: Any) -> tuple[Kind, torch.dtype, int, tuple[float, float]]:
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    numel = draw(UNIFORM_SIZES) if kind == "uniform" else 16 * draw(GROUPS)
    return kind, dtype, numel, draw(bounds(dtype) if kind == "uniform" else moments())


def fill_with_torch(kind: Kind, out: torch.Tensor, a: float, b: float, generator: torch.Generator) -> torch.Tensor:
    return (out.uniform_ if kind == "uniform" else out.normal_)(a, b, generator=generator)


def fill(found: Native, kind: Kind, block: Words, next: int, out: torch.Tensor, a: float, b: float) -> int:
    return (found.uniform if kind == "uniform" else found.normal)(block, next, out, a, b)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def check_fill(found: Native, kind: Kind, dtype: torch.dtype, numel: int, a: float, b: float, generator: torch.Generator) -> None:
    block, next = state_of(generator)
    ours, wanted = torch.empty(numel, dtype=dtype), torch.empty(numel, dtype=dtype)
    next = fill(found, kind, block, next, ours, a, b)
    fill_with_torch(kind, wanted, a, b, generator)
    assert same_bits(ours, wanted)
    assert same_place(generator, block, next)


@filling
@settings(checked, max_examples=200)
@given(call=fills(), seed=seeds, drawn=consumed)
def test_a_fill_has_torchs_bits(call: Any, seed: int, drawn: int) -> None:
    assert FOUND is not None
    kind, dtype, numel, (a, b) = call
    check_fill(FOUND, kind, dtype, numel, a, b, drawn_from(seed, drawn))


@needed
@pytest.mark.skipif(not SAME_KERNEL, reason="torch itself does not use AVX2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "a", "b"), [("uniform", -(2048**-0.5), 2048**-0.5), ("normal", 0.0, 1.0), ("normal", 0.1, 0.02)]
)
def test_a_million_elements(found: Native, dtype: torch.dtype, kind: Kind, a: float, b: float) -> None:
    if not SAME_AS_TORCH and (kind, dtype) != ("normal", torch.float32):
        pytest.skip("this torch has other bits")
    check_fill(found, kind, dtype, 1 << 20, a, b, drawn_from(31, 5))


@filling
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("mean", "std"), [(nan, 1.0), (-nan, 1.0), (inf, 1.0), (-inf, inf), (0.0, inf), (1e39, 1e39)])
def test_what_is_no_number(found: Native, dtype: torch.dtype, mean: float, std: float) -> None:
    check_fill(found, "normal", dtype, 4_096, mean, std, drawn_from(2, 3))


@filling
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [1, 1 << 12, (1 << 24) - (1 << 10)])
def test_chosen_words(found: Native, dtype: torch.dtype, step: int) -> None:
    """Numbers that are small, that have few bits (and are rounded from the middle between two), and that are close to one."""
    for first in range(0, 1 << 12, WORDS - 16):
        words = (first + np.arange(WORDS)) * step if step <= 1 << 12 else first % 400 + np.arange(WORDS) + step
        for kind in KINDS:
            generator = generator_at(untempered((words & 0xFFFFFF).astype(np.uint32)), 16)
            check_fill(found, kind, dtype, WORDS - 16, -0.7, 1.3, generator)


def test_untempered_words_are_drawn() -> None:
    words = np.arange(WORDS, dtype=np.uint32) * np.uint32(0x9E3779B1)
    drawn = torch.empty(WORDS - 1, dtype=torch.int32).random_(generator=generator_at(untempered(words), 1))
    assert np.array_equal(drawn.numpy(), words[1:] & np.uint32(0x7FFFFFFF))


@st.composite
def shards(draw: Any) -> tuple[Kind, torch.dtype, int, int, int]:
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    unit = 1 if kind == "uniform" else 16
    return kind, dtype, draw(st.integers(1, 9)), unit * draw(st.integers(1, 60)), unit * draw(st.integers(0, 60))


@filling
@settings(checked, max_examples=150)
@given(shard=shards(), seed=seeds, drawn=consumed, more=st.integers(0, 5))
def test_rows_are_columns_of_a_larger_fill(shard: Any, seed: int, drawn: int, more: int) -> None:
    assert FOUND is not None
    kind, dtype, rows, length, gap = shard
    generator = drawn_from(seed, drawn)
    block, next = state_of(generator)
    out = torch.full((rows, length + more), 7.0, dtype=dtype)
    next = FOUND.rows(kind, block, next, out[:, :length], gap, -0.3, 0.7)
    whole = fill_with_torch(kind, torch.empty(rows * (length + gap) - gap, dtype=dtype), -0.3, 0.7, generator)
    wanted = torch.cat([whole, whole.new_zeros(gap)]).view(rows, length + gap)[:, :length]
    assert same_bits(out[:, :length], wanted)
    assert (out[:, length:] == 7.0).all()
    assert same_place(generator, block, next)


@filling
def test_threads_do_not_disturb_each_other(found: Native) -> None:
    def made(seed: int) -> tuple[bytes, bytes]:
        block, next = state_of(torch.Generator().manual_seed(seed))
        out = torch.empty(40_000)
        found.normal(block, next, out, 0.0, 1.0)
        return out.numpy().tobytes(), found.jump(block, random_polynomial(seed)).tobytes()

    alone = [made(seed) for seed in range(12)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(made, range(12))) == alone


@needed
def test_no_elements_change_nothing(found: Native) -> None:
    block, next = state_of(torch.Generator().manual_seed(1))
    before = block.copy()
    for kind in KINDS:
        if found.fills(torch.float32, kind):
            assert fill(found, kind, block, next, torch.empty(0), 0.0, 1.0) == next
    assert found.skip(block, next, 0) == next
    assert np.array_equal(block, before)


# -- wrong arguments ----------------------------------------------------------------------------------------------------


def read_only(block: Words) -> Words:
    block.setflags(write=False)
    return block


BLOCK = np.zeros(WORDS, np.uint32)


@filling
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda found: found.uniform(BLOCK, 624, torch.empty(4, 4).t(), 0, 1), "contiguous tensor"),
        (lambda found: found.uniform(BLOCK, 624, torch.empty(4, dtype=torch.float64), 0, 1), "no compiled uniform fill"),
        (lambda found: found.uniform(BLOCK, 624, torch.empty(4, device="meta"), 0, 1), "on meta"),
        (lambda found: found.uniform(BLOCK, 0, torch.empty(4), 0, 1), "1 to 624"),
        (lambda found: found.uniform(BLOCK, 625, torch.empty(4), 0, 1), "1 to 624"),
        (lambda found: found.normal(BLOCK, 624, torch.empty(24), 0, 1), "groups of 16"),
        (lambda found: found.rows("normal", BLOCK, 624, torch.empty(2, 16), 8, 0, 1), "groups of 16"),
        (lambda found: found.rows("uniform", BLOCK, 624, torch.empty(16), 0, 0, 1), "two dimensions"),
        (lambda found: found.rows("uniform", BLOCK, 624, torch.empty(4, 8).t(), 0, 0, 1), "contiguous rows"),
        (lambda found: found.rows("uniform", BLOCK, 624, torch.empty(4, 8), -1, 0, 1), "gap"),
        (lambda found: found.twist(BLOCK[:-1], 1), "a block is"),
        (lambda found: found.twist(BLOCK.astype(np.int64), 1), "a block is"),
        (lambda found: found.twist(read_only(BLOCK.copy()), 1), "read-only"),
        (lambda found: found.skip(BLOCK, 0, 1), "1 to 624"),
        (lambda found: found.square(np.zeros(2_493, np.uint8)), "a polynomial is"),
        (lambda found: found.jump(BLOCK, np.zeros(312, np.uint64)), "a polynomial is"),
    ],
)
def test_wrong_arguments_are_named(found: Native, call: Callable[[Native], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(found)


@needed
def test_polynomials_may_lie_anywhere(found: Native) -> None:
    polynomial, memory = random_polynomial(4), np.zeros(2 * PACKED + 2, np.uint8)
    odd, strided = memory[1 : PACKED + 1], memory[: 2 * PACKED : 2]
    for each in (odd, strided):
        each[:] = polynomial
        assert np.array_equal(found.square(each), found.square(polynomial))


# -- rounds of trunc_normal_ --------------------------------------------------------------------------------------------


@needed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 16, 1000])
def test_what_is_out_of_bounds(dtype: torch.dtype, numel: int) -> None:
    assert FOUND is not None
    values = torch.randn(numel, generator=torch.Generator().manual_seed(1)).to(dtype)
    values[0] = 0.5
    wrong = FOUND.outside(values, -1.25, 0.5)
    assert wrong.tolist() == ((values < -1.25) | (values > 0.5)).nonzero().view(-1).tolist()


@filling
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [0.6, 1.2, 2.0, 4.0])
def test_rounds_are_those_of_trunc_normal(dtype: torch.dtype, width: float) -> None:
    assert FOUND is not None
    numel, generator = 4096, torch.Generator().manual_seed(3)
    block, next = module.state_of(generator)
    expected = torch.empty(numel, dtype=dtype)
    torch.nn.init.trunc_normal_(expected, std=1.0, a=-width, b=width, generator=generator)
    out = torch.empty(numel, dtype=dtype)
    bounds = torch.tensor([-width, width], dtype=dtype).tolist()
    next = FOUND.normal(block, next, out, 0.0, 1.0)
    wrong = FOUND.outside(out, *bounds)
    while len(wrong):
        next, wrong = FOUND.redraw(block, next, out, wrong, (0.0, 1.0), (bounds[0], bounds[1]))
    assert torch.equal(out, expected)
    assert torch.equal(module.generator_at(block, next).get_state()[8:], generator.get_state()[8:])
