"""Which ops matter: the slice that some storages' values depend on, and what of the tape outlives the constructor."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import cache
from typing import Any, Protocol

from .digraph import covers
from .graph import View
from .schema import FILLS, aten


class Recorded(Protocol):
    """What an op must offer here: an `Op`, or an entry that is still being recorded."""

    @property
    def index(self) -> int: ...
    @property
    def func(self) -> Any: ...
    @property
    def reads(self) -> tuple[View, ...]: ...
    @property
    def writes(self) -> tuple[View, ...]: ...
    @property
    def outputs(self) -> tuple[View | None, ...]: ...
    @property
    def overwrites(self) -> bool: ...
    @property
    def targets(self) -> tuple[View, ...]: ...


def slice_indices(
    ops: Sequence[Recorded],
    nbytes: Mapping[int, int],
    writers: Mapping[int, Sequence[int]],
    wanted: Iterable[int],
    also: Iterable[int] = (),
) -> list[int]:
    """Indices of the ops that the storages `wanted`, and the operands of the ops `also`, depend on, those ops included.

    Walks backwards from the last writer of each storage, so it takes time proportional to the slice, not to the tape.
    """
    found: set[int] = set()
    queue = [-index for index in also]
    heapq.heapify(queue)
    reached: dict[int, int] = {}  # how far back the writers of a storage are on the queue already; `before` only ever falls

    def ask(storage: int, before: int) -> None:
        """Put the writers of `storage` before op `before` on the queue, back to the last one that replaces all of it."""
        if reached.get(storage, before) < before:
            return
        indices = writers.get(storage, ())
        reached[storage] = -1
        for index in reversed(indices[: bisect_left(indices, before)]):
            heapq.heappush(queue, -index)
            if replaces(ops[index], storage, nbytes):
                reached[storage] = index
                return

    for storage in wanted:
        ask(storage, len(ops))
    while queue:
        index = -heapq.heappop(queue)
        if index in found:
            continue
        found.add(index)
        for view in (*ops[index].reads, *kept_targets(ops[index], nbytes)):
            ask(view.storage, index)
    return sorted(found)


def replaces(op: Recorded, storage: int, nbytes: Mapping[int, int]) -> bool:
    """Whether `op` leaves nothing of what `storage` held before."""
    for view in op.reads:
        if view.storage == storage:
            return False
    for view in op.targets:
        if view.storage == storage and (op.overwrites or view not in op.writes) and covers(view, nbytes[storage]):
            return True
    return False


def kept_targets(op: Recorded, nbytes: Mapping[int, int]) -> tuple[View, ...]:
    """What `op` writes in part, or changes in place: its previous contents matter."""
    return tuple(view for view in op.writes if not (op.overwrites and covers(view, nbytes[view.storage])))


@cache
def is_anchor(func: Any) -> bool:
    """Whether an op is a fill that looks at no tensor, `trunc_normal_` included."""
    return func in FILLS or getattr(func, "__name__", "") == "_no_grad_trunc_normal_"


@cache
def may_be_left_out(func: Any) -> bool:
    """Whether the runtime can do without an op that nothing reads: a fill, or a copy of a tensor (`copy.deepcopy` makes many)."""
    return is_anchor(func) or func is aten.clone.default


def mark_liveness(
    entries: Sequence[Any], nbytes: Sequence[int], exposed: AbstractSet[int], kept: Iterable[int]
) -> tuple[list[bool], list[bool]]:
    """For every op: whether it is live, and whether it is unread; `kept` are the storages that outlive the constructor.

    `live` follows reads from live ops only. `unread` holds for a fill or a clone whose values no later call looks at before they
    are overwritten or dropped, not even a dead one: the constructor's second run may leave it out without any call noticing.
    An entry that is live already stays so. `exposed` storages are looked at behind torch's back, at any time.
    """
    sizes = dict(enumerate(nbytes))
    needed = {*kept, *exposed}
    looked_at = needed.copy()
    live, unread = [False] * len(entries), [False] * len(entries)
    for entry in reversed(entries):
        reaches = [view.storage for view in entry.targets if 0 not in view.size]
        is_live = live[entry.index] = entry.live or not needed.isdisjoint(reaches)
        is_read = not may_be_left_out(entry.func) or not looked_at.isdisjoint(reaches)
        unread[entry.index] = not is_read
        if not is_live and not is_read:
            continue
        replaced = [storage for storage in reaches if storage not in exposed and replaces(entry, storage, sizes)]
        read = [view.storage for view in entry.reads]
        if is_live:
            needed.difference_update(replaced)
            needed.update(read)
        if is_read:
            looked_at.difference_update(replaced)
            looked_at.update(read)
            if not is_anchor(entry.func):
                looked_at.update([view.storage for view in kept_targets(entry, sizes)])
    return live, unread
