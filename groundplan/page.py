"""A report as one page for a browser: nothing is loaded from anywhere, and without scripts everything is still there.

The page holds the report's own data as JSON (`<script type="application/json" id="report">`); what is shown is made of the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .layout import layout_line
from .markup import Markup, element, joined
from .planner.memory import Memory
from .planner.records import dtype_name
from .planner.verdict import Room, Verdict
from .shown import shortened
from .tensor_table import Row
from .tracer.describe import describe_frame
from .treemap import Box, Rectangle, boxes, tree
from .units import format_bytes, format_count

if TYPE_CHECKING:
    from .report import Report

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_SHOWN_ROWS = 500
_SHOWN_LINES = 6
_COLORS = 8
_WIDTH, _HEIGHT = 1000.0, 560.0
_LETTER = 6.7  # the width of a letter in the treemap
_ROOMS = "Every place that was looked at. Bars: tensors, what comes on top, the margin; the line is what is usable"
_CLASSES = {"fits": "fits", "tight": "tight", "does not fit": "no"}


def page(report: Report) -> str:
    """The whole page."""
    title = report.decisions.constructor
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: ground plan"),
        element("style", Markup(_file("page.css"))),
    )
    data = report.to_json() | {"memory": report.memory.to_json()}
    body = element(
        "body",
        element("main", element("h1", title), *_sections(report)),
        element("script", _script_data(data), type="application/json", id="report"),
        element("script", Markup(_file("page.js"))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


@cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _script_data(data: Mapping[str, object]) -> Markup:
    """JSON that cannot end the element that holds it."""
    return Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))


def _sections(report: Report) -> Iterator[Markup]:
    yield _summary(report)
    if report.verdict is not None:
        yield _verdict(report.verdict)
    yield from _phases(report.memory)
    yield _peak(report.memory)
    yield from _map(report)
    yield from _tensors(report.rows)
    yield from _inits(report.rows)
    yield from _dead(report)
    yield from _uninitialized(report)
    yield _decisions(report)
    if report.notes:
        yield _section("Assumptions and notes", _list(report.notes))


# -- parts of sections --------------------------------------------------------------------------------------------------


def _section(title: str, *inside: str) -> Markup:
    name = "-".join(title.lower().split())
    return element("section", element("h2", title, id=name), *inside, aria_labelledby=name)


def _list(texts: Sequence[str]) -> Markup:
    return element("ul", *(element("li", text) for text in texts))


def _table(caption: str, head: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    made = element("table", element("caption", caption), element("thead", element("tr", *head)), element("tbody", *rows))
    return element("div", made, class_="wide", tabindex=0, role="region", aria_label=caption)


def _head(text: str, number: bool = False, sort: bool = False) -> Markup:
    if not text:
        return element("td")
    inside = element("button", text, type="button") if sort else text
    return element("th", inside, scope="col", class_="number" if number else None)


def _bytes(nbytes: int, **attributes: str) -> Markup:
    return element("td", format_bytes(nbytes), class_="number", data_value=nbytes, title=f"{nbytes:,} bytes", **attributes)


def _count(count: int) -> Markup:
    return element("td", format_count(count), class_="number", data_value=count, title=f"{count:,}")


def _bar(pieces: Sequence[tuple[int, str]], whole: int, limit: int | None = None) -> Markup:
    """A cell with pieces of a bar, one after the other, as (bytes, class); `whole` bytes are all of its width."""
    drawn, at = [], 0.0
    for nbytes, kind in pieces:
        width = 100 * nbytes / whole if whole else 0.0
        drawn.append(element("rect", x=f"{at:.3f}", y=0, width=f"{width:.3f}", height=10, class_=kind))
        at += width
    if limit is not None and whole:
        x = f"{100 * limit / whole:.3f}"
        drawn.append(element("line", x1=x, x2=x, y1=0, y2=10, class_="limit", vector_effect="non-scaling-stroke"))
    drawing = element("svg", *drawn, viewBox="0 0 100 10", preserveAspectRatio="none", aria_hidden="true", focusable="false")
    return element("td", drawing, class_="bar")


# -- summary and verdict ------------------------------------------------------------------------------------------------


def _summary(report: Report) -> Markup:
    from .report import header_lines

    pairs = [joined(element("dt", label), element("dd", text)) for label, text in header_lines(report)]
    return element("dl", *pairs)


def _verdict(verdict: Verdict) -> Markup:
    word = element("span", verdict.verdict, class_=f"verdict {_CLASSES[verdict.verdict]}", id="verdict")
    names = ("place", "verdict", "phase", "needed", "margin", "usable", "left")
    head = [_head(name, name in names[3:]) for name in names] + [_head("")]
    table = _table(_ROOMS, head, [_room(room) for room in verdict.rooms])
    on_top = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in verdict.binding.added.items())
    besides = element("p", f"Besides the tensors, at {verdict.binding.place}: {on_top}.")
    return _section("Does it fit", element("p", str(verdict.cluster), ": ", word), table, besides, _list(verdict.notes))


def _room(room: Room) -> Markup:
    whole = max(room.usable, room.needed + room.margin)
    word = element("td", room.verdict, class_=_CLASSES[room.verdict])
    sign = "" if room.left >= 0 else "−"
    left = element("td", f"{sign}{format_bytes(abs(room.left))} ({room.percent:.1f} %)", class_="number", data_value=room.left)
    numbers = [_bytes(nbytes) for nbytes in (room.needed, room.margin, room.usable)]
    pieces = [(room.tensors, "fill-bar"), (sum(room.added.values()), "fill-added"), (room.margin, "fill-margin")]
    return element(
        "tr",
        element("th", room.place, scope="row"),
        word,
        element("td", room.phase),
        *numbers,
        left,
        _bar(pieces, whole, room.usable),
    )


# -- memory -------------------------------------------------------------------------------------------------------------


def _phases(memory: Memory) -> Iterator[Markup]:
    devices = list(dict.fromkeys(device for found in memory.by_device.values() for device in found))
    whole = max((nbytes for found in memory.by_device.values() for nbytes in found.values()), default=0)
    tables = [_of_device(memory, device, whole) for device in devices]
    yield _section("Memory by phase", *tables)


def _of_device(memory: Memory, device: str, whole: int) -> Markup:
    rows = []
    for phase, found in memory.by_device.items():
        nbytes = found.get(device, 0)
        name = element("th", phase, scope="row")
        rows.append(
            element("tr", name, _bytes(nbytes, data_phase=phase, data_device=device), _bar([(nbytes, "fill-bar")], whole))
        )
    return _table(f"Peak bytes on {device}", [_head("phase"), _head("bytes", True), _head("")], rows)


def _peak(memory: Memory) -> Markup:
    binding = memory.binding
    line = element("p", f"{format_bytes(binding.bytes)} in {binding.phase} on {binding.device}.")
    if not binding.tensors:
        return _section("What makes the peak", line)
    whole = binding.tensors[0][1]
    rows = [
        element("tr", element("td", name, class_="name"), _bytes(nbytes), _bar([(nbytes, "fill-bar")], whole))
        for name, nbytes in binding.tensors
    ]
    caption = "Largest there, with what is held because of them: gradient, optimizer state, the copy being converted"
    return _section("What makes the peak", line, _table(caption, [_head("tensor"), _head("bytes", True), _head("")], rows))


# -- the treemap --------------------------------------------------------------------------------------------------------


def _map(report: Report) -> Iterator[Markup]:
    leaves = list(report.parameter_leaves)
    whole = tree(leaves)
    if not whole.nbytes:
        return
    kinds = Counter[str]()
    for leaf in leaves:
        kinds[leaf.kind] += leaf.nbytes
    colors = {kind: min(place, _COLORS - 1) for place, (kind, _) in enumerate(kinds.most_common())}
    drawn = list(boxes(whole, Rectangle(0.0, 0.0, _WIDTH, _HEIGHT)))
    shapes = [_box(box, whole.nbytes, colors, first=place == 0) for place, box in enumerate(drawn[1:])]
    drawing = element(
        "svg",
        *shapes,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        class_="treemap",
        role="group",
        aria_label=f"Treemap of {format_bytes(whole.nbytes)} of parameters by module",
    )
    how = "Areas are bytes in the dtypes that the plan ends with; colors are classes of modules. Arrow keys go from part to part."
    yield _section(
        "Parameters by module", element("p", how, class_="note"), _legend(kinds, colors), drawing, element("output", id="part")
    )


def _legend(kinds: Counter[str], colors: Mapping[str, int]) -> Markup:
    named = [(kind, nbytes) for kind, nbytes in kinds.most_common() if colors[kind] < _COLORS - 1]
    rest = sum(kinds.values()) - sum(nbytes for _, nbytes in named)
    entries = [(kind, nbytes, colors[kind]) for kind, nbytes in named] + ([("others", rest, _COLORS - 1)] if rest else [])
    return element("ul", *(_entry(*entry) for entry in entries), class_="legend")


def _entry(kind: str, nbytes: int, color: int) -> Markup:
    swatch = element("svg", element("rect", width=10, height=10, class_=f"k{color}"), viewBox="0 0 10 10", aria_hidden="true")
    return element("li", swatch, f"{kind} {format_bytes(nbytes)}")


def _box(box: Box, whole: int, colors: Mapping[str, int], first: bool) -> Markup:
    part, (x, y, width, height) = box.part, box.place
    label = f"{part.path}: {format_bytes(part.nbytes)}, {100 * part.nbytes / whole:.1f} %, {part.kind}"
    fill = f"k{colors.get(part.kind, _COLORS - 1)}" if box.is_leaf else "outer"
    shape = element("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_=fill)
    fits = int((width - 6) / _LETTER)
    text = shortened(part.label, fits) if fits >= 3 and height >= 14 else ""
    words = element("text", text, x=f"{x + 3:.1f}", y=f"{y + 11:.1f}") if text else ""
    tab = 0 if first else -1
    data: dict[str, int] = {"data_bytes": part.nbytes, "data_depth": box.depth}
    return element("g", shape, words, element("title", label), tabindex=tab, role="img", aria_label=label, **data)


# -- tensors and ops ----------------------------------------------------------------------------------------------------


def _tensors(rows: Sequence[Row]) -> Iterator[Markup]:
    if not rows:
        return
    ranked = sorted(rows, key=lambda row: (-row.nbytes, row.name))
    names = ("tensor", "count", "shape", "dtype", "device", "bytes", "init", "kind")
    head = [_head(name, name in ("count", "bytes"), sort=True) for name in names]
    caption = "Tensors that differ in a layer's number only are one line; its bytes are those of all of them"
    made = [_tensor(row) for row in ranked[:_SHOWN_ROWS]]
    more = [element("p", f"… and {len(rows) - _SHOWN_ROWS:,} more lines, all in the page's JSON.")] * (len(rows) > _SHOWN_ROWS)
    yield _section("Largest tensors", _table(caption, head, made), *more)


def _tensor(row: Row) -> Markup:
    shape = "lazy" if row.shape is None else "×".join(map(str, row.shape)) or "scalar"
    init = f"{row.init}, rest uninitialized" if row.uninitialized and not row.init.startswith("uninitialized") else row.init
    cells = [
        element("td", row.name, class_="name"),
        _count(row.count),
        element("td", shape),
        element("td", dtype_name(row.final)),
    ]
    cells += [element("td", row.device), _bytes(row.nbytes), element("td", init), element("td", row.section)]
    return element("tr", *cells)


def _inits(rows: Sequence[Row]) -> Iterator[Markup]:
    counts, sizes = Counter[str](), Counter[str]()
    for row in rows:
        counts[row.init] += row.count
        sizes[row.init] += row.nbytes
    if not counts:
        return
    made = [
        element("tr", element("td", element("code", init)), _count(counts[init]), _bytes(nbytes))
        for init, nbytes in sizes.most_common()
    ]
    head = [_head("init", sort=True), _head("tensors", True, sort=True), _head("bytes", True, sort=True)]
    yield _section("Init functions", _table("What gives the tensors their values", head, made))


def _dead(report: Report) -> Iterator[Markup]:
    if not report.dead:
        return
    rows = []
    for each in report.dead:
        lines = "; ".join(describe_frame(line) for line in each.lines[:_SHOWN_LINES])
        more = f"; and {len(each.lines) - _SHOWN_LINES} more" if len(each.lines) > _SHOWN_LINES else ""
        numbers = [_count(number) for number in (each.count, each.elements, each.draws)]
        rows.append(element("tr", element("td", element("code", each.init)), *numbers, element("td", f"{lines}{more}")))
    head = [_head("init"), *(_head(name, True) for name in ("ops", "elements", "draws")), _head("called from")]
    count = (
        f"{len(report.graph.dead_ops):,} of {len(report.graph.ops):,} ops leave nothing in the finished module and are not run"
    )
    yield _section("Dead ops", _table(count, head, rows))


def _uninitialized(report: Report) -> Iterator[Markup]:
    from .report import WAY_OUT

    names = [tensor.name for tensor in report.graph.uninitialized]
    if names:
        more = [f"… and {len(names) - _SHOWN_ROWS:,} more"] * (len(names) > _SHOWN_ROWS)
        yield _section("Tensors without values", element("p", WAY_OUT), _list([*names[:_SHOWN_ROWS], *more]))


def _decisions(report: Report) -> Markup:
    from .report import step_line

    made = [*map(step_line, report.decisions.steps), *filter(None, [layout_line(report.decisions)])]
    return _section("Decisions", _list(made) if made else element("p", "None: everything stays as constructed."))
