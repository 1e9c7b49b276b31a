"""The exact way to divide a chain of units between unequal devices, host memory and the disk: the fewest bytes offloaded.

Units run one after the other, so each device gets consecutive ones, and what passes from device to device is one activation.
Units that no device has room for are *offloaded*: they lie in host memory, or on disk, and are brought to the *main* device one
at a time to be run there. They are consecutive too, anywhere in the chain: one *gap*.

Whatever fits is feasible for a shorter run of units as well. So the furthest unit that a set of devices can reach from the
front, and from the back, says all there is to know about it, and every gap can be looked at: the fewest bytes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

HOST, DISK = -1, -2
"""Homes of units that are offloaded; others are at a device's index."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What is not divided: `nbytes` of weights where it lies, and what is needed where it runs. All sizes are bytes.

    `cache` stays there from step to step, `working` is there while the unit runs, and `streamed` is the largest part of its
    weights that is brought to the main device at a time where it is offloaded.
    """

    name: str
    nbytes: int
    cache: int = 0
    working: int = 0
    streamed: int = 0


@dataclass(frozen=True, slots=True)
class Partition:
    """A home for each unit, a device's index, `HOST` or `DISK`, and the device that runs what is offloaded."""

    homes: tuple[int, ...]
    main: int

    def offloaded(self, units: Sequence[Unit]) -> int:
        """Bytes of weights in host memory or on disk."""
        return sum(unit.nbytes for unit, home in zip(units, self.homes, strict=True) if home < 0)

    def on_disk(self, units: Sequence[Unit]) -> int:
        """Bytes of weights on disk."""
        return sum(unit.nbytes for unit, home in zip(units, self.homes, strict=True) if home == DISK)

    @property
    def runs(self) -> tuple[int, ...]:
        """The device that runs each unit."""
        return tuple(self.main if home < 0 else home for home in self.homes)

    @property
    def hops(self) -> int:
        """How many times what passes between units goes from device to device."""
        return sum(one != other for one, other in itertools.pairwise(self.runs))


def used(units: Sequence[Unit], found: Partition, device: int) -> int:
    """Bytes that a device holds at most: what lies there, what stays and is needed while it runs, and what is brought to it."""
    lies = sum(unit.nbytes for unit, home in zip(units, found.homes, strict=True) if home == device)
    runs = [unit for unit, runner in zip(units, found.runs, strict=True) if runner == device]
    brought = [unit.streamed for unit, home in zip(units, found.homes, strict=True) if home < 0 and found.main == device]
    return lies + sum(unit.cache for unit in runs) + max((unit.working for unit in runs), default=0) + max(brought, default=0)


def partition(
    units: Sequence[Unit], devices: Sequence[int], host: int = 0, disk: bool = True, resident: int = 0
) -> Partition | None:
    """The partition that offloads the fewest bytes, of those the one with the fewest on disk, then the fewest hops.

    `devices` are the bytes that each has room for, `host` those of the host memory; nothing is offloaded to the disk unless
    `disk`, and `resident` bytes lie on the main device in any case. None where there is no way: no device has room for what has
    to be there to run an offloaded unit, or the host's memory is too small.

    >>> partition([Unit("a", 4), Unit("b", 3), Unit("c", 2)], devices=[3, 6])
    Partition(homes=(1, 0, -2), main=0)
    >>> partition([Unit("a", 4), Unit("b", 3)], devices=[4, 3]).homes
    (0, 1)
    """
    chain = _Chain(tuple(units), tuple(devices), resident)
    best: tuple[tuple[int, int, int], Partition] | None = None
    for gap in chain.gaps():
        if best is not None and gap.nbytes > best[0][0]:
            break
        kept = _host_run(units, gap, host)
        on_disk = gap.nbytes - sum(units[number].nbytes for number in kept)
        if (on_disk and not disk) or (best is not None and (gap.nbytes, on_disk) > best[0][:2]):
            continue
        for main in range(len(devices)):
            away = tuple(HOST if number in kept else DISK for number in range(gap.start, gap.stop))
            for before, after in chain.homes(gap, main):
                found = Partition((*before, *away, *after), main)
                cost = (gap.nbytes, on_disk, found.hops)
                if best is None or cost < best[0]:
                    best = cost, found
    return None if best is None else best[1]


class _Gap(NamedTuple):
    """Units `start` to `stop` (which is not one of them), offloaded, and their bytes."""

    nbytes: int
    start: int
    stop: int


