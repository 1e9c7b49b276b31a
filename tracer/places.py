"""Places in a random stream: where a generator stands, said without drawing anything.

A `Place` is a number of draws (32-bit words) after a known state of torch's CPU generator. Ops move it by arithmetic (`draws`),
and only where numbers are wanted is it turned into a state, by jumping there from the nearest state that is known.

The CPU generator also keeps the second number of a pair of normal samples for the next small `normal_`; it survives everything
but a new seed, so a place says from which pair it came.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass, field
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch

from .jump import Block, is_known, jumped, twisted
from .native import WORDS, native

# torch's CPUGeneratorImplState, little-endian: `left` and `next` say how much of the block `state` has been used
_LAYOUT = np.dtype(
    [
        ("seed", "<u8"),
        ("left", "<i4"),
        ("seeded", "<i4"),
        ("next", "<u8"),
        ("state", "<u8", (WORDS,)),
        ("samples", "V32"),  # normal_x, normal_y, normal_rho, normal_is_valid
        ("float_sample", "V8"),
    ]
)
_SAMPLES = 5016  # the byte where the normal samples start
_SAMPLED = 5040  # the byte that says whether a normal sample is kept
_SKIPPED_AT_ONCE = 1 << 15
_KEPT_BLOCKS = 4096  # of 2.5 kB
_JUMP_FROM = 600_000  # words: from here on a jump whose polynomial is known beats drawing
_COMPILED_JUMP_FROM = 1_200_000  # words: the same against compiled twists
_FIRST_JUMP_FROM = 6_000_000  # words: and from here on one whose polynomial is not


class Draw(NamedTuple):
    """What a call takes from the CPU's generator: `words` of 32 bits, and `normals` drawn one by one, in pairs."""

    words: int
    normals: int = 0


class Stream:
    """The numbers that a CPU generator gives from one state on: its state after any number of words."""

    def __init__(self, state: torch.Tensor) -> None:
        self.start = state.clone()
        self._record = np.frombuffer(self.start.numpy().tobytes(), _LAYOUT)[0]
        self._used = WORDS if self._record["left"] == 1 else int(self._record["next"])
        self._blocks: dict[int, Block] = {0: self._record["state"].astype(np.uint32)}
        self._known = [0]
        self._lock = Lock()
        self.lengths: dict[Any, int] = {}
        """How far some ops went whose draws depend on values, once that has been found out."""

    @property
    def keeps_a_sample(self) -> bool:
        """Whether the state it starts from holds the second number of a pair."""
        return bool(self.start[_SAMPLED])

    def state(self, words: int, samples: torch.Tensor | None = None) -> torch.Tensor:
        """The generator's state after `words` words, with the normal sample of the state `samples`; None: none is kept."""
        if words == 0:
            state = self.start.clone()
        else:
            number, used = self._located(words)
            state = self._written(self._block(number), used)
        return _with_samples(state, samples)

    def block(self, words: int) -> tuple[Block, int]:
        """The block that the generator is in after `words` words, and how much of it is used: 624 before the next twist."""
        if words == 0:
            return self._blocks[0].copy(), self._used
        number, used = self._located(words)
        return self._block(number).copy(), used

    def note(self, words: int, block: Block) -> None:
        """Remember that a generator is in `block` after `words` words: what comes after need not be jumped to."""
        if words:
            self._keep(self._located(words)[0], block)

    def _located(self, words: int) -> tuple[int, int]:
        """The number of the block that holds the last of `words` words, and how much of it they use."""
        number, used = divmod(self._used + words - 1, WORDS)
        return number, used + 1

    def _written(self, block: Block, used: int) -> torch.Tensor:
        record = self._record.copy()
        record["state"], record["left"], record["next"] = block, 1 + WORDS - used, used
        return torch.frombuffer(bytearray(record.tobytes()), dtype=torch.uint8)

    def _block(self, number: int) -> Block:
        with self._lock:
            nearest = self._known[bisect_right(self._known, number) - 1]
            block = self._blocks[nearest]
        if nearest == 0 and number:  # a seed is no block of the stream yet: its first word is not all used
            nearest, block = 1, twisted(block)
        if number > nearest:
            block = self._advanced(block, number - nearest)
        self._keep(number, block)
        return block

    def _advanced(self, block: Block, count: int) -> Block:
        words = count * WORDS
        compiled = native() is not None
        known_pays = words >= (_COMPILED_JUMP_FROM if compiled else _JUMP_FROM)
        pays = words >= _FIRST_JUMP_FROM or (known_pays and is_known(words))
        if pays and jumps_agree():
            return jumped(block, words)
        if count < 4 or compiled:
            return twisted(block, count)
        generator = torch.Generator()
        generator.set_state(self._written(block, WORDS))
        skip(words, generator)
        return _block_of(generator.get_state())

    def _keep(self, number: int, block: Block) -> None:
        with self._lock:
            if number not in self._blocks:
                self._blocks[number] = block
                insort(self._known, number)
            if len(self._known) > _KEPT_BLOCKS:  # thin them out evenly
                for each in self._known[1::2]:
                    del self._blocks[each]
                del self._known[1::2]


