"""The compiled accelerator of torch's CPU generator (`mersenne.c`): there where it could be built and gives torch's bits.

    found = native()
    if found and found.fills(torch.float32, "normal"):
        next = found.normal(block, next, out, 0.0, 0.02)

A generator's place in its stream is a *block*, its 624 words (`np.uint32`), and `next`, how many of them are consumed: 1 to 624,
where 624 says that a twist comes before the next word. Methods change the block in place and return the new `next`. They hold
nothing between calls and release the GIL, so threads may use one `Native` at once, each with a block of its own. Polynomials over
GF(2) are `np.uint8` arrays of 2496 bytes, eight coefficients a byte, the lowest first.

The first `native()` tests the library against torch (a few milliseconds); what differs is not used, and `why_not` says so.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Kind = Literal["uniform", "normal"]
Words = NDArray[np.uint32]
Polynomial = NDArray[np.uint8]
Places = NDArray[np.int32]

WORDS = 624  # of a block
DEGREE = 19_937  # of the characteristic polynomial
PACKED = 2_496  # bytes of a polynomial modulo it: 312 words of 64 bits
GROUP = 16  # elements that `normal_` makes at once

_VERSION = 2
_KINDS: dict[Kind, int] = {"uniform": 0, "normal": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "gp_version": (_INT, []),
    "gp_twist": (None, [_POINTER, _LONG]),
    "gp_skip": (None, [_POINTER, _POINTER, _LONG]),
    "gp_jump": (None, [_POINTER] * 3),
    "gp_multiply": (None, [_POINTER] * 4 + [_INT]),
    "gp_square": (None, [_POINTER] * 3 + [_INT]),
    "gp_fills": (_INT, []),
    "gp_rows": (None, [_INT, _INT, _POINTER, _POINTER, _POINTER] + [_LONG] * 4 + [_FLOAT] * 2),
    "gp_outside": (_LONG, [_INT, _POINTER, _LONG, _FLOAT, _FLOAT, _POINTER]),
    "gp_redraw": (_LONG, [_INT, _POINTER, _POINTER, _POINTER, _LONG, _POINTER, _LONG] + [_FLOAT] * 4),
}


# -- what it can do -----------------------------------------------------------------------------------------------------


class Native:
    """The functions of the compiled library; `native()` makes the one there is."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self._library = library
        self._terms = characteristic_terms()
        self._fills: set[tuple[Kind, torch.dtype]] = set(product(_KINDS, _DTYPES))

    def fills(self, dtype: torch.dtype, kind: Kind | None = None) -> bool:
        """Whether fills of this kind (None: of both) give torch's values of this dtype, bit for bit."""
        return all((each, dtype) in self._fills for each in ([kind] if kind else _KINDS))

    def twist(self, block: Words, count: int) -> None:
        """Replace the block with the one `count` blocks later."""
        self._library.gp_twist(_changed(block), count)

    def skip(self, block: Words, next: int, count: int) -> int:
        """Consume `count` words without looking at them."""
        place = _place(next)
        self._library.gp_skip(_changed(block), ctypes.byref(place), count)
        return place.value

    def jump(self, block: Words, polynomial: Polynomial) -> Words:
        """The block n words later, for `polynomial` = x^n modulo the characteristic polynomial.

        A block that `manual_seed` made, untwisted yet, must be twisted once before: its first word does not obey the recurrence.
        """
        out, polynomial = np.empty(WORDS, np.uint32), _aligned(polynomial)
        self._library.gp_jump(_words(block), polynomial.ctypes.data, out.ctypes.data)
        return out

    def multiply(self, a: Polynomial, b: Polynomial) -> Polynomial:
        """a * b over GF(2), modulo the characteristic polynomial."""
        out, a, b = np.empty(PACKED, np.uint8), _aligned(a), _aligned(b)
        self._library.gp_multiply(a.ctypes.data, b.ctypes.data, out.ctypes.data, self._terms.ctypes.data, len(self._terms))
        return out

    def square(self, a: Polynomial) -> Polynomial:
        """a * a, in half the time."""
        out, a = np.empty(PACKED, np.uint8), _aligned(a)
        self._library.gp_square(a.ctypes.data, out.ctypes.data, self._terms.ctypes.data, len(self._terms))
        return out

    def uniform(self, block: Words, next: int, out: torch.Tensor, low: float, high: float) -> int:
        """Fill `out` (contiguous) as `out.uniform_(low, high)` does; bounds that torch would reject are not noticed."""
        return self._fill("uniform", block, next, out, _one_row(out), low, high)

    def normal(self, block: Words, next: int, out: torch.Tensor, mean: float, std: float) -> int:
        """Fill `out` (contiguous, a multiple of 16 elements) as `out.normal_(mean, std)` does."""
        return self._fill("normal", block, next, out, _one_row(out), mean, std)

    def rows(self, kind: Kind, block: Words, next: int, out: torch.Tensor, gap: int, a: float, b: float) -> int:
        """Fill the rows of `out` (two dimensions, each row contiguous) and pass over `gap` words between two rows.

        So a fill of a larger contiguous tensor leaves them in some of its columns. `a` and `b` are from and to, or mean and
        standard deviation. Normal values come in groups of 16: row length and gap are multiples of 16, and the first element is
        the first of a group of the larger tensor.
        """
        if out.dim() != 2 or (out.stride(1) != 1 and out.shape[1] > 1) or gap < 0:
            raise ValueError(f"two dimensions, contiguous rows and a gap are needed, not strides {out.stride()}, gap {gap}")
        return self._fill(kind, block, next, out, _Rows(out.shape[0], out.shape[1], gap, out.stride(0)), a, b)

    def outside(self, values: torch.Tensor, low: float, high: float) -> Places:
        """The places of the values (a contiguous row) that are below `low` or above `high`, bounds that the dtype can hold."""
        wrong = np.empty(len(values) + 1, np.int32)
        found = self._library.gp_outside(_DTYPES[values.dtype], values.data_ptr(), len(values), low, high, wrong.ctypes.data)
        return wrong[:found]

    def redraw(
        self, block: Words, next: int, out: torch.Tensor, wrong: Places, normal: tuple[float, float], bounds: tuple[float, float]
    ) -> tuple[int, Places]:
        """One more round of a `trunc_normal_`: those of `out` (a contiguous row, a multiple of 16) at the places `wrong` get the
        values that `normal_` with (mean, std) draws there next; also returns the places whose new values are out of bounds."""
        place = _place(next)
        into, after, places = out.data_ptr(), ctypes.byref(place), wrong.ctypes.data
        call = (_DTYPES[out.dtype], _changed(block), after, into, len(out), places, len(wrong))
        left = self._library.gp_redraw(*call, *normal, *bounds)
        return place.value, wrong[:left]

    def _fill(self, kind: Kind, block: Words, next: int, out: torch.Tensor, rows: _Rows, a: float, b: float) -> int:
        if not self.fills(out.dtype, kind) or out.device.type != "cpu":
            raise ValueError(f"no compiled {kind} fill of {out.dtype} on {out.device}; `fills` tells which there are")
        if kind == "normal" and (rows.length % GROUP or rows.gap % GROUP):
            raise ValueError(f"normal values come in groups of {GROUP}, not in rows of {rows.length} and gaps of {rows.gap}")
        place = _place(next)
        into, after = out.data_ptr(), ctypes.byref(place)
        self._library.gp_rows(_KINDS[kind], _DTYPES[out.dtype], _changed(block), after, into, *rows, a, b)
        return place.value


