"""Random streams: which state of which generator a recorded op starts from.

After every recorded random op the real generator is put into a state that exists nowhere else, a *fingerprint* (a seed that
nobody chose). At the next op, a known fingerprint says which op the stream follows, so saving, restoring and forking a generator
are understood without watching for them; an unknown state is one that the constructor set itself.

Generators arrive at the dispatcher in fresh wrappers; their state is the only identity they have.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from .errors import TraceError
from .graph import StreamPosition
from .imagined import ImaginedGenerator, current_device

_CPU = torch.default_generator


class Streams:
    """The ledger of one trace: which fingerprint stands for which position."""

    def __init__(self) -> None:
        self._known: dict[int, StreamPosition] = {}
        self._next = secrets.randbits(61) + (1 << 61)
        self._imagined: dict[int, ImaginedGenerator] = {}
        self._seed_of_all: int | None = None
        self._started: set[str] = set()
        self._private: list[tuple[torch.Generator, torch.Tensor]] = []

    def start_default(self) -> None:
        """Mark the ambient streams before the constructor can set a seed."""
        self.start(torch.default_generator, torch.device("cpu"))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for index, generator in enumerate(torch.cuda.default_generators):
                self.start(generator, torch.device("cuda", index))

    def ends(self) -> tuple[StreamPosition, ...]:
        """Where the default generators in use stand now.

        Raises `TraceError` where something drew from the CPU's generator after the last recorded op.
        """
        return tuple(self._end(torch.device(name)) for name in sorted(self._started))

    def _end(self, device: torch.device) -> StreamPosition:
        generator = self.default_generator(device)
        position = self._known.get(generator.initial_seed())
        if position is None:
            return _explicit(generator, device)
        _check_untouched(generator)
        return position

    @contextmanager
    def private_generators_kept(self) -> Iterator[None]:
        """Give generators that the constructor was handed their states back; those of its own are lost with it anyway."""
        try:
            yield
        finally:
            for generator, state in reversed(self._private):
                generator.set_state(state)

    def default_generator(self, device: torch.device) -> torch.Generator | ImaginedGenerator:
        """The generator that an op on `device` draws from when it names none."""
        if device.type == "cpu":
            return _CPU
        if device.type == "cuda" and torch.cuda.is_available():
            torch.cuda.init()
            return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
        index = current_device() if device.index is None else device.index
        if index not in self._imagined:
            self._imagined[index] = ImaginedGenerator(self._seed_of_all or 0)
            if self._seed_of_all is not None:  # its stream does not start where the ambient one does
                self._started.add(_name(torch.device("cuda", index)))
        return self._imagined[index]

    def seed_imagined(self, seed: int, index: int | None) -> None:
        """`torch.cuda.manual_seed` on a machine without CUDA; without an `index`, `manual_seed_all`."""
        if index is None:
            self._seed_of_all = seed
        for each in self._imagined if index is None else [index]:
            self.default_generator(torch.device("cuda", each)).manual_seed(seed)
            self._started.add(_name(torch.device("cuda", each)))

    def take(self, generator: torch.Generator | None, device: torch.device, op: int) -> StreamPosition:
        """Where op number `op`, which is about to draw, starts; the generator is left in a state that says that it has drawn."""
        source = self.default_generator(device) if generator is None else generator
        position = self._known.get(source.initial_seed())
        if position is None:
            position = self._unknown(source, generator, device)
        else:
            _check_untouched(source)
        self._mark(source, StreamPosition("after", op, device=_name(device)))
        return position

    def _unknown(self, source: Any, generator: torch.Generator | None, device: torch.device) -> StreamPosition:
        """The position of a generator that is in none of our states: its first, or one that the constructor set."""
        self.start(source, device)
        known = self._known.get(source.initial_seed())
        if known is not None:
            return known
        if generator is not None:
            self._private.append((generator, generator.get_state()))
        return _explicit(source, device)

    def start(self, source: torch.Generator | ImaginedGenerator, device: torch.device) -> None:
        """Mark the default generator of `device` as the ambient stream, the first time it is met."""
        name = _name(device)
        if name not in self._started and source is self.default_generator(device):
            self._started.add(name)
            self._mark(source, StreamPosition("ambient", device=name))

    def _mark(self, source: torch.Generator | ImaginedGenerator, position: StreamPosition) -> None:
        self._next += 1
        self._known[self._next] = position
        source.manual_seed(self._next)


# The bytes of a CPU generator's state that say how far it has come since it was seeded: where they start, and what they are then.
_PLACE = 8
_UNTOUCHED = bytes(torch.Generator().manual_seed(0).get_state()[_PLACE : _PLACE + 16].tolist())


def _check_untouched(source: torch.Generator | ImaginedGenerator) -> None:
    """A generator in a fingerprint state has drawn nothing since; otherwise the trace does not see everything that draws."""
    if source is not _CPU and (isinstance(source, ImaginedGenerator) or source.device.type != "cpu"):
        return
    state = source.get_state()
    if ctypes.string_at(state.data_ptr() + _PLACE, len(_UNTOUCHED)) != _UNTOUCHED:
        raise TraceError(
            "random numbers were drawn where the trace does not see it: in another thread, or by compiled code. Draw them in the "
            "constructor's own thread, or pass the finished tensors in from outside"
        )


@cache
def _name(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(device)


def _explicit(source: torch.Generator | ImaginedGenerator, device: torch.device) -> StreamPosition:
    seed, name = source.initial_seed(), str(device)
    if isinstance(source, ImaginedGenerator):
        return StreamPosition("explicit", seed=seed, device=name)
    with torch._C._DisableTorchDispatch():
        state = source.get_state()
        fresh = torch.Generator(source.device).manual_seed(seed).get_state()
        if torch.equal(state, fresh):
            return StreamPosition("explicit", seed=seed, device=name)
        return StreamPosition("explicit", state=state.numpy().tobytes(), device=name)


@contextmanager
def generators_kept() -> Iterator[dict[str, torch.Tensor]]:
    """Give every default generator its state back at the end, come what may; yields the states by device."""
    states = generator_states()
    try:
        yield states
    finally:
        restore_generators(states)


def generator_states() -> dict[str, torch.Tensor]:
    """The states of the default generators in use: the CPU's, and CUDA's when it is initialized."""
    states = {"cpu": torch.default_generator.get_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{i}": g.get_state() for i, g in enumerate(torch.cuda.default_generators)}
    return states


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    """Put default generators into the given states (by device)."""
    for name, state in states.items():
        default_generator(name).set_state(state)


def default_generator(device: str) -> torch.Generator:
    """The real default generator of a device, by the device's name."""
    kind = torch.device(device)
    if kind.type == "cpu":
        return torch.default_generator
    torch.cuda.init()
    return torch.cuda.default_generators[kind.index or 0]
