"""What surrounds a constructor: torch's settings, and the random generators of Python and numpy."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from .graph import Ambient
from .imagined import default_device


def ambient_now() -> Ambient:
    """The torch settings that a constructor called now would run under."""
    device = default_device()
    return Ambient(
        torch.get_default_dtype(),
        "cpu" if device.type == "cpu" else str(device),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


one_at_a_time = threading.RLock()
"""Held while a constructor runs: it replaces functions of torch and moves global generators, which threads share."""


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """The default dtype comes back at the end, whatever is set meanwhile."""
    before = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def ambient_kept() -> Iterator[None]:
    """The settings come back at the end, whatever the constructor sets and leaves."""
    before = ambient_now()
    with default_dtype_kept():
        try:
            yield
        finally:
            torch._C._set_grad_enabled(before.grad_enabled)
            if ambient_now().default_device != before.default_device:
                torch.set_default_device(before.default_device)


@contextmanager
def ambient_applied(ambient: Ambient) -> Iterator[None]:
    """Run under recorded settings; the caller's own come back at the end."""
    with ExitStack() as stack:
        stack.enter_context(ambient_kept())
        if ambient.inference_mode != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(ambient.inference_mode))
        stack.enter_context(torch.set_grad_enabled(ambient.grad_enabled))
        if ambient.default_device != ambient_now().default_device:
            stack.enter_context(torch.device(ambient.default_device))
        torch.set_default_dtype(ambient.default_dtype)
        yield


class HostRandom(NamedTuple):
    """The states of Python's and numpy's global random generators."""

    python: Any
    numpy: Any

    def same(self, other: HostRandom) -> bool:
        """Whether both generators stand where they stand in `other`."""
        mine, theirs = self.numpy, other.numpy
        return bool(
            self.python == other.python and mine[0] == theirs[0] and np.array_equal(mine[1], theirs[1]) and mine[2:] == theirs[2:]
        )


def host_random_now() -> HostRandom:
    """The states as they are."""
    return HostRandom(random.getstate(), np.random.get_state())


def restore_host_random(states: HostRandom) -> None:
    """Put both generators into the given states."""
    random.setstate(states.python)
    np.random.set_state(states.numpy)


@contextmanager
def host_random_from(states: HostRandom) -> Iterator[None]:
    """Put both generators into the given states; the caller's own come back at the end."""
    before = host_random_now()
    restore_host_random(states)
    try:
        yield
    finally:
        restore_host_random(before)
