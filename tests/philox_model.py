"""torch's random fills on CUDA in plain numpy, after the kernels' sources: what `groundplan.tracer.philox` is checked against.

Uniform values are the device's, bit for bit; normal ones are close, as the device approximates the sine and the cosine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from groundplan.tracer.philox import Grid

Array = npt.NDArray[Any]
REACH = 2**31 - 1  # bytes that one launch addresses
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)


# -- the engine ---------------------------------------------------------------------------------------------------------


def philox(key: int, counter: Array | int, thread: Array | int) -> Array:
    """Philox4x32-10: four 32-bit words (in the last axis) for every 128-bit counter (`counter`, `thread`), low half first."""
    halves = [np.asarray(half, np.uint64) for half in (counter, thread)]
    words: list[Array] = list(np.broadcast_arrays(*(word for half in halves for word in (half & _LOW, half >> _HIGH))))
    first, second = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        words = _philox_round(words, np.uint64(first), np.uint64(second))
        first, second = (first + 0x9E3779B9) & 0xFFFFFFFF, (second + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(words, -1).astype(np.uint32)


def _philox_round(words: list[Array], first: np.uint64, second: np.uint64) -> list[Array]:
    left, right = words[0] * np.uint64(0xD2511F53), words[2] * np.uint64(0xCD9E8D57)
    return [(right >> _HIGH) ^ words[1] ^ first, right & _LOW, (left >> _HIGH) ^ words[3] ^ second, left & _LOW]


# -- the kernel ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where elements find their numbers: the counter's low half (from the fill's offset on), its high half, and the lane."""

    counter: Array
    thread: Array
    lane: Array


def kernel(numel: int, unroll: int, grid: Grid) -> Places:
    """`distribution_elementwise_grid_stride_kernel`, loop by loop, all threads at a time."""
    count = _threads(numel, grid)
    counter, thread, lane = (np.full(numel, -1, np.int64) for _ in range(3))
    for step, first in enumerate(range(0, numel, count * unroll)):
        for ii in range(unroll):
            here = np.arange(first + ii * count, min(first + (ii + 1) * count, numel))
            counter[here], thread[here], lane[here] = step, here % count, ii
    return Places(counter, thread, lane)


def _threads(numel: int, grid: Grid) -> int:
    return 256 * min(-(-numel // 256), grid.multiprocessors * (grid.threads_per_multiprocessor // 256))


def _calls(numel: int, unroll: int, grid: Grid) -> int:
    """How many times each thread of one launch calls the engine."""
    return (numel - 1) // (unroll * _threads(numel, grid)) + 1 if numel else 0


# -- one fill -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fill:
    """One `uniform_()` or `normal_()` on a contiguous tensor; its methods take the elements to look at."""

    numel: int
    dtype: torch.dtype
    grid: Grid
    seed: int = 0
    offset: int = 0
    reach: int = REACH

    @property
    def unroll(self) -> int:
        """The elements of one call to the engine."""
        return 2 if self.dtype == torch.float64 else 4

    @property
    def everything(self) -> Array:
        """Every element."""
        return np.arange(self.numel)

    def launches(self) -> Iterator[tuple[int, int]]:
        """What each launch starts at and stops before: `SplitUntil32Bit`, with its stack."""
        stack = [(0, self.numel)]
        while stack:
            start, stop = stack.pop()
            if 1 + (stop - start - 1) * self.dtype.itemsize <= self.reach:
                yield start, stop
            else:
                half = start + (stop - start) // 2
                stack += [(half, stop), (start, half)]

    def places(self, index: Array) -> Places:
        """Where the elements find their numbers."""
        counter, thread, lane = (np.full(index.shape, -1, np.int64) for _ in range(3))
        launches = list(self.launches())
        base = _calls(self.numel, self.unroll, self.grid) if len(launches) > 1 else 0
        for start, stop in launches:
            count = _threads(stop - start, self.grid)
            here = (start <= index) & (index < stop)
            step, rest = np.divmod(index[here] - start, self.unroll * count)
            counter[here], thread[here], lane[here] = base + step, rest % count, rest // count
            base += _calls(stop - start, self.unroll, self.grid)
        return Places(counter, thread, lane)

    def uniform(self, index: Array) -> Array:
        """The values of `uniform_()`, in half precision before rounding."""
        units, lane = self._units(index)
        drawn = np.take_along_axis(units, lane, -1)[..., 0]
        return np.where(drawn == 1, 0, drawn)

    def normal(self, index: Array) -> Array:
        """The values of `normal_()`, after Box and Muller: the sine in even lanes, the cosine in odd ones."""
        units, lane = self._units(index)
        radius, angle = np.moveaxis(np.take_along_axis(units, lane - lane % 2 + np.arange(2), -1), -1, 0).astype(np.float64)
        wave = np.where(lane[..., 0] % 2 == 0, np.sin(2 * np.pi * angle), np.cos(2 * np.pi * angle))
        return np.asarray(np.sqrt(-2 * np.log(radius)) * wave)

    def _units(self, index: Array) -> tuple[Array, Array]:
        """What the engine gave the thread of each element, as numbers in (0, 1], and the element's lane in it."""
        places = self.places(index)
        words = philox(self.seed, places.counter + self.offset // 4, places.thread)
        return _in_unit(words, self.dtype), places.lane[..., None]


def _in_unit(words: Array, dtype: torch.dtype) -> Array:
    """Numbers in (0, 1]: `curand_uniform4` of every word, or `curand_uniform2_double` of every two."""
    if dtype == torch.float64:
        wide = words.astype(np.uint64)
        return np.asarray((wide[..., 0::2] ^ (wide[..., 1::2] << np.uint64(21))) * 2.0**-53 + 2.0**-54)
    return words.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
