"""The page: well formed, loading nothing, escaped, with the report's own numbers; and in a real browser, if there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.markup import Markup, element, joined
from groundplan.units import format_bytes

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
VOID = {"meta", "link", "br", "hr", "img", "input"}
NASTY = "</script><script>alert(1)</script>&\"'"


class Net(nn.Module):
    """Repeated blocks, a tie, a buffer, a dead init, a tensor without values, and a name that is HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 64)
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.head = nn.Linear(64, 1000, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.arange(6.0))
        self.bare = nn.Parameter(torch.empty(5))
        self.add_module(NASTY, nn.LayerNorm(64))
        nn.init.zeros_(self.embed.weight)


class Page(HTMLParser):
    """Everything of a page that tests look at; raises where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(text for text in self.text["script"] if text.startswith("{")))
        return found


@pytest.fixture(scope="module")
def report() -> gp.Report:
    plan = gp.trace(Net).cast(torch.bfloat16).to("cuda")
    return plan.report(gp.Training("adamw"), "2x24GB+64GB-cpu")


@pytest.fixture(scope="module")
def text(report: gp.Report, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.to_html(path)
    return path.read_text(encoding="utf-8")


# -- markup -------------------------------------------------------------------------------------------------------------


def test_markup_escapes_all_but_markup() -> None:
    assert element("p", "<", Markup("<b>"), title='"&') == '<p title="&quot;&amp;">&lt;<b></p>'
    assert joined("a&", element("br")) == "a&amp;<br>"
    assert element("td", data_value=3, hidden=True, class_=None, aria_hidden=False) == '<td data-value="3" hidden></td>'


# -- the page -----------------------------------------------------------------------------------------------------------


def test_it_loads_nothing(text: str) -> None:
    page = Page(text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form", "a"}
        assert not {"src", "href", "srcset", "action", "style"} & attributes.keys(), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttpRequest|import\(|eval\(", text.split('id="report"')[0])
    policy = next(each for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_names_are_escaped(text: str) -> None:
    page = Page(text)
    assert "alert(1)" in text and "<script>alert" not in text
    assert len(list(page.all("script"))) == 2
    assert any(f"{NASTY}.weight" in cell for cell in page.text["td"] + page.text["title"])


def test_its_numbers_are_the_reports(report: gp.Report, text: str) -> None:
    page, data = Page(text), report.to_json()
    assert page.data == json.loads(json.dumps(data | {"memory": report.memory.to_json()}))
    phases = {
        (cell["data-phase"], cell["data-device"]): int(cell["data-value"] or 0) for cell in page.all("td") if "data-phase" in cell
    }
    assert phases == {
        (phase, device): report.memory.by_device[phase].get(device, 0) for phase in data["phases"] for device in ("cpu", "cuda:0")
    }
    shown = [int(cell["data-value"] or 0) for cell in page.all("td") if "data-value" in cell]
    for row in data["tensors"]:
        assert row["nbytes"] in shown and row["name"] in page.text["td"]
    binding = data["verdict"]["binding"]
    assert {binding["needed"], binding["usable"], binding["left"], binding["margin"]} <= set(shown)
    assert data["verdict"]["verdict"] == "tight" and "tight" in page.text["span"]


def test_the_treemap_holds_every_parameter(report: gp.Report, text: str) -> None:
    boxes = [(each["aria-label"], int(each["data-bytes"] or 0), each["data-depth"]) for each in Page(text).all("g")]
    total = sum(row["nbytes"] for row in report.to_json()["tensors"] if row["section"].startswith("parameters"))
    assert f"Treemap of {format_bytes(total)} of parameters by module" in text
    assert sum(nbytes for _, nbytes, depth in boxes if depth == "1") == total
    assert ("embed.weight: 128.00 kB, 83.5 %, Embedding", 128_000, "1") in boxes


def test_every_section_is_there_and_named(report: gp.Report, text: str) -> None:
    page = Page(text)
    assert [title.strip() for title in page.text["h2"]] == [
        "Does it fit",
        "Step time, predicted",
        "Memory by phase",
        "Memory over time",
        "What makes the peak",
        "Parameters by module",
        "Largest tensors",
        "Init functions",
        "Dead ops",
        "Tensors without values",
        "Decisions",
        "Assumptions and notes",
    ]
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {each["aria-labelledby"] for each in page.all("section")} <= set(ids)
    assert set(report.notes) <= set(page.text["li"])
    assert {"cast to bfloat16", "move to cuda"} <= set(page.text["li"])


def test_it_can_be_used_by_keyboard(text: str) -> None:
    page = Page(text)
    assert [each["tabindex"] for each in page.all("g")].count("0") == 1, "one stop; arrow keys go on from there"
    assert all(each.get("aria-label") for each in page.all("g"))
    assert all(each.get("scope") for each in page.all("th"))
    assert all(each.get("tabindex") == "0" for each in page.all("div") if each.get("class") == "wide"), (
        "what scrolls can be reached"
    )
    assert next(page.all("html"))["lang"] == "en"


def luminance(color: str) -> float:
    """Relative luminance of `#rrggbb`, as WCAG 2 defines it."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_can_be_read_in_light_and_dark(text: str, scheme: int) -> None:
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", text.split(":root {")[1 + scheme].split("}")[0]))
    pairs = [(word, "back") for word in ("text", "dim", "good", "warn", "bad", "focus")]
    pairs += [("text", ground) for ground in ("panel", *(f"c{at}" for at in range(8)))]
    assert {
        pair: contrast(colors[pair[0]], colors[pair[1]]) for pair in pairs if contrast(colors[pair[0]], colors[pair[1]]) < 4.5
    } == {}


