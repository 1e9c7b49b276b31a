"""Why a tensor is what it is, op by op; and why a plan decides what it decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .fit_text import CANDIDATES, FIT, CandidateLine, candidate_lines, fit_facts, who, who_stepped, would_help
from .fold import fold_names
from .layout import (
    checkpointing_line,
    checkpointing_lines,
    layout_line,
    layout_lines,
    tensor_placement,
    tensor_quantizing,
)
from .planner.decisions import Cast, Decisions, Move, Rule, castable, final_device, final_dtype
from .planner.estimate import memory
from .planner.fitted import AnyFitted
from .planner.records import dtype_name
from .report_text import WAY_OUT, peak_line, step_line
from .shown import Shown, bullets, heading, shortened
from .tracer.describe import describe_frame, describe_op, describe_part, describe_value, operator_name
from .tracer.digraph import covers
from .tracer.graph import Op, ParamGraph, Storage, StreamPosition, TensorNode
from .units import format_bytes

_SHOWN_HITS = 6

Fact = tuple[str, str]


@dataclass(frozen=True)
class Passage:
    """One paragraph of an explanation: what it is about, and the lines under it; a struck one has no effect."""

    title: str
    lines: tuple[str, ...]
    dead: bool = False


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """An explanation: facts first, then passages. `print()` shows it in at most 100 columns, a notebook and rich in colors.

    Of a plan that `plan.fit` decided, `fitted` is its record: the reasons and the candidates are shown between the two.
    """

    title: str
    facts: tuple[Fact, ...]
    subtitle: str
    passages: tuple[Passage, ...]
    fitted: AnyFitted | None = None

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        yield Text(shortened(self.title, width), style="bold")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in self.facts:
            grid.add_row(f"  {label}", Text(text))
        yield grid
        if self.fitted is not None:
            yield from _fit(self.fitted)
        if self.passages:
            yield heading(self.subtitle)
        for passage in self.passages:
            yield from _passage(passage)


def _passage(passage: Passage) -> Iterator[RenderableType]:
    style = "dim" if passage.dead else ""
    lines = [(f"  {passage.title}", style), *((f"      {line}", "dim") for line in passage.lines)]
    for text, style in lines:
        indent = len(text) - len(text.lstrip())
        grid = Table.grid()
        grid.add_column(width=indent)
        grid.add_column(overflow="fold")
        grid.add_row("", Text(text.lstrip(), style=style))
        yield grid


def _fit(fitted: AnyFitted) -> Iterator[RenderableType]:
    """Why the search decided so, what else it looked at, and what would help."""
    yield heading("what plan.fit decided, and why")
    for reason in fitted.reasons:
        yield from _passage(Passage(reason.what, (reason.why,)))
    if lines := candidate_lines(fitted):
        yield heading("layouts that were tried, the chosen one first")
        yield _candidates(lines)
    if helpful := would_help(fitted):
        yield heading("would help, and is not carried out yet")
        yield from bullets(helpful)


def _candidates(lines: Sequence[CandidateLine]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", width=3, no_wrap=True)
    for name in CANDIDATES:
        number = name in CANDIDATES[1:3]
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    for line in lines:
        table.add_row("  >" if line.chosen else "", *line[1:], style="bold" if line.chosen else "")
    return table


def explain(graph: ParamGraph, decisions: Decisions, name: str | None = None, left_whole: Sequence[str] = ()) -> Explanation:
    """How the tensor called `name` comes by its values, shape and dtype; or, without a name, every decision with its reason.

    `left_whole` are lines on what inferred rules leave out.

    Raises `UnknownNameError` for a name that the graph does not have.
    """
    if name is None:
        return _explain_decisions(graph, decisions, left_whole)
    return _explain_tensor(graph, decisions, graph.tensor(name))


# -- one tensor ---------------------------------------------------------------------------------------------------------


def _explain_tensor(graph: ParamGraph, decisions: Decisions, tensor: TensorNode) -> Explanation:
    storage = next(each for each in graph.storages if each.index == tensor.view.storage)
    facts = [(tensor.kind, _traits(tensor)), ("storage", _storage(tensor, storage))]
    facts += [("tied with", ", ".join(tensor.names[1:]))] if len(tensor.names) > 1 else []
    facts += list(_steps_for(tensor, storage, decisions))
    if (placement := tensor_placement(tensor, graph, decisions)) is not None:
        facts.append(("placement", placement))
    if (quantized := tensor_quantizing(tensor, decisions)) is not None:
        facts.append(("quantized", quantized))
    facts += list(_beginning(graph, tensor, storage))
    recipe = graph.recipe(tensor.name)
    dead = [op for op in graph.writers.get(storage.index, ()) if not op.live]
    ops = sorted({*recipe, *dead}, key=lambda op: op.index)
    calls = Counter(op.site for op in ops if op.site.init is not None)
    passages = tuple(_op(op, tensor, graph, calls[op.site] > 1) for op in ops)
    return Explanation(tensor.name, tuple(facts), "recipe", passages)


def _traits(tensor: TensorNode) -> str:
    traits = [describe_value(tensor.view), format_bytes(tensor.nbytes)]
    if tensor.kind == "parameter":
        traits.append("trainable" if tensor.requires_grad else "frozen (requires_grad is False)")
    if tensor.kind == "buffer" and not tensor.persistent:
        traits.append("not in the state_dict")
    if tensor.grad_fn is not None:
        traits.append(f"grad_fn {tensor.grad_fn}")
    return ", ".join(traits)


def _storage(tensor: TensorNode, storage: Storage) -> str:
    view = tensor.view
    whole = f"number {storage.index}, {format_bytes(storage.nbytes)} on {storage.device}"
    if covers(view, storage.nbytes):
        return f"{whole}; the tensor is all of it"
    return f"{whole}; the tensor is a view of it: stride {list(view.stride)}, offset {view.offset}"


def _steps_for(tensor: TensorNode, storage: Storage, decisions: Decisions) -> Iterator[Fact]:
    dtype, device = final_dtype(tensor, decisions), final_device(tensor, storage, decisions)
    casts = [(number, step) for number, step in enumerate(decisions.steps) if isinstance(step, Cast)]
    moves = [number for number, step in enumerate(decisions.steps) if isinstance(step, Move)]
    rules = [(number, found) for number, cast in casts if castable(tensor) and (found := _rule(cast, tensor))]
    if rules:
        change = f"{dtype_name(tensor.dtype)} → " if dtype != tensor.dtype else ""
        yield "dtype", f"{change}{dtype_name(dtype)}, by {' and then '.join(_cast_by(decisions, *each) for each in rules)}"
    elif casts:
        yield "dtype", f"{dtype_name(dtype)}: {_why_not_cast(tensor)}"
    if moves:
        stays = "a plain attribute stays where it was made"
        yield "device", f"{device}: {stays if tensor.kind == 'attribute' else _moved_by(decisions, moves[-1])}"


def _moved_by(decisions: Decisions, number: int) -> str:
    line = step_line(decisions.steps[number])
    return f"plan.fit decided to {line}" if who_stepped(decisions, number) == FIT else f"you asked to {line}"


def _cast_by(decisions: Decisions, number: int, rule: Rule) -> str:
    whose = "plan.fit's cast" if who_stepped(decisions, number) == FIT else "your cast"
    return f"{whose} to {rule.dtype}" if rule.pattern == "*" else f"{whose} of {rule.pattern!r} to {rule.dtype}"


def _rule(cast: Cast, tensor: TensorNode) -> Rule | None:
    """The rule of `cast` that decides about `tensor`: the first that matches the first of its names that any rule matches."""
    return next((rule for name in tensor.names for rule in cast.rules if fnmatchcase(name, rule.pattern)), None)


def _why_not_cast(tensor: TensorNode) -> str:
    if tensor.kind == "attribute":
        return "a cast, like nn.Module.to, leaves plain attributes alone"
    return (
        "no rule of the casts matches it" if castable(tensor) else "a cast, like nn.Module.to, leaves integers and booleans alone"
    )


def _beginning(graph: ParamGraph, tensor: TensorNode, storage: Storage) -> Iterator[Fact]:
    if storage.constant is not None:
        constant = storage.constant
        values = f"{describe_value(constant.dtype)}{list(constant.size)}, digest {constant.digest[:12]}"
        yield "begins as", f"a constant from outside the tape: {values}"
    if tensor in graph.uninitialized:
        yield "uninitialized", f"the constructor leaves elements without values; {WAY_OUT}"


def _op(op: Op, tensor: TensorNode, graph: ParamGraph, is_part: bool) -> Passage:
    """One op in words; where it `is_part` of an init function that calls several, its operator is named as well."""
    own = next((view for view in op.targets if view.storage == tensor.view.storage), None)
    made = "" if own else "".join(f"  makes {describe_value(view)}" for view in op.targets[:1])
    part = describe_part(own, tensor.view) if own else ""
    within = f": {operator_name(op)}" if is_part else ""
    title = f"op {op.index}  {describe_op(op)}{within}{part}{made}"
    lines = [] if op.position is None else [_position(op.position, graph.ops)]
    lines += [f"at {describe_frame(frame)}" for frame in op.site.frames[:1]]
    lines += [f"   {describe_frame(frame)}" for frame in op.site.frames[1:]]
    return Passage(f"{title}  {_fate(op, tensor, graph)}" if not op.live else title, tuple(lines), dead=not op.live)


def _fate(op: Op, tensor: TensorNode, graph: ParamGraph) -> str:
    """Why a dead op has no effect."""
    later = (each for each in graph.writers[tensor.view.storage] if each.index > op.index and each.live)
    after = next(later, None)
    by = f", overwritten by op {after.index}" if after is not None else ""
    return f"dead{by}: never run" if op.unread else f"dead{by}: what read it is dropped"


def _position(position: StreamPosition, ops: Sequence[Op]) -> str:
    """Where in the random stream an op starts, in words."""
    stream = f"draws from the {position.device} stream"
    if position.origin == "ambient":
        return f"{stream}, where the constructor found it"
    if position.origin == "after" and position.op is not None:
        return f"{stream}, right after op {position.op}, {describe_op(ops[position.op])}"
    if position.seed is not None:
        return f"{stream}, seeded with {position.seed} by the constructor"
    return f"{stream}, at a state that the constructor set"


# -- every decision -----------------------------------------------------------------------------------------------------


def _explain_decisions(graph: ParamGraph, decisions: Decisions, left_whole: Sequence[str]) -> Explanation:
    fitted = decisions.fitted
    facts = [*(() if fitted is None else fit_facts(fitted)), *_facts(graph, decisions)]
    passages = tuple(Passage(f"{number}. {title}", lines) for number, (title, lines) in enumerate(_steps(graph, decisions), 1))
    if left_whole:
        passages += (Passage("left whole by the tensor axis, as a traced forward shows", tuple(left_whole)),)
    order = "in your order" if fitted is None else "in order"
    return Explanation(decisions.constructor, tuple(facts), f"steps after the constructor, {order}", passages, fitted)


def _facts(graph: ParamGraph, decisions: Decisions) -> Iterator[Fact]:
    """What is decided about the whole, and by whom."""
    moves = [number for number, step in enumerate(decisions.steps) if isinstance(step, Move)]
    if decisions.placing is None:
        yield "device", _moved(decisions, moves[-1]) if moves else _constructed_on(graph)
    if not any(isinstance(step, Cast) for step in decisions.steps):
        yield "dtype", f"as constructed, under the default dtype {decisions.ambient.default_dtype}: {_no_cast(decisions)}"
    layout, kind = layout_line(decisions), _layout_kind(decisions)
    if layout is not None:
        yield "quantized" if decisions.quantizing else "layout", f"{layout}: {who(decisions, kind)}"
    again = checkpointing_line(decisions)
    if again is not None:
        yield "checkpointing", f"{again}: {who(decisions, 'checkpointing')}"
    yield "random stream", f"{decisions.reference}: {_why_stream(decisions)}"
    if decisions.bound_state is not None:
        yield "bound to", f"generator state {decisions.bound_state[:12]}: the constructor looks at random values"
    if decisions.fitted is None:
        yield "memory", peak_line(memory(graph, decisions))


def _moved(decisions: Decisions, number: int) -> str:
    step = decisions.steps[number]
    assert isinstance(step, Move)
    return f"{step.device}: {who_stepped(decisions, number)}"


def _no_cast(decisions: Decisions) -> str:
    return "you asked for no cast" if decisions.fitted is None else "nothing is cast"


def _layout_kind(decisions: Decisions) -> str:
    """Which of the decisions `layout_line` is about."""
    return next((name for name in ("sharding", "placing") if getattr(decisions, name) is not None), "quantizing")


def _steps(graph: ParamGraph, decisions: Decisions) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Everything that is done after the constructor: a title and lines each."""
    for number, step in enumerate(decisions.steps):
        yield f"{step_line(step)}{_by_fit(decisions, who_stepped(decisions, number))}", tuple(_step(step, graph))
    layout = layout_line(decisions)
    if layout is not None:
        by = _by_fit(decisions, who(decisions, _layout_kind(decisions)))
        yield f"{layout}{by}", tuple(layout_lines(graph, decisions))
    again = checkpointing_line(decisions)
    if again is not None:
        by = _by_fit(decisions, who(decisions, "checkpointing"))
        yield f"{again}{by}", tuple(checkpointing_lines(graph, decisions))


