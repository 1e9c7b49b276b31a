"""A second model of the CUDA caching allocator, slow and simple: memory is a list of the ranges in use, all else is looked up.

There are no blocks, no chains and no sorted sets here. What is free is computed anew whenever it is asked for, as the gaps that
the ranges in use leave in what is mapped, and what is smallest or lowest is found by looking at all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from groundplan.planner.allocator_config import AllocatorConfig
from groundplan.planner.allocator_driver import Device
from groundplan.planner.allocator_events import Allocate, EmptyCache, Event, Free, RecordStream, Synchronize

MIB = 2**20

Gap = tuple[int, int]
"""From an address to another."""


@dataclass(eq=False)
class Used:
    """A range in the program's hands, or freed and waited for."""

    start: int
    end: int
    requested: int
    live: bool = True
    streams: set[Any] = field(default_factory=set)


@dataclass(eq=False)
class Segment:
    """A range of addresses of one pool and stream; `pages` are those that are mapped, all of them unless it is expandable."""

    start: int
    end: int
    small: bool
    stream: Any
    page: int
    pages: set[int]
    used: list[Used] = field(default_factory=list)

    def mapped(self) -> list[Gap]:
        found: list[Gap] = []
        for page in sorted(self.pages):
            start = self.start + page * self.page
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], start + self.page)
            else:
                found.append((start, start + self.page))
        return found

    def gaps(self) -> list[Gap]:
        """What is mapped and not in use."""
        found = []
        for start, end in self.mapped():
            at = start
            for used in sorted(self.used, key=lambda used: used.start):
                if start <= used.start < end:
                    found += [(at, used.start)] if used.start > at else []
                    at = used.end
            found += [(at, end)] if at < end else []
        return found

    def room_from(self, start: int) -> int:
        """Bytes from an address to the next range in use, mapped or not."""
        return min((used.start for used in self.used if used.start >= start), default=self.end) - start


