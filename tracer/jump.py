"""Jumping ahead in mt19937: the state any number of words later, without drawing them.

The generator's state is a *block* of 624 words. A step of one word is linear over GF(2), so by the theorem of Cayley and
Hamilton the block that lies `distance` words ahead is a sum (XOR) of the next 19937 ones: those whose bits are set in the
polynomial x^distance modulo the characteristic polynomial of a step (Haramoto et al., "Efficient jump ahead for F2-linear
random number generators", 2008).
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from .native import DEGREE, PACKED, WORDS, characteristic_terms, native, untempered

Block = NDArray[np.uint32]
Bits = NDArray[np.uint8]  # one coefficient of a polynomial an element, the lowest first


def jumped(block: Block, distance: int) -> Block:
    """The block that lies `distance` words after `block`, which must itself have come from a twist (not from a seed)."""
    compiled = native()
    if compiled is not None:
        ahead: Block = compiled.jump(block, packed_power(distance))
        return ahead
    return _combined(block, np.unpackbits(packed_power(distance), bitorder="little"))


def twisted(block: Block, count: int = 1) -> Block:
    """The block that lies `count` blocks after `block`."""
    compiled = native()
    if compiled is not None:
        block = block.copy()
        compiled.twist(block, count)
        return block
    for _ in range(count):
        block = _twist(block)
    return block


_HIGH, _LOW, _MATRIX = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x9908B0DF)


def _twist(block: Block) -> Block:
    """One step of 624 words (Matsumoto and Nishimura, 1998), in the runs of 227 words that do not depend on each other."""
    out = np.empty_like(block)
    out[:227] = block[397:] ^ _mixed(block[:227], block[1:228])
    out[227:454] = out[:227] ^ _mixed(block[227:454], block[228:455])
    out[454:623] = out[227:396] ^ _mixed(block[454:623], block[455:624])
    out[623:] = out[396:397] ^ _mixed(block[623:], out[:1])
    return out


def _mixed(upper: Block, lower: Block) -> Block:
    mixed: Block = (((upper & _HIGH) | (lower & _LOW)) >> np.uint32(1)) ^ ((lower & np.uint32(1)) * _MATRIX)
    return mixed


# -- applying a polynomial to a block -----------------------------------------------------------------------------------

_SPAN = DEGREE + WORDS + 3  # the words that the windows of a polynomial reach, in whole groups of four
_GROUPS = -(-DEGREE // 4)
_ROWS_AT_ONCE = 256


def _combined(block: Block, polynomial: Bits) -> Block:
    """The sum of the windows of 624 words that the polynomial's coefficients select.

    Four neighboring windows at a time: their sixteen sums are themselves windows of sixteen streams.
    """
    sums = _sums_of_four(_words_from(block, _SPAN))
    windows = np.lib.stride_tricks.sliding_window_view(sums.reshape(-1), WORDS)
    groups = polynomial[: 4 * _GROUPS].reshape(-1, 4) @ np.array([1, 2, 4, 8])
    starts = np.arange(_GROUPS) * 4 + groups * sums.shape[1]
    out = np.zeros(WORDS, np.uint32)
    for first in range(0, _GROUPS, _ROWS_AT_ONCE):
        out ^= np.bitwise_xor.reduce(windows[starts[first : first + _ROWS_AT_ONCE]], axis=0)
    return out


def _sums_of_four(words: Block) -> Block:
    """Row v is the sum of the streams that start k words later, for every bit k of v."""
    length = len(words) - 3
    sums = np.zeros((16, length), np.uint32)
    for row in range(1, 16):
        lowest = row & -row
        shift = lowest.bit_length() - 1
        np.bitwise_xor(sums[row ^ lowest], words[shift : shift + length], out=sums[row])
    return sums


def _words_from(block: Block, count: int) -> Block:
    """The first `count` words of the stream that starts with `block`: numpy draws them, and the tempering is undone."""
    generator = np.random.MT19937()
    generator.state = {"bit_generator": "MT19937", "state": {"key": block, "pos": WORDS}}
    return np.concatenate([block, untempered(generator.random_raw(count - WORDS).astype(np.uint32))])


# -- powers of x --------------------------------------------------------------------------------------------------------

_FREE_BITS = 14  # x^16383 is itself, no reduction needed


@lru_cache(maxsize=4096)
def packed_power(distance: int) -> Bits:
    """x^distance modulo the characteristic polynomial, eight coefficients a byte."""
    free = max(0, distance.bit_length() - _FREE_BITS)
    bits = np.zeros(8 * PACKED, np.uint8)
    bits[distance >> free] = 1
    power = np.packbits(bits, bitorder="little")
    for place in reversed(range(free)):
        power = _squared(power)
        if distance >> place & 1:
            power = _times_x(power)
    power.setflags(write=False)
    return power


def is_known(distance: int) -> bool:
    """Whether a jump of this distance has been worked out before, or soon will be: the second time it is asked for."""
    seen = _asked.get(distance, 0)
    _asked[distance] = seen + 1
    if len(_asked) > 10_000:
        _asked.clear()
    return seen > 0


_asked: dict[int, int] = {}


def _squared(power: Bits) -> Bits:
    compiled = native()
    if compiled is not None:
        square: Bits = compiled.square(power)
        return square
    spread = np.zeros(2 * DEGREE - 1, np.uint8)
    spread[::2] = np.unpackbits(power, bitorder="little")[:DEGREE]
    return _packed(_reduced(spread))


def _times_x(power: Bits) -> Bits:
    bits = np.unpackbits(power, bitorder="little")
    moved = np.concatenate(([0], bits[: DEGREE - 1])).astype(np.uint8)
    if bits[DEGREE - 1]:
        moved[characteristic_terms()[1:]] ^= 1
    return _packed(moved)


def _packed(bits: Bits) -> Bits:
    packed = np.zeros(PACKED, np.uint8)
    packed[: -(-DEGREE // 8)] = np.packbits(bits, bitorder="little")
    return packed


_LENGTH = 40960  # of the Fourier transforms: at least 2 * 19937, and quick


def _reduced(product: Bits) -> Bits:
    """A polynomial of degree below 2 * 19937 - 1 modulo the characteristic one (Barrett's reduction)."""
    characteristic, inverse = _transformed()
    quotient = _multiplied(product[DEGREE:], inverse)[DEGREE : 2 * DEGREE]
    reduced: Bits = product[:DEGREE] ^ _multiplied(quotient, characteristic)[:DEGREE]
    return reduced


def _multiplied(bits: Bits, transform: NDArray[np.complex128]) -> Bits:
    """A product over GF(2): the coefficients over the integers are below 2^15, so that doubles hold them with room to spare."""
    product = np.fft.irfft(np.fft.rfft(bits.astype(np.float64), _LENGTH) * transform, _LENGTH)
    return (np.rint(product).astype(np.int32) & 1).astype(np.uint8)


@cache
def _transformed() -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """The Fourier transforms of the characteristic polynomial p, and of x^(2 * 19937) divided by p."""
    bits = np.zeros(DEGREE + 1, np.uint8)
    bits[characteristic_terms()] = 1
    inverse = _divided()
    return np.fft.rfft(bits.astype(np.float64), _LENGTH), np.fft.rfft(inverse.astype(np.float64), _LENGTH)


def _divided() -> Bits:
    """x^(2 * 19937) divided by p, by long division: as p's second exponent lies far below, hundreds of bits at a time."""
    exponents = characteristic_terms().tolist()
    gap = exponents[0] - exponents[1]
    rest, quotient, top = 1 << (2 * DEGREE), 0, 2 * DEGREE
    while top >= DEGREE:
        low = max(DEGREE, top - gap + 1)
        part = rest >> low
        quotient |= part << (low - DEGREE)
        for exponent in exponents:
            rest ^= part << (exponent + low - DEGREE)
        top = low - 1
    return np.unpackbits(np.frombuffer(quotient.to_bytes(PACKED, "little"), np.uint8), bitorder="little")[: DEGREE + 1]
