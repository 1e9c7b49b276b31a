"""What the closed form is made of: bytes that come and go on a device for the sake of a tensor.

A phase has several thousand of them, so that they are kept in columns: `Changes` is a sequence of `Change`s that makes them only
when it is asked for them, and knows its peaks without.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

HOST = "cpu"

Ints = npt.NDArray[np.int64]
Names = npt.NDArray[np.object_]


class Change(NamedTuple):
    """Bytes allocated on a device (released, if negative) for the sake of a tensor."""

    device: str
    tensor: str
    nbytes: int


@dataclass(frozen=True, eq=False)
class Run:
    """Changes one after the other on one device: at least one, the tensors' names and the bytes."""

    device: str
    names: Names
    nbytes: Ints

    def __iter__(self) -> Iterator[Change]:
        return (Change(self.device, name, nbytes) for name, nbytes in self.pairs())

    def pairs(self) -> Iterator[tuple[str, int]]:
        """Names and bytes."""
        return zip(self.names.tolist(), self.nbytes.tolist(), strict=True)

    @cached_property
    def _sums(self) -> Ints:
        return np.cumsum(self.nbytes)

    @cached_property
    def rise(self) -> int:
        """How far the running sum rises above where it was, at most; below 0 where it only falls."""
        return int(self._sums.max())

    @property
    def net(self) -> int:
        """How much more there is afterwards."""
        return int(self._sums[-1])

    def until(self, rise: int) -> Run | None:
        """The changes up to the first at which the running sum is `rise`; None where it never is."""
        found = np.flatnonzero(self._sums == rise)
        return Run(self.device, self.names[: found[0] + 1], self.nbytes[: found[0] + 1]) if len(found) else None

    @cached_property
    def largest(self) -> Change:
        """The largest of them, the first of those that are equal."""
        at = int(self.nbytes.argmax())
        return Change(self.device, self.names[at], int(self.nbytes[at]))


class Changes(Sequence[Change]):
    """Changes in the order in which they happen.

    >>> changes = Changes.of([Change("cpu", "a", 8), Change("cpu", "b", 4), Change("cpu", "a", -8)])
    >>> changes.peaks(), changes.tensors_at("cpu", 12)
    ({'cpu': 12}, {'a': 8, 'b': 4})
    >>> (changes + changes)[3]
    Change(device='cpu', tensor='a', nbytes=8)
    """

    def __init__(self, runs: Iterable[Run] = ()) -> None:
        self.runs = tuple(runs)

    @classmethod
    def of(cls, changes: Iterable[Change]) -> Changes:
        """The same, from a list of them."""
        return cls(_runs(changes))

    @classmethod
    def on_one(cls, device: str, names: Sequence[str], nbytes: Sequence[int]) -> Changes:
        """Changes on one device."""
        return cls([Run(device, names_of(names), np.array(nbytes, dtype=np.int64))] if names else ())

    @classmethod
    def of_columns(cls, devices: Sequence[str], of: Ints, names: Names, nbytes: Ints) -> Changes:
        """Changes whose devices are told by a number in `of` each, of one of `devices`."""
        if not len(of):
            return cls()
        if len(set(devices)) == 1:
            return cls([Run(devices[0], names, nbytes)])
        numbers = np.array([devices.index(device) for device in devices])[of]
        cuts = np.flatnonzero(np.diff(numbers)) + 1
        firsts = [devices[number] for number in numbers[[0, *cuts]]]
        return cls(map(Run, firsts, np.split(names, cuts), np.split(nbytes, cuts)))

    def __add__(self, other: Changes) -> Changes:
        return Changes((*self.runs, *other.runs))

    def __len__(self) -> int:
        return sum(len(run.nbytes) for run in self.runs)

    def __iter__(self) -> Iterator[Change]:
        for run in self.runs:
            yield from run

    @overload
    def __getitem__(self, index: int) -> Change: ...
    @overload
    def __getitem__(self, index: slice) -> list[Change]: ...
    def __getitem__(self, index: int | slice) -> Change | list[Change]:
        return list(self)[index]

    # -- sums -----------------------------------------------------------------------------------------------------------

    def released(self) -> Changes:
        """The same bytes released."""
        return Changes(Run(run.device, run.names, -run.nbytes) for run in self.runs)

    def largest(self, besides: str | None = None) -> Change | None:
        """The largest on any device (but `besides`), the first of those that are equal."""
        found = (run.largest for run in self.runs if run.device != besides)
        return max(found, key=lambda change: change.nbytes, default=None)

    def on(self, device: str) -> Changes:
        """Those on one device."""
        return Changes(run for run in self.runs if run.device == device)

    def devices(self) -> list[str]:
        """The devices, in the order in which they occur."""
        return list(dict.fromkeys(run.device for run in self.runs))

    def peaks(self) -> dict[str, int]:
        """The highest running sum on each device, 0 at least: first the devices that hold something, as they come to it."""
        now: dict[str, int] = {}
        peaks: dict[str, int] = {}
        for run in self.runs:
            before = now.get(run.device, 0)
            now[run.device] = before + run.net
            if before + run.rise > peaks.get(run.device, 0):
                peaks[run.device] = before + run.rise
        return peaks | {device: 0 for device in now if device not in peaks}

    def tensors_at(self, device: str, peak: int) -> dict[str, int]:
        """What is held because of each tensor when the running sum on a device is `peak` for the first time."""
        held: dict[str, int] = {}
        now = 0
        for run in self.on(device).runs:
            if now == peak:
                break
            until = run.until(peak - now)
            for name, nbytes in (until or run).pairs():
                held[name] = held.get(name, 0) + nbytes
            if until is not None:
                break
            now += run.net
        return held


def _runs(changes: Iterable[Change]) -> Iterator[Run]:
    for device, together in groupby(changes, key=lambda each: each.device):
        _, names, nbytes = zip(*together, strict=True)
        yield Run(device, names_of(names), np.array(nbytes, dtype=np.int64))


def names_of(names: Sequence[str]) -> Names:
    """Names as a column."""
    found: Names = np.empty(len(names), dtype=object)
    found[:] = names
    return found
