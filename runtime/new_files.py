"""New files in a folder, all of them or none: written under a temporary name, then moved to their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..tracer.errors import GroundplanError, MaterializeError


@contextmanager
def new_files(
    folder: Path,
    refuse: Callable[[Path], bool],
    way_out: str,
    last: str = "",
    error: type[GroundplanError] = MaterializeError,
) -> Iterator[Path]:
    """A temporary folder inside `folder`, which is made if need be; what the body writes there is moved to `folder` at its end.

    Files that `refuse` says yes to may not be there before: `error` is raised, with the `way_out`, as for anything that the disk
    refuses. The file called `last` is moved last: where it is, all are. Where the body raises, nothing is left.
    """
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    made: list[Path] = []
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = next((each for each in sorted(folder.iterdir()) if refuse(each)), None)
        if there is not None:
            raise error(f"{there} is there already, and would be lost; {way_out}")
        temporary = Path(tempfile.mkdtemp(prefix=".groundplan-", dir=folder))
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: file.name == last):
            made.append(folder / file.name)
            file.rename(made[-1])
        temporary.rmdir()
    except BaseException as failure:
        for each in (*made, *(new[-1:] or ([temporary] if temporary else []))):
            shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)
        if isinstance(failure, OSError):
            raise error(f"cannot write to {folder}: {failure.strerror or failure}; {way_out}") from failure
        raise


def sync(path: Path) -> None:
    """Have a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
