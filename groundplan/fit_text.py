"""What `plan.fit` found, in words and lines: for explanations, reports and the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .planner.decisions import Decisions
from .planner.fitted import AnyFitted, Candidate, Fitted
from .planner.step_time import human_seconds
from .units import format_bytes, format_count

YOU = "you asked for it"
FIT = "plan.fit decided it"

_TIERS = {
    "T0": "in closed form (T0)",
    "T1": "by a run on fake tensors (T1)",
    "T2": "by a run on fake tensors and the caching allocator's rules (T2)",
}
_CHANGED = {"steps": "a cast or a move", "sharding": "a mesh", "placing": "devices", "quantizing": "a quantization"}


def who(decisions: Decisions, name: str) -> str:
    """Who decided about `sharding`, `placing`, `quantizing` or `checkpointing`, where anything is decided."""
    fitted = decisions.fitted
    return YOU if fitted is None or name in fitted.changed or name == "quantizing" else FIT


def who_stepped(decisions: Decisions, number: int) -> str:
    """The same of a step, the first of which is number 0."""
    return FIT if decisions.fitted is not None and number in decisions.fitted.steps else YOU


# -- the whole, in a line and in a few ------------------------------------------------------------------------------------


def fit_line(fitted: AnyFitted) -> str:
    """`fitted to 8xH100-80GB for Training(...): fits, 37 ms a step of 8 samples`."""
    speed = f", {_step(fitted)}" if isinstance(fitted, Fitted) else ""
    since = f"; since then you said {_since(fitted)}" if fitted.changed else ""
    return f"fitted to {fitted.cluster} for {fitted.workload.describe()}: {fitted.verdict}{speed}{since}"


def fit_facts(fitted: AnyFitted) -> Iterator[tuple[str, str]]:
    """The question and the answer, as (label, text)."""
    yield "fitted to", f"{fitted.cluster}, for {fitted.workload.describe()}"
    if fitted.options:
        yield "as you said", ", ".join(each.describe() for each in fitted.options)
    if fitted.changed:
        yield "changed", f"since then you said {_since(fitted)}: the figures are those of the plan before that"
    yield "verdict", f"{fitted.verdict}, checked {_TIERS.get(fitted.tier, fitted.tier)}"
    yield "peak", f"{format_bytes(fitted.peak)} a rank" if isinstance(fitted, Fitted) else format_bytes(fitted.peak)
    yield "least to spare", fitted.binding
    if isinstance(fitted, Fitted):
        yield "speed", f"{_step(fitted)}: {_rate(fitted)}, as predicted"
        if not fitted.proven:
            yield "search", "the time for it was over: the best that was found by then"


def _since(fitted: AnyFitted) -> str:
    return " and ".join(_CHANGED.get(name, name) for name in fitted.changed)


def _step(fitted: Fitted) -> str:
    return f"{human_seconds(fitted.seconds)} a step of {fitted.samples:,} sample{'s' * (fitted.samples != 1)}"


def _rate(fitted: Fitted) -> str:
    tokens = fitted.tokens_per_second
    samples = f"{fitted.samples_per_second:.3g} samples/s"
    return samples if tokens is None else f"{format_count(round(tokens))} tokens/s, {samples}"


# -- candidates -----------------------------------------------------------------------------------------------------------


class CandidateLine(NamedTuple):
    """A line of the table of candidates."""

    chosen: bool
    layout: str
    time: str
    peak: str
    verdict: str


CANDIDATES = ("layout", "a sample", "peak", "verdict")
"""The heads of the columns after the mark of the chosen one."""


def candidate_lines(fitted: AnyFitted) -> list[CandidateLine]:
    """The candidates of training, the chosen one first; serving has none."""
    if not isinstance(fitted, Fitted):
        return []
    return [_candidate(each, number == 0) for number, each in enumerate(fitted.candidates)]


def _candidate(candidate: Candidate, chosen: bool) -> CandidateLine:
    time = "" if candidate.seconds is None else human_seconds(candidate.seconds)
    return CandidateLine(chosen, candidate.layout, time, format_bytes(candidate.peak), verdict_line(candidate))


def verdict_line(candidate: Candidate) -> str:
    """The verdict, and what is missing."""
    if not candidate.missing:
        return candidate.verdict
    of_margin = " of the margin" if candidate.verdict == "tight" else ""
    return f"{candidate.verdict}: {format_bytes(candidate.missing)}{of_margin} missing"


def would_help(fitted: AnyFitted) -> tuple[str, ...]:
    """What is not carried out yet and would help."""
    return fitted.would_help if isinstance(fitted, Fitted) else ()
