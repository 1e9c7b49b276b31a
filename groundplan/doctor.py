"""What this machine can do: which way each kernel of random numbers takes here, found by trying it."""

from __future__ import annotations

import platform
import textwrap
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .planner.decisions import groundplan_version
from .planner.records import dtype_name
from .runtime.cuda import check_pieces
from .runtime.fill import check_parts
from .runtime.pages import huge_pages
from .runtime.workers import usable_cores
from .tracer.draws import REDRAWS, draw_of_call
from .tracer.native import native, why_not
from .tracer.places import jumps_agree

_aten = torch.ops.aten
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_OPERATORS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "uniform_": (_aten.uniform_.default, ()),
    "normal_": (_aten.normal_.default, ()),
    "log_normal_": (_aten.log_normal_.default, ()),
    "exponential_": (_aten.exponential_.default, ()),
    "cauchy_": (_aten.cauchy_.default, ()),
    "geometric_": (_aten.geometric_.default, (0.5,)),
    "bernoulli_": (_aten.bernoulli_.float, (0.5,)),
    "random_": (_aten.random_.default, ()),
}
_MEANING = {
    "compiled": "drawn by groundplan's compiled code, in pieces on every core",
    "pieces": "drawn by torch's kernel, in pieces on every core",
    "counted": "drawn by torch's kernel whole; what is not wanted is passed over without drawing",
    "whole": "drawn whole, in order, on one core, wanted or not: slower, with the same values",
}
_SIZE = 1024


@dataclass(frozen=True)
class Doctor:
    """What `examine` found. `paths` says for each operator and dtype which way it takes: a key of `_MEANING`."""

    groundplan: str
    torch: str
    python: str
    cpu: str
    cores: int
    huge_pages: str
    compiled: bool
    compiled_note: str | None
    jumps: bool
    paths: dict[str, dict[str, str]]
    cuda: dict[str, bool]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([*self._machine(), "", *self._table(), "", *self._legend()])

    def _machine(self) -> list[str]:
        ways = "placed by jumps" if self.jumps else "never placed: everything is drawn in order"
        lines = [
            f"groundplan {self.groundplan}, torch {self.torch}, Python {self.python}",
            f"  CPU            {self.cpu}, {self.cores} usable core{'s' * (self.cores != 1)}",
            f"  huge pages     {self.huge_pages}",
            *textwrap.wrap(f"compiled code  {self._compiled()}", 100, initial_indent="  ", subsequent_indent=" " * 17),
            f"  generator      {ways}",
        ]
        for device, right in self.cuda.items():
            lines.append(f"  {device:<13}  {'parts are drawn by themselves' if right else 'drawn whole, in order'}")
        return lines

    def _compiled(self) -> str:
        return ("in use" if self.compiled else "not in use") + (f": {self.compiled_note}" if self.compiled_note else "")

    def _table(self) -> list[str]:
        rows = [["", *next(iter(self.paths.values()))], *([name, *found.values()] for name, found in self.paths.items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]

    def _legend(self) -> list[str]:
        used = {path for found in self.paths.values() for path in found.values()}
        return [f"{path}: {meaning}" for path, meaning in _MEANING.items() if path in used]


def examine() -> Doctor:
    """Try every kernel of random numbers on small tensors against torch's own results on this machine; takes a second or so.

    >>> examine().paths["uniform_"]["float32"] in ("compiled", "pieces", "whole")
    True
    """
    paths = {name: {dtype_name(dtype): _path(*call, dtype) for dtype in _FLOATS} for name, call in _OPERATORS.items()}
    if REDRAWS:
        paths["trunc_normal_"] = dict(paths["normal_"])
    return Doctor(
        groundplan=groundplan_version(),
        torch=str(torch.__version__),
        python=platform.python_version(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        cores=usable_cores(),
        huge_pages=huge_pages(),
        compiled=native() is not None,
        compiled_note=why_not(),
        jumps=jumps_agree(),
        paths=paths,
        cuda={f"cuda:{index}": _cuda_is_right(index) for index in range(torch.cuda.device_count())},
    )


def _path(func: Any, args: tuple[Any, ...], dtype: torch.dtype) -> str:
    draw = draw_of_call(func, (None, *args), dtype, _SIZE, True)
    if draw is None:
        return "whole"
    if draw.normals or not check_parts(func, dtype, args, draw.words // _SIZE):
        return "counted"
    compiled = native()
    if compiled is not None and func in (_aten.uniform_.default, _aten.normal_.default):
        kind = "uniform" if func is _aten.uniform_.default else "normal"
        return "compiled" if compiled.fills(dtype, kind) else "pieces"  # type: ignore[arg-type]
    return "pieces"


def _cuda_is_right(index: int) -> bool:
    device = torch.device("cuda", index)
    kernels = (_aten.uniform_.default, _aten.normal_.default)
    return all(check_pieces(func, (), dtype, device) for func in kernels for dtype in (torch.float32, torch.bfloat16))
