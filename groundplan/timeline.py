"""Memory over time as a drawing: areas of kinds on top of each other, phase after phase, and what is reserved as a line above.

The markup is SVG with its colors in attributes, so that it stands alone, in a notebook or in a file; a page's style sheet goes
before them. The moments of a phase are equally wide; a phase is as wide as it has moments, but wide enough for its name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .markup import Markup, element
from .planner.series import TENSORS, Point, Series, Stretch
from .shown import write_atomically
from .tracer.errors import DecisionError
from .units import format_bytes

WIDTH, HEIGHT = 1000.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 76.0, 14.0, 28.0, 40.0
_LEAST_WIDTH = 78.0  # of a phase
_LEGEND_LINE = 20.0
_LETTER = 6.6
_TICKS = 5


class Color(NamedTuple):
    """A color on a light ground, and on a dark one."""

    light: str
    dark: str


COLORS = {
    "parameter": Color("#332288", "#8f83e0"),
    "buffer": Color("#88ccee", "#88ccee"),
    "input": Color("#999933", "#a5a53c"),
    "gradient": Color("#ddcc77", "#ddcc77"),
    "optimizer state": Color("#44aa99", "#44aa99"),
    "activation": Color("#cc6677", "#cc6677"),
    "KV cache": Color("#882255", "#b23a76"),
    "gathered parameter": Color("#aa4499", "#d06cc0"),
    "communication buffer": Color("#117733", "#1e8c45"),
    "temporary": Color("#c8ccd1", "#c8ccd1"),
    TENSORS: Color("#4a7ebb", "#5b93d3"),
}
"""After Paul Tol's "muted" scheme (2021), made to be told apart with any color vision."""

_OTHER = Color("#d55e00", "#e57e2e")
_TEXT, _LINES, _BACK = Color("#1b1f24", "#e6e9ed"), Color("#d0d7de", "#3a414a"), Color("#ffffff", "#14171b")


def class_of(kind: str) -> str:
    """The class that areas and swatches of a kind have.

    >>> class_of("optimizer state")
    't-optimizer-state'
    """
    return f"t-{kind.lower().replace(' ', '-')}"


def style(dark: bool) -> str:
    """The rules of a style sheet that give each kind its color."""
    return "\n".join(f".{class_of(kind)} {{ fill: {color[dark]}; }}" for kind, color in COLORS.items())


# -- where things are ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Span:
    """A phase and the piece of the horizontal axis that it has."""

    stretch: Stretch
    x: float
    width: float

    def at(self, point: Point) -> float:
        """Where a point is."""
        return self.x + self.width * (point.at - self.stretch.points[0].at) / max(self.stretch.moments, 1)


@dataclass(frozen=True, slots=True)
class Frame:
    """The drawing's coordinates: the phases' spans, and `top` bytes at the upper edge."""

    spans: tuple[Span, ...]
    top: float
    step: float

    def y(self, nbytes: float) -> float:
        """Where so many bytes are."""
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * nbytes / self.top


def frame(series: Series) -> Frame:
    """Coordinates with room for all of a series."""
    stretches = series.stretches
    room = WIDTH - _LEFT - _RIGHT
    least = min(_LEAST_WIDTH, room / len(stretches))
    shared, moments = room - least * len(stretches), sum(each.moments for each in stretches)
    spans, x = [], _LEFT
    for each in stretches:
        width = least + shared * (each.moments / moments if moments else 1 / len(stretches))
        spans.append(Span(each, x, width))
        x += width
    step = _step(max(series.highest, 1) * 1.04)
    return Frame(tuple(spans), max(series.highest, 1) * 1.04, step)


def _step(top: float) -> float:
    """Bytes between two lines: 1, 2 or 5 times a power of ten, so that there are about `_TICKS` of them.

    >>> _step(34.9e9)
    10000000000.0
    """
    power = 1.0
    while power * 10 * _TICKS <= top:
        power *= 10
    return min((factor * power for factor in (1, 2, 5, 10)), key=lambda step: abs(top / step - _TICKS))


