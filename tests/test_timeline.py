"""Memory over time as a drawing: in the page, in a browser, in files and in a notebook."""

from __future__ import annotations

import builtins
import itertools
import json
import re
import sys
import types
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.allocations import STEP, Allocation, Kind, Moment, Timeline
from groundplan.planner.series import TENSORS, Point, Series, Stretch, series_of_run
from groundplan.timeline import COLORS, HEIGHT, WIDTH, class_of, drawing, frame, style
from groundplan.tracer.errors import DecisionError
from groundplan.units import format_bytes

from .test_page import BROWSER, Page, browse, luminance
from .test_reserved_run import net, training

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def report() -> gp.Report:
    return gp.trace(net).to("cuda").report(training(), "1x24GB+64GB-cpu", tier="T2")


@pytest.fixture(scope="module")
def text(report: gp.Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("timeline") / "report.html"
    report.to_html(path)
    return path.read_text(encoding="utf-8")


def series_of(report: gp.Report) -> Series:
    found = report.memory.series()
    assert found is not None
    return found


# -- the drawing --------------------------------------------------------------------------------------------------------


def corners(path: str) -> list[tuple[float, float]]:
    """Where the steps of a path lead."""
    x = y = 0.0
    found = []
    for command, first, second in re.findall(r"([MHV])([\d.]+)(?: ([\d.]+))?", path):
        x = float(first) if command in "MH" else x
        y = float(second) if command == "M" else float(first) if command == "V" else y
        found.append((x, y))
    return found


def test_areas_are_as_high_as_the_bytes(report: gp.Report) -> None:
    series = series_of(report)
    placed, made = frame(series), drawing(series, legend=False)
    paths = dict(re.findall(r'<path d="([^"]+)"[^>]* class="([^"]+)"', made))
    by_class = {name: corners(path) for path, name in paths.items()}
    for number, kind in enumerate(series.kinds):
        sums = [sum(point.held[: number + 1]) for stretch in series.stretches for point in stretch.points]
        if class_of(kind) in by_class:
            assert min(y for _, y in by_class[class_of(kind)]) == pytest.approx(placed.y(max(sums)), abs=0.06)
    reserved = max(point.reserved or 0 for stretch in series.stretches for point in stretch.points)
    assert min(y for _, y in by_class["reserved"]) == pytest.approx(placed.y(reserved), abs=0.06)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for path in by_class.values() for x, y in path)


def test_areas_lie_one_over_the_other_from_the_top_of_the_stack_down(report: gp.Report) -> None:
    series = series_of(report)
    order = re.findall(r'class="(t-[a-z-]+)"', drawing(series, legend=False))
    shown = [class_of(kind) for kind in series.kinds]
    assert order == [name for name in reversed(shown) if name in order] and "t-activation" in order


def test_phases_share_the_width_by_their_moments(report: gp.Report) -> None:
    spans = frame(series_of(report)).spans
    assert spans[0].x + sum(span.width for span in spans) == pytest.approx(spans[-1].x + spans[-1].width)
    ranked = sorted(spans, key=lambda span: span.stretch.moments)
    assert [span.width for span in ranked] == sorted(span.width for span in spans)
    for span in spans:
        assert span.at(span.stretch.points[-1]) == pytest.approx(span.x + span.width)


def test_the_peak_is_marked_where_it_is(report: gp.Report) -> None:
    series = series_of(report)
    stretch, point = series.peak
    placed = frame(series)
    span = next(span for span in placed.spans if span.stretch is stretch)
    x, y = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawing(series))[0]
    assert (float(x), float(y)) == pytest.approx((span.at(point), placed.y(point.total)), abs=0.06)
    assert f"peak {format_bytes(point.total)} in {stretch.phase}" in drawing(series)


def test_one_phase_of_one_moment() -> None:
    run = Timeline((Allocation("temporary", 5, "cpu"),), (Moment(STEP, 0, True),))
    made = drawing(series_of_run(run, "cpu"))
    assert "peak 5 B in step" in made
    flat = Series("cpu", (TENSORS,), (Stretch("load", 0, (Point(0, (0,)),)),))
    assert "peak 0 B in load" in drawing(flat)


