"""The page's sections about memory: peaks by phase, the timeline by kind, and what makes the peak."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .fold import fold_names
from .markup import Markup, element
from .page_parts import bar, bytes_cell, count_cell, heading, section, square, swatch, table
from .planner.allocations import Allocation
from .planner.allocator_events import Usage
from .planner.memory import Memory
from .planner.ranks_alike import RanksAlike
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
_AT_PEAK = "What is there then, repeated layers together, the largest first; of a backward op the forward op's line"


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


def _timelines(each: RanksAlike, report: Report) -> Iterator[Markup]:
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
    peaks = [stretch.peak for stretch in series.stretches]
    rows = [_kind(kind, [peak.held[number] for peak in peaks]) for number, kind in enumerate(series.kinds)]
    if len(series.kinds) > 1:
        rows.append(_kind("in all", [peak.total for peak in peaks]))
    if series.has_reserved:
        rows.append(_kind("reserved", [max(point.reserved or 0 for point in each.points) for each in series.stretches]))
    head = [heading("kind"), *(heading(stretch.phase, True) for stretch in series.stretches)]
    return table(f"Bytes on {series.device} by kind, at each phase's peak", head, rows)


def _kind(kind: str, sizes: Sequence[int]) -> Markup:
    return element("tr", element("th", kind, scope="row"), *(bytes_cell(nbytes) for nbytes in sizes))


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
    """What allocations on one line have in common; `name` stands for all layers."""

    kind: str
    name: str
    op: str
    source: str


class _Group(NamedTuple):
    """Allocations of one origin: how many, and their bytes."""

    origin: _Origin
    pieces: int
    nbytes: int


def _grouped(allocations: Sequence[Allocation]) -> list[_Group]:
    """The groups, the largest first."""
    keys = [(each.kind, each.op, str(each.source) if each.source else "") for each in allocations]
    found = []
    for fold in fold_names([each.name or each.module for each in allocations], keys):
        kind, op, source = keys[fold.members[0]]
        nbytes = sum(allocations[member].nbytes for member in fold.members)
        found.append(_Group(_Origin(kind, fold.name, op, source), fold.count, nbytes))
    return sorted(found, key=lambda group: (-group.nbytes, group.origin))


def _allocations(groups: Sequence[_Group]) -> Iterator[Markup]:
    names = ("kind", "tensor or module", "op", "source", "count", "bytes")
    head = [heading(name, name in ("count", "bytes"), sort=True) for name in names]
    rows = []
    for origin, pieces, nbytes in groups[:_SHOWN_ALLOCATIONS]:
        cells = [
            element("td", square(class_of(origin.kind)), origin.kind, class_="kind"),
            element("td", origin.name, class_="name"),
        ]
        cells += [element("td", element("code", origin.op), class_="op"), element("td", origin.source, class_="source")]
        rows.append(element("tr", *cells, count_cell(pieces), bytes_cell(nbytes)))
    yield table(_AT_PEAK, head, rows)
    rest = groups[_SHOWN_ALLOCATIONS:]
    if rest:
        yield element(
            "p", f"… and {len(rest):,} more, {format_bytes(sum(each.nbytes for each in rest))}, all in the page's JSON."
        )
