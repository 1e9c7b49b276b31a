"""The page's section about what `plan.fit` found: the answer, the decisions with their reasons, and what else was tried."""

from __future__ import annotations

from collections.abc import Iterator

from .fit_text import CANDIDATES, fit_facts, verdict_line, would_help
from .markup import Markup, element, joined
from .page_parts import bar, bytes_cell, heading, listing, section, table
from .planner.fitted import AnyFitted, Candidate, Fitted
from .planner.step_time import human_seconds

_CLASSES = {"fits": "fits", "tight": "tight", "does not fit": "no"}
_TRIED = "Layouts that were tried, the chosen one first, each with the best that layers can do in it; bars are time"
_MICROSECOND = 1e-6


def fit(fitted: AnyFitted) -> Markup:
    """The whole section."""
    facts = element("dl", *(joined(element("dt", label), element("dd", text)) for label, text in fit_facts(fitted)))
    return section("What plan.fit decided", facts, _reasons(fitted), *_candidates(fitted), *_would_help(fitted))


def _reasons(fitted: AnyFitted) -> Markup:
    rows = [
        element("tr", element("th", each.what, scope="row"), element("td", each.why, class_="why")) for each in fitted.reasons
    ]
    return table("Every decision of the search with its reason", [heading("decision"), heading("why")], rows)


def _candidates(fitted: AnyFitted) -> Iterator[Markup]:
    if not isinstance(fitted, Fitted) or not fitted.candidates:
        return
    slowest = max(each.seconds or 0.0 for each in fitted.candidates)
    head = [heading(""), *(heading(name, name in CANDIDATES[1:3], sort=True) for name in CANDIDATES), heading("")]
    rows = [_candidate(each, number == 0, slowest) for number, each in enumerate(fitted.candidates)]
    yield table(_TRIED, head, rows)


def _candidate(candidate: Candidate, chosen: bool, slowest: float) -> Markup:
    verdict = element("td", verdict_line(candidate), class_=_CLASSES[candidate.verdict], title=candidate.short or None)
    cells = [
        element("td", "chosen" if chosen else ""),
        element("td", candidate.layout, class_="name"),
        _seconds(candidate.seconds),
        bytes_cell(candidate.peak),
        verdict,
    ]
    pieces = [(_microseconds(candidate.seconds), "fill-bar")] if candidate.seconds is not None else []
    return element("tr", *cells, bar(pieces, _microseconds(slowest)), class_="chosen" if chosen else None)


def _seconds(seconds: float | None) -> Markup:
    if seconds is None:
        return element("td", "", class_="number", data_value=-1)
    return element("td", human_seconds(seconds), class_="number", data_value=_microseconds(seconds), title=f"{seconds} s")


def _microseconds(seconds: float) -> int:
    return round(seconds / _MICROSECOND)


def _would_help(fitted: AnyFitted) -> Iterator[Markup]:
    if helpful := would_help(fitted):
        yield element("p", "Would help, and is not carried out yet:")
        yield listing(helpful)
