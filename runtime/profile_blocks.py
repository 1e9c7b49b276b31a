"""What was followed of a step, cut into the blocks of a profile: the rounds of each run of layers, and what is between them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..planner.allocations import Allocation, Moment
from ..planner.profile import Block, Event, Mark, Profile, Repeated, Stretch, net_of, stretch
from ..planner.work import Exchange, Op
from .followed import Item, with_turns
from .skipped_layers import ROUNDS, CannotSkip, Run

_STANDS_FOR_OTHERS = 1  # the number of the round that does


@dataclass(frozen=True, slots=True)
class _Piece:
    """A range of items that becomes a block."""

    start: int
    end: int
    run: int = -1
    times: int = 1


def cut(stream: Sequence[Item], allocations: Sequence[Allocation], runs: Sequence[Run], early: frozenset[str]) -> Profile:
    """The profile of a step; raises `CannotSkip` where the rounds of a run cannot be told apart, or do not come out even."""
    watched = {each.unit for each in stream if isinstance(each, Mark)}
    items = list(with_turns(stream, watched))
    pieces = list(_with_gaps([each for index, run in enumerate(runs) for each in _rounds(index, run, items)], len(items)))
    born = [item.allocation for item in items if isinstance(item, Moment) and item.born]
    places = {allocation: place for place, allocation in enumerate(born)}
    kept = tuple(allocations[index] for index in born)
    counts = _counts(pieces, items)
    blocks = tuple(Block(each.times, tuple(_parts(each, items, counts, places, kept)), each.run) for each in pieces)
    inputs = tuple((each.name, each.nbytes) for each in allocations if each.kind == "input")
    _check_even(blocks, pieces, items, kept, places)
    return Profile(kept, blocks, inputs, tuple(map(_repeated, runs)), early)


def _repeated(run: Run) -> Repeated:
    """Of the two that are not named by their own place the first stands for all in the middle, the other for the last but one."""
    last = run.rounds - 1
    return Repeated(run.layers, run.period, ((1, range(1, last - 1)), (2, range(last - 1, last))))


# -- pieces -------------------------------------------------------------------------------------------------------------


def _rounds(index: int, run: Run, items: Sequence[Item]) -> Iterator[_Piece]:
    """The rounds of a run, forward and backward.

    A round lasts until the next one begins, so that what the code between layers does is part of it; the last one to come lasts
    until its last layer is done.
    """
    rounds = {name: found for place, name in enumerate(run.layers) if (found := run.round_of(place)) is not None}
    for turn, order in (("forward", range(ROUNDS)), ("backward", range(ROUNDS - 1, -1, -1))):
        marks = [(place, each) for place, each in enumerate(items) if isinstance(each, Mark) and each.unit in rounds]
        begins = [(place, rounds[each.unit]) for place, each in marks if each.turn == turn]
        ends = [place for place, each in marks if each.turn == f"{turn} ends"]
        if [each for _, each in begins] != [each for each in order for _ in range(run.period)] or len(ends) != len(begins):
            raise CannotSkip(f"the {turn} does not go through the layers one after the other, once each")
        edges = [*(place for place, _ in begins[:: run.period]), max(ends) + 1]
        for (start, end), each in zip(pairwise(edges), order, strict=True):
            yield _Piece(start, end, index, run.rounds - ROUNDS + 1 if each == _STANDS_FOR_OTHERS else 1)


def _with_gaps(pieces: list[_Piece], end: int) -> Iterator[_Piece]:
    at = 0
    for piece in sorted(pieces, key=lambda each: each.start):
        if piece.start < at:
            raise CannotSkip("layers of two lists run among each other")
        if piece.start > at:
            yield _Piece(at, piece.start)
        yield piece
        at = piece.end
    yield _Piece(at, end)


# -- events -------------------------------------------------------------------------------------------------------------


def _counts(pieces: Sequence[_Piece], items: Sequence[Item]) -> dict[int, int]:
    """How many allocations come or go with an item, where it is more than one.

    What a layer that stands for others makes, and the code around the layers lets go (or the other way round), is there once for
    each of them.
    """
    starts = [piece.start for piece in pieces]
    born: dict[int, int] = {}
    counts: dict[int, int] = {}
    for place, item in enumerate(items):
        if isinstance(item, Moment) and item.born:
            born[item.allocation] = place
        elif isinstance(item, Moment) and item.allocation in born:
            first, second = (pieces[bisect.bisect_right(starts, at) - 1] for at in (born[item.allocation], place))
            if first.run != second.run:
                if min(first.times, second.times) > 1:
                    raise CannotSkip("what a layer of one list makes is let go by one of another")
                counts[born[item.allocation]], counts[place] = second.times, first.times
    return counts


def _parts(
    piece: _Piece, items: Sequence[Item], counts: Mapping[int, int], places: Mapping[int, int], kept: tuple[Allocation, ...]
) -> Iterator[Mark | Stretch]:
    events: list[Event] = []
    noted: list[Op | Exchange] = []
    for place in range(piece.start, piece.end):
        item = items[place]
        if isinstance(item, Mark):
            if events or noted:
                yield stretch(events, kept, noted)
            events, noted = [], []
            yield item
        elif isinstance(item, Op | Exchange):
            noted.append(item)
        elif isinstance(item, Moment) and item.allocation in places:
            count = counts.get(place, 1)
            events.append(Event(places[item.allocation], count if item.born else -count))
    if events or noted:
        yield stretch(events, kept, noted)


def _check_even(
    blocks: Sequence[Block],
    pieces: Sequence[_Piece],
    items: Sequence[Item],
    kept: Sequence[Allocation],
    places: Mapping[int, int],
) -> None:
    """Raise where something other than what stays to the end is left: then a layer in the middle is not like those beside it."""
    left = sum(block.times * net_of(block) for block in blocks)
    gone = {item.allocation for item in items if isinstance(item, Moment) and not item.born}
    stays = 0
    for piece in pieces:
        for item in items[piece.start : piece.end]:
            if isinstance(item, Moment) and item.born and item.allocation not in gone:
                stays += piece.times * kept[places[item.allocation]].nbytes
    if left != stays:
        raise CannotSkip(f"{left - stays} bytes do not come out even")