class _Rows(NamedTuple):
    """How many rows of how many elements, the words passed over between two, and the elements from one to the next."""

    number: int
    length: int
    gap: int
    stride: int


def _one_row(out: torch.Tensor) -> _Rows:
    if not out.is_contiguous():
        raise ValueError(f"a contiguous tensor is needed, not one with strides {out.stride()}")
    return _Rows(1, out.numel(), 0, 0)


def _place(next: int) -> ctypes.c_int64:
    if not 1 <= next <= WORDS:
        raise ValueError(f"1 to {WORDS} words of a block are consumed, not {next}")
    return _LONG(next)


def _words(block: Words) -> int:
    if block.dtype != np.uint32 or block.shape != (WORDS,) or not (block.flags.c_contiguous and block.flags.aligned):
        raise ValueError(f"a block is a contiguous np.uint32 array of {WORDS} words, not {block.dtype} {block.shape}")
    return block.ctypes.data


def _changed(block: Words) -> int:
    if not block.flags.writeable:
        raise ValueError("the block cannot be changed: it is read-only")
    return _words(block)


def _aligned(polynomial: Polynomial) -> Polynomial:
    """The polynomial where words of 64 bits may be read."""
    if polynomial.dtype != np.uint8 or polynomial.shape != (PACKED,):
        raise ValueError(f"a polynomial is an np.uint8 array of {PACKED} bytes, not {polynomial.dtype} {polynomial.shape}")
    usable = polynomial.flags.c_contiguous and polynomial.ctypes.data % 8 == 0
    return polynomial if usable else polynomial.copy()


