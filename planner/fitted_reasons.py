"""Why the search decided what it did, in words with figures, and what else it looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .fit_training import ALIKE, Does, Found, Search, Short, Tried
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
    for short in sorted(found.short, key=lambda each: each.room.needed - each.room.usable)[:_SHOWN]:
        yield Candidate(
            layout=short.layout.describe(),
            peak=short.memory.peak,
            verdict="tight" if short.room.left >= 0 else "does not fit",
            short=short.room.describe(),
        )


def _why_mesh(best: Tried, found: Found) -> str:
    time = f"{human_seconds(best.seconds)} a sample, {best.time}"
    others = [each for each in found.tried if each.layout is not best.layout]
    if not others:
        count = len(found.short)
        return f"{time}; of {count + 1} layouts nothing else fits" if count else f"{time}; there is no other layout"
    other = others[0]
    slower = other.seconds / best.seconds - 1
    alike = f" which is as fast within {ALIKE:.0%} and less simple" if slower <= ALIKE else f" which takes {slower:.0%} longer"
    return f"{time}; next is {other.layout.describe()},{alike}; {len(found.short)} layouts do not fit"


def _why_layers(best: Tried, search: Search) -> Iterator[Reason]:
    """Of checkpointing and of what stays gathered: how many layers, and what there would be without."""
    doing = Counter(each for run in best.does for each in run)
    for does, count in doing.items():
        rules = [rule.pattern for rule in best.decisions.checkpointing if rule.level == does.level]
        if does.level != "none":
            yield Reason(what=f"{does.level} checkpointing of {', '.join(rules)}", why=_without(best, search, count))
    kept = [] if best.decisions.sharding is None else [rule.pattern for rule in best.decisions.sharding.reshard_rules]
    if kept:
        yield Reason(
            what=f"{', '.join(kept)} stay gathered between forward and backward",
            why="there is room for them, and they need not be gathered again",
        )
    if all(each.level == "none" for each in doing) and doing:
        yield Reason(what="no checkpointing", why=f"everything that layers keep fits: {best.verdict.binding.describe()}")


def _without(best: Tried, search: Search, count: int) -> str:
    """What a step would come to if no layer ran again."""
    found = search.uniform(best.layout, Does("none"))
    if found is None:
        return f"{count} layers run again in the backward, so that it fits"
    room = search.shortest(found.verdict)
    lacks = "" if room is None else f", {human_bytes(max(search.missing(found.verdict), 0))} more than there is in {room.place}"
    return (
        f"without, a step takes {human_bytes(found.memory.phases['step'])}{lacks}; running again costs "
        f"{human_seconds(max(best.time.total - found.time.total, 0.0))} a step"
    )


def _why_offload(found: Found) -> str:
    nearest = min(found.short, key=lambda each: each.room.needed - each.room.usable, default=None)
    return "nothing fits without" if nearest is None else f"nothing fits without: {describe_short(nearest)}"


def describe_short(short: Short) -> str:
    """A layout that does not fit: where what is missing, and the tensors that make it."""
    largest = ", ".join(f"{name} ({human_bytes(nbytes)})" for name, nbytes in short.memory.binding.tensors[:3])
    return f"{short.layout.describe()}: {short.room.describe()}; largest: {largest}"
