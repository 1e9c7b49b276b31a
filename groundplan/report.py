"""What a plan's report shows: every tensor, folded by repeated layers, and what becomes of it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .fold import Fold, fold_names
from .layout import layout_line
from .planner.decisions import Cast, Decisions, Move, final_device, final_dtype
from .planner.memory import Memory
from .planner.ranks_alike import RanksAlike, ranks_alike
from .planner.records import dtype_name
from .planner.series import Series
from .planner.verdict import Verdict
from .shown import Shown, bullets, heading, shortened, write_atomically
from .tensor_table import SECTIONS, Row, tensor_table
from .timeline import alone, drawing, write_png
from .tracer.describe import describe_frame, describe_op, recipe_phrases
from .tracer.errors import DecisionError
from .tracer.graph import Frame, Op, ParamGraph, Storage, TensorNode
from .treemap import Leaf
from .units import format_bytes, format_count

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


@dataclass(frozen=True, slots=True)
class Dead:
    """Dead ops of one kind: `lines` are the constructor's lines they were called from, the most frequent first."""

    init: str
    count: int
    elements: int
    draws: int
    lines: tuple[Frame, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Report(Shown):
    """The report of a plan. `print(report)` shows it in at most 100 columns, a notebook and rich show it in colors.

    Tensors are listed under their final dtypes; repeated layers are folded into one line. All sizes are bytes of tensor storage.
    """

    graph: ParamGraph
    decisions: Decisions
    memory: Memory
    verdict: Verdict | None = None

    # -- other forms ----------------------------------------------------------------------------------------------------

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The report as plain data (sizes in bytes); written to `path` as JSON as well, if one is given."""
        data = {
            "constructor": self.decisions.constructor,
            "reference": self.graph.reference,
            "decisions": [step.model_dump(mode="json") for step in self.decisions.steps],
            "sharding": self.decisions.sharding and self.decisions.sharding.model_dump(mode="json"),
            "placing": self.decisions.placing and self.decisions.placing.model_dump(mode="json"),
            "quantizing": [each.model_dump(mode="json") for each in self.decisions.quantizing],
            "parameters": _totals(self.graph.parameters) | {"trainable": _trainable(self.graph)},
            "buffers": _totals(self.graph.buffers),
            "attributes": _totals(_attributes(self.graph)),
            "bytes": {"constructed": _names(self.sizes[0]), "final": _names(self.sizes[1])},
            "tensors": [_row_json(row) for row in self.rows],
            "ties": {tensor.name: list(tensor.names[1:]) for tensor in self.graph.ties},
            "ops": len(self.graph.ops),
            "dead_ops": {"count": len(self.graph.dead_ops), "by_init": [_dead_json(each) for each in self.dead]},
            "uninitialized": [tensor.name for tensor in self.graph.uninitialized],
            "phases": dict(self.memory.phases),
            "peak": self.memory.peak,
            "ranks": [_rank_json(each) for each in self.rank_classes] if self.memory.ranks > 1 else [],
            "verdict": None if self.verdict is None else self.verdict.to_json(),
            "notes": list(self.notes),
        }
        if path is not None:
            write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return data

    def to_svg(self, path: str | os.PathLike[str]) -> None:
        """Write the memory over time, by kind, to `path` as a drawing: of the device, and of ranks rank 0, that make the peak.

        Raises `DecisionError` where nothing is held.
        """
        write_atomically(path, alone(self._series(), self._whose))

    def to_png(self, path: str | os.PathLike[str], width: int = 1600) -> None:
        """The same as an image, `width` pixels wide, on a light ground.

        Raises `DecisionError` where nothing is held, or the package `resvg-py`, which draws it, is not installed.
        """
        write_png(path, alone(self._series(), self._whose, dark=False), width)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report to `path` as one page for a browser that loads nothing; what was there stays until it is complete.

        It shows what the text shows, with bars for the memory, a treemap of the parameters and tables that sort, and holds
        `to_json()` as data.
        """
        from .page import page

        write_atomically(path, page(self))

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        yield Text(shortened(self.decisions.constructor, width), style="bold")
        yield _header(self)
        yield Text("")
        yield from tensor_table(self.rows, width) if self.rows else ()
        yield from _ties(self.graph)
        yield from _dead(self, width)
        yield from _uninitialized(self.graph)
        yield from _memory(self.memory)
        yield from _verdict(self.verdict)
        if self.notes:
            yield heading("notes")
            yield from bullets(self.notes, style="dim")

    def _repr_html_(self) -> str:
        series = self.memory.series()
        return super()._repr_html_() + ("" if series is None else drawing(series, self._whose))

    def _series(self) -> Series:
        series = self.memory.series()
        if series is None:
            raise DecisionError(f"{self.decisions.constructor} holds nothing in any phase, so there is no timeline to draw")
        return series

    @property
    def _whose(self) -> str:
        return "rank 0" if self.memory.ranks > 1 else ""

    # -- contents -------------------------------------------------------------------------------------------------------

    @cached_property
    def rank_classes(self) -> tuple[RanksAlike, ...]:
        """The ranks of a plan that shards, those together whose parts have the same shapes; rank 0's come first."""
        return ranks_alike(self.graph, self.decisions.sharding, self.memory)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The tensors, folded: parameters, buffers, then plain attributes."""
        phrases = recipe_phrases(self.graph)
        without = {tensor.name for tensor in self.graph.uninitialized}
        names = [tensor.name for tensor in self.graph.tensors]
        keys = [_key(end, phrases[name], name in without) for end, name in zip(self._ends, names, strict=True)]
        folds = fold_names(names, keys)
        rows = (_row(fold, keys[fold.members[0]]) for fold in folds)
        return tuple(sorted(rows, key=lambda row: SECTIONS.index(row.section)))

    @cached_property
    def _ends(self) -> tuple[_End, ...]:
        storages = {storage.index: storage for storage in self.graph.storages}
        return tuple(_end(tensor, storages[tensor.view.storage], self.decisions) for tensor in self.graph.tensors)

    @property
    def parameter_leaves(self) -> Iterator[Leaf]:
        """The parameters with their final bytes and the class of the module that holds them."""
        types = {name: module.type.rpartition(".")[2] for module in self.graph.modules for name in module.names}
        for tensor, dtype, _, held in self._ends:
            if tensor.kind == "parameter":
                owner = tensor.name.rpartition(".")[0]
                yield Leaf(tensor.name, held * dtype.itemsize, types.get(owner, "parameter"))

    @cached_property
    def sizes(self) -> tuple[Mapping[torch.dtype, int], Mapping[torch.dtype, int]]:
        """Bytes by dtype, as constructed and in the end; a storage that several tensors show counts once, unless converted."""
        constructed, final = Counter[torch.dtype](), Counter[torch.dtype]()
        storages = {storage.index: storage.nbytes for storage in self.graph.storages if storage.device != "meta"}
        for tensor, dtype, _, held in self._ends:
            nbytes = storages.pop(tensor.view.storage, 0)
            constructed[tensor.dtype] += nbytes
            final[dtype] += nbytes if dtype == tensor.dtype else held * dtype.itemsize
        return +constructed, +final

    @cached_property
    def dead(self) -> tuple[Dead, ...]:
        """The dead ops by init function, those that write most first."""
        groups: dict[str, list[Op]] = {}
        for op in self.graph.dead_ops:
            groups.setdefault(describe_op(op), []).append(op)
        found = (_dead_group(init, ops) for init, ops in groups.items())
        return tuple(sorted(found, key=lambda dead: (-dead.elements, dead.init)))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader has to know besides: about the trace first, then what the sizes leave out."""
        found = list(self.graph.notes)
        if self.graph.seed_dependent:
            lines = ", ".join(describe_frame(frame) for frame in self.graph.seed_dependent[:3])
            found.append(f"the constructor looks at random values ({lines}): the ops listed hold for one state of the generator")
        if self.graph.host_random:
            found.append("the constructor draws from Python's or numpy's random module as well")
        return (*found, *self.memory.notes)


# -- counting -----------------------------------------------------------------------------------------------------------


def _section(tensor: TensorNode) -> str:
    if tensor.kind == "attribute":
        return "plain attributes"
    if tensor.kind == "buffer":
        return "buffers" if tensor.persistent else "buffers, not persistent"
    return "parameters" if tensor.requires_grad else "parameters, frozen"


class _End(NamedTuple):
    """Where a tensor ends up; `held` is the number of elements it has of its own, an expanded one fewer than it shows."""

    tensor: TensorNode
    dtype: torch.dtype
    device: str
    held: int


class _Key(NamedTuple):
    """What tensors on one line have in common."""

    section: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: str
    init: str
    held: int
    uninitialized: bool
    constructed: torch.dtype


def _end(tensor: TensorNode, storage: Storage, decisions: Decisions) -> _End:
    held = min(tensor.numel, storage.nbytes // tensor.dtype.itemsize)
    if not decisions.steps:
        return _End(tensor, tensor.dtype, storage.device, held)
    return _End(tensor, final_dtype(tensor, decisions), final_device(tensor, storage, decisions), held)


def _key(end: _End, init: str, uninitialized: bool) -> _Key:
    tensor = end.tensor
    shape = None if tensor.type.startswith("Uninitialized") else tensor.shape
    init = tensor.type if tensor.opaque else init
    return _Key(_section(tensor), shape, end.dtype, end.device, init, end.held, uninitialized, tensor.dtype)


def _row(fold: Fold, key: _Key) -> Row:
    return Row(
        section=key.section,
        name=fold.name,
        count=fold.count,
        shape=key.shape,
        dtype=key.constructed,
        final=key.dtype,
        device=key.device,
        init=key.init,
        nbytes=fold.count * key.held * key.dtype.itemsize,
        uninitialized=key.uninitialized,
    )


def _attributes(graph: ParamGraph) -> list[TensorNode]:
    return [tensor for tensor in graph.tensors if tensor.kind == "attribute"]


def _totals(tensors: Sequence[TensorNode]) -> dict[str, int]:
    return {"tensors": len(tensors), "elements": sum(tensor.numel for tensor in tensors)}


def _trainable(graph: ParamGraph) -> int:
    return sum(tensor.numel for tensor in graph.parameters if tensor.requires_grad)


def _dead_group(init: str, ops: Sequence[Op]) -> Dead:
    elements = [sum(view.numel for view in op.targets) for op in ops]
    draws = sum(count for op, count in zip(ops, elements, strict=True) if op.random)
    lines = Counter(op.site.line for op in ops if op.site.line)
    return Dead(init, len(ops), sum(elements), draws, tuple(line for line, _ in lines.most_common()))


# -- as data ------------------------------------------------------------------------------------------------------------


def _names(sizes: Mapping[torch.dtype, int]) -> dict[str, int]:
    return {dtype_name(dtype): nbytes for dtype, nbytes in sizes.items() if nbytes}


def _row_json(row: Row) -> dict[str, Any]:
    names = {"dtype": dtype_name(row.dtype), "final": dtype_name(row.final)}
    return asdict(row) | names | {"shape": None if row.shape is None else list(row.shape)}


def _rank_json(each: RanksAlike) -> dict[str, Any]:
    memory = each.memory
    series = [found.to_json() for device in memory.devices if (found := memory.series(device)) is not None]
    return {"ranks": list(each.ranks), "phases": memory.phases, "peak": memory.peak, "timeline": series}


def _dead_json(dead: Dead) -> dict[str, Any]:
    return asdict(dead) | {"lines": [describe_frame(line) for line in dead.lines]}


# -- as text: the header ------------------------------------------------------------------------------------------------


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
    yield "parameters", f"{_counted(graph.parameters)}, {_trainable_part(graph)}"
    if graph.buffers:
        yield "buffers", _counted(graph.buffers)
    if attributes := _attributes(graph):
        yield "attributes", f"{_counted(attributes)}, neither parameter nor buffer"
    yield "bytes", _sizes(constructed) + (f" → {_sizes(final)}" if final != constructed else "")
    yield "random stream", _STREAMS["cuda" if graph.reference.startswith("cuda") else "cpu"]
    yield "devices", ", ".join(dict.fromkeys(row.device for row in report.rows)) or "none"
    made = [*map(step_line, report.decisions.steps), *filter(None, [layout_line(report.decisions)])]
    yield "decisions", "; ".join(made) or "none: everything stays as constructed"


def _counted(tensors: Sequence[TensorNode]) -> str:
    elements = sum(tensor.numel for tensor in tensors)
    exact = f" ({elements:,})" if elements >= 1000 else ""
    return f"{format_count(elements)}{exact} in {len(tensors):,} tensor{'s' * (len(tensors) != 1)}"


def _trainable_part(graph: ParamGraph) -> str:
    trainable, total = _trainable(graph), sum(tensor.numel for tensor in graph.parameters)
    if trainable in (0, total):
        return "all trainable" if trainable else "none trainable"
    return f"{format_count(trainable)} trainable"


def _sizes(sizes: Mapping[torch.dtype, int]) -> str:
    found = sorted(_names(sizes).items(), key=lambda pair: -pair[1])
    each = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in found)
    return each if len(found) == 1 else f"{format_bytes(sum(sizes.values()))}{f' ({each})' if each else ''}"


def step_line(step: Cast | Move) -> str:
    """A step as the user asked for it: `cast to bfloat16`, `move to cuda`."""
    if isinstance(step, Move):
        return f"move to {step.device}"
    if step.uniform is not None:
        return f"cast to {dtype_name(step.uniform)}"
    return "cast " + ", ".join(f"{rule.pattern} to {rule.dtype}" for rule in step.rules)


# -- as text: the sections ----------------------------------------------------------------------------------------------


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