def test_a_drawing_stays_small() -> None:
    """A run of 200,000 moments is drawn by what its 1,500 points need."""
    count = 100_000
    pieces = tuple(Allocation(("activation", "temporary")[n % 2], 1 + n * 7919 % 99_991, "cuda:0") for n in range(count))
    moments = tuple(Moment(STEP, n, born) for n in range(count) for born in (True, False))
    assert len(drawing(series_of_run(Timeline(pieces, moments), "cuda:0"))) < 120_000


# -- colors -------------------------------------------------------------------------------------------------------------

# Of linear RGB, for eyes without one of the cones: Machado, Oliveira and Fernandes (2009), severity 1.
VISIONS = {
    "trichromat": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanope": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranope": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
}
# To CIE XYZ, the white of D65 being 1.
XYZ = ((0.4339, 0.3762, 0.1899), (0.2126, 0.7152, 0.0722), (0.0177, 0.1095, 0.8728))


def product(matrix: Any, vector: Any) -> list[float]:
    return [sum(factor * value for factor, value in zip(row, vector, strict=True)) for row in matrix]


def lab(color: str, vision: str) -> tuple[float, float, float]:
    """CIE L*a*b* of `#rrggbb` as some eyes see it."""
    linear = [luminance(f"#{color[at : at + 2] * 3}") for at in (1, 3, 5)]
    seen = [min(max(value, 0.0), 1.0) for value in product(VISIONS[vision], linear)]
    x, y, z = (value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in product(XYZ, seen))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_kinds_can_be_told_apart(scheme: int, vision: str) -> None:
    colors = {kind: lab(color[scheme], vision) for kind, color in COLORS.items() if kind != TENSORS}
    apart = {
        pair: sum((a - b) ** 2 for a, b in zip(colors[pair[0]], colors[pair[1]], strict=True)) ** 0.5
        for pair in itertools.combinations(colors, 2)
    }
    assert {pair: distance for pair, distance in apart.items() if distance < 12} == {}


def test_every_kind_has_a_color() -> None:
    assert set(get_args(Kind)) <= set(COLORS)
    for kind in COLORS:
        assert f".{class_of(kind)} {{ fill: {COLORS[kind].dark}; }}" in style(dark=True)


# -- in the page --------------------------------------------------------------------------------------------------------


def test_the_page_has_the_drawing_and_its_numbers(report: gp.Report, text: str) -> None:
    page, memory = Page(text), report.memory
    drawn = [each for each in page.all("svg") if each.get("class") == "timeline"]
    assert [each["data-device"] for each in drawn] == ["cuda:0"], "what is on the CPU could not be seen beside it"
    assert all(each["role"] == "img" and each["aria-label"] for each in drawn)
    series = series_of(report)
    shown = [int(each["data-value"] or 0) for each in page.all("td") if "data-value" in each]
    for stretch in series.stretches:
        assert {*stretch.peak.held, stretch.peak.total} <= set(shown)
    for devices in memory.reserved.values():
        assert {devices["cuda:0"].active, devices["cuda:0"].reserved} <= set(shown)
    every = [found.to_json() for device in memory.devices if (found := memory.series(device)) is not None]
    assert page.data["memory"]["timeline"] == json.loads(json.dumps(every)) and len(every) == 2


def test_the_page_lists_what_is_there_at_the_peak(report: gp.Report, text: str) -> None:
    page = Page(text)
    assert "What is there then" in text
    assert {"optimizer state", "activation", "parameter"} <= set(page.text["td"])
    held = sum(each.nbytes for each in report.memory.at_peak())
    assert held == report.memory.peak
    assert "addmm" in page.text["code"]