def _by_fit(decisions: Decisions, by: str) -> str:
    """Who it was, where there are two who decide."""
    return "" if decisions.fitted is None else f" ({by})"


def _constructed_on(graph: ParamGraph) -> str:
    devices = {storage.index: storage.device for storage in graph.storages}
    used = sorted({devices[tensor.view.storage] for tensor in graph.tensors})
    plural = "s" * (len(used) > 1)
    return f"{', '.join(used) or 'none'}: the device{plural} the constructor asked for"


def _why_stream(decisions: Decisions) -> str:
    device = decisions.ambient.default_device
    if device.partition(":")[0] == decisions.reference:
        return f"the default device was {device} when the constructor was traced"
    return f"what the constructor draws, it draws on {decisions.reference}"


def _step(step: Cast | Move, graph: ParamGraph) -> Iterator[str]:
    if isinstance(step, Move):
        yield f"every parameter and buffer, as module.to({step.device!r}) does"
        return
    if step.uniform:
        yield f"as module.to(torch.{dtype_name(step.uniform)}) does"
    yield from _hits(step, graph)


def _hits(cast: Cast, graph: ParamGraph) -> Iterator[str]:
    """What each rule of `cast` applies to."""
    hits: dict[str, list[str]] = {rule.pattern: [] for rule in cast.rules}
    rest: list[str] = []
    for tensor in graph.tensors:
        rule = _rule(cast, tensor) if castable(tensor) else None
        (rest if rule is None else hits[rule.pattern]).append(tensor.name)
    for rule in cast.rules:
        yield f"{rule.pattern} to {rule.dtype}: {_list(hits[rule.pattern])}"
    if rest:
        yield f"left as constructed: {_list(rest)}"


def _list(names: Iterable[str]) -> str:
    names = list(names)
    folds = [fold.name for fold in fold_names(names)]
    more = f", … and {len(folds) - _SHOWN_HITS} more" if len(folds) > _SHOWN_HITS else ""
    return f"{len(names):,} tensor{'s' * (len(names) != 1)}" + (f" ({', '.join(folds[:_SHOWN_HITS])}{more})" if names else "")
