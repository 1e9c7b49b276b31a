"""The table of tensors: one line for all that differ in a layer's number only, cut to the width there is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.text import Text

from .planner.records import dtype_name
from .shown import shortened
from .units import format_bytes

SECTIONS = ("parameters", "parameters, frozen", "buffers", "buffers, not persistent", "plain attributes")

_WIDEST_SHAPE = 24
_LEAST_INIT = 20


@dataclass(frozen=True, slots=True)
class Row:
    """Tensors that differ in a layer's number only. `nbytes` is for all of them, in the dtype they end in."""

    section: str
    name: str
    count: int
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    final: torch.dtype
    device: str
    init: str
    nbytes: int
    uninitialized: bool

    @property
    def shape_words(self) -> str:
        """The shape as it is written: `3×4`."""
        return "lazy" if self.shape is None else "×".join(map(str, self.shape)) or "scalar"

    @property
    def init_words(self) -> str:
        """The init function, and whether it leaves elements without values."""
        rest = self.uninitialized and not self.init.startswith("uninitialized")
        return f"{self.init}, rest uninitialized" if rest else self.init


@dataclass(frozen=True, slots=True)
class _Columns:
    """Where things stand in the table of tensors; `name` and `init` share one column of `shared` characters."""

    count: int
    shared: int
    init: int
    shape: int
    dtype: int
    nbytes: int


def tensor_table(rows: Sequence[Row], width: int) -> Iterator[Text]:
    """The lines of the table, `width` columns wide at most. A section whose tensors have one dtype names it in its title."""
    devices = Counter(row.device for row in rows).most_common(1)
    lines = [_Line.of(row, devices[0][0]) for row in rows]
    dtypes = {section: {line.dtype for line in lines if line.section == section} for section in SECTIONS}
    columns = _columns(lines, any(len(found) > 1 for found in dtypes.values()), width)
    titles = _Line("", "tensor", "", "init", "shape", "dtype", "bytes", False)
    yield titles.text(columns, "dim")
    section = None
    for line in lines:
        if line.section != section:
            section = line.section
            only = f" ({next(iter(dtypes[section]))})" if not columns.dtype else ""
            yield Text(f"{section}{only}", style="bold")
        yield line.text(columns, "bold red" if line.uninitialized else "")


@dataclass(frozen=True, slots=True)
class _Line:
    """A row of the table, in words."""

    section: str
    name: str
    count: str
    init: str
    shape: str
    dtype: str
    nbytes: str
    uninitialized: bool

    @classmethod
    def of(cls, row: Row, usual_device: str) -> _Line:
        dtype = dtype_name(row.final) + (f" {row.device}" if row.device != usual_device else "")
        return cls(
            section=row.section,
            name=row.name,
            count=f"{row.count:,}x" if row.count > 1 else "",
            init=row.init_words,
            shape=shortened(row.shape_words, _WIDEST_SHAPE),
            dtype=dtype,
            nbytes=format_bytes(row.nbytes),
            uninitialized=row.uninitialized,
        )

    def text(self, columns: _Columns, style: str) -> Text:
        count = f" {self.count.rjust(columns.count)}  "
        dtype = f"  {self.dtype.ljust(columns.dtype)}" if columns.dtype else ""
        rest = f"  {self.shape.ljust(columns.shape)}{dtype}  {self.nbytes.rjust(columns.nbytes)}"
        return Text(f"{count}{self._name_and_init(columns)}{rest}", style=style, no_wrap=True, overflow="crop")

    def _name_and_init(self, columns: _Columns) -> str:
        """The init function stands in its column where the name leaves it room, else further left or right."""
        init = shortened(self.init, max(columns.shared - len(self.name) - 2, min(len(self.init), _LEAST_INIT)))
        name = shortened(self.name, columns.shared - len(init) - 2)
        start = min(max(columns.init, len(name) + 2), columns.shared - len(init))
        return f"{name.ljust(start)}{init}".ljust(columns.shared)


def _columns(lines: Sequence[_Line], with_dtype: bool, width: int) -> _Columns:
    count = max((len(line.count) for line in lines), default=0)
    shape = max(len("shape"), *(len(line.shape) for line in lines))
    dtype = max(len("dtype"), *(len(line.dtype) for line in lines)) if with_dtype else 0
    nbytes = max(len("bytes"), *(len(line.nbytes) for line in lines))
    name = max(len("tensor"), *(len(line.name) for line in lines))
    init = max(len("init"), *(len(line.init) for line in lines))
    room = width - 1 - count - 2 - 2 - shape - (dtype + 2 if dtype else 0) - 2 - nbytes
    shared = min(room, name + 2 + init)
    return _Columns(count, shared, min(name + 2, shared - min(init, _LEAST_INIT)), shape, dtype, nbytes)
