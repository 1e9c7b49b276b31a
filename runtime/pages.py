"""Huge pages for new memory, and memory given back.

The first write to each 4 kB costs nearly as much as the random numbers that go there.

Linux gives out 2 MB at a time where a program asks for that (`madvise`), unless an administrator has forbidden it. Only whole
huge pages inside the tensor are asked for, so that it takes no more memory than before.

Where the host of a virtual machine takes back what is free ("free page reporting"), it takes whole huge pages, and the first
write to one of those waits for 512 pages of the host's. `NewMemory` finds out as it goes which kind is cheaper.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

HUGE = 2**21
_PASSING = 2**20  # bytes
_ADVICE = 14  # MADV_HUGEPAGE
_POPULATE = 23  # MADV_POPULATE_WRITE, which changes no byte
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_AGAIN = 256  # pieces after which the dearer kind of page is tried once more


def prefer_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages under a storage on the CPU that is about to be written for the first time."""
    nbytes = storage.nbytes()
    if nbytes < 2 * HUGE or storage.device.type != "cpu" or (libc := _libc()) is None:
        return
    _advise(libc, storage.data_ptr(), storage.data_ptr() + nbytes)


def _advise(libc: Any, start: int, end: int) -> None:
    start = -(-start // HUGE) * HUGE
    length = (end - start) // HUGE * HUGE
    if length > 0:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)


def passing_row(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """New memory, zeroed, that goes back to the system as soon as it is dropped.

    What `torch.empty` gives back stays with malloc, which does not find room in it for the next aligned request of that size.
    """
    if numel * dtype.itemsize < _PASSING:
        return torch.zeros(numel, dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, numel * dtype.itemsize), dtype=dtype)


def return_freed_memory() -> None:
    """Give what has been freed back to the system, where the C library can be asked to (glibc).

    It keeps what lies between blocks that are still in use: a gigabyte, where large tensors go and small ones stay by turns.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


class NewMemory:
    """Fetches memory that is about to be written to, piece by piece, in huge pages as long as they cost less; for any thread.

    To fetch it by one call is cheaper than by a fault at each page. Linux before 5.14 does not, and gets huge pages in any case.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._costs = {True: 0.0, False: 0.0}  # seconds a byte, lately; what was not tried costs nothing

    def fetch(self, out: torch.Tensor) -> None:
        """The memory of a part of a tensor."""
        if out.device.type != "cpu" or out.nbytes < 2 * HUGE or not out.is_contiguous() or (libc := _libc()) is None:
            return
        huge, storage = self._chosen(), out.untyped_storage()
        start, end = out.data_ptr(), out.data_ptr() + out.nbytes
        if huge:  # the page in which the next piece begins is this one's
            _advise(libc, start, min(end + HUGE - 1, storage.data_ptr() + storage.nbytes()))
        start -= start % mmap.PAGESIZE
        before = time.thread_time()
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _POPULATE)
        cost, known = (time.thread_time() - before) / out.nbytes, self._costs[huge]
        self._costs[huge] = (3 * known + cost) / 4 if known else cost

    def _chosen(self) -> bool:
        cheaper = self._costs[True] <= self._costs[False]
        return cheaper != (next(self._numbers) % _AGAIN == _AGAIN - 1)


def huge_pages() -> str:
    """What the kernel does about huge pages: `always`, `madvise` or `never`; `unknown` elsewhere than on Linux."""
    try:
        return _SETTING.read_text().split("[")[1].split("]")[0]
    except (OSError, IndexError):
        return "unknown"


@cache
def _libc() -> Any:
    if not sys.platform.startswith("linux") or huge_pages() not in ("always", "madvise"):
        return None
    return ctypes.CDLL(None)
