"""The page's sections about memory: peaks by phase, the timeline by kind, and what makes the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .markup import Markup, element
from .page_parts import bar, bytes_cell, count_cell, heading, section, swatch, table
from .planner.allocations import Allocation
from .planner.allocator_events import Usage
from .planner.memory import Memory
from .planner.rank_classes import RankClass
from .planner.series import Series
from .timeline import class_of, describe, drawing
from .units import format_bytes

if TYPE_CHECKING:
    from .report import Report

_SHOWN_ALLOCATIONS = 25
_LEAST_SHARE = 0.001  # of the peak, for a device to have a drawing of its own
_HOW = (
    "Bytes by kind, moment by moment: each is one allocation or release, and phases are as wide as they have moments. "
    "With a script, the pointer or the arrow keys say what is there at a moment."
)
_HOW_T0 = "The tensors that the closed form knows of, phase by phase, each from its beginning to its end."
_LARGEST = "Largest there, with what is held because of them: gradient, optimizer state, the copy being converted"
_AT_PEAK = "What is there then: same origins together, the largest first; of a backward op, the forward op's line"


# -- by phase -----------------------------------------------------------------------------------------------------------


def phases(memory: Memory) -> Iterator[Markup]:
    """Peaks by phase and device, with what is active and reserved where that is known."""
    devices = list(dict.fromkeys(device for found in memory.by_device.values() for device in found))
    usages = [usage.reserved for found in memory.reserved.values() for usage in found.values()]
    whole = max([*(nbytes for found in memory.by_device.values() for nbytes in found.values()), *usages], default=0)
    yield section("Memory by phase", *(_of_device(memory, device, whole) for device in devices))


def _of_device(memory: Memory, device: str, whole: int) -> Markup:
    known = any(device in found for found in memory.reserved.values())
    head = [heading("phase"), heading("bytes", True), *(heading(name, True) for name in ("active", "reserved") if known)]
    rows = []
    for phase, found in memory.by_device.items():
        nbytes, usage = found.get(device, 0), memory.reserved.get(phase, {}).get(device)
        cells = [element("th", phase, scope="row"), bytes_cell(nbytes, data_phase=phase, data_device=device)]
        rows.append(element("tr", *cells, *_usage(usage, known), bar(_pieces(nbytes, usage), whole)))
    caption = f"Peak bytes on {device}{': of tensors, active and reserved' if known else ''}"
    return table(caption, [*head, heading("")], rows)


def _usage(usage: Usage | None, known: bool) -> list[Markup]:
    if usage is None:
        return [element("td", "", class_="number")] * (2 * known)
    return [bytes_cell(usage.active), bytes_cell(usage.reserved)]


def _pieces(nbytes: int, usage: Usage | None) -> list[tuple[int, str]]:
    beyond = max(usage.reserved - nbytes, 0) if usage is not None else 0
    return [(nbytes, "fill-bar"), *([(beyond, "fill-added")] if beyond else [])]


# -- over time ----------------------------------------------------------------------------------------------------------


def over_time(report: Report) -> Iterator[Markup]:
    """The timelines: of one process or of rank 0, and of other ranks where they differ, one of which is open at a time."""
    shown = [(each, made) for each in report.rank_classes if (made := list(_timelines(each, report)))]
    if not shown:
        return
    how = element("p", _HOW if report.memory.run is not None else _HOW_T0, class_="note")
    if len(shown) == 1:
        yield section("Memory over time", how, *shown[0][1])
        return
    parts = []
    for place, (each, made) in enumerate(shown):
        title = f"{each.describe()}: peak {format_bytes(each.memory.peak)}"
        parts.append(element("details", element("summary", title), *made, name="ranks", open=place == 0))
    yield section("Memory over time", how, *parts)


def _timelines(each: RankClass, report: Report) -> Iterator[Markup]:
    name = each.describe() if report.memory.ranks > 1 else ""
    for series in _drawn(each.memory):
        caption = element("figcaption", describe(series, name))
        drawn = drawing(series, name, legend=False, data_rank=each.ranks[0], data_device=series.device)
        said = element("output", class_="moment")
        yield element("figure", caption, _legend(series), drawn, said)
        yield _kinds(series)


def _drawn(memory: Memory) -> list[Series]:
    """Those of devices that hold enough to be seen beside the others, of the one that makes the peak first."""
    every = [found for device in memory.devices if (found := memory.series(device)) is not None]
    least = max(1, _LEAST_SHARE * memory.peak)
    return sorted((each for each in every if each.highest >= least), key=lambda each: each.device != memory.binding.device)


def _legend(series: Series) -> Markup:
    entries = [swatch(class_of(kind), kind) for kind in series.kinds]
    reserved = [swatch("reserved-swatch", "reserved")] if series.has_reserved else []
    return element("ul", *entries, *reserved, class_="legend")


def _kinds(series: Series) -> Markup:
    """The numbers of the drawing: bytes of each kind where a phase's peak is."""
    reserved = ["reserved"] if series.has_reserved else []
    several = len(series.kinds) > 1
    head = [heading("phase"), *(heading(name, True) for name in (*series.kinds, *["in all"] * several, *reserved))]
    rows = []
    for stretch in series.stretches:
        point = stretch.peak
        most = [max(each.reserved or 0 for each in stretch.points)] if reserved else []
        cells = [bytes_cell(nbytes) for nbytes in (*point.held, *[point.total] * several, *most)]
        rows.append(element("tr", element("th", stretch.phase, scope="row"), *cells))
    return table(f"Bytes on {series.device} by kind, at each phase's peak", head, rows)