# -- the drawing --------------------------------------------------------------------------------------------------------


def drawing(series: Series, name: str = "", legend: bool = True, **attributes: str | int) -> Markup:
    """The SVG of a series, to be part of HTML; `name` says whose memory it is, `legend` whether the kinds are explained in it."""
    placed = frame(series)
    shown = [kind for number, kind in enumerate(series.kinds) if _occurs(series, number)]
    explained = list(_legend(shown, series.has_reserved)) if legend else []
    height = HEIGHT + (_LEGEND_LINE * (1 + max((line for _, line in explained), default=0)) if explained else 0)
    label = describe(series, name)
    inside = [
        element("title", label),
        *_grid(placed),
        *_areas(series, placed),
        *([_line(placed)] if series.has_reserved else []),
        *_phases(placed),
        *_peak(series, placed),
        *(each for each, _ in explained),
    ]
    return element(
        "svg",
        *inside,
        viewBox=f"0 0 {WIDTH:g} {height:g}",
        class_="timeline",
        role="img",
        aria_label=label,
        font_family="system-ui, sans-serif",
        font_size=12,
        **attributes,
    )


def describe(series: Series, name: str = "") -> str:
    """What the drawing shows, in a sentence."""
    stretch, point = series.peak
    of = f" of {name}" if name else ""
    reserved = f"; up to {format_bytes(_most_reserved(series))} reserved" if series.has_reserved else ""
    return f"Memory on {series.device}{of} over time: peak {format_bytes(point.total)} in {stretch.phase}{reserved}"


def _most_reserved(series: Series) -> int:
    return max(point.reserved or 0 for each in series.stretches for point in each.points)


def _occurs(series: Series, number: int) -> bool:
    return any(point.held[number] for each in series.stretches for point in each.points)


def _areas(series: Series, placed: Frame) -> Iterator[Markup]:
    """From the highest sum down to the lowest, each over the one before, so that only upper edges have to be drawn."""
    bottom = f"{placed.y(0):.1f}"
    for number in reversed(range(len(series.kinds))):
        kind = series.kinds[number]
        if _occurs(series, number):
            upper = [[sum(point.held[: number + 1]) for point in span.stretch.points] for span in placed.spans]
            path = f"M{_LEFT:.1f} {bottom}{_steps(placed, upper)}V{bottom}Z"
            yield element("path", d=path, fill=COLORS.get(kind, _OTHER).light, class_=class_of(kind))


def _line(placed: Frame) -> Markup:
    reserved = [[point.reserved or 0 for point in span.stretch.points] for span in placed.spans]
    path = f"M{_LEFT:.1f} {placed.y(reserved[0][0]):.1f}{_steps(placed, reserved)}"
    return element("path", d=path, fill="none", stroke=_TEXT.light, stroke_width=1.5, class_="reserved")


def _steps(placed: Frame, heights: Sequence[Sequence[int]]) -> str:
    """From the left to the right: what is there stays until the next moment."""
    path, last = [], ""
    for span, values in zip(placed.spans, heights, strict=True):
        for point, value in zip(span.stretch.points, values, strict=True):
            if (y := f"{placed.y(value):.1f}") != last:
                path.append(f"H{span.at(point):.1f}V{y}")
                last = y
    return "".join([*path, f"H{WIDTH - _RIGHT:.1f}"])


