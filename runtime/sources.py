"""Where the numbers of a guided run come from.

A `Source` draws what an op of the tape fills, now or later, or passes over it. `EagerSource` gives what eager gives: the numbers
of torch's generators, in order, which stand afterwards where eager leaves them. (`keyed.KeyedSource` is the other one.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..tracer.arguments import generator_in
from ..tracer.draws import REDRAWS, is_static
from ..tracer.graph import Op
from ..tracer.places import Place
from ..tracer.schema import aten
from ..tracer.streams import default_generator
from .cuda import passed_on_cuda
from .fill import created
from .filler import Threaded, advance, is_large
from .pages import prefer_huge_pages

Generator = torch.Generator | None


class Pending(Protocol):
    """A fill that is put off."""

    def fill(self, target: torch.Tensor) -> None:
        """Do it to `target`."""

    def convert(self, like: torch.Tensor, out: torch.Tensor) -> bool:
        """Write into `out` what filling `like` and converting it to the dtype of `out` gives; False where that cannot be done."""


class Source(Protocol):
    """Draws the numbers of a guided run."""

    def fill(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> None:
        """Do `func(target, *args)`, a random fill in place."""

    def put_off(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> Pending | None:
        """The same as something to be done later; None, and nothing is done, where that is not possible."""

    def pass_over(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> bool:
        """Go on as if the fill had been done; False, and nothing is done, where that is not possible."""

    def truncate(self, op: Op, tensor: torch.Tensor, bounds: tuple[float, ...], generator: Generator) -> int | None:
        """Do a `trunc_normal_`; how often torch would have written the tensor, or None where torch is to do it."""

    def call(self, op: Op, args: Any, kwargs: dict[str, Any]) -> Any:
        """Do any other op that draws."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A fill that draws nothing, such as `zero_`, put off."""

    func: Any
    args: tuple[Any, ...]

    def fill(self, target: torch.Tensor) -> None:
        """As `Pending`."""
        prefer_huge_pages(target.untyped_storage())
        self.func(target, *self.args)

    def convert(self, like: torch.Tensor, out: torch.Tensor) -> bool:
        """As `Pending`."""
        sample = torch.empty(1, dtype=like.dtype, device="cpu")
        self.func(sample, *self.args)
        prefer_huge_pages(out.untyped_storage())
        out.copy_(sample.to(out.dtype).expand_as(out))
        return True


@dataclass(frozen=True, slots=True)
class _Placed:
    """A random fill that is put off, and the place in the stream that it starts from."""

    func: Any
    args: tuple[Any, ...]
    start: Place
    filler: Threaded

    def fill(self, target: torch.Tensor) -> None:
        if self.filler.fill(self.func, target, self.args, self.start) is None:
            self.func(target, *self.args, generator=self.start.generator())

    def convert(self, like: torch.Tensor, out: torch.Tensor) -> bool:
        return self.filler.convert(self.func, self.args, self.start, like, out)


class EagerSource:
    """The numbers that the eager constructor would draw."""

    def __init__(self, filler: Threaded) -> None:
        self._filler = filler

    def fill(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> None:
        """As a `Source`."""
        if not self._fill(func, target, args, generator):
            prefer_huge_pages(target.untyped_storage())
            func(target, *args, generator=generator)

    def put_off(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> Pending | None:
        """As a `Source`."""
        source = generator or torch.default_generator
        start = Place.at(source.get_state())
        return _Placed(func, args, start, self._filler) if advance(func, target, args, source) else None

    def pass_over(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> bool:
        """As a `Source`."""
        if target.device.type == "cpu":
            return advance(func, target, args, generator or torch.default_generator)
        source = generator or default_generator(str(target.device))
        end = passed_on_cuda(op, source.get_state())
        if end is not None:
            source.set_state(end)
        return end is not None

    def truncate(self, op: Op, tensor: torch.Tensor, bounds: tuple[float, ...], generator: Generator) -> int | None:
        """As a `Source`."""
        if tensor.device.type != "cpu" or not REDRAWS:
            return None
        if is_static(op):
            return 1 if self._fill(aten.normal_.default, tensor, bounds[:2], generator) else None
        source = generator or torch.default_generator
        done = self._filler.truncated(tensor, bounds, Place.at(source.get_state()))
        if done is None:
            return None
        end, rounds = done
        source.set_state(end.state())
        return min(rounds, 2)

    def call(self, op: Op, args: Any, kwargs: dict[str, Any]) -> Any:
        """As a `Source`."""
        call = created(op, args, kwargs) if op.targets and is_large(op.targets[0].numel) else None
        if call is None:
            return op.func(*args, **kwargs)
        out, func, scalars = call
        self.fill(op, func, out, scalars, generator_in(args, kwargs))
        return out

    def _fill(self, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> bool:
        """Fill a large tensor in pieces; False, and nothing is done, where torch is to do it."""
        if not is_large(target.numel()) or target.device.type != "cpu":
            return False
        source = generator or torch.default_generator
        end = self._filler.fill(func, target, args, Place.at(source.get_state()))
        if end is not None:
            source.set_state(end.state())
        return end is not None
