"""What to say where no plan for training fits: what is in the way, and changes that would do, each tried."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from .fitting import PLENTY
from .planner.fit_training import LEVELS, Short, Tried
from .planner.fitted_reasons import describe_short
from .planner.memory import human_bytes
from .planner.optimizers import state_pieces
from .planner.rank_memory import rank_parts
from .tracer.errors import DecisionError
from .would_help import would_help

if TYPE_CHECKING:
    from .fitting_training import FitTraining

_SHOWN = 4
_MORE_NODES = (2, 4, 8, 16)

Change = Callable[["FitTraining"], "FitTraining | None"]
"""The question with something relaxed; None where that does not apply."""


@dataclass(frozen=True)
class Relaxed:
    """A change after which something fits, in words, and what."""

    words: str
    best: Tried

    def describe(self) -> str:
        """With its figures."""
        room = self.best.verdict.binding
        layers = sorted({each.level for run in self.best.does for each in run if each.level != "none"})
        doing = f", {' and '.join(layers)} checkpointing" if layers else ""
        held = f"{room.verdict}, {human_bytes(room.needed)} of {human_bytes(room.usable)} in {room.place}"
        return f"{self.words} ({self.best.layout.describe()}{doing}: {held})"


def nothing_fits(question: FitTraining) -> str:
    """The error's text."""
    nearest = _nearest(question.short)
    ways = [each.describe() for each in relaxations(question)]
    listed = "".join(f"\n  - {way}" for way in ways)
    would = f"What fits, tried:{listed}" if ways else "No single change or pair of changes that was tried makes it fit"
    asked = f"nothing fits {question.cluster} for {_workload(question)}"
    lean = replace(nearest.layout, workload=replace(nearest.layout.workload, checkpointing=question.leanest_level))
    helps = list(would_help(question, lean, lean.decisions, nearest.memory.peak))
    not_yet = f"\nWould help, but is not carried out yet: {'; '.join(helps)}" if helps else ""
    return f"{asked}: {_held(question, nearest)}.\nThe nearest is {describe_short(nearest)}.\n{would}{not_yet}"


def _nearest(short: Sequence[Short]) -> Short:
    """Of every layout what the last search said, which left least free; of those the one that lacks the smallest share."""
    last = {each.layout.describe(): each for each in short}.values()
    return min(last, key=lambda each: (each.room.needed - each.room.usable) / each.room.usable)


def _workload(question: FitTraining) -> str:
    from .planner.fitted import TrainingRecord

    return TrainingRecord.of(question.workload).describe()


def _held(question: FitTraining, nearest: Short) -> str:
    """What weights, gradients and optimizer state of a rank come to, whatever the layers do."""
    layout = nearest.layout
    _, parameters = rank_parts(question.plan.graph, layout.decisions, layout.workload)
    weights = sum(each.nbytes for each in parameters.each)
    state = sum(nbytes for pieces in state_pieces(layout.workload.optimizer, None, parameters) for _, nbytes in pieces)
    dtypes = sorted({str(each.dtype).removeprefix("torch.") for each in parameters.kinds})
    return (
        f"each rank of {layout.describe()} has {human_bytes(weights)} of {' and '.join(dtypes)} weights to train, as much in "
        f"gradients, and {human_bytes(state)} of {layout.workload.optimizer} state"
    )


# -- changes ------------------------------------------------------------------------------------------------------------


def relaxations(question: FitTraining) -> Iterator[Relaxed]:
    """Changes that make it fit: single ones, and pairs of those of the workload where no single one leaves the whole margin."""
    singly = (_tried(question, change) for change in (*_OF_WORKLOAD, *_OF_OPTIONS))
    found = [each for each in singly if each is not None]
    if not any(each.best.verdict.verdict == "fits" for each in found):
        pairs = itertools.combinations(_OF_WORKLOAD, 2)
        both = (_tried(question, *pair) for pair in pairs)
        found += [each for each in both if each is not None and each.best.verdict.verdict == "fits"]
    yield from sorted(found, key=lambda each: (each.best.verdict.verdict != "fits", each.best.seconds))[:_SHOWN]
    for hardware in _OF_CLUSTER:
        if (bigger := hardware(question)) is not None:
            yield bigger


