"""Threads that fill tensors: torch's random kernels use one core each, and let others run meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ..tracer.errors import MaterializeError

Item = TypeVar("Item")


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` threads, started when they are first needed; `with` ends them. None: one for each usable core."""

    def __init__(self, count: int | None = None) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise MaterializeError(f"threads={count!r} is not a number of threads; say threads=1 or more, or None for every core")
        self.count = usable_cores() if count is None else count
        self._pool: ThreadPoolExecutor | None = None

    def each(self, body: Callable[[Item], None], items: Iterable[Item]) -> None:
        """Run `body` on every item, and wait; where one raises, so does this."""
        items = list(items)
        if self.count == 1 or len(items) < 2:
            for item in items:
                body(item)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count, thread_name_prefix="groundplan")
        for done in [self._pool.submit(_without_autograd, body, item) for item in items]:
            done.result()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _without_autograd(body: Callable[[Item], None], item: Item) -> None:
    with torch.inference_mode():
        body(item)
