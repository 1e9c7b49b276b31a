"""The files of a checkpoint, read by position into memory that is there already.

Nothing is mapped: a file that is cut short meanwhile gives an error, where mapped memory would end the process.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import torch

from ..tracer.errors import CheckpointError

_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is refused, not waited for
_AT_ONCE = 2**30  # bytes; Linux reads no more than 2 GiB in one call
_LINE = 128  # bytes; the lines in a pickle are names


class File:
    """A file that is open for reading; it is closed with `close`, or when nobody refers to it any more."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._descriptor = -1
        try:
            self._descriptor = _opened(self.path)
            self._seen = os.fstat(self._descriptor)
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            raise CheckpointError(f"cannot read {self.path}: {getattr(error, 'strerror', None) or error}") from error
        if not stat.S_ISREG(self._seen.st_mode):
            self.close()
            raise CheckpointError(f"{self.path} is not a file")

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._seen.st_size

    def read(self, start: int, memory: memoryview, what: str) -> None:
        """Fill `memory` with the bytes from `start` on; `what` is what they are, for the error."""
        done = 0
        while done < len(memory):
            try:
                count = os.preadv(self._descriptor, [memory[done : done + _AT_ONCE]], start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {what} from {self.path}: {error.strerror or error}") from error
            if not count:
                raise CheckpointError(f"{self.path} was cut short while {what} was read; copy it again")
            done += count

    def expect(self, start: int, length: int) -> None:
        """These bytes are read soon: the kernel may fetch them from the disk meanwhile."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def head(self, count: int, start: int = 0) -> bytes:
        """The first bytes, or as many as there are."""
        memory = bytearray(max(0, min(count, self.size - start)))
        self.read(start, memoryview(memory), "its beginning")
        return bytes(memory)

    def check_reaches(self, end: int, what: str) -> None:
        """Raise `CheckpointError` where the file ends before `what` does, which goes on to byte `end`."""
        if end > self.size:
            raise CheckpointError(
                f"{self.path} ends at byte {self.size:,}, and {what} goes on to {end:,}: the file is cut short; copy it again"
            )

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where somebody has written to the file since it was opened."""
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != (self._seen.st_size, self._seen.st_mtime_ns):
            raise CheckpointError(f"{self.path} was written to while it was read; load it again once it is finished")

    def close(self) -> None:
        """Close it; again does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def _opened(path: Path) -> int:
    """A checkpoint of many ranks has more files than a process is allowed by default: the limit is raised when it is met."""
    try:
        return os.open(path, os.O_RDONLY | _FLAGS)
    except OSError as error:
        if error.errno != errno.EMFILE or not _more_files():
            raise
    return os.open(path, os.O_RDONLY | _FLAGS)


def _more_files() -> bool:
    """Raise the number of files that the process may have open as far as it may itself; False where nothing is left."""
    try:
        import resource
    except ImportError:  # Windows
        return False
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if now == most:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return True


class Slice:
    """A part of a file, as a file of its own that can be read and sought in, for torch's reader."""

    def __init__(self, file: File, start: int, length: int, what: str) -> None:
        self._file, self._start, self._length, self._what, self._at = file, start, length, what, 0

    def read(self, count: int = -1) -> bytes:
        """The next `count` bytes, or as many as are left."""
        left = max(0, self._length - self._at)
        memory = bytearray(left if count < 0 else min(count, left))
        self._file.read(self._start + self._at, memoryview(memory), self._what)
        self._at += len(memory)
        return bytes(memory)

    def readinto(self, memory: bytearray) -> int:
        """The next bytes, into `memory`."""
        found = self.read(len(memory))
        memory[: len(found)] = found
        return len(found)

    def readline(self) -> bytes:
        """The bytes up to the end of the line."""
        found, at = b"", self._at
        while b"\n" not in found and (more := self.read(_LINE)):
            found += more
        line = found[: found.find(b"\n") + 1 or None]
        self._at = at + len(line)
        return line

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def seekable(self) -> bool:
        """Whether `seek` works."""
        return True


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be written."""
    row: Any = tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()  # a single element's stride is any
    return memoryview(row)