def _tried(question: FitTraining, *changes: tuple[str, Change]) -> Relaxed | None:
    changed: FitTraining | None = question
    for _, change in changes:
        changed = None if changed is None else change(changed)
    if changed is None:
        return None
    best = _best(changed)
    return None if best is None else Relaxed(" and ".join(words for words, _ in changes), best)


def _best(question: FitTraining) -> Tried | None:
    """The best by the closed form alone."""
    quick = replace(question, options=replace(question.options, tier="T0"), short=[])
    try:
        found = quick.found()
    except DecisionError:
        return None
    return None if found is None else found.best


def _smaller_state(question: FitTraining) -> FitTraining | None:
    """torchao's AdamW with 8-bit state."""
    if not question.workload.optimizer.startswith("adam") or question.workload.optimizer == "adamw-8bit":
        return None
    if importlib.util.find_spec("torchao") is None:
        return None
    return replace(question, workload=replace(question.workload, optimizer="adamw-8bit", implementation=None))


def _bf16_weights(question: FitTraining) -> FitTraining | None:
    return None if question.options.dtype is not None else _with(question, dtype=torch.bfloat16)


def _bf16_compute(question: FitTraining) -> FitTraining | None:
    if question.options.compute_dtype is not None or question.workload.autocast is not None:
        return None
    return _with(question, compute_dtype=torch.bfloat16)


def _smaller_batches(question: FitTraining) -> FitTraining | None:
    if question.workload.batch_size == 1 or question.options.split_batch:
        return None
    return _with(question, split_batch=True)


def _half_length(question: FitTraining) -> FitTraining | None:
    length = question.workload.seq_len
    if question.workload.inputs is not None or length is None or length < 2:
        return None
    return replace(question, workload=replace(question.workload, seq_len=length // 2))


def _all_levels(question: FitTraining) -> FitTraining | None:
    if question.workload.checkpointing == "none" and question.options.checkpointing is None:
        return None
    return replace(_with(question, checkpointing=LEVELS), workload=replace(question.workload, checkpointing="none"))


def _with_offload(question: FitTraining) -> FitTraining | None:
    return _with(question, offload=None) if question.options.offload is False else None


def _any_axes(question: FitTraining) -> FitTraining | None:
    return _with(question, axes=None) if question.options.axes else None


def _with(question: FitTraining, **options: object) -> FitTraining:
    return replace(question, options=replace(question.options, **options))  # type: ignore[arg-type]


_OF_WORKLOAD: tuple[tuple[str, Change], ...] = (
    ('optimizer="adamw-8bit"', _smaller_state),
    ("dtype=torch.bfloat16 for the weights", _bf16_weights),
    ("compute_dtype=torch.bfloat16", _bf16_compute),
    ("split_batch=True", _smaller_batches),
    ("half the seq_len", _half_length),
)
_OF_OPTIONS: tuple[tuple[str, Change], ...] = (
    ("every level of checkpointing", _all_levels),
    ("offload allowed", _with_offload),
    ("other axes allowed", _any_axes),
)


# -- more hardware ------------------------------------------------------------------------------------------------------


def _more_host_memory(question: FitTraining) -> Relaxed | None:
    """The host memory that is needed where there is plenty; then with just that much."""
    if not question.cluster.devices or question.options.offload is False:
        return None
    plenty = _best(_on(question, host_memory=PLENTY))
    if plenty is None:
        return None
    enough = replace(question, cluster=plenty.verdict.with_enough_host_memory)
    best = _best(enough)
    return None if best is None else Relaxed(str(enough.cluster), best)


def _more_nodes(question: FitTraining) -> Relaxed | None:
    """The fewest nodes, of a few powers of two, with which it fits."""
    for times in _MORE_NODES if not question.options.axes else ():
        more = _on(question, nodes=question.cluster.nodes * times)
        if (best := _best(more)) is not None:
            return Relaxed(str(more.cluster), best)
    return None


def _on(question: FitTraining, **changed: int) -> FitTraining:
    return replace(question, cluster=question.cluster.model_copy(update=changed))


_OF_CLUSTER = (_more_host_memory, _more_nodes)
