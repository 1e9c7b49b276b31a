"""Huge pages for new memory, and memory given back.

The first write to each 4 kB costs nearly as much as the random numbers that go there.

Linux gives out 2 MB at a time where a program asks for that (`madvise`), unless an administrator has forbidden it. Only whole
huge pages inside the tensor are asked for, so that it takes no more memory than before.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

HUGE = 2**21
_ADVICE = 14  # MADV_HUGEPAGE
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def prefer_huge_pages(storage: torch.UntypedStorage) -> None:
    """Ask for huge pages under a storage on the CPU that is about to be written for the first time."""
    nbytes = storage.nbytes()
    if nbytes < 2 * HUGE or storage.device.type != "cpu" or (libc := _libc()) is None:
        return
    start = -(-storage.data_ptr() // HUGE) * HUGE
    length = (storage.data_ptr() + nbytes - start) // HUGE * HUGE
    if length > 0:
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)


def return_freed_memory() -> None:
    """Give what has been freed back to the system, where the C library can be asked to (glibc).

    It keeps what lies between blocks that are still in use: a gigabyte, where large tensors go and small ones stay by turns.
    """
    libc: Any = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))


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