# -- at the peak --------------------------------------------------------------------------------------------------------


def peak(memory: Memory) -> Markup:
    """What makes the peak: of a run every allocation by its origin, else the largest tensors."""
    binding = memory.binding
    line = element("p", f"{format_bytes(binding.bytes)} in {binding.phase} on {binding.device}.")
    allocations = memory.at_peak()
    if allocations:
        return section("What makes the peak", line, *_allocations(_grouped(allocations)))
    if not binding.tensors:
        return section("What makes the peak", line)
    whole = binding.tensors[0][1]
    rows = [
        element("tr", element("td", name, class_="name"), bytes_cell(nbytes), bar([(nbytes, "fill-bar")], whole))
        for name, nbytes in binding.tensors
    ]
    return section("What makes the peak", line, table(_LARGEST, [heading("tensor"), heading("bytes", True), heading("")], rows))


class _Origin(NamedTuple):
    """What allocations on one line have in common."""

    kind: str
    name: str
    op: str
    source: str


def _grouped(allocations: Sequence[Allocation]) -> list[tuple[_Origin, int, int]]:
    """Origins with how many allocations they have and their bytes, the largest first."""
    found: dict[_Origin, tuple[int, int]] = {}
    for each in allocations:
        origin = _Origin(each.kind, each.name or each.module, each.op, str(each.source) if each.source else "")
        count, nbytes = found.get(origin, (0, 0))
        found[origin] = count + 1, nbytes + each.nbytes
    ranked = sorted(found.items(), key=lambda pair: (-pair[1][1], pair[0]))
    return [(origin, count, nbytes) for origin, (count, nbytes) in ranked]


def _allocations(groups: Sequence[tuple[_Origin, int, int]]) -> Iterator[Markup]:
    names = ("kind", "tensor or module", "op", "source", "count", "bytes")
    head = [heading(name, name in ("count", "bytes"), sort=True) for name in names]
    rows, whole = [], groups[0][2]
    for origin, count, nbytes in groups[:_SHOWN_ALLOCATIONS]:
        where = element("td", origin.name, class_="name")
        cells = [element("td", origin.kind), where, element("td", element("code", origin.op)), element("td", origin.source)]
        rows.append(element("tr", *cells, count_cell(count), bytes_cell(nbytes), bar([(nbytes, class_of(origin.kind))], whole)))
    yield table(_AT_PEAK, [*head, heading("")], rows)
    rest = groups[_SHOWN_ALLOCATIONS:]
    if rest:
        yield element("p", f"… and {len(rest):,} more, {format_bytes(sum(each[2] for each in rest))}, all in the page's JSON.")