def _host_run(units: Sequence[Unit], gap: _Gap, host: int) -> range:
    """The consecutive units of a gap with the most bytes that host memory has room for; of several the most, and the first."""
    best, most, start, held = range(0), -1, gap.start, 0
    for stop in range(gap.start, gap.stop):
        held += units[stop].nbytes
        while held > host:
            held -= units[start].nbytes
            start += 1
        if start <= stop and (held, stop + 1 - start) > (most, len(best)):
            best, most = range(start, stop + 1), held
    return best


class _Chain:
    """Units in their order, and the room of devices.

    Devices with the same room are alike: from the front the first of them are used first, from the back the last.
    """

    def __init__(self, units: tuple[Unit, ...], devices: tuple[int, ...], resident: int) -> None:
        self._units, self._devices, self._resident = units, devices, resident
        self._held = list(itertools.accumulate((unit.nbytes + unit.cache for unit in units), initial=0))
        self._cached = list(itertools.accumulate((unit.cache for unit in units), initial=0))
        self._ways: dict[tuple[int, int, int, bool], dict[int, tuple[tuple[int, int], ...]]] = {}

    def gaps(self) -> list[_Gap]:
        """Every gap, the smallest first, and of those that are equal the ones further back."""
        sums, count = list(itertools.accumulate((unit.nbytes for unit in self._units), initial=0)), len(self._units)
        found = [_Gap(sums[stop] - sums[start], start, stop) for start in range(count) for stop in range(start + 1, count + 1)]
        return [_Gap(0, count, count), *sorted(found, key=lambda gap: (gap.nbytes, -gap.stop, -gap.start))]

    def homes(self, gap: _Gap, main: int) -> Iterator[tuple[list[int], list[int]]]:
        """The devices of the units before a gap, and of those after it; nothing where they do not fit."""
        inside = self._units[gap.start : gap.stop]
        reserve = self._resident + self._cached[gap.stop] - self._cached[gap.start]
        reserve += max((unit.streamed for unit in inside), default=0)
        working = max((unit.working for unit in inside), default=0)
        if reserve + working > self._devices[main]:
            return
        front, back = (self._reached(main, reserve, working, forward) for forward in (True, False))
        whole = (1 << len(self._devices)) - 1
        for mask, way in front.items():
            rest = back.get(whole ^ mask, ())
            if way[-1][1] >= gap.start and rest and rest[-1][1] <= gap.stop:
                yield _spread(way, gap.start, True), _spread(rest, gap.stop, False)[::-1]

    def _reached(self, main: int, reserve: int, working: int, forward: bool) -> dict[int, tuple[tuple[int, int], ...]]:
        """For sets of devices, as bits: which one after the other, and how far each gets; the way that gets furthest."""
        key = (main, reserve, working, forward)
        if key not in self._ways:
            start = 0 if forward else len(self._units)
            found: dict[int, tuple[tuple[int, int], ...]] = {0: ((-1, start),)}
            for mask in range(1 << len(self._devices)):
                if mask in found:
                    for device in self._next(mask, main, forward):
                        kept = (reserve, working) if device == main else (0, 0)
                        end = self._extended(found[mask][-1][1], self._devices[device] - kept[0], kept[1], forward)
                        known, further = found.get(mask | 1 << device), (*found[mask], (device, end))
                        if known is None or (end > known[-1][1] if forward else end < known[-1][1]):
                            found[mask | 1 << device] = further
            self._ways[key] = found
        return self._ways[key]

    def _next(self, mask: int, main: int, forward: bool) -> Iterator[int]:
        """Devices that a set lacks, one of each kind."""
        seen = set()
        for device in range(len(self._devices)) if forward else reversed(range(len(self._devices))):
            kind = (self._devices[device], device == main)
            if not mask >> device & 1 and kind not in seen:
                seen.add(kind)
                yield device

    def _extended(self, start: int, room: int, working: int, forward: bool) -> int:
        """How far a device gets from `start` on."""
        step, end = (1 if forward else -1), start
        while 0 <= (number := end if forward else end - 1) < len(self._units):
            working = max(working, self._units[number].working)
            if abs(self._held[end + step] - self._held[start]) + working > room:
                break
            end += step
        return end


def _spread(way: Sequence[tuple[int, int]], stop: int, forward: bool) -> list[int]:
    """The device of each unit on a way that goes no further than `stop`."""
    found: list[int] = []
    for (_, start), (device, end) in itertools.pairwise(way):
        found += [device] * (min(end, stop) - start if forward else start - max(end, stop))
    return found
