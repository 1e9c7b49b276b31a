"""A report as text, section by section: the header, ties, dead ops, tensors without values, memory, and whether it fits."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .fit_text import fit_line
from .fold import fold_names
from .layout import checkpointing_line, layout_line
from .planner.decisions import Cast, Decisions, Move
from .planner.memory import Memory
from .planner.records import dtype_name
from .planner.step_time import StepTime
from .planner.verdict import Verdict
from .shown import bullets, heading, shortened
from .tensor_table import tensor_table
from .tracer.graph import Frame, ParamGraph, TensorNode
from .units import format_bytes, format_count

if TYPE_CHECKING:
    from .report import Report

WAY_OUT = 'materialize() raises unless you pass uninitialized="zero" or uninitialized="empty"'

_WIDEST_NAME = 60
_SHOWN_DEAD = 6
_SHOWN_LINES = 4
_SHOWN_TIES = 12
_SHOWN_UNINITIALIZED = 12
_VERDICT_STYLES = {"fits": "green", "tight": "yellow", "does not fit": "bold red"}
_STREAMS = {
    "cpu": "cpu: that of torch's CPU generator, on whatever device the tensors end up",
    "cuda": "cuda: that of torch's CUDA generator, drawn on the GPU",
}


def sections(report: Report, width: int) -> Iterator[RenderableType]:
    """All of it, one below the other, none wider than `width` columns."""
    yield Text(shortened(report.decisions.constructor, width), style="bold")
    yield _header(report)
    yield Text("")
    yield from tensor_table(report.rows, width) if report.rows else ()
    yield from _ties(report.graph)
    yield from _dead(report, width)
    yield from _uninitialized(report.graph)
    yield from _memory(report.memory)
    yield from _verdict(report.verdict)
    yield from _time(report.time)
    if report.notes:
        yield heading("notes")
        yield from bullets(report.notes, style="dim")


# -- the header ---------------------------------------------------------------------------------------------------------


def _header(report: Report) -> RenderableType:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in header_lines(report):
        grid.add_row(f"  {label}", Text(text))
    return grid


def header_lines(report: Report) -> Iterator[tuple[str, str]]:
    """What stands above everything else, as (label, text)."""
    graph, (constructed, final) = report.graph, report.sizes
    yield "parameters", f"{_counted(graph.parameters)}, {_trainable_part(report)}"
    if graph.buffers:
        yield "buffers", _counted(graph.buffers)
    if report.attributes:
        yield "attributes", f"{_counted(report.attributes)}, neither parameter nor buffer"
    yield "bytes", _sizes(constructed) + (f" → {_sizes(final)}" if final != constructed else "")
    yield "random stream", _STREAMS["cuda" if graph.reference.startswith("cuda") else "cpu"]
    yield "devices", ", ".join(dict.fromkeys(row.device for row in report.rows)) or "none"
    yield "decisions", "; ".join(decision_lines(report.decisions)) or "none: everything stays as constructed"
    if report.decisions.fitted is not None:
        yield "fit", fit_line(report.decisions.fitted)


def _counted(tensors: Sequence[TensorNode]) -> str:
    elements = sum(tensor.numel for tensor in tensors)
    exact = f" ({elements:,})" if elements >= 1000 else ""
    return f"{format_count(elements)}{exact} in {len(tensors):,} tensor{'s' * (len(tensors) != 1)}"


def _trainable_part(report: Report) -> str:
    trainable, total = report.trainable, sum(tensor.numel for tensor in report.graph.parameters)
    if trainable in (0, total):
        return "all trainable" if trainable else "none trainable"
    return f"{format_count(trainable)} trainable"


def _sizes(sizes: Mapping[torch.dtype, int]) -> str:
    found = sorted(sizes.items(), key=lambda pair: -pair[1])
    each = ", ".join(f"{dtype_name(dtype)} {format_bytes(nbytes)}" for dtype, nbytes in found)
    return each if len(found) == 1 else f"{format_bytes(sum(sizes.values()))}{f' ({each})' if each else ''}"


def decision_lines(decisions: Decisions) -> list[str]:
    """Everything that was decided, a line each."""
    return [*map(step_line, decisions.steps), *filter(None, [layout_line(decisions), checkpointing_line(decisions)])]


def step_line(step: Cast | Move) -> str:
    """A step as it is asked for: `cast to bfloat16`, `move to cuda`."""
    if isinstance(step, Move):
        return f"move to {step.device}"
    if step.uniform is not None:
        return f"cast to {dtype_name(step.uniform)}"
    return "cast " + ", ".join(f"{rule.pattern} to {rule.dtype}" for rule in step.rules)


# -- the sections -------------------------------------------------------------------------------------------------------


def _ties(graph: ParamGraph) -> Iterator[RenderableType]:
    if not graph.ties:
        return
    lines = [" = ".join([*(fold.name for fold in fold_names(tensor.names[1:])), tensor.name]) for tensor in graph.ties]
    folds = fold_names(lines, together=True)
    yield heading("ties: one tensor under several names")
    yield from bullets(_first([f"{fold.name}{f'  ({fold.count}x)' * (fold.count > 1)}" for fold in folds], _SHOWN_TIES))


def _first(texts: Sequence[str], most: int) -> list[str]:
    return [*texts[:most], *([f"… and {len(texts) - most} more"] if len(texts) > most else [])]


def _dead(report: Report, width: int) -> Iterator[RenderableType]:
    dead = report.dead
    if not dead:
        return
    count, elements, draws = len(report.graph.dead_ops), sum(each.elements for each in dead), sum(each.draws for each in dead)
    yield heading(f"dead ops: {count:,} of {len(report.graph.ops):,} leave nothing in the finished module")
    yield Text(f"  they write {format_count(elements)} elements and draw {format_count(draws)} random values", style="dim")
    shown = dead[:_SHOWN_DEAD]
    rows = [(f"  {each.init}", f"{each.count:,}x", format_count(each.elements), _lines(each.lines)) for each in shown]
    widths = [min(max(len(row[column]) for row in rows), 40) for column in range(3)]
    widths.append(width - sum(widths) - 6)
    grid = Table.grid(padding=(0, 2, 0, 0))
    for column, size in enumerate(widths):
        grid.add_column(width=size, no_wrap=True, justify="right" if column in (1, 2) else "left", style="dim")
    for row in rows:
        grid.add_row(*(Text(shortened(cell, size)) for cell, size in zip(row, widths, strict=True)))
    yield grid
    if len(dead) > _SHOWN_DEAD:
        yield Text(f"  … and {len(dead) - _SHOWN_DEAD} more kinds", style="dim")


def _lines(frames: Sequence[Frame]) -> str:
    """`at modeling_llama.py:219, 220, 342 and 5 more lines`."""
    files: dict[str, list[int]] = {}
    for frame in frames[:_SHOWN_LINES]:
        files.setdefault(os.path.basename(frame.file), []).append(frame.line)
    more = len(frames) - _SHOWN_LINES
    places = ", ".join(f"{file}:{', '.join(map(str, lines))}" for file, lines in files.items())
    return f"at {places}{f' and {more} more lines' if more > 0 else ''}" if places else ""


def _uninitialized(graph: ParamGraph) -> Iterator[RenderableType]:
    found = graph.uninitialized
    if not found:
        return
    names = [f"{fold.name}{f'  ({fold.count}x)' * (fold.count > 1)}" for fold in fold_names([tensor.name for tensor in found])]
    yield heading(f"uninitialized: the constructor leaves {len(found):,} tensor{'s' * (len(found) != 1)} without values")
    yield from bullets(_first(names, _SHOWN_UNINITIALIZED), style="bold red")
    yield Text(f"  {WAY_OUT}", style="red")


def _memory(memory: Memory) -> Iterator[RenderableType]:
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column("  phase", no_wrap=True)
    columns = list(memory.columns())
    for title, _ in columns:
        grid.add_column(title, justify="right", no_wrap=True)
    for phase in memory.by_device:
        grid.add_row(f"  {phase}", *(format_bytes(found.get(phase, 0)) for _, found in columns))
    yield heading("memory")
    yield grid
    yield from bullets([peak_line(memory)], mark=" ")


def _time(time: StepTime | str | None) -> Iterator[RenderableType]:
    """How long a step takes, with what that takes for granted."""
    if time is not None:
        yield heading("step time, predicted")
        yield from bullets([str(time)])
        yield from bullets(time.notes if isinstance(time, StepTime) else (), style="dim")


def _verdict(verdict: Verdict | None) -> Iterator[RenderableType]:
    if verdict is not None:
        yield heading(f"cluster {verdict.cluster}: {verdict.verdict}")
        yield from bullets((room.describe() for room in verdict.rooms), style=_VERDICT_STYLES[verdict.verdict])
        yield from bullets(verdict.notes, style="dim")


def peak_line(memory: Memory) -> str:
    """The peak in one sentence: bytes, phase, device, and the largest tensors there."""
    binding = memory.binding
    tensors = ", ".join(f"{shortened(name, _WIDEST_NAME)} ({format_bytes(nbytes)})" for name, nbytes in binding.tensors[:3])
    return f"peak {format_bytes(memory.peak)} in {binding.phase} on {binding.device}; largest: {tensors or 'nothing'}"