def _grid(placed: Frame) -> Iterator[Markup]:
    for number in range(int(placed.top / placed.step) + 1):
        y = f"{placed.y(number * placed.step):.1f}"
        yield element("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=y, y2=y, stroke=_LINES.light, class_="grid")
        yield _text(format_bytes(round(number * placed.step)), _LEFT - 6, placed.y(number * placed.step) + 4, anchor="end")


def _phases(placed: Frame) -> Iterator[Markup]:
    for span in placed.spans:
        x, end = f"{span.x:.1f}", HEIGHT - _BOTTOM + 6
        yield element("line", x1=x, x2=x, y1=_TOP, y2=end, stroke=_LINES.light, class_="grid")
        place = {"data_phase": span.stretch.phase, "data_x": x, "data_width": f"{span.width:.1f}"}
        yield _text(span.stretch.phase, span.x + span.width / 2, HEIGHT - _BOTTOM + 17, anchor="middle", **place)


def _peak(series: Series, placed: Frame) -> Iterator[Markup]:
    stretch, point = series.peak
    span = next(each for each in placed.spans if each.stretch is stretch)
    x, y = span.at(point), placed.y(point.total)
    yield element(
        "circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4, fill=_BACK.light, stroke=_TEXT.light, stroke_width=2, class_="peak"
    )
    words = f"peak {format_bytes(point.total)} in {stretch.phase}"
    yield _text(words, min(max(x, _LEFT + 80), WIDTH - _RIGHT - 80), 16, anchor="middle", font_weight="600")


def _text(text: str, x: float, y: float, anchor: str, **attributes: str) -> Markup:
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=_TEXT.light, **attributes)


def _legend(kinds: Sequence[str], reserved: bool) -> Iterator[tuple[Markup, int]]:
    """An entry for each kind, and the line that it stands on."""
    x, line = _LEFT, 0
    for kind in [*kinds, *(["reserved"] if reserved else [])]:
        width = 26 + _LETTER * len(kind)
        if x + width > WIDTH - _RIGHT:
            x, line = _LEFT, line + 1
        y = HEIGHT + line * _LEGEND_LINE
        color = COLORS.get(kind, _OTHER)
        swatch = element("rect", x=f"{x:.1f}", y=y, width=12, height=12, fill=color.light, class_=class_of(kind))
        if kind == "reserved":
            swatch = element(
                "path", d=f"M{x:.1f} {y + 6}h12", fill="none", stroke=_TEXT.light, stroke_width=1.5, class_="reserved"
            )
        yield element("g", swatch, _text(kind, x + 17, y + 10, anchor="start")), line
        x += width


# -- alone --------------------------------------------------------------------------------------------------------------


def alone(series: Series, name: str = "", dark: bool = True) -> Markup:
    """The same as a document of its own, on its ground; `dark` says whether it follows the viewer's wish for one."""
    made = drawing(series, name, xmlns="http://www.w3.org/2000/svg")
    ground = element("rect", width="100%", height="100%", fill=_BACK.light, class_="ground")
    rules = element("style", Markup(_DARK.replace("COLORS", style(dark=True)))) if dark else Markup("")
    start = made.index(">") + 1
    return Markup(f"{made[:start]}{rules}{ground}{made[start:]}\n")


def write_png(path: str | os.PathLike[str], svg: str, width: int) -> None:
    """Draw an SVG that stands alone to `path`, `width` pixels wide. Raises `DecisionError` where nothing is there to draw it."""
    try:
        import resvg_py
        from font_source_sans_pro import SourceSansPro, SourceSansProSemibold
    except ImportError as error:
        raise DecisionError(
            f"a PNG is drawn by the packages resvg-py and font-source-sans-pro, which cannot be imported ({error}): "
            "pip install 'groundplan[png]', or write an SVG, which needs nothing"
        ) from error
    fonts = [SourceSansPro, SourceSansProSemibold]  # letters are the same on every machine
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=width, sans_serif_family=_FONT, skip_system_fonts=True, font_files=fonts)
    write_atomically(path, bytes(drawn))


_FONT = "Source Sans Pro"


_DARK = f"""
@media (prefers-color-scheme: dark) {{
text {{ fill: {_TEXT.dark}; }} .grid {{ stroke: {_LINES.dark}; }} .reserved {{ stroke: {_TEXT.dark}; }}
.ground {{ fill: {_BACK.dark}; }} .peak {{ fill: {_BACK.dark}; stroke: {_TEXT.dark}; }}
COLORS
}}
"""
