"""What reports and explanations have in common: as plain text, in colors in a terminal, and as HTML."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

WIDTH = 100
_WIDEST = 140
_LEAST = 6
_HTML = '<pre style="font-family:Menlo,Consolas,monospace;line-height:1.25;white-space:pre">{code}</pre>'


class Shown:
    """Something to look at: `str()` is plain text of at most 100 columns; rich and notebooks show it in colors."""

    @abstractmethod
    def blocks(self, width: int) -> Iterable[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=WIDTH, color_system=None, legacy_windows=False).print(*self.blocks(WIDTH), sep="\n")
        return "\n".join(line.rstrip() for line in file.getvalue().rstrip().split("\n"))

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.blocks(min(options.max_width, _WIDEST))

    def _repr_html_(self) -> str:
        return self._html().export_html(inline_styles=True, code_format=_HTML)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write a self-contained page to `path`; what was there stays until the page is complete."""
        write_atomically(path, self._html().export_html(inline_styles=True))

    def _html(self) -> Console:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_terminal=True, color_system="truecolor")
        console.print(*self.blocks(WIDTH), sep="\n")
        return console


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write `content` to `path`, text as UTF-8: it holds either all of it or what it held before."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def shortened(text: str, width: int) -> str:
    """`text` in at most `width` characters: a longer one loses its middle, a dotted name whole components of it.

    >>> shortened("model.layers.{0-125}.mlp.experts.gate_proj.weight", 40)
    'model.layers.….experts.gate_proj.weight'
    >>> shortened("model.layers.{0-60}.self_attn.kv_a_proj_with_mqa.weight", 50)
    'model.layers.{0-60}.self_attn.kv_a_proj_wi….weight'
    """
    if len(text) <= width:
        return text
    parts = text.split(".")
    if " " not in text and len(parts) > 2 and len(parts[0]) + len(parts[-1]) + 3 <= width:
        return _without_components(parts, width)
    kept = width - 1
    return f"{text[: kept - kept // 2]}…{text[len(text) - kept // 2 :]}"


def _without_components(parts: list[str], width: int) -> str:
    """A long component in the middle loses its end; else the first and last ones stay, and as many more from both ends as fit."""
    excess = len(".".join(parts)) - width + 1
    longest = max(range(1, len(parts) - 1), key=lambda at: len(parts[at]) * parts[at].isidentifier())
    if len(parts[longest]) - excess >= _LEAST:
        return ".".join([*parts[:longest], parts[longest][:-excess] + "…", *parts[longest + 1 :]])
    head, tail = 1, 1
    for from_head in (False, True) * len(parts):
        more = (head + 1, tail) if from_head else (head, tail + 1)
        if sum(more) < len(parts) and len(_joined(parts, *more)) <= width:
            head, tail = more
    return _joined(parts, head, tail)


def _joined(parts: list[str], head: int, tail: int) -> str:
    return ".".join([*parts[:head], "…", *parts[len(parts) - tail :]])


def heading(text: str) -> Text:
    """The line above a section, after an empty one."""
    return Text(f"\n{text}", style="bold")


def bullets(texts: Iterable[str], style: str = "", mark: str = "-") -> Iterator[RenderableType]:
    """One paragraph each, wrapped under itself."""
    for text in texts:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(width=len(mark), no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text(mark, style=style), Text(text, style=style))
        yield Padding(grid, (0, 0, 0, 2))
