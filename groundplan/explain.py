"""Why a tensor is what it is, op by op; and why a plan decides what it decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

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
from .planner.records import dtype_name
from .report_text import WAY_OUT, peak_line, step_line
from .shown import Shown, heading, shortened
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
    """An explanation: facts first, then passages. `print()` shows it in at most 100 columns, a notebook and rich in colors."""

    title: str
    facts: tuple[Fact, ...]
    subtitle: str
    passages: tuple[Passage, ...]

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        yield Text(shortened(self.title, width), style="bold")
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in self.facts:
            grid.add_row(f"  {label}", Text(text))
        yield grid
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


def explain(graph: ParamGraph, decisions: Decisions, name: str | None = None) -> Explanation:
    """How the tensor called `name` comes by its values, shape and dtype; or, without a name, every decision with its reason.

    Raises `UnknownNameError` for a name that the graph does not have.
    """
    return _explain_decisions(graph, decisions) if name is None else _explain_tensor(graph, decisions, graph.tensor(name))


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
    casts = [step for step in decisions.steps if isinstance(step, Cast)]
    moves = [step for step in decisions.steps if isinstance(step, Move)]
    rules = [found for cast in casts if castable(tensor) and (found := _rule(cast, tensor))]
    if rules:
        change = f"{dtype_name(tensor.dtype)} → " if dtype != tensor.dtype else ""
        yield "dtype", f"{change}{dtype_name(dtype)}, by {' and then '.join(_asked(rule) for rule in rules)}"
    elif casts:
        yield "dtype", f"{dtype_name(dtype)}: {_why_not_cast(tensor)}"
    if moves:
        stays = "a plain attribute stays where it was made"
        yield "device", f"{device}: {stays if tensor.kind == 'attribute' else f'you asked to {step_line(moves[-1])}'}"


def _rule(cast: Cast, tensor: TensorNode) -> Rule | None:
    """The rule of `cast` that decides about `tensor`: the first that matches the first of its names that any rule matches."""
    return next((rule for name in tensor.names for rule in cast.rules if fnmatchcase(name, rule.pattern)), None)


def _asked(rule: Rule) -> str:
    return f"your cast to {rule.dtype}" if rule.pattern == "*" else f"your cast of {rule.pattern!r} to {rule.dtype}"


def _why_not_cast(tensor: TensorNode) -> str:
    if tensor.kind == "attribute":
        return "a cast, like nn.Module.to, leaves plain attributes alone"
    return (
        "no rule of your casts matches it"
        if castable(tensor)
        else "a cast, like nn.Module.to, leaves integers and booleans alone"
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


def _explain_decisions(graph: ParamGraph, decisions: Decisions) -> Explanation:
    ambient = decisions.ambient
    moves = [step for step in decisions.steps if isinstance(step, Move)]
    facts = [("device", f"{moves[-1].device}: you asked for it" if moves else _constructed_on(graph))]
    if not any(isinstance(step, Cast) for step in decisions.steps):
        facts.append(("dtype", f"as constructed, under the default dtype {ambient.default_dtype}: you asked for no cast"))
    layout = layout_line(decisions)
    if layout is not None:
        facts.append(("quantized" if decisions.quantizing else "layout", f"{layout}: you asked for it"))
    again = checkpointing_line(decisions)
    if again is not None:
        facts.append(("checkpointing", f"{again}: you asked for it"))
    facts.append(("random stream", f"{decisions.reference}: {_why_stream(decisions)}"))
    if decisions.bound_state is not None:
        facts.append(("bound to", f"generator state {decisions.bound_state[:12]}: the constructor looks at random values"))
    facts.append(("memory", peak_line(memory(graph, decisions))))
    steps = tuple(_step(number, step, graph) for number, step in enumerate(decisions.steps, 1))
    if layout is not None:
        steps += (Passage(f"{len(steps) + 1}. {layout}", tuple(layout_lines(graph, decisions))),)
    if again is not None:
        steps += (Passage(f"{len(steps) + 1}. {again}", tuple(checkpointing_lines(graph, decisions))),)
    return Explanation(decisions.constructor, tuple(facts), "steps after the constructor, in your order", steps)


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


def _step(number: int, step: Cast | Move, graph: ParamGraph) -> Passage:
    if isinstance(step, Move):
        return Passage(f"{number}. {step_line(step)}", (f"every parameter and buffer, as module.to({step.device!r}) does",))
    lines = [f"as module.to(torch.{dtype_name(step.uniform)}) does"] if step.uniform else []
    return Passage(f"{number}. {step_line(step)}", (*lines, *_hits(step, graph)))


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
