"""What an optimizer is to the planner: bytes of state per parameter, and what its step allocates and frees meanwhile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch

Implementation = Literal["foreach", "fused", "for-loop"]

Piece = tuple[int, int]
"""Bytes that are there because of a parameter: its position, and how many."""

STEP_BYTES = 4
"""A count of steps: a float32 scalar (torch/optim/optimizer.py `_get_scalar_dtype`)."""


@dataclass(frozen=True)
class Trained:
    """A parameter that an optimizer steps: what one rank holds of it, on `device`.

    `whole` is the shape that all ranks hold together, None for one that is not divided. `hidden` says that it is a matrix inside
    the model (`hidden_matrices`).
    """

    device: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    hidden: bool = False
    whole: tuple[int, ...] | None = None

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @cached_property
    def together(self) -> Hashable:
        """The same for parameters that foreach kernels take together."""
        return self.device, self.dtype

    @cached_property
    def matrices_apart(self) -> Hashable:
        """The same, and besides whether it is a matrix."""
        return self.device, self.dtype, len(self.shape) > 1

    @property
    def divided(self) -> bool:
        return self.whole is not None and self.whole != self.shape


class Locals:
    """What the local variables of a step hold: a variable keeps its tensors until it gets others, which are made before.

    `worst` is what is held, besides the variables' first values, when it is most on each device.

    >>> step = Locals([Trained("cpu", (2,), torch.float32), Trained("cpu", (3,), torch.float32)])
    >>> step.take("denom", (0, 8))
    >>> step.take("denom", (1, 12))
    >>> step.worst
    [(0, 8), (1, 12)]
    """

    def __init__(self, parameters: Sequence[Trained]) -> None:
        self._devices = [each.device for each in parameters]
        self._held: dict[str, tuple[Piece, ...]] = {}
        self._sums: dict[str, int] = {}
        self._worst: dict[str, tuple[int, list[Piece]]] = {}

    def take(self, name: str, *pieces: Piece) -> None:
        """`name = ...`: new tensors, after which the old ones go."""
        made = [piece for piece in pieces if piece[1]]
        for position, nbytes in made:
            device = self._devices[position]
            self._sums[device] = self._sums.get(device, 0) + nbytes
        for device in {self._devices[position] for position, _ in made}:
            if self._sums[device] > self._worst.get(device, (0, []))[0]:
                there = [piece for held in (*self._held.values(), made) for piece in held]
                self._worst[device] = (self._sums[device], [each for each in there if self._devices[each[0]] == device])
        self.drop(name)
        self._held[name] = tuple(made)

    def rename(self, old: str, new: str) -> None:
        """`new = old`, which the old name is not used for any more."""
        self.drop(new)
        self._held[new] = self._held.pop(old, ())

    def together(self, pieces: Iterable[Piece]) -> None:
        """Tensors that come and go by themselves."""
        self.take("together", *pieces)
        self.drop("together")

    def drop(self, *names: str) -> None:
        for name in names:
            for position, nbytes in self._held.pop(name, ()):
                self._sums[self._devices[position]] -= nbytes

    @property
    def worst(self) -> list[Piece]:
        return [piece for _, pieces in self._worst.values() for piece in pieces]


class Optimizer(ABC):
    """One of the optimizers that `gp.Training` names."""

    name: ClassVar[str]
    source: ClassVar[str]
    implementations: ClassVar[tuple[Implementation, ...]] = ("foreach", "fused", "for-loop")
    group_bytes: ClassVar[int] = 0
    """Bytes in host memory that it holds besides, however many parameters there are."""

    @property
    def note(self) -> str:
        """What is assumed of gradients and state, in a sentence."""
        return f"gradients and {self.name} state have the parameters' dtype, as torch.optim's defaults do"

    def default(self, parameters: Sequence[Trained]) -> Implementation:
        """What it takes where nobody says: foreach where every parameter is on CUDA, else the loop.

        torch/optim/optimizer.py `_default_to_fused_or_foreach`.
        """
        on_cuda = all(device.startswith("cuda") for device in {each.device for each in parameters})
        return "foreach" if on_cuda and "foreach" in self.implementations else "for-loop"

    def check(self, parameters: Iterable[Trained]) -> None:  # noqa: B027
        """Raises `DecisionError` for parameters that it cannot step."""

    @abstractmethod
    def state(self, parameter: Trained) -> int:
        """Bytes of state on the parameter's device, its step count left out."""

    def counts(self, parameter: Trained) -> bool:
        """Whether a count of its steps is kept with each parameter."""
        return False

    @abstractmethod
    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        """Take what `step()` takes while it runs, in order."""


def groups(parameters: Sequence[Trained], *, by_dim: bool = False) -> list[list[int]]:
    """Positions by device and dtype, as `_group_tensors_by_device_and_dtype` has them; `by_dim` keeps matrices apart."""
    found: dict[object, list[int]] = {}
    for position, each in enumerate(parameters):
        found.setdefault(each.matrices_apart if by_dim else each.together, []).append(position)
    return list(found.values())
