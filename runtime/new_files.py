"""New files in a folder, all of them or none: written under a temporary name, then moved to their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..tracer.errors import MaterializeError


class NewFiles:
    """`with NewFiles(...) as files:` what is written to `files.temporary` is moved to `folder`, which is made if need be.

    `complaint` looks at the folder, and says what is wrong with it, if anything is. That, and whatever the disk refuses under
    `writing`, is an `error`, with the `way_out`. Files are moved at the end of the body, or when it calls `finish`; `last` is the
    one that comes last: where it is, all are. Where the body raises, before or after that, nothing is left.
    """

    def __init__(
        self,
        folder: Path,
        complaint: Callable[[Path], str | None],
        last: str,
        way_out: str,
        error: type[MaterializeError] = MaterializeError,
    ) -> None:
        self.folder = folder
        self._complaint, self._last, self._way_out, self._error = complaint, last, way_out, error
        self._made: list[Path] = []

    def __enter__(self) -> NewFiles:
        self._new = [each for each in (self.folder, *self.folder.parents) if not each.exists()][-1:]
        try:
            with self.writing():
                self.folder.mkdir(parents=True, exist_ok=True)
                complaint = self._complaint(self.folder)
                if complaint is not None:
                    raise self._error(f"{complaint}; {self._way_out}")
                self.temporary = Path(tempfile.mkdtemp(prefix=".groundplan-", dir=self.folder))
        except BaseException:
            self._remove(self._new)
            raise
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.finish()
        except BaseException:
            kind = BaseException
            raise
        finally:
            if kind is not None:
                self._remove([*self._made, *(self._new or [self.temporary])])

    @contextmanager
    def writing(self, what: str = "") -> Iterator[None]:
        """What the disk refuses in the body, said so; `what` is written there."""
        try:
            yield
        except OSError as error:
            written = f"{what} " if what else ""
            raise self._error(f"cannot write {written}to {self.folder}: {error.strerror or error}; {self._way_out}") from error

    def finish(self) -> None:
        """Move the files to where they belong; again does nothing."""
        if not self.temporary.exists():
            return
        with self.writing():
            for file in sorted(self.temporary.iterdir(), key=lambda file: file.name == self._last):
                self._made.append(self.folder / file.name)
                file.rename(self._made[-1])
            self.temporary.rmdir()

    @staticmethod
    def _remove(paths: list[Path]) -> None:
        for each in paths:
            if each.is_dir():
                shutil.rmtree(each, ignore_errors=True)
            elif each.exists():
                each.unlink()


class NewFilesOfRanks(NewFiles):
    """The same for ranks that write together: the first one makes the folder and moves the files; all raise, or none."""

    def __enter__(self) -> NewFilesOfRanks:
        self.temporary = Path(self._same_on_all(lambda: str(super(NewFilesOfRanks, self).__enter__().temporary)))
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        mine = error and f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        said: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(said, mine)
        failure = next((each for each in said if each is not None), None)
        if failure is not None and dist.get_rank() == 0:
            super().__exit__(self._error, error, trace)
        if failure is not None:
            raise self._error(f"nothing was written to {self.folder}; {failure}") from error
        self._same_on_all(lambda: super(NewFilesOfRanks, self).__exit__(None) or "")

    def _same_on_all(self, action: Callable[[], str]) -> str:
        """What the first rank's `action` gives; what it raises, all raise."""
        told: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                told[0] = action()
            except self._error as error:
                told[1] = str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise self._error(told[1])
        return str(told[0])


def sync(path: Path) -> None:
    """Have a folder's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