def state_from(words: bytes) -> torch.Tensor:
    """The state of a generator whose block is these 2496 bytes, as if it had just been seeded with them."""
    record = np.zeros((), _LAYOUT)
    record["state"], record["left"], record["seeded"] = np.frombuffer(words, "<u4"), 1, 1
    record["seed"] = int.from_bytes(words[:8], "little")
    return torch.frombuffer(bytearray(record.tobytes()), dtype=torch.uint8)


def _block_of(state: torch.Tensor) -> Block:
    block: Block = np.frombuffer(state.numpy().tobytes(), _LAYOUT)[0]["state"].astype(np.uint32)
    return block


def _with_samples(state: torch.Tensor, samples: torch.Tensor | None) -> torch.Tensor:
    if samples is None:
        state[_SAMPLES:] = 0
    else:
        state[_SAMPLES:] = samples[_SAMPLES:]
    return state


def skip(words: int, generator: torch.Generator) -> None:
    """Draw `words` words from a CPU generator and drop them; nothing else of its state changes (a kept sample stays)."""
    scratch = torch.empty(min(words // 2, _SKIPPED_AT_ONCE), dtype=torch.int64, device="cpu")
    fill = torch.ops.aten.random_.default
    for start in range(0, words // 2, _SKIPPED_AT_ONCE):
        fill(scratch[: min(words // 2 - start, _SKIPPED_AT_ONCE)], generator=generator)
    if words % 2:
        fill(torch.empty(1, dtype=torch.int8, device="cpu"), generator=generator)


@cache
def jumps_agree() -> bool:
    """Whether a jump leads where drawing does, tried once: it rests on Fourier transforms, or on compiled code."""
    generator = torch.Generator().manual_seed(2008)
    skip(WORDS, generator)
    block = _block_of(generator.get_state())
    skip(1000 * WORDS, generator)
    return np.array_equal(jumped(block, 1000 * WORDS), _block_of(generator.get_state()))


_KEPT_STREAMS = 4
_streams: dict[bytes, Stream] = {}  # the one used last comes last
_lock = Lock()


@dataclass(frozen=True, slots=True)
class Place:
    """`words` draws after the start of `stream`.

    `pair` says after how many words the pair was drawn whose second number the generator still keeps; `-1` stands for the one
    that it kept at the stream's start, None for none.
    """

    stream: Stream = field(repr=False)
    words: int = 0
    pair: int | None = None

    @classmethod
    def at(cls, state: torch.Tensor) -> Place:
        """The place of a generator in this state.

        >>> generator = torch.Generator().manual_seed(0)
        >>> place = Place.at(generator.get_state()).after(Draw(words=10))
        >>> _ = torch.rand(10, generator=generator)
        >>> torch.equal(place.state(), generator.get_state())
        True
        """
        stream = Stream(state)
        return cls(stream, 0, -1 if stream.keeps_a_sample else None)

    @classmethod
    def known(cls, state: torch.Tensor) -> Place:
        """The same, with all that has been worked out before about the stream that starts there."""
        key = state.numpy().tobytes()
        with _lock:
            stream = _streams.pop(key, None) or Stream(state)
            _streams[key] = stream
            if len(_streams) > _KEPT_STREAMS:
                del _streams[next(iter(_streams))]
        return cls(stream, 0, -1 if stream.keeps_a_sample else None)

    def moved(self, words: int) -> Place:
        """So many words further on."""
        return Place(self.stream, self.words + words, self.pair)

    def after(self, draw: Draw) -> Place:
        """Where the generator stands after a call that draws `draw`."""
        if not draw.normals:
            return self.moved(draw.words)
        fresh = draw.normals - (self.pair is not None)
        words = self.words + 4 * (-(-fresh // 2))
        return Place(self.stream, words, words - 4 if fresh % 2 else None)

    def state(self) -> torch.Tensor:
        """The generator's state here."""
        return self.stream.state(self.words, self._samples())

    def generator(self) -> torch.Generator:
        """A new generator that stands here."""
        generator = torch.Generator()
        generator.set_state(self.state())
        return generator

    def reached(self, generator: torch.Generator) -> None:
        """Tell the stream that `generator` has arrived here."""
        self.stream.note(self.words, _block_of(generator.get_state()))

    def _samples(self) -> torch.Tensor | None:
        """A state that keeps the same normal sample."""
        if self.pair is None:
            return None
        if self.pair == -1:
            return self.stream.start
        generator = Place(self.stream, self.pair).generator()
        torch.empty(1, dtype=torch.float64, device="cpu").normal_(generator=generator)
        return generator.get_state()