@cache
def characteristic_terms() -> NDArray[np.int32]:
    """The exponents of mt19937's characteristic polynomial, the highest first: 135 of them.

    The closed form is Matsumoto and Nishimura's (1998, appendix), with n = 624, m = 397, w = 32, r = 31 and the twist's constant.
    """
    powers = [1]  # of x^623 + x^396
    for _ in range(31):
        powers.append(powers[-1] << 623 ^ powers[-1] << 396)
    found = powers[31]
    for bit in range(31):
        if 0x9908B0DF >> bit & 1:
            found ^= powers[30 - bit]
    found = found << 624 ^ found << 397 ^ 1  # the constant's highest bit
    bits = np.unpackbits(np.frombuffer(found.to_bytes(PACKED, "little"), np.uint8), bitorder="little")
    return np.ascontiguousarray(np.flatnonzero(bits)[::-1], np.int32)


# -- whether it is there ------------------------------------------------------------------------------------------------


def native() -> Native | None:
    """The accelerator, or None without one: then everything works, more slowly. `GROUNDPLAN_NATIVE=0` turns it off."""
    return _found()[0]


def why_not() -> str | None:
    """Why there is no accelerator, or what torch does itself in spite of it; None if it does everything."""
    return _found()[1]


@cache
def _found() -> tuple[Native | None, str | None]:
    if os.environ.get("GROUNDPLAN_NATIVE") == "0":
        return None, "the environment variable GROUNDPLAN_NATIVE is 0"
    path = library_path()
    if path is None:
        return None, "the compiled library is missing: no C compiler (gcc or clang) was found when groundplan was installed"
    return load(path)