class Softmax(nn.Module):
    """Under autocast its op runs in float32, which a conversion of ours sees to."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self.up(x), dim=-1)


def test_under_autocast_an_op_has_the_line_that_called_it() -> None:
    workload = gp.Training(inputs=lambda: (torch.ones(4, 8),), autocast=torch.bfloat16)
    run = gp.trace(Softmax).to("cuda").memory(workload, tier="T1").run
    assert run is not None
    lines = {each.source for each in run.allocations if each.op == "_log_softmax"}
    assert [line and line.function for line in lines] == ["forward"]


def test_ranks_that_differ_have_a_drawing_each(tmp_path: Path) -> None:
    report = gp.trace(nn.Linear, 64, 7).to("cuda").shard({"dp": 3}, units=()).report(gp.Training())
    assert [each.ranks for each in report.rank_classes] == [(0, 1), (2,)]
    report.to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    opened = [each.get("open", "closed") for each in page.all("details")]
    assert opened == [None, "closed"] and {each["name"] for each in page.all("details")} == {"ranks"}
    assert page.text["summary"][0].startswith("ranks 0-1: peak ") and page.text["summary"][1].startswith("rank 2: peak ")
    assert [each["ranks"] for each in page.data["ranks"]] == [[0, 1], [2]]
    assert page.data["ranks"][1]["peak"] == report.memory.rank(2).peak < report.memory.peak


def test_of_many_ranks_the_first_and_last_of_each_axis_are_looked_at() -> None:
    report = gp.trace(nn.Linear, 64, 70).shard({"dp_replicate": 2, "dp_shard": 64}, units=()).report()
    assert sorted(rank for each in report.rank_classes for rank in each.ranks) == [0, 63, 64, 127]


PROBE = """
<script>
const said = [];
window.addEventListener("error", (event) => said.push("error: " + event.message));
document.addEventListener("securitypolicyviolation", (event) => said.push("violation: " + event.violatedDirective));
window.addEventListener("load", () => {
  const drawing = document.querySelector("svg.timeline");
  const line = drawing.parentNode.querySelector("output");
  const before = line.textContent;
  drawing.focus();
  const press = (key, shiftKey) => drawing.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey, bubbles: true }));
  press("End"); const last = line.textContent;
  press("Home"); const first = line.textContent;
  press("ArrowRight", true); press("ArrowRight", true); press("ArrowRight", true); const next = line.textContent;
  const box = drawing.getBoundingClientRect(), circle = drawing.querySelector("circle").getBoundingClientRect();
  const at = { clientX: circle.x + circle.width / 2 + 0.01, clientY: box.y + 10, bubbles: true };
  drawing.dispatchEvent(new PointerEvent("pointermove", at));
  const found = { said, before, first, next, last, peak: line.textContent, focused: document.activeElement === drawing,
    fill: getComputedStyle(drawing.querySelector(".t-parameter")).fill, wide: box.width, high: box.height,
    fits: document.documentElement.scrollWidth <= window.innerWidth };
  document.title = JSON.stringify(found);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize(("size", "dark"), [("1200,900", False), ("500,800", True)], ids=["wide", "narrow and dark"])