def test_a_plain_report_of_nothing(tmp_path: Path) -> None:
    found = gp.trace(nn.Module).report()
    found.to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.text["h2"] == ["Memory by phase", "What makes the peak", "Decisions", "Assumptions and notes"]
    assert page.data["verdict"] is None


# -- in a browser -------------------------------------------------------------------------------------------------------

PROBE = """
<script>
const said = [];
window.addEventListener("error", (event) => said.push("error: " + event.message));
document.addEventListener("securitypolicyviolation", (event) => said.push("violation: " + event.violatedDirective));
window.addEventListener("load", () => {
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  document.querySelector(".treemap g[tabindex='0']").focus();
  const first = document.getElementById("part").textContent;
  press("End");
  const last = document.getElementById("part").textContent;
  press("Home");
  const table = [...document.querySelectorAll("table")].find((each) => each.querySelector("th button"));
  const buttons = table.querySelectorAll("th button");
  const column = (at) => [...table.tBodies[0].rows].map((row) => row.cells[at].dataset.value ?? row.cells[at].textContent);
  buttons[5].click(); const down = column(5);
  buttons[5].click(); const up = column(5);
  document.title = JSON.stringify({ said, first, last, back: document.getElementById("part").textContent, down, up,
    wide: document.documentElement.scrollWidth <= window.innerWidth, size: getComputedStyle(document.body).fontSize,
    requests: performance.getEntriesByType("resource").length });
});
</script>
"""


def browse(page: Path, folder: Path, *flags: str) -> str:
    """The page's HTML after its scripts ran, with a profile of its own."""
    fixed = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    more = f"--disable-component-update --disable-sync --user-data-dir={folder / 'profile'} --dump-dom"
    command = [str(BROWSER), *fixed.split(), *more.split(), *flags, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1200,900", "500,800"])
def test_a_browser_shows_it(text: str, tmp_path: Path, size: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(text.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    dom = browse(page, tmp_path, f"--window-size={size}")
    found = json.loads(next(title for title in Page(dom).text["title"] if title.startswith("{")))
    assert found["said"] == [] and found["requests"] == 0
    assert found["first"] == found["back"] != found["last"] and "%" in found["last"]
    assert found["down"] == sorted(found["down"], key=int, reverse=True) and found["up"] == sorted(found["up"], key=int)
    assert found["wide"], "nothing is wider than the window; tables scroll by themselves"
    assert found["size"] == "16px"
