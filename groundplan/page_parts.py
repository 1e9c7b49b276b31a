"""What the sections of the page are put together from: headings, lists, tables with their cells, and bars."""

from __future__ import annotations

from collections.abc import Sequence

from .markup import Markup, element
from .units import format_bytes, format_count


def section(title: str, *inside: str) -> Markup:
    """A part of the page under a heading that names it."""
    name = "-".join(title.lower().split())
    return element("section", element("h2", title, id=name), *inside, aria_labelledby=name)


def listing(texts: Sequence[str]) -> Markup:
    """A list of plain texts."""
    return element("ul", *(element("li", text) for text in texts))


def table(caption: str, head: Sequence[Markup], rows: Sequence[Markup]) -> Markup:
    """A table in a box that scrolls by itself, which can be reached by keyboard."""
    made = element("table", element("caption", caption), element("thead", element("tr", *head)), element("tbody", *rows))
    return element("div", made, class_="wide", tabindex=0, role="region", aria_label=caption)


def heading(text: str, number: bool = False, sort: bool = False) -> Markup:
    """The head of a column; an empty one has no name. With `sort` the page's script sorts by it."""
    if not text:
        return element("td")
    inside = element("button", text, type="button") if sort else text
    return element("th", inside, scope="col", class_="number" if number else None)


def bytes_cell(nbytes: int, **attributes: str) -> Markup:
    """Bytes as people read them, with the exact number beside."""
    return element("td", format_bytes(nbytes), class_="number", data_value=nbytes, title=f"{nbytes:,} bytes", **attributes)


def count_cell(count: int) -> Markup:
    """The same for a count."""
    return element("td", format_count(count), class_="number", data_value=count, title=f"{count:,}")


def bar(pieces: Sequence[tuple[int, str]], whole: int, limit: int | None = None) -> Markup:
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


def square(kind: str) -> Markup:
    """A square in the color of the class `kind`."""
    return element(
        "svg",
        element("rect", width=10, height=10, class_=kind),
        viewBox="0 0 10 10",
        class_="swatch",
        aria_hidden="true",
        focusable="false",
    )


def swatch(kind: str, text: str) -> Markup:
    """An entry of a legend: a square of the class `kind`, and what it stands for."""
    return element("li", square(kind), text)
