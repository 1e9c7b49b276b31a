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

from .markup import Markup, element, joined
from .page_fit import fit
from .page_memory import over_time, peak, phases
from .page_parts import bar, bytes_cell, count_cell, heading, listing, section, swatch, table
from .planner.records import dtype_name
from .planner.step_time import StepTime
from .planner.verdict import Room, Verdict
from .report_text import WAY_OUT, decision_lines, header_lines
from .shown import shortened
from .tensor_table import Row
from .timeline import style
from .tracer.describe import describe_frame
from .treemap import Box, Rectangle, boxes, tree
from .units import format_bytes

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
        element("style", Markup(_style())),
    )
    data = report.to_json() | {"memory": report.memory.to_json()}
    body = element(
        "body",
        element("main", element("h1", title), *_sections(report)),
        element("script", _script_data(data), type="application/json", id="report"),
        element("script", Markup(_file("page.js"))),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _style() -> str:
    """The style sheet, with the colors of kinds."""
    return f"{_file('page.css')}{style(dark=False)}\n@media (prefers-color-scheme: dark) {{\n{style(dark=True)}\n}}\n"


@cache
def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _script_data(data: Mapping[str, object]) -> Markup:
    """JSON that cannot end the element that holds it."""
    return Markup(json.dumps(data, ensure_ascii=True).replace("<", "\\u003c"))


def _sections(report: Report) -> Iterator[Markup]:
    yield _summary(report)
    if report.decisions.fitted is not None:
        yield fit(report.decisions.fitted)
    if report.verdict is not None:
        yield _verdict(report.verdict)
    if report.time is not None:
        notes = report.time.notes if isinstance(report.time, StepTime) else ()
        yield section("Step time, predicted", element("p", str(report.time)), listing(notes))
    yield from phases(report.memory)
    yield from over_time(report)
    yield peak(report.memory)
    yield from _map(report)
    yield from _tensors(report.rows)
    yield from _inits(report.rows)
    yield from _dead(report)
    yield from _uninitialized(report)
    yield _decisions(report)
    if report.notes:
        yield section("Assumptions and notes", listing(report.notes))


# -- summary and verdict ------------------------------------------------------------------------------------------------


def _summary(report: Report) -> Markup:
    pairs = [joined(element("dt", label), element("dd", text)) for label, text in header_lines(report)]
    return element("dl", *pairs)


def _verdict(verdict: Verdict) -> Markup:
    word = element("span", verdict.verdict, class_=f"verdict {_CLASSES[verdict.verdict]}", id="verdict")
    names = ("place", "verdict", "phase", "needed", "margin", "usable", "left")
    head = [heading(name, name in names[3:]) for name in names] + [heading("")]
    rooms = table(_ROOMS, head, [_room(room) for room in verdict.rooms])
    on_top = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in verdict.binding.added.items())
    besides = element("p", f"Besides the tensors, at {verdict.binding.place}: {on_top}.")
    return section("Does it fit", element("p", str(verdict.cluster), ": ", word), rooms, besides, listing(verdict.notes))


def _room(room: Room) -> Markup:
    whole = max(room.usable, room.needed + room.margin)
    word = element("td", room.verdict, class_=_CLASSES[room.verdict])
    sign = "" if room.left >= 0 else "−"
    left = element("td", f"{sign}{format_bytes(abs(room.left))} ({room.percent:.1f} %)", class_="number", data_value=room.left)
    numbers = [bytes_cell(nbytes) for nbytes in (room.needed, room.margin, room.usable)]
    pieces = [(room.tensors, "fill-bar"), (sum(room.added.values()), "fill-added"), (room.margin, "fill-margin")]
    return element(
        "tr",
        element("th", room.place, scope="row"),
        word,
        element("td", room.phase),
        *numbers,
        left,
        bar(pieces, whole, room.usable),
    )


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
    yield section(
        "Parameters by module", element("p", how, class_="note"), _legend(kinds, colors), drawing, element("output", id="part")
    )


def _legend(kinds: Counter[str], colors: Mapping[str, int]) -> Markup:
    named = [(kind, nbytes) for kind, nbytes in kinds.most_common() if colors[kind] < _COLORS - 1]
    rest = sum(kinds.values()) - sum(nbytes for _, nbytes in named)
    entries = [(kind, nbytes, colors[kind]) for kind, nbytes in named] + ([("others", rest, _COLORS - 1)] if rest else [])
    return element(
        "ul", *(swatch(f"k{color}", f"{kind} {format_bytes(nbytes)}") for kind, nbytes, color in entries), class_="legend"
    )


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
    head = [heading(name, name in ("count", "bytes"), sort=True) for name in names]
    caption = "Tensors that differ in a layer's number only are one line; its bytes are those of all of them"
    made = [_tensor(row) for row in ranked[:_SHOWN_ROWS]]
    more = [element("p", f"… and {len(rows) - _SHOWN_ROWS:,} more lines, all in the page's JSON.")] * (len(rows) > _SHOWN_ROWS)
    yield section("Largest tensors", table(caption, head, made), *more)


def _tensor(row: Row) -> Markup:
    cells = [
        element("td", row.name, class_="name"),
        count_cell(row.count),
        element("td", row.shape_words),
        element("td", dtype_name(row.final)),
    ]
    cells += [element("td", row.device), bytes_cell(row.nbytes), element("td", row.init_words), element("td", row.section)]
    return element("tr", *cells)


def _inits(rows: Sequence[Row]) -> Iterator[Markup]:
    counts, sizes = Counter[str](), Counter[str]()
    for row in rows:
        counts[row.init] += row.count
        sizes[row.init] += row.nbytes
    if not counts:
        return
    made = [
        element("tr", element("td", element("code", init)), count_cell(counts[init]), bytes_cell(nbytes))
        for init, nbytes in sizes.most_common()
    ]
    head = [heading("init", sort=True), heading("tensors", True, sort=True), heading("bytes", True, sort=True)]
    yield section("Init functions", table("What gives the tensors their values", head, made))


def _dead(report: Report) -> Iterator[Markup]:
    if not report.dead:
        return
    rows = []
    for each in report.dead:
        lines = "; ".join(describe_frame(line) for line in each.lines[:_SHOWN_LINES])
        more = f"; and {len(each.lines) - _SHOWN_LINES} more" if len(each.lines) > _SHOWN_LINES else ""
        numbers = [count_cell(number) for number in (each.count, each.elements, each.draws)]
        rows.append(element("tr", element("td", element("code", each.init)), *numbers, element("td", f"{lines}{more}")))
    head = [heading("init"), *(heading(name, True) for name in ("ops", "elements", "draws")), heading("called from")]
    count = (
        f"{len(report.graph.dead_ops):,} of {len(report.graph.ops):,} ops leave nothing in the finished module and are not run"
    )
    yield section("Dead ops", table(count, head, rows))


def _uninitialized(report: Report) -> Iterator[Markup]:
    names = [tensor.name for tensor in report.graph.uninitialized]
    if names:
        more = [f"… and {len(names) - _SHOWN_ROWS:,} more"] * (len(names) > _SHOWN_ROWS)
        yield section("Tensors without values", element("p", WAY_OUT), listing([*names[:_SHOWN_ROWS], *more]))


def _decisions(report: Report) -> Markup:
    made = decision_lines(report.decisions)
    return section("Decisions", listing(made) if made else element("p", "None: everything stays as constructed."))
