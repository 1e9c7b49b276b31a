"""Why the search decided what it did, in words with figures, and what else it looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .fit_training import ALIKE, LEVELS, Does, Found, Search, Short, Tried
from .fitted import Candidate, Reason
from .memory import human_bytes
from .step_time import human_seconds

_SHOWN = 12


def reasons(best: Tried, found: Found, search: Search) -> Iterator[Reason]:
    """Of every decision that differs from the default, and of what was left alone on purpose."""
    yield Reason(what=f"mesh: {best.layout.describe()}", why=_why_mesh(best, found))
    yield from _why_layers(best, search)
    if best.decisions.sharding is not None and best.decisions.sharding.offload:
        yield Reason(what="parameters and optimizer state in host memory", why=_why_offload(found))


def candidates(best: Tried, found: Found) -> Iterator[Candidate]:
    """What was tried, the chosen one first, then by time; then what does not fit, by how much it lacks."""
    others = [each for each in found.tried if each.layout is not best.layout]
    for each in [best, *others][:_SHOWN]:
        yield Candidate(layout=each.layout.describe(), seconds=each.seconds, peak=each.memory.peak, verdict=each.verdict.verdict)
    for short in sorted(_only_short(found), key=lambda each: each.room.needed - each.room.usable)[:_SHOWN]:
        yield Candidate(
            layout=short.layout.describe(),
            peak=short.memory.peak,
            verdict="tight" if short.room.left >= 0 else "does not fit",
            short=short.room.describe(),
            missing=max(short.room.margin - short.room.left, 0) if short.room.left >= 0 else -short.room.left,
        )


def _only_short(found: Found) -> list[Short]:
    """The layouts that fit in no search, one with less to leave free included, each once."""
    fitting = {each.layout.describe() for each in found.tried}
    return list({each.layout.describe(): each for each in found.short if each.layout.describe() not in fitting}.values())


def _why_mesh(best: Tried, found: Found) -> str:
    time = f"{human_seconds(best.seconds)} a sample, {best.time}"
    others = [each for each in found.tried if each.layout is not best.layout]
    count = len(_only_short(found))
    if not others:
        return f"{time}; of {count + 1} layouts nothing else fits" if count else f"{time}; there is no other layout"
    other = others[0]
    slower = other.seconds / best.seconds - 1
    alike = f" which is as fast within {ALIKE:.0%} and less simple" if slower <= ALIKE else f" which takes {slower:.0%} longer"
    return f"{time}; next is {other.layout.describe()},{alike}; {count} layouts do not fit"


def _why_layers(best: Tried, search: Search) -> Iterator[Reason]:
    """Of checkpointing and of what stays gathered: how many layers, and what there would be without."""
    doing = Counter(each.level for run in best.does for each in run)
    for level in LEVELS[:-1]:
        rules = [rule.pattern for rule in best.decisions.checkpointing if rule.level == level]
        if rules:
            yield Reason(what=f"{level} checkpointing of {', '.join(rules)}", why=_without(best, search))
    kept = [] if best.decisions.sharding is None else [rule.pattern for rule in best.decisions.sharding.reshard_rules]
    if kept:
        yield Reason(
            what=f"{', '.join(kept)} stay gathered between forward and backward",
            why="there is room for them, and they need not be gathered again",
        )
    if list(doing) == ["none"]:
        yield Reason(what="no checkpointing", why=f"everything that layers keep fits: {best.verdict.binding.describe()}")


def _without(best: Tried, search: Search) -> str:
    """What a step would come to if no layer ran again."""
    found = search.uniform(best.layout, Does("none"))
    if found is None:
        return "so that it fits"
    room = search.shortest(found.verdict)
    lacks = "" if room is None else f", {human_bytes(max(search.missing(found.verdict), 0))} more than there is in {room.place}"
    more = best.time.total - found.time.total
    cost = f"running again costs {human_seconds(more)} a step" if more > 0 else "communication hides that layers run again"
    return f"without, a step takes {human_bytes(found.memory.phases['step'])}{lacks}; {cost}"


def _why_offload(found: Found) -> str:
    nearest = min(found.short, key=lambda each: each.room.needed - each.room.usable, default=None)
    return "nothing fits without" if nearest is None else f"nothing fits without: {describe_short(nearest)}"


def describe_short(short: Short) -> str:
    """A layout that does not fit: where what is missing, and the tensors that make it."""
    largest = ", ".join(f"{name} ({human_bytes(nbytes)})" for name, nbytes in short.memory.binding.tensors[:3])
    return f"{short.layout.describe()}: {short.room.describe()}; largest: {largest}"
