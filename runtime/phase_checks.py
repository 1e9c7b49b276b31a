"""What a real run took, phase by phase, beside what was predicted: recordings made into checks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, STEP
from ..planner.changes import Change
from ..planner.memory import Memory
from ..planner.verification import KERNELS, Check, Held, Part, attributed, built_at, predicted_at
from .memory_events import lifetimes
from .recording import Recording, Span
from .watched import Watched, built, held_at

BUILDING = ("construct", "load")


@dataclass(frozen=True)
class Predicted:
    """What is held against: T0's memory of this rank with its timelines, and T1's where the step could be run."""

    closed_form: Memory
    timelines: Mapping[str, Sequence[Change]]
    run: Memory | None


class PhaseChecks:
    """What was recorded, turned into checks: `where` has the device that stands here for each of the prediction.

    `module` is what was built, and `finished` the time when it was.
    """

    def __init__(
        self, recording: Recording, watch: Watched, module: Any, finished: int, predicted: Predicted, where: Mapping[str, str]
    ) -> None:
        self._recording, self._predicted, self._where = recording, predicted, where
        self._spans = lifetimes(recording.events)
        self._known = watch.pieces(self._spans)
        self._module, self._finished = module, finished

    def __iter__(self) -> Iterator[Check]:
        """One for each phase that was run and each device that it is predicted to use."""
        for phase in self._predicted.closed_form.by_device:
            spans = [span for span in self._recording.spans if not span.watched and span.name in _names_of(phase)]
            for device in self._where:
                if spans and self._prediction(self._predicted.closed_form, phase, device):
                    yield self._check(phase, device, spans)

    def _prediction(self, memory: Memory, phase: str, device: str) -> int:
        return memory.by_device[phase].get(device, 0)

    def _check(self, phase: str, device: str, spans: Sequence[Span]) -> Check:
        repeats = tuple(self._recording.measured(span, self._where[device]) for span in spans)
        span = spans[repeats.index(max(repeats))]
        run = self._predicted.run
        closed_form = self._prediction(self._predicted.closed_form, phase, device)
        of_run = (
            None if run is None or run.run is None or span.name not in run.run.peaks else self._prediction(run, phase, device)
        )
        found = Check(phase, device, closed_form, of_run, max(repeats), repeats, (), 0, {})
        whole, beyond, taken = self._beyond(span, self._where[device], max(repeats))
        found = replace(found, parts=self._parts(found, span), whole=whole, beyond=beyond, taken=taken)
        replayed = None if run is None or of_run is None else run.reserved.get(phase, {}).get(device)
        here = self._where[device]
        reserved = max(each.counters[here].reserved for each in spans) if here in span.counters else None
        return replace(found, replayed=None if replayed is None else replayed.reserved, reserved=reserved)

    def _beyond(self, span: Span, device: str, measured: int) -> tuple[int, dict[str, int], int]:
        """What there is besides: of the device, or of the process since it began to build."""
        if device in span.counters:
            counters = span.counters[device]
            kept = {"allocator's cache": counters.reserved - measured, "CUDA context, libraries, other processes": counters.taken}
            return counters.reserved + counters.taken, kept, counters.taken
        grown = span.resident - self._recording.before
        return grown, {"process beyond tensors": grown - measured}, self._recording.before

    def _parts(self, check: Check, span: Span) -> tuple[Part, ...]:
        here = self._where[check.device]
        if check.phase in BUILDING and here in span.peaks:
            guess = built_at(self._predicted.timelines[check.phase], check.device)
            return attributed(guess, built(span.peaks[here], self._module, self._spans, self._finished), check.difference)
        looked = next((each for each in self._recording.spans if each.watched and each.name == span.name), span)
        if here not in looked.peaks:
            return attributed([], [], check.difference)
        real = held_at(looked.peaks[here], self._known, KERNELS if looked.watched else "temporary")
        if check.run is None:
            real = [_counted(each, check.phase, self._predicted.closed_form) for each in real]
        return attributed(self._guess(check, span), real, check.difference)

    def _guess(self, check: Check, span: Span) -> list[Held]:
        """What was predicted, by kind; the closed form says no more than how much it is of all that it counts."""
        run = self._predicted.run
        if check.run is not None and run is not None and run.run is not None:
            return predicted_at(run.run, _worse_of(run, span.name, check), check.device)
        return [Held(_COUNTED, "closed form", check.closed_form, check.closed_form)]


_COUNTED = "counted by the closed form"


def _counted(each: Held, phase: str, memory: Memory) -> Held:
    """The same, with the closed form's own kind where that counts it: inputs and activations within a step only."""
    passing = phase not in (FIRST_STEP, STEP, OPTIMIZER) or "activations" in memory.left_out
    if each.kind == KERNELS or (passing and each.kind not in _KEPT):
        return each
    return replace(each, kind=_COUNTED, what="closed form")


_KEPT = ("parameter", "buffer", "gradient", "optimizer state")


def _worse_of(run: Memory, name: str, check: Check) -> str:
    """The phase of the run whose peak was compared: of the two in the optimizer the one that takes more."""
    if check.phase != OPTIMIZER or run.run is None:
        return name
    peaks = run.run.peaks
    return max((FIRST_OPTIMIZER, OPTIMIZER), key=lambda each: peaks[each].get(check.device, 0))


def _names_of(phase: str) -> tuple[str, ...]:
    """The spans of a phase: both the first and the later calls of the optimizer are `optimizer`."""
    return (FIRST_OPTIMIZER, OPTIMIZER) if phase == OPTIMIZER else (phase,)
