"""Where a random fill stands in the stream of a CUDA generator (Philox4x32-10), and how to reproduce any part of it.

A CUDA generator is a seed and an *offset*. A fill of n elements starts S threads, in blocks of 256 and never more than the device
holds at once. Every call of a thread to the engine gives four 32-bit words, which make U elements: two of 64 bits, or four of
others. Element i of the fill takes

    thread = i % S     step = i // (U * S)     lane = i % (U * S) // S
    words  = philox(key=seed, counter=(offset / 4 + step, thread))

and the offset moves by 4 for every step. So a native call of any length m on its own, at an offset moved by 4 * k, gives the m
elements from k * U * S on: where m <= S both take lane 0 of the threads 0 to m - 1, and where m > S the device is full in both
and S is the same.

A tensor that 32 bits cannot address (beyond 2 GiB) is filled in several launches. The whole reserves its share of the stream and
leaves it unused; then it is halved until every part can be addressed, and each part is a fill like any other.

Read from torch 2.11 and 2.13, which agree: `ATen/native/cuda/DistributionTemplates.h` (threads, steps, lanes, the reservation,
the words of each operator) and `ATen/native/DistributionTemplates.h` (the range of `random_`). Read from torch's repository only:
`ATen/TensorIterator.cpp` (halving) and `ATen/cuda/CUDAGeneratorImpl.cpp` (offset, state).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_aten = torch.ops.aten
_BLOCK = 256  # threads of a block: `block_size_bound`
_CALL = 4  # what one call to the engine moves the offset by: `max_generator_offsets_per_curand_call`
_REACH = 2**31 - 1  # bytes that one launch can address: `can_use_32bit_indexing`
_WIDE = 2**28  # from this many numbers to choose from on, `random_` takes 64 bits an element
_LARGEST = 1 << 22  # elements of scratch memory for one piece
_STATE = struct.Struct("=QQ")  # the seed, the offset

_FLOATS = frozenset([torch.float32, torch.float64, torch.float16, torch.bfloat16])
_INTEGERS = frozenset([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
_NUMBERS = _FLOATS | _INTEGERS
_DTYPES = {
    _aten.uniform_.default: _FLOATS,
    _aten.normal_.default: _FLOATS,
    _aten.exponential_.default: _FLOATS,
    _aten.cauchy_.default: _FLOATS,
    _aten.log_normal_.default: _FLOATS,
    _aten.rand.default: _FLOATS,
    _aten.rand.generator: _FLOATS,
    _aten.randn.default: _FLOATS,
    _aten.randn.generator: _FLOATS,
    _aten.geometric_.default: _NUMBERS,
    _aten.bernoulli_.float: _NUMBERS | {torch.bool},
    _aten.random_.default: _NUMBERS | {torch.bool},
    _aten.random_.to: _NUMBERS | {torch.bool},
    getattr(_aten.random_, "from"): _NUMBERS | {torch.bool},
}


@dataclass(frozen=True)
class Grid:
    """What of a CUDA device decides how it fills: S = 256 * min(ceil(n / 256), SMs * (threads of an SM // 256)).

    `calc_execution_policy` in `ATen/native/cuda/DistributionTemplates.h`.

    >>> h100 = Grid(multiprocessors=132, threads_per_multiprocessor=2048)
    >>> h100.threads(1000), h100.threads(10**9)
    (1024, 270336)
    """

    multiprocessors: int
    threads_per_multiprocessor: int

    @classmethod
    def of(cls, device: torch.device) -> Grid:
        """The grid of a real device.

        >>> Grid.of(torch.device("cuda")).threads(1) if torch.cuda.is_available() else 256
        256
        """
        properties = torch.cuda.get_device_properties(device)
        return cls(properties.multi_processor_count, properties.max_threads_per_multi_processor)

    def threads(self, numel: int) -> int:
        """S, the threads that one launch over `numel` elements starts.

        >>> Grid(multiprocessors=2, threads_per_multiprocessor=1536).threads(257)
        512
        """
        blocks = self.multiprocessors * (self.threads_per_multiprocessor // _BLOCK)
        return _BLOCK * min(-(-numel // _BLOCK), blocks)


@dataclass(frozen=True)
class Piece:
    """A native call on a contiguous tensor of `stop - start` elements, `offset` after the fill's own offset, gives [start, stop).

    >>> Piece(start=4096, stop=5000, offset=4)
    Piece(start=4096, stop=5000, offset=4)
    """

    start: int
    stop: int
    offset: int


def increment(func: Any, dtype: torch.dtype, numel: int, grid: Grid, args: Sequence[Any] = ()) -> int | None:
    """How far one call of `func` on `numel` elements moves the offset; `None` where that is not certain.

    4 * ceil(n / (U * S)) for every launch (`calc_execution_policy`). `args` are the operator's arguments after the tensor; only
    `random_` with a range needs them.

    >>> small = Grid(multiprocessors=1, threads_per_multiprocessor=1024)
    >>> increment(torch.ops.aten.uniform_.default, torch.float32, 4097, small)
    8
    >>> increment(torch.ops.aten.uniform_.default, torch.float64, 4097, small)
    12
    >>> increment(torch.ops.aten.random_.to, torch.int64, 4097, small, args=[2**40])
    12
    """
    unroll = _unroll(func, dtype, args)
    if unroll is None:
        return None
    last = _launches(numel, unroll, dtype.itemsize, grid)[-1]
    return last.offset + _reserved(last.stop - last.start, unroll, grid)


def pieces(
    func: Any,
    dtype: torch.dtype,
    numel: int,
    start: int,
    stop: int,
    grid: Grid,
    args: Sequence[Any] = (),
    largest: int = _LARGEST,
) -> list[Piece] | None:
    """The calls that give the elements [start, stop) of one contiguous fill of `numel` elements; `None` as in `increment`.

    A piece starts at a multiple of U * S from where its launch starts, so the first one may start before `start`; none ends after
    `stop`, and together they leave no gap. One has at most `largest` elements, or U * S where that is more.

    >>> small = Grid(multiprocessors=1, threads_per_multiprocessor=1024)
    >>> for piece in pieces(torch.ops.aten.normal_.default, torch.float32, 20_000, 5000, 13_000, small, largest=4096) or []:
    ...     print(piece)
    Piece(start=4096, stop=8192, offset=4)
    Piece(start=8192, stop=12288, offset=8)
    Piece(start=12288, stop=13000, offset=12)
    """
    unroll = _unroll(func, dtype, args)
    if unroll is None:
        return None
    launches = _launches(numel, unroll, dtype.itemsize, grid)
    return [piece for launch in launches for piece in _cut(launch, start, stop, unroll, grid, largest)]


def placed(state: torch.Tensor, offset: int) -> torch.Tensor:
    """The state of a CUDA generator (`get_state`), its offset moved by `offset`.

    16 bytes: the seed and the offset, both 64-bit in the machine's byte order (`CUDAGeneratorImpl::get_state`).

    >>> state = placed(torch.zeros(16, dtype=torch.uint8), 8)
    >>> seed_of(state), offset_of(state)
    (0, 8)
    """
    seed, before = _seed_and_offset(state)
    return torch.frombuffer(bytearray(_STATE.pack(seed, before + offset)), dtype=torch.uint8)


def offset_of(state: torch.Tensor) -> int:
    """The offset in the state of a CUDA generator.

    >>> offset_of(torch.tensor([7] + [0] * 7 + [12] + [0] * 7, dtype=torch.uint8))
    12
    """
    return _seed_and_offset(state)[1]


def seed_of(state: torch.Tensor) -> int:
    """The seed in the state of a CUDA generator.

    >>> seed_of(torch.tensor([7] + [0] * 7 + [12] + [0] * 7, dtype=torch.uint8))
    7
    """
    return _seed_and_offset(state)[0]


def _seed_and_offset(state: torch.Tensor) -> tuple[int, int]:
    if state.numel() != _STATE.size:
        raise ValueError(f"the state of a CUDA generator has {_STATE.size} bytes, this one has {state.numel()}")
    seed, offset = _STATE.unpack(state.numpy().tobytes())
    return seed, offset


def _unroll(func: Any, dtype: torch.dtype, args: Sequence[Any]) -> int | None:
    """U, the elements that a thread makes of one call to the engine: its result's size by the size that is computed in."""
    if dtype not in _DTYPES.get(func, ()):
        return None
    if func is _aten.random_.default:
        return 2 if dtype in (torch.float64, torch.int64) else 4
    if func is _aten.random_.to or func is getattr(_aten.random_, "from"):
        choices = _choices(dtype, [0, *args] if func is _aten.random_.to else args)
        return None if choices is None else 2 if choices >= _WIDE else 4
    return 2 if dtype == torch.float64 else 4


def _choices(dtype: torch.dtype, args: Sequence[Any]) -> int | None:
    """The numbers that `random_` with a range chooses from; `None` where it adjusts the range to the dtype's precision first."""
    if len(args) != 2:
        return None
    low, high = args
    if low == -(2**63) and high is None:
        return 2**64
    most = _last_integer(dtype)
    stop = most + 1 if high is None else high
    if dtype.is_floating_point and (low < -most or stop > most + 1):
        return None
    return int(stop - low)


def _last_integer(dtype: torch.dtype) -> int:
    """The largest integer of a dtype; of a floating-point one, the largest up to which it has them all (2 ** digits)."""
    if dtype.is_floating_point:
        return int(2 / torch.finfo(dtype).eps)
    return 1 if dtype == torch.bool else torch.iinfo(dtype).max


def _reserved(numel: int, unroll: int, grid: Grid) -> int:
    """What one launch moves the offset by."""
    return _CALL * -(-numel // (unroll * grid.threads(numel))) if numel else 0


def _launches(numel: int, unroll: int, itemsize: int, grid: Grid) -> list[Piece]:
    """The launches of one call in order, each with its offset from the call's."""
    lengths = _halved(numel, itemsize)
    start, offset = 0, 0 if len(lengths) == 1 else _reserved(numel, unroll, grid)
    launches = []
    for length in lengths:
        launches.append(Piece(start, start + length, offset))
        start, offset = start + length, offset + _reserved(length, unroll, grid)
    return launches


def _halved(numel: int, itemsize: int) -> list[int]:
    """The lengths into which a contiguous tensor is split until 32 bits address each (`SplitUntil32Bit`)."""
    if 1 + (numel - 1) * itemsize <= _REACH:
        return [numel]
    return [*_halved(numel // 2, itemsize), *_halved(numel - numel // 2, itemsize)]


def _cut(launch: Piece, start: int, stop: int, unroll: int, grid: Grid, largest: int) -> list[Piece]:
    """The pieces of one launch that cover what of [start, stop) lies in it."""
    low, high = max(start, launch.start), min(stop, launch.stop)
    if low >= high:
        return []
    step = unroll * grid.threads(launch.stop - launch.start)
    length = step * max(largest // step, 1)
    first = low - (low - launch.start) % step
    return [
        Piece(at, min(at + length, high), launch.offset + _CALL * ((at - launch.start) // step))
        for at in range(first, high, length)
    ]
