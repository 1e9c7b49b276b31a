"""Collectives over gloo whose memory is given back where the profiler sees it.

A thread of gloo lets go of a work a moment after it has said that the work is done, and whoever lets go last frees its tensors.
The profiler looks at one thread, to which memory that gloo's frees would seem to be there for good.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives

PAUSE = 0.01
"""Seconds after a work is done by which gloo's thread has let go of it."""


@contextmanager
def works_given_back() -> Iterator[None]:
    """In the body every wait for a collective takes `PAUSE` more, so that this thread is the last to let go.

    A functional collective, such as tensor parallelism's, lets go as it waits, so the pause is before it: where a work takes
    longer than that, as another rank is late, gloo's thread is the last still.
    """
    wait, wait_tensor = dist.Work.wait, _functional_collectives.wait_tensor

    def waited(work: dist.Work, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(PAUSE)
        return done

    def waited_for(tensor: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)  # before, as it is this call that lets go
        found: torch.Tensor = wait_tensor(tensor)  # type: ignore[no-untyped-call]
        return found

    with mock.patch.object(dist.Work, "wait", waited), mock.patch.object(_functional_collectives, "wait_tensor", waited_for):
        yield
