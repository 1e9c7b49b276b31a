"""The peak of this process's resident memory, over a stretch of its life."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

can_restart = os.access(_CLEAR, os.W_OK)
"""Whether the peak can start anew (Linux). Elsewhere it is that of the whole life so far, and only a new record can be seen."""


def restart_peak() -> int:
    """Have the peak count from here, where that is possible; the bytes that are resident now, or the peak so far.

    What is lost is the process's own record (`VmHWM`, which `ru_maxrss` does not go by).
    """
    if not can_restart:
        return peak_bytes()
    _CLEAR.write_text("5")  # proc(5): 5 resets the peak resident set size to the current value
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most bytes that were resident since the last `restart_peak`; on other systems than Linux, since the process began."""
    if can_restart:
        return _status("VmHWM")
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else 1024 * found


def _status(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field + ":")).split()[1])
