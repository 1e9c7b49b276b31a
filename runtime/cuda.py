"""Filling on CUDA: torch's own kernels on pieces of a tensor, their generator's offset moved to where each piece stands.

A CUDA kernel fills a whole tensor faster than pieces of it, so that only parts are taken apart; where they stand is said in
`tracer.philox`. That this device really draws so is tried once for each operator and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..tracer.graph import Op
from ..tracer.philox import Grid, increment, pieces, placed
from .fill import as_fill
from .pens import Pen

SCRATCH = 1 << 22
"""Elements of scratch memory for one piece."""


@dataclass(frozen=True, slots=True)
class CudaFill:
    """A call of `func` with scalars `args` that fills `numel` contiguous elements of `dtype`, its generator in state `start`."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    dtype: torch.dtype
    numel: int
    start: torch.Tensor
    grid: Grid
    device: torch.device
    quantum: ClassVar[int] = SCRATCH

    @classmethod
    def of(cls, op: Op, start: torch.Tensor) -> CudaFill | None:
        """The fill that a recorded op is; None where its elements' places are not certain on this device."""
        call, view = as_fill(op), op.targets[0]
        if call is None or not view.is_contiguous or op.position is None:
            return None
        device = torch.device(op.position.device)
        if device.type != "cuda" or not torch.cuda.is_available() or not check_pieces(call[0], call[1], view.dtype, device):
            return None
        return cls(*call, view.dtype, view.numel, start, Grid.of(device), device)

    @property
    def end(self) -> torch.Tensor:
        """The generator's state after the fill."""
        moved = increment(self.func, self.dtype, self.numel, self.grid, self.args)
        assert moved is not None
        return placed(self.start, moved)

    def pen(self, place: None = None, first: int = 0) -> Pen:
        """A pen at element `first`."""
        pen = _CudaPen(self)
        pen.skip(first)
        return pen

    def draw(self, out: torch.Tensor, offset: int) -> None:
        """The native call on `out`, the generator's offset moved by `offset`."""
        generator = torch.Generator(self.device)
        generator.set_state(placed(self.start, offset))
        self.func(out, *self.args, generator=generator)


class _CudaPen(Pen):
    """Writes elements by native calls on aligned pieces; what a piece holds before the wanted ones is dropped."""

    def __init__(self, fill: CudaFill) -> None:
        super().__init__(fill.dtype)
        self.fill = fill

    def write(self, out: torch.Tensor) -> None:
        fill, start, stop = self.fill, self.at, self.at + len(out)
        found = pieces(fill.func, fill.dtype, fill.numel, start, stop, fill.grid, fill.args, SCRATCH)
        assert found is not None
        for piece in found:
            first = max(piece.start, start)
            target = out[first - start : piece.stop - start]
            if first == piece.start:
                fill.draw(target, piece.offset)
            else:
                scratch = torch.empty(piece.stop - piece.start, dtype=fill.dtype, device=out.device)
                fill.draw(scratch, piece.offset)
                target.copy_(scratch[first - piece.start :])
        self.at = stop

    def skip(self, count: int) -> None:
        self.at += count

    def chunks(self, count: int, converted: bool) -> Any:
        """As a `Pen`."""
        return (min(SCRATCH, count - start) for start in range(0, count, SCRATCH))


def passed_on_cuda(op: Op, start: torch.Tensor) -> torch.Tensor | None:
    """The state of a CUDA generator after `op`, without running it; None where what it draws is not certain on this device."""
    fill = CudaFill.of(op, start)
    return None if fill is None else fill.end


@cache
def check_pieces(func: Any, args: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether increments and pieces are as `tracer.philox` says, tried on a tensor that takes the device several steps."""
    grid = Grid.of(device)
    numel = 9 * grid.threads(1 << 30) + 77
    moved = increment(func, dtype, numel, grid, args)
    if moved is None:
        return False
    with _disable_current_modes(), torch.no_grad():
        generator = torch.Generator(device).manual_seed(11)
        start = generator.get_state()
        whole = torch.empty(numel, dtype=dtype, device=device)
        func(whole, *args, generator=generator)
        fill = CudaFill(func, args, dtype, numel, start, grid, device)
        part = torch.empty(numel // 2, dtype=dtype, device=device)
        fill.pen(first=numel // 3).write(part)
        same = torch.equal(part.view(torch.uint8), whole[numel // 3 : numel // 3 + numel // 2].view(torch.uint8))
        return same and torch.equal(fill.end, generator.get_state())
