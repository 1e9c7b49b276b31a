"""The ranks that fill one module together: they agree before anything is drawn, and none waits for one that is gone.

What they tell each other goes through the process group's own key-value store, not through collectives: a collective waits for a
dead rank as long as the group's timeout allows. The first rank of the group listens to all, the others to the first.

1. `agree`: every rank says what it is about to build; the first one compares, and publishes what it found
2. `largest` and `united`: a number that several ranks work out, a part each, is told to all
3. `finish`: every rank says that it is done; the first one says when all are. Only then does a module change.

A thread of each rank writes a number every second. A rank whose number stands still is gone; one that raises says so. Either way
the first one to notice says what happened, and every rank raises it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist

from ..tracer.errors import GroundplanError, RanksError

ARRIVAL = 45.0
"""Seconds after which a rank that has not come is given up; `timeout=` says otherwise."""

_BEAT = 1.0  # seconds
_SILENCE = 15.0  # seconds after which a rank whose thread writes nothing is gone
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.25  # seconds between two looks at the store, which thousands of ranks may share
_GOODBYE = 5.0  # seconds that the first rank stays at most for the others to hear how it went
_SHOWN = 8
_calls: Counter[str] = Counter()


class Seen(NamedTuple):
    """The rounds that the elements of a row from `start` to `stop` take."""

    rounds: int
    start: int
    stop: int


def covered(seen: Iterable[Seen | None], numel: int) -> int | None:
    """The rounds that `numel` elements take; None where these are not all of them.

    >>> covered([Seen(3, 0, 10), None, Seen(5, 10, 20)], 20)
    5
    >>> covered([Seen(3, 0, 10), Seen(5, 11, 20)], 20) is None
    True
    """
    found, end = 1, 0
    for each in sorted((each for each in seen if each is not None), key=lambda each: each.start):
        if each.start > end:
            return None
        found, end = max(found, each.rounds), max(end, each.stop)
    return found if end >= numel else None


class Ranks:
    """One process alone: nothing to agree on."""

    rank = 0
    count = 1

    def check(self) -> None:
        """Raise `RanksError` where another rank has failed."""

    def agree(self, said: Mapping[str, str]) -> None:
        """Raise `RanksError` on every rank where the ranks say different things."""

    def largest(self, key: str, first: int, parts: int, find: Callable[[int], int]) -> int:
        """The largest of `parts` numbers, which so many ranks find, from number `first % count` on. Every rank has to call."""
        return max(map(find, range(parts)))

    def united(self, key: str, first: int, seen: Seen | None, numel: int) -> int | None:
        """The largest number of rounds that any rank has seen; None where they have not seen all `numel` elements.

        Every rank has to call, with the same `key`; rank `first % count` puts together what they say.
        """
        return covered([seen], numel)

    def finish(self) -> None:
        """Return when every rank is done."""


@contextmanager
def together(group: Any, timeout: float | None) -> Iterator[Ranks]:
    """The ranks of a process group, `"world"` for all of them, or None for this process alone.

    An error in the body is told to the other ranks, whose bodies then raise `RanksError`.
    """
    if not _is_distributed(group):
        yield Ranks()
        return
    group = dist.group.WORLD if isinstance(group, str) else group
    ranks = _Together(group, ARRIVAL if timeout is None else timeout)
    with ranks.beating():
        try:
            yield ranks
        except BaseException as error:
            ranks.fail(error)
            raise


def _is_distributed(group: Any) -> bool:
    if isinstance(group, str) and group != "world":
        raise RanksError(f'group={group!r} is neither a process group nor "world" nor None')
    if group is None or not dist.is_available() or not dist.is_initialized():
        return False
    members = None if isinstance(group, str) else group
    return dist.get_world_size(members) > 1 and dist.get_backend(members) != "fake"


class _Together(Ranks):
    def __init__(self, group: Any, timeout: float) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self._names = dist.get_process_group_ranks(group)
        name = getattr(group, "group_name", "world")
        _calls[name] += 1  # the same on every rank, as each counts its calls, whether they succeed or not
        self._store = dist.distributed_c10d.PrefixStore(
            f"groundplan/{name}/{_calls[name]}", dist.distributed_c10d._get_default_store()
        )
        self._timeout = timeout
        self._start = time.monotonic()
        self._failure: str | None = None
        self._agreements = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()

    # -- the protocol ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        if self._failure is not None:
            raise RanksError(self._failure)

    def agree(self, said: Mapping[str, str]) -> None:
        self._agreements += 1
        turn = self._agreements
        self._set(f"says/{turn}/{self.rank}", json.dumps(dict(said)))
        if self.rank == 0:
            others = {rank: json.loads(self._wait(f"says/{turn}/{rank}", rank)) for rank in range(self.count)}
            difference = _difference(others, self._names)
            if difference:
                self._publish(difference)
                raise RanksError(difference)
            self._set(f"agreed/{turn}", "yes")
        self._wait(f"agreed/{turn}", 0)

    def largest(self, key: str, first: int, parts: int, find: Callable[[int], int]) -> int:
        mine = (self.rank - first) % self.count
        if mine < parts:
            self._set(f"found/{key}/{mine}", str(find(mine)))
        if mine == 0:
            found = [int(self._wait(f"found/{key}/{part}", (first + part) % self.count)) for part in range(parts)]
            self._set(f"largest/{key}", str(max(found)))
        return int(self._wait(f"largest/{key}", first % self.count))

    def united(self, key: str, first: int, seen: Seen | None, numel: int) -> int | None:
        whose = first % self.count
        self._set(f"seen/{key}/{self.rank}", json.dumps(seen))
        if self.rank == whose:
            every = [json.loads(self._wait(f"seen/{key}/{rank}", rank)) for rank in range(self.count)]
            self._set(f"united/{key}", json.dumps(covered([each and Seen(*each) for each in every], numel)))
        found: int | None = json.loads(self._wait(f"united/{key}", whose))
        return found

    def finish(self) -> None:
        self._set(f"done/{self.rank}", "yes")
        if self.rank == 0:
            for rank in range(self.count):
                self._wait(f"done/{rank}", rank)
            self._set("finished", "yes")
        self._wait("finished", 0)
        self._set(f"left/{self.rank}", "yes")
        self._stay_for([f"left/{rank}" for rank in range(self.count)])

    def fail(self, error: BaseException) -> None:
        """Tell the others what this rank raises, unless they know already."""
        told = self._failure is not None or isinstance(error, RanksError)
        try:
            if not told:
                self._publish(f"rank {self._names[self.rank]} failed: {type(error).__name__}: {error}")
            self._say_goodbye()
        except (RuntimeError, GroundplanError):
            pass  # the store is gone, and with it whoever could be told

    def _say_goodbye(self) -> None:
        self._set(f"heard/{self.rank}", "yes")
        self._stay_for([f"heard/{rank}" for rank in range(1, self.count) if rank in self._heard or self._has(f"beat/{rank}")])

    def _stay_for(self, awaited: list[str]) -> None:
        """The first rank may hold the store: were it to go on, and end, the others could not read there how it all went."""
        end = time.monotonic() + _GOODBYE
        while self.rank == 0 and awaited and time.monotonic() < end and not self._store.check(awaited):
            time.sleep(0.01)

    def _publish(self, message: str) -> None:
        found = self._store.compare_set("failed", "", message)
        self._failure = found.decode() or message

    # -- the store ------------------------------------------------------------------------------------------------------

    def _set(self, key: str, value: str) -> None:
        with _reached():
            self._store.set(key, value)

    def _has(self, key: str) -> bool:
        with _reached():
            return bool(self._store.check([key]))

    def _wait(self, key: str, whose: int) -> str:
        """The value of a key that rank `whose` will write; raises where that rank, or any other, is lost."""
        pause = _FIRST_PAUSE
        while not self._has(key):
            self.check()
            self._look_for(whose)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        with _reached():
            return bytes(self._store.get(key)).decode()

    def _look_for(self, rank: int) -> None:
        """Raise where a rank has not come in time, or has fallen silent."""
        now = time.monotonic()
        if not self._has(f"beat/{rank}"):
            if now - self._start > self._timeout:
                self._lose(
                    f"rank {self._names[rank]} did not come within {self._timeout:g} s: every rank of the group has to make the "
                    "same call. Say timeout=SECONDS if it takes longer, or group=None to fill a module on one rank alone"
                )
            return
        with _reached():
            beat = bytes(self._store.get(f"beat/{rank}"))
        last, when = self._heard.get(rank, (b"", now))
        if beat != last:
            self._heard[rank] = (beat, now)
        elif now - when > _SILENCE:
            self._lose(f"rank {self._names[rank]} is gone: it has given no sign of life for {_SILENCE:g} s")

    def _lose(self, message: str) -> None:
        self._publish(message)
        self.check()

    # -- signs of life --------------------------------------------------------------------------------------------------

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life, and listen for the failure of others, until the end."""
        self._set(f"beat/{self.rank}", "0")
        thread = threading.Thread(target=self._beat, name="groundplan ranks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def _beat(self) -> None:
        number = 0
        while not self._stop.wait(_BEAT):
            number += 1
            try:
                self._store.set(f"beat/{self.rank}", str(number))
                if self._failure is None and self._store.check(["failed"]):
                    self._failure = bytes(self._store.get("failed")).decode()
            except RuntimeError as error:
                self._failure = _LOST.format(error)
                return


_LOST = "the ranks cannot reach each other any more: the process that held their store is gone ({})"


@contextmanager
def _reached() -> Iterator[None]:
    """Errors of the store's connection, said so."""
    try:
        yield
    except RuntimeError as error:
        raise RanksError(_LOST.format(error)) from error


def _difference(said: Mapping[int, Mapping[str, str]], names: list[int]) -> str | None:
    """What the ranks disagree about, one line a rank, compared with what most of them say."""
    lines = []
    for key in said[0]:
        values = Counter(each.get(key, "nothing") for each in said.values())
        usual, _ = values.most_common(1)[0]
        lines += [
            f"\n  rank {names[rank]}: {key} {each.get(key, 'nothing')}, where rank {_first(said, key, usual, names)} has {usual}"
            for rank, each in said.items()
            if each.get(key, "nothing") != usual
        ]
    if not lines:
        return None
    more = f"\n  … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return (
        f"the ranks are about to build different things, so nothing was drawn:{''.join(lines[:_SHOWN])}{more}\n"
        "Call with the same constructor, arguments, seed and mesh on every rank (or torch.manual_seed the same on all)"
    )


def _first(said: Mapping[int, Mapping[str, str]], key: str, value: str, names: list[int]) -> int:
    return next(names[rank] for rank, each in said.items() if each.get(key, "nothing") == value)