class Model:
    """Takes the same events as `CachingAllocator`. After `failed` it is not to be used any more."""

    def __init__(self, config: AllocatorConfig, device: Device) -> None:
        self.config, self.device = config, device
        self.segments: list[Segment] = []
        self.live: dict[Any, tuple[Segment, Used] | None] = {}
        self.waiting: list[tuple[Any, Used, Segment]] = []  # one for each stream that is waited for
        self.done: list[tuple[Any, Used, Segment]] = []
        self.next = 2**40
        self.peaks = [0, 0, 0, 0, 0]
        self.failed = False
        self.retries = 0
        self.searches = 0
        self.born: dict[Gap, int] = {}
        total, fraction = device.total, config.per_process_memory_fraction
        self.allowed = int(fraction * total) if total is not None and fraction < 1 else None

    # -- counting -------------------------------------------------------------------------------------------------------

    def usage(self) -> list[int]:
        used = [each for segment in self.segments for each in segment.used]
        return [
            sum(each.requested for each in used),
            sum(each.end - each.start for each in used if each.live),
            sum(each.end - each.start for each in used),
            sum(segment.page * len(segment.pages) for segment in self.segments),
            0 if self.config.expandable_segments else len(self.segments),
        ]

    def noted(self) -> None:
        """After every step: peaks, and since when each gap is there."""
        self.peaks = [max(pair) for pair in zip(self.peaks, self.usage(), strict=True)]
        gaps = {gap for segment in self.segments for gap in segment.gaps()}
        self.born = {gap: self.born.get(gap, self.searches) for gap in gaps}

    # -- events ---------------------------------------------------------------------------------------------------------

    def take(self, event: Event) -> None:
        match event:
            case Allocate(id, nbytes, stream):
                if nbytes:
                    self.finish_waiting()
                    self.allocate(id, nbytes, stream)
                else:
                    self.live[id] = None
            case Free(id):
                self.free(id)
            case RecordStream(id, stream):
                found = self.live[id]
                if found is not None and found[0].stream != stream:
                    found[1].streams.add(stream)
            case Synchronize(stream):
                self.done = [each for each in self.waiting if stream is None or each[0] == stream or each in self.done]
            case EmptyCache():
                self.empty_cache()
        self.noted()

    def free(self, id: Any) -> None:
        found = self.live.pop(id)
        if found is None:
            return
        segment, used = found
        used.live = False
        if used.streams:
            self.waiting += [(stream, used, segment) for stream in used.streams]
        else:
            segment.used.remove(used)

    def finish_waiting(self) -> None:
        for entry in self.done:
            self.waiting.remove(entry)
            stream, used, segment = entry
            used.streams.discard(stream)
            if not used.streams:
                segment.used.remove(used)
        self.done = []
        self.noted()

    def empty_cache(self) -> None:
        self.done = list(self.waiting)
        self.finish_waiting()
        emptied = set()
        for segment in self.segments:
            before = bool(segment.pages)
            if self.config.expandable_segments:
                for start, end in segment.gaps():
                    first, last = -(-(start - segment.start) // segment.page), (end - segment.start) // segment.page
                    segment.pages -= set(range(first, last))
            elif not segment.used:
                segment.pages = set()
            if before and not segment.pages:
                emptied.add(id(segment))
        self.segments = [segment for segment in self.segments if id(segment) not in emptied]

    # -- allocating -----------------------------------------------------------------------------------------------------

    def allocate(self, id: Any, nbytes: int, stream: Any) -> None:
        size = self.rounded(nbytes)
        small = size <= MIB
        self.searches += not small
        found = self.find(small, stream, size)
        if found is None:
            self.collect()
            found = self.grow(small, stream, size)
            if found is None and self.release_oversize(small, stream, size):
                found = self.grow(small, stream, size)
            if found is None:
                self.empty_cache()
                self.retries += 1
                found = self.grow(small, stream, size)
        if found is None:
            self.failed = True
            return
        segment, (start, end) = found
        used = Used(start, start + size if self.splits(small, end - start, size) else end, nbytes)
        segment.used.append(used)
        self.live[id] = (segment, used)

    def rounded(self, nbytes: int) -> int:
        interval = 0
        while 2 ** (interval + 21) <= nbytes and interval < 15:
            interval += 1
        divisions = self.config.roundup_power2_divisions[interval]
        if divisions > 1 and nbytes > 512 * divisions:
            power = 1
            while power * 2 <= nbytes:
                power *= 2
            steps = (power + power * step // divisions for step in range(divisions + 1))
            return next(step for step in steps if step >= nbytes)
        return max(512, (nbytes + 511) // 512 * 512)

    def splits(self, small: bool, room: int, size: int) -> bool:
        if small or self.config.expandable_segments:
            return room - size >= 512
        return room - size > MIB and (self.config.max_split_size is None or size < self.config.max_split_size)

    def free_gaps(self, small: bool, stream: Any) -> list[tuple[int, int, Segment]]:
        """(size, address, segment), best first."""
        same = [each for each in self.segments if each.small == small and each.stream == stream]
        return sorted(((end - start, start, each) for each in same for start, end in each.gaps()), key=lambda gap: gap[:2])

    def find(self, small: bool, stream: Any, size: int) -> tuple[Segment, Gap] | None:
        fitting = [gap for gap in self.free_gaps(small, stream) if gap[0] >= size]
        if not fitting:
            return None
        best = fitting[0]
        if self.config.expandable_segments:
            rooms = [self.growable(*gap) for gap in fitting]
            steps = 0
            while steps + 1 < len(rooms) and rooms[steps + 1] < rooms[steps]:
                steps += 1
            best = fitting[steps]
        room, start, segment = best
        limit = self.config.max_split_size
        if limit is not None:
            if size < limit and room >= limit:
                return None
            if size >= limit and room >= size + self.config.max_non_split_rounding:
                return None
        return segment, (start, start + room)

    def growable(self, size: int, start: int, segment: Segment) -> int:
        """The size of a gap with the unmapped pages behind it."""
        page = (start + size - segment.start) // segment.page
        if (start + size - segment.start) % segment.page or segment.start + page * segment.page >= segment.end:
            return size
        if any(used.start == start + size for used in segment.used):
            return size
        following = min((each for each in segment.pages if each >= page), default=(segment.end - segment.start) // segment.page)
        return size + (following - page) * segment.page

    def grow(self, small: bool, stream: Any, size: int) -> tuple[Segment, Gap] | None:
        large = self.config.large_segment_size if size < 10 * MIB else (size + 2 * MIB - 1) // (2 * MIB) * 2 * MIB
        asked = 2 * MIB if small else large
        if self.allowed is not None and self.usage()[3] + asked > self.allowed:
            return None
        if self.config.expandable_segments:
            return self.expand(small, stream, size)
        if not self.fits(asked):
            return None
        segment = Segment(self.next, self.next + asked, small, stream, asked, {0})
        self.next += asked
        self.segments.append(segment)
        self.noted()
        return segment, (segment.start, segment.end)

    def fits(self, nbytes: int) -> bool:
        return self.device.total is None or self.usage()[3] + nbytes <= self.device.total - self.device.taken

    def expand(self, small: bool, stream: Any, size: int) -> tuple[Segment, Gap] | None:
        segment, start = self.place(small, stream, size)
        at = start
        while at < start + size:  # stretch by stretch of what is mapped or not
            page = (at - segment.start) // segment.page
            if page in segment.pages:
                at = segment.start + (page + 1) * segment.page
                continue
            pages = [page]
            while segment.start + (pages[-1] + 1) * segment.page < start + size and pages[-1] + 1 not in segment.pages:
                pages.append(pages[-1] + 1)
            if not self.fits(len(pages) * segment.page):
                return None
            segment.pages |= set(pages)
            self.noted()
            at = segment.start + (pages[-1] + 1) * segment.page
        return segment, next(gap for gap in segment.gaps() if gap[0] <= start < gap[1])

    def place(self, small: bool, stream: Any, size: int) -> tuple[Segment, int]:
        """The lowest address next to unmapped pages from which on nothing is in use for long enough."""
        for segment in sorted(self.segments, key=lambda each: each.start):
            if segment.small == small and segment.stream == stream:
                count = (segment.end - segment.start) // segment.page
                ends = [page for page in range(min(count, max(segment.pages, default=-1) + 2)) if page not in segment.pages]
                for page in (each for each in ends if each == 0 or each - 1 in segment.pages):
                    edge = segment.start + page * segment.page
                    start = next((gap[0] for gap in segment.gaps() if gap[1] == edge), edge)
                    if segment.room_from(start) >= size:
                        return segment, start
        page = 2 * MIB if small else self.config.large_segment_size
        total = self.device.total
        space = 2**47 if total is None else total + total // 8
        space = (space + page - 1) // page * page
        segment = Segment(self.next, self.next + space, small, stream, page, set())
        self.next += space
        self.segments.append(segment)
        return segment, segment.start

    # -- giving back ----------------------------------------------------------------------------------------------------

    def release_oversize(self, small: bool, stream: Any, size: int) -> bool:
        limit = self.config.max_split_size
        if limit is None or self.config.expandable_segments:
            return False
        needed = max(size, limit)
        large = [gap for gap in self.free_gaps(small, stream) if gap[0] >= limit]
        one = next((gap for gap in large if gap[0] >= needed), None)
        released = 0
        for gap in [one] if one is not None else reversed(large):
            if released < needed:
                self.segments.remove(gap[2])
                released += gap[0]
        return released >= needed

    def collect(self) -> None:
        threshold = self.config.garbage_collection_threshold
        if self.allowed is None or not threshold or self.config.expandable_segments:
            return
        target, reclaimed = self.usage()[3] - int(threshold * self.allowed), 0
        while reclaimed < target:
            free = [each for each in self.segments if not each.used and not each.small]
            ages = {id(each): self.searches - self.born[each.start, each.end] for each in free}
            if not ages:
                return
            mean = sum(ages.values()) / len(ages)
            old = [each for each in self.segments if ages.get(id(each), -1) >= mean]
            reclaimed += sum(each.end - each.start for each in old)
            self.segments = [each for each in self.segments if each not in old]
