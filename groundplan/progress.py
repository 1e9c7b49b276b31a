"""How far a build is: the user's own callback, or a bar in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .runtime.materialize import Progress as ProgressCallback

_SHOWN_FROM = 2**28  # bytes; a model below this is built before a bar could be read


@contextmanager
def shown(progress: bool | ProgressCallback, nbytes: int) -> Iterator[ProgressCallback | None]:
    """The callback for `progress`: the user's own, or a bar on stderr for a large model, if that is a terminal."""
    if callable(progress):
        yield progress
        return
    console = Console(stderr=True)
    if not progress or nbytes < _SHOWN_FROM or not console.is_terminal:
        yield None
        return
    with progress_bar(console) as show:
        yield show


@contextmanager
def progress_bar(console: Console) -> Iterator[ProgressCallback]:
    """A bar of bytes filled and to fill."""
    columns = (TextColumn("materialize"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("materialize", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show