def test_a_browser_shows_it(report: gp.Report, text: str, tmp_path: Path, size: str, dark: bool) -> None:
    page = tmp_path / "report.html"
    page.write_text(text.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    dom = browse(page, tmp_path, f"--window-size={size}", *flags)
    found = json.loads(next(title for title in Page(dom).text["title"] if title.startswith("{")))
    assert found["said"] == [] and found["focused"] and found["fits"]
    assert found["before"] == "" and found["first"].startswith("start, moment 0 of ") and "0 B" in found["first"]
    assert found["next"] != found["first"]
    memory = report.memory
    stretch, point = series_of(report).peak
    assert found["peak"].startswith(f"{stretch.phase}, moment "), found["peak"]
    assert f": {format_bytes(point.total)}; " in found["peak"] and "activation" in found["peak"]
    run = memory.run
    assert run is not None
    end = sum(piece.nbytes for piece in left_over(run))
    assert f": {format_bytes(end)}; " in found["last"] and found["last"].startswith("optimizer, moment ")
    red, green, blue = (int(COLORS["parameter"][dark][at : at + 2], 16) for at in (1, 3, 5))
    assert found["fill"] == f"rgb({red}, {green}, {blue})"
    assert found["wide"] / found["high"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)


def left_over(run: Timeline) -> list[Allocation]:
    """What is there when a run ends."""
    born, gone = ({each.allocation for each in run.moments if each.born is way} for way in (True, False))
    return [run.allocations[index] for index in born - gone if run.allocations[index].device == "cuda:0"]


# -- in files and notebooks ---------------------------------------------------------------------------------------------


def test_an_svg_stands_alone(report: gp.Report, tmp_path: Path) -> None:
    path = tmp_path / "memory.svg"
    report.to_svg(path)
    root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == f"{SVG}svg" and root.attrib["aria-label"].startswith("Memory on cuda:0 over time: peak ")
    filled = [each for each in root.iter() if each.tag in (f"{SVG}path", f"{SVG}text")]
    assert all("fill" in each.attrib for each in filled), "its colors need no style sheet"
    words = {each.text for each in root.iter(f"{SVG}text")}
    assert {"parameter", "activation", "reserved", "first_step", "optimizer"} <= words
    assert "http" not in path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_takes_the_svg(report: gp.Report, tmp_path: Path) -> None:
    report.to_svg(tmp_path / "memory.svg")
    dom = browse(tmp_path / "memory.svg", tmp_path)
    assert "parsererror" not in dom and 'class="t-activation"' in dom


def test_a_png_is_drawn(report: gp.Report, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    report.to_png(tmp_path / "memory.png", width=800)
    content = (tmp_path / "memory.png").read_bytes()
    assert content.startswith(b"\x89PNG") and int.from_bytes(content[16:20], "big") == 800


def test_what_is_drawn_needs_no_style_sheet(report: gp.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every program that draws an SVG knows media queries and variables, so there are none."""
    given: dict[str, Any] = {}
    stand_in = types.ModuleType("resvg_py")
    stand_in.svg_to_bytes = lambda **arguments: given.update(arguments) or b"png"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "resvg_py", stand_in)
    report.to_png(tmp_path / "memory.png", width=321)
    assert (tmp_path / "memory.png").read_bytes() == b"png" and given["width"] == 321
    assert "<style" not in given["svg_string"] and "var(" not in given["svg_string"]
    ElementTree.fromstring(given["svg_string"])


def test_without_the_package_it_is_said_what_to_install(
    report: gp.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any) -> Any:
        if name == "resvg_py":
            raise ImportError("No module named 'resvg_py'")
        return real(name, *arguments)

    monkeypatch.delitem(sys.modules, "resvg_py", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DecisionError, match=r"resvg-py.*pip install 'groundplan\[png\]'"):
        report.to_png(tmp_path / "memory.png")
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match="holds nothing in any phase"):
        gp.trace(nn.Module).report().to_svg(tmp_path / "memory.svg")


def test_a_notebook_shows_it(report: gp.Report) -> None:
    shown = report._repr_html_()
    assert "<svg" in shown and "<style" not in shown[shown.index("<svg") :], "a style sheet would hold for the whole notebook"
    assert "<svg" not in gp.trace(nn.Module).report()._repr_html_()
    assert "<svg" in gp.trace(nn.Linear, 3, 4).report()._repr_html_()


def test_a_report_of_the_weights_has_a_timeline_of_its_phases(tmp_path: Path) -> None:
    report = gp.trace(nn.Linear, 300, 400).cast(torch.bfloat16).report()
    series = series_of(report)
    assert [stretch.phase for stretch in series.stretches] == ["construct", "load", "checkpoint"]
    for stretch in series.stretches:
        assert stretch.peak.total == report.memory.by_device[stretch.phase]["cpu"]
    report.to_svg(tmp_path / "memory.svg")
    assert "peak" in (tmp_path / "memory.svg").read_text()