def library_path() -> Path | None:
    """The compiled library beside this module, if it was built."""
    candidates = (Path(__file__).with_name(f"_mersenne{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def load(path: Path) -> tuple[Native | None, str | None]:
    """The accelerator in this file, tested, and a sentence about what cannot be used of it."""
    try:
        found = Native(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        return None, f"the compiled library cannot be loaded: {error}"
    if found._library.gp_version() != _VERSION:
        return None, f"the compiled library is of another version of groundplan; install again to rebuild it ({path})"
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        return _tested(found)


# -- whether it gives torch's bits --------------------------------------------------------------------------------------

# Elements of one comparison. Where torch was compiled to other instructions, about one normal value in a hundred differs.
_COMPARED = 2_048
# After how many words a fill starts (None: in the block `_edges`), and its arguments. In some of them many values are rounded to
# the upper bound, which becomes the lower one, or from the middle between two bfloat16 values.
_CASES: dict[Kind, list[tuple[int | None, float, float]]] = {
    "uniform": [(0, 0.0, 1.0), (7, -(2048**-0.5), 2048**-0.5), (617, 1.0, 1 + 2**-20), (5, 1.0, 1.05), (None, 0.0, 1.0)],
    "normal": [(0, 0.0, 1.0), (7, 0.0, 0.02), (617, 0.1, 0.7), (5, 1 + 2**-8, 0.0), (None, 0.0, 1.0)],
}


def _tested(found: Native) -> tuple[Native | None, str | None]:
    if not _words_agree(found):
        return None, "the compiled library does not give the generator's words"
    if not found._library.gp_fills():
        found._fills = set()
        return found, "torch makes the values of all fills: the compiled ones need a CPU with AVX2, FMA and F16C"
    found._fills = {(kind, dtype) for kind in _KINDS for dtype in _agreeing(found, kind)}
    names = [f"{kind}_ of {dtype}" for kind, dtype in product(_KINDS, _DTYPES) if not found.fills(dtype, kind)]
    return found, f"torch gives other bits than the compiled library for {', '.join(names)}" if names else None


def _agreeing(found: Native, kind: Kind) -> list[torch.dtype]:
    """The dtypes of which this kind of fill gives torch's values: none if not of float32, as rounding it to others only hides
    where it differs."""
    if not _fill_agrees(found, kind, torch.float32):
        return []
    return [dtype for dtype in _DTYPES if dtype == torch.float32 or _fill_agrees(found, kind, dtype)]


def _words_agree(found: Native) -> bool:
    """Twists, skips and jumps against torch; products against jumps, as x^a * x^b is the jump by a + b."""
    generator = torch.Generator().manual_seed(DEGREE)
    block, next = state_of(generator)
    next = found.skip(block, next, 1_000)
    _draw(generator, 1_000)
    now, there = state_of(generator)
    far = block.copy()
    found.twist(far, 75)
    fifteen, thirty = _power(15 * WORDS), _power(30 * WORDS)
    sixty = found.square(thirty)
    return (
        next == there
        and np.array_equal(block, now)
        and np.array_equal(sixty, found.multiply(thirty, thirty))
        and np.array_equal(far, found.jump(block, found.multiply(sixty, fifteen)))
    )


def _power(exponent: int) -> Polynomial:
    """x^exponent, for an exponent below the degree."""
    found = np.zeros(PACKED, np.uint8)
    found[exponent // 8] = 1 << exponent % 8
    return found


def _fill_agrees(found: Native, kind: Kind, dtype: torch.dtype) -> bool:
    return all(_filled(kind, dtype, *case, found) == _filled(kind, dtype, *case, None) for case in _CASES[kind])


def _filled(kind: Kind, dtype: torch.dtype, start: int | None, a: float, b: float, by: Native | None) -> tuple[bytes, bytes, int]:
    """A fill's values, and the block and the place in it that it leaves; None: as torch makes them."""
    values = np.zeros(_COMPARED * dtype.itemsize, np.uint8)
    out = torch.frombuffer(values, dtype=dtype)
    generator = generator_at(_edges(), 1) if start is None else torch.Generator().manual_seed(start)
    _draw(generator, start or 0)
    if by is not None:
        block, next = state_of(generator)
        next = by._fill(kind, block, next, out, _one_row(out), a, b)
    else:
        (out.uniform_ if kind == "uniform" else out.normal_)(a, b, generator=generator)
        block, next = state_of(generator)
    return values.tobytes(), block.tobytes(), next


def _draw(generator: torch.Generator, count: int) -> None:
    torch.empty(count, dtype=torch.int32, device="cpu").random_(generator=generator)


@cache
def _edges() -> Words:
    """A block of rare words: the ends of the range, multiples of an eighth, and numbers of 12 bits, which half-precision dtypes
    often have to round from the middle between two of theirs."""
    ends = [0, 0xFFFFFF, 1, 0xFFFFFE, *range(0, 1 << 24, 1 << 21)] * 3
    few_bits = (np.arange(WORDS - 1 - len(ends)) * 1_117 % 4_096) << 12
    return untempered(np.array([0, *ends, *few_bits], np.uint32))


# -- a generator's state ------------------------------------------------------------------------------------------------


def state_of(generator: torch.Generator) -> tuple[Words, int]:
    """A CPU generator's block (a copy) and how many of its words are consumed; none are left in one that was just seeded."""
    state = generator.get_state().numpy()
    left = int(state[8:12].view(np.int32)[0])  # one more than there are
    return state[24 : 24 + 8 * WORDS].view(np.uint64).astype(np.uint32), WORDS + 1 - left


def generator_at(block: Words, next: int) -> torch.Generator:
    """A generator in this state."""
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state().numpy()
    state[8:12].view(np.int32)[0], state[16:24].view(np.uint64)[0] = WORDS + 1 - next, next
    state[24 : 24 + 8 * WORDS].view(np.uint64)[:] = block
    generator.set_state(torch.from_numpy(state))
    return generator


def untempered(words: Words) -> Words:
    """The words of a block that give these when they are drawn."""
    words = words ^ words >> np.uint32(18)
    words = words ^ words << np.uint32(15) & np.uint32(0xEFC60000)
    mixed: Words = words
    for _ in range(4):
        mixed = words ^ mixed << np.uint32(7) & np.uint32(0x9D2C5680)
    mixed ^= mixed >> np.uint32(11) ^ mixed >> np.uint32(22)
    return mixed
