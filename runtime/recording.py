"""Spans of a real run, one after the other, and what each took: memory events, CUDA's own counters, resident memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.profiler import profile

from .memory_events import MemoryEvent, Peak, memory_events, memory_profile, peaks_of
from .process_peak import peak_bytes, restart_peak

HOST = "cpu"


@dataclass(slots=True)
class Counters:
    """A device's bytes over a span: asked for, handed out, reserved, each at its peak; and taken by others at its end."""

    requested: int
    active: int
    reserved: int
    taken: int


@dataclass(slots=True)
class Span:
    """A stretch of the run; `peaks` are by device, of its memory events, `resident` is the process's peak."""

    name: str
    start: int
    watched: bool
    end: int = 0
    resident: int = 0
    counters: dict[str, Counters] = field(default_factory=dict)
    peaks: dict[str, Peak] = field(default_factory=dict)


class Recording:
    """While it is entered, `span` opens a span and closes the one before; afterwards `spans` and `events` are complete.

    CUDA's peak counters and the process's record of resident memory start anew with every span.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self.spans: list[Span] = []
        self.events: list[MemoryEvent] = []
        self.before = 0
        self._cuda = [device for device in devices if device.startswith("cuda")]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The time that is looked at."""
        gc.collect()  # of what came before, which would go meanwhile
        self.before = restart_peak()
        profiler = memory_profile()
        with profiler:
            yield
            self._close()
        self._complete(profiler)

    def span(self, name: str, watched: bool = False) -> None:
        """From here on it is another span."""
        self._close()
        for device in self._cuda:
            torch.cuda.reset_peak_memory_stats(device)
        restart_peak()
        self.spans.append(Span(name, time.time_ns(), watched))

    def _close(self) -> None:
        if not self.spans or self.spans[-1].end:
            return
        span = self.spans[-1]
        span.counters = {device: _counters(device) for device in self._cuda}
        span.resident, span.end = peak_bytes(), time.time_ns()

    def _complete(self, profiler: profile) -> None:
        self.events = memory_events(profiler)
        found = peaks_of(self.events, [span.start for span in self.spans])
        for span, peaks in zip(self.spans, found, strict=True):
            span.peaks = peaks

    def measured(self, span: Span, device: str) -> int:
        """The peak of what torch's allocator had handed out: on CUDA by its own count, else by the memory events."""
        if device in span.counters:
            return span.counters[device].active
        return span.peaks[device].nbytes if device in span.peaks else 0


def _counters(device: str) -> Counters:
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return Counters(
        stats["requested_bytes.all.peak"],
        stats["active_bytes.all.peak"],
        stats["reserved_bytes.all.peak"],
        total - free - stats["reserved_bytes.all.current"],
    )
