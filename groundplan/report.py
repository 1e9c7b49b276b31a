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

from .fold import Fold, fold_names
from .page import page
from .planner.decisions import Decisions, final_device, final_dtype
from .planner.memory import Memory
from .planner.ranks_alike import RanksAlike, ranks_alike
from .planner.records import dtype_name
from .planner.series import Series
from .planner.step_time import StepTime
from .planner.verdict import Verdict
from .report_text import sections
from .shown import Shown, write_atomically
from .tensor_table import SECTIONS, Row
from .timeline import alone, drawing, write_png
from .tracer.describe import describe_frame, describe_op, recipe_phrases
from .tracer.errors import DecisionError
from .tracer.graph import Frame, Op, ParamGraph, Storage, TensorNode
from .treemap import Leaf


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
    time: StepTime | str | None = None

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
            "checkpointing": [rule.model_dump(mode="json") for rule in self.decisions.checkpointing],
            "fitted": self.decisions.fitted and self.decisions.fitted.model_dump(mode="json"),
            "parameters": _totals(self.graph.parameters) | {"trainable": self.trainable},
            "buffers": _totals(self.graph.buffers),
            "attributes": _totals(self.attributes),
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
            "step_time": self.time.to_json() if isinstance(self.time, StepTime) else self.time,
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
        write_atomically(path, page(self))

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        return sections(self, width)

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

    @property
    def attributes(self) -> list[TensorNode]:
        """The tensors that are neither parameters nor buffers."""
        return [tensor for tensor in self.graph.tensors if tensor.kind == "attribute"]

    @property
    def trainable(self) -> int:
        """Elements of the parameters that require gradients."""
        return sum(tensor.numel for tensor in self.graph.parameters if tensor.requires_grad)

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


def _totals(tensors: Sequence[TensorNode]) -> dict[str, int]:
    return {"tensors": len(tensors), "elements": sum(tensor.numel for tensor in tensors)}


def _dead_group(init: str, ops: Sequence[Op]) -> Dead:
    elements = [sum(view.numel for view in op.targets) for op in ops]
    draws = sum(count for op, count in zip(ops, elements, strict=True) if op.random)
    lines = Counter(op.site.line for op in ops if op.site.line)
    return Dead(init, len(ops), sum(elements), draws, tuple(line for line, _ in lines.most_common()))


# -- as data ------------------------------------------------------------------------------------------------------------


def _names(sizes: Mapping[torch.dtype, int]) -> dict[str, int]:
    return {dtype_name(dtype): nbytes for dtype, nbytes in sizes.items()}


def _row_json(row: Row) -> dict[str, Any]:
    names = {"dtype": dtype_name(row.dtype), "final": dtype_name(row.final)}
    return asdict(row) | names | {"shape": None if row.shape is None else list(row.shape)}


def _rank_json(each: RanksAlike) -> dict[str, Any]:
    memory = each.memory
    series = [found.to_json() for device in memory.devices if (found := memory.series(device)) is not None]
    return {"ranks": list(each.ranks), "phases": memory.phases, "peak": memory.peak, "timeline": series}


def _dead_json(dead: Dead) -> dict[str, Any]:
    return asdict(dead) | {"lines": [describe_frame(line) for line in dead.lines]}
