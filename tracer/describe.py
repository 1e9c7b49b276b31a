"""The graph in words and as data: ops and recipes as short phrases, the whole graph as text and as JSON."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from typing import Any

import torch

from .digraph import steps
from .graph import Constant, Frame, ModuleNode, Op, ParamGraph, Storage, StreamPosition, TensorNode, Version, View

_SHOWN_ITEMS = 6
_SHOWN_LINKS = 4
_UNTOLD = ("generator", "layout", "pin_memory", "memory_format", "non_blocking", "size", "implicit")
"""Arguments that say nothing about the values; the size is in the tensor's own shape."""

_RANGE = ("start", "end", "step")
_PLAIN = ("other", "value", "val", "exponent", "fill_value", *_RANGE)
"""Names that add nothing where the argument is the only one, `mul_(0.5)`, or where all of them are a range's."""

_MISSING = object()


# -- values -------------------------------------------------------------------------------------------------------------


def describe_value(value: object) -> str:
    """An argument in a few characters: floats with 4 significant digits, tensors by dtype and shape.

    >>> describe_value(5 ** 0.5), describe_value(torch.bfloat16), describe_value(View(0, torch.float32, (2, 3), (3, 1)))
    ('2.236', 'bfloat16', 'float32[2, 3]')
    """
    if isinstance(value, float):
        short = f"{value:.4g}"
        return f"{short}.0" if short.lstrip("-").isdigit() else short
    if isinstance(value, View):
        return f"{describe_value(value.dtype)}{list(value.size)}"
    if isinstance(value, list | tuple):
        shown = [describe_value(item) for item in value[:_SHOWN_ITEMS]] + ["…"] * (len(value) > _SHOWN_ITEMS)
        return f"[{', '.join(shown)}]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, bool | int | complex | str | torch.device | None):
        return repr(value) if isinstance(value, str) else str(value)
    return type(value).__name__


# -- ops ----------------------------------------------------------------------------------------------------------------


def describe_op(op: Op) -> str:
    """The call in the field's own words: the init function if one was called, else the operator.

    `kaiming_uniform_(a=2.236)`, `normal_(mean=0.0, std=0.02)`, `zero_()`, `copy_(float32[4, 4])`.
    """
    name = op.site.init or operator_name(op)
    return f"{name}({_named(_shown(op, hidden=op.writes[:1]))})"


def _brief(op: Op, hidden: Sequence[View] = ()) -> str:
    """The call without the tensors in `hidden`, and without what an init function's reader takes for granted (`mean=0.0`)."""
    name = op.site.init or operator_name(op)
    defaults = _init_defaults(name)
    shown = [(key, value) for key, value in _shown(op, [*op.writes[:1], *hidden]) if defaults.get(key, _MISSING) != value]
    return f"{name}({_named(shown)})"


def _shown(op: Op, hidden: Sequence[View]) -> list[tuple[str, Any]]:
    arguments = op.site.init_args if op.site.init is not None else _arguments(op)
    shown = [(name, value) for name, value in arguments if not (isinstance(value, View) and value in hidden)]
    plain = len(shown) == 1 or all(name in _RANGE for name, _ in shown)
    return [("" if plain and name in _PLAIN else name, value) for name, value in shown]


@cache
def _init_defaults(name: str) -> Mapping[str, Any]:
    """The defaults of an init function; those of `uniform_`, and every `std`, are worth telling all the same."""
    init = getattr(torch.nn.init, name, None)
    if name == "uniform_" or not callable(init):
        return {}
    parameters = inspect.signature(init).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty and each.name != "std"}


def describe_frame(frame: Frame) -> str:
    """A line of Python, its file from the installed package on.

    >>> describe_frame(Frame("/usr/lib/site-packages/torch/nn/init.py", 24, "normal_"))
    'torch/nn/init.py:24 in normal_'
    """
    file = frame.file.replace("\\", "/").rpartition("/site-packages/")[2]
    return str(frame._replace(file=file))


def _named(arguments: Iterable[tuple[str, Any]]) -> str:
    return ", ".join(f"{name}={describe_value(value)}" if name else describe_value(value) for name, value in arguments)


def operator_name(op: Op) -> str:
    """The operator's name without namespace and overload."""
    name = op.name.rpartition("::")[2].removeprefix("aten.")
    return name.partition(".")[0]


def _arguments(op: Op) -> Iterator[tuple[str, Any]]:
    """The arguments worth telling, scalars under the schema's names, tensors without one."""
    schema = getattr(op.func, "_schema", None)
    if schema is None:
        yield from (("", value) for value in op.args)
        yield from ((name, value) for name, value in op.kwargs if _worth_telling(op, name, value))
        return
    given = dict(zip((argument.name for argument in schema.arguments), op.args, strict=False)) | dict(op.kwargs)
    for argument in schema.arguments:
        value = given.get(argument.name, argument.default_value)
        distribution = op.random and isinstance(value, float)  # normal_ without its std would not be readable
        if _worth_telling(op, argument.name, value) and (distribution or value != argument.default_value):
            yield "" if isinstance(value, View) else argument.name, value


def _worth_telling(op: Op, name: str, value: object) -> bool:
    if name in ("dtype", "device"):
        return value is not None and bool(op.reads)
    return value is not None and name not in _UNTOLD


# -- recipes ------------------------------------------------------------------------------------------------------------


def describe_recipe(ops: Sequence[Op], view: View | None = None, storages: Iterable[Storage] = ()) -> str:
    """A recipe in one short phrase: the last overwrite of what is in `view` and what follows it, joined by ` + `.

    `view` is the last op's first target if not given; `storages` are needed only to tell a constant. The phrase is
    `uninitialized` where there is no op. Values computed from other tensors are told from their source on, joined by ` → `.
    """
    phrases = _Phrases(storages)
    for op in ops:
        phrases.take(op)
    target = view if view is not None else (ops[-1].targets[0] if ops else None)
    return "uninitialized" if target is None else phrases.of(target)


def recipe_phrases(graph: ParamGraph) -> dict[str, str]:
    """The phrase of every tensor's recipe, by the tensor's first name; linear in the size of the tape."""
    phrases = _Phrases(graph.storages)
    for op in graph.ops:
        if op.live:
            phrases.take(op)
    return {tensor.name: phrases.of(tensor.view) for tensor in graph.tensors}


class _Phrases:
    """Reads the tape from front to back and can say, at any moment, how a view came by its values."""

    def __init__(self, storages: Iterable[Storage]) -> None:
        self._constants = {storage.index for storage in storages if storage.constant is not None}
        self._writes: dict[int, list[tuple[Op, View]]] = {}
        self._sources: dict[int, tuple[str, ...]] = {}
        self._texts: dict[Hashable, str] = {}

    def take(self, op: Op) -> None:
        """The next op of the tape."""
        targets = op.targets
        source = _source(op, targets) if op.reads and op.site.init is None else None
        if source is not None:
            self._sources[op.index] = (*_abridged(self._links(source)), _brief(op, hidden=[source]))
        for view in targets:
            self._writes.setdefault(view.storage, []).append((op, view))

    def of(self, view: View) -> str:
        """How the elements in `view` came by their present values."""
        if not view.numel:
            return "empty"
        return " → ".join(_abridged(self._links(view)))

    def _links(self, view: View) -> tuple[str, ...]:
        """The phrase as a chain: where the values come from, then every computation on the way."""
        writes = self._visible(view)
        if not writes:
            return ("constant" if view.storage in self._constants else "uninitialized",)
        first, target = writes[0]
        if len(writes) == 1 and target == view and first.site.init is not None and view.storage not in self._constants:
            return (self._init_text(first),)
        replaced = _replaces(first, target, view)
        base = self._sources.get(first.index, (_brief(first),)) if replaced else (_brief(first),)
        texts = [f"{base[-1]}{describe_part(target, view)}"]
        texts += [f"{_brief(op)}{describe_part(target, view)}" for op, target in _one_per_call(writes)]
        if view.storage in self._constants and not replaced:
            base, texts = ("",), ["constant", *texts]
        return (*base[:-1], " + ".join(_counted(texts)))

    def _init_text(self, op: Op) -> str:
        """The brief text of an op under an init function; most ops of a model share a few of them."""
        key = (op.site.init, *((name, type(value), str(value)) for name, value in op.site.init_args))
        if key not in self._texts:
            self._texts[key] = _brief(op)
        return self._texts[key]

    def _visible(self, view: View) -> list[tuple[Op, View]]:
        """The last write that replaces all of `view`, and every later one that touches it."""
        found: list[tuple[Op, View]] = []
        for op, target in reversed(self._writes.get(view.storage, ())):
            if target == view or _overlap(target, view):
                found.append((op, target))
                if _replaces(op, target, view):
                    break
        return found[::-1]


def _source(op: Op, targets: Sequence[View]) -> View | None:
    """The first tensor that `op` reads besides what it writes."""
    made = {view.storage for view in targets}
    return next((view for view in op.reads if view.storage not in made), None)


def _one_per_call(writes: Sequence[tuple[Op, View]]) -> Iterator[tuple[Op, View]]:
    """The writes after the first one, without those that an init function made in the same call as the one before."""
    for (before, _), (op, view) in pairwise(writes):
        if op.site.init is None or (op.site.init, op.site.line) != (before.site.init, before.site.line):
            yield op, view


def _counted(texts: Sequence[str]) -> Iterator[str]:
    """Equal neighbors once, with their number."""
    start = 0
    for end in range(1, len(texts) + 1):
        if end == len(texts) or texts[end] != texts[start]:
            yield texts[start] if end - start == 1 else f"{end - start}x {texts[start]}"
            start = end


def _abridged(links: tuple[str, ...]) -> tuple[str, ...]:
    return links if len(links) <= _SHOWN_LINKS else (*links[:2], "…", links[-1])


def _extent(view: View) -> tuple[int, int]:
    """The first byte in view, and the one behind the last."""
    last = view.offset + sum((size - 1) * stride for size, stride in zip(view.size, view.stride, strict=True))
    return view.offset * view.dtype.itemsize, (last + 1) * view.dtype.itemsize


def _overlap(one: View, other: View) -> bool:
    (start, end), (other_start, other_end) = _extent(one), _extent(other)
    return start < other_end and other_start < end and one.numel > 0


def _replaces(op: Op, target: View, view: View) -> bool:
    """Whether `op`, writing `target`, leaves nothing of what was in `view` before."""
    if not op.overwrites and target in op.writes:
        return False
    if target == view:
        return True
    (start, end), (view_start, view_end) = _extent(target), _extent(view)
    return start <= view_start and view_end <= end and target.numel * target.dtype.itemsize == end - start


def describe_part(target: View, view: View) -> str:
    """Which part of `view` a write to `target` touches, `[1 of 10 rows]`; an empty string where it is all of it."""
    if target == view or target.numel >= view.numel or target.dtype != view.dtype:
        return ""
    row = math.prod(view.size[1:])
    start, end = _extent(target)
    dense = target.numel * target.dtype.itemsize == end - start
    whole_rows = dense and not (target.numel % row or (target.offset - view.offset) % row) and view.numel == row * view.size[0]
    if len(view.size) > 1 and whole_rows:
        return f"[{target.numel // row} of {view.size[0]} rows]"
    return f"[{target.numel} of {view.numel}]"


# -- the graph as text --------------------------------------------------------------------------------------------------


def graph_text(graph: ParamGraph) -> str:
    """One line a tensor, under it the ops of its recipe, each with the constructor's line."""
    dead = f", {len(graph.dead_ops)} dead" if graph.dead_ops else ""
    lines = [f"{len(graph.tensors)} tensors, {len(graph.ops)} ops{dead}; reference stream: {graph.reference}"]
    storages = {storage.index: storage for storage in graph.storages}
    for tensor, recipe in recipes(graph):
        lines.append(_tensor_line(tensor))
        constant = storages[tensor.view.storage].constant
        if constant is not None:
            lines.append(f"    constant {describe_value(constant.dtype)}{list(constant.size)}, digest {constant.digest[:12]}")
        elif not recipe:
            lines.append("    empty" if not tensor.numel else "    uninitialized")
        lines += [f"    {line}" for line in _recipe_lines(recipe)]
    return "\n".join(lines)


def _recipe_lines(recipe: Iterable[Op]) -> Iterator[str]:
    """One line an op; the ops that one call of an init function makes share a line."""
    for _, group in groupby(recipe, key=lambda op: op.site if op.site.init is not None else op.index):
        ops = list(group)
        place = f"  at {describe_frame(ops[0].site.line)}" if ops[0].site.line else ""
        yield f"{describe_op(ops[0])}{f', {len(ops)} ops' if len(ops) > 1 else ''}{place}"


def _tensor_line(tensor: TensorNode) -> str:
    traits = "" if tensor.requires_grad or tensor.kind != "parameter" else ", frozen"
    traits += ", not persistent" if tensor.kind == "buffer" and not tensor.persistent else ""
    ties = "".join(f" = {name}" for name in tensor.names[1:])
    return f"{tensor.name}: {tensor.kind} {describe_value(tensor.view)}{traits}{ties}"


def recipes(graph: ParamGraph) -> Iterator[tuple[TensorNode, tuple[Op, ...]]]:
    """Every tensor with the ops that its values depend on, in constructor order; linear in what it yields."""
    parents: list[set[int]] = []
    makers: dict[Version, int] = {}
    last: dict[int, int] = {}
    for step in steps(graph.ops, graph.storages):
        parents.append({makers[version] for version in step.reads + step.continues if version in makers})
        makers.update((version, step.op.index) for version in step.writes)
        last.update((version.storage, step.op.index) for version in step.writes)
    for tensor in graph.tensors:
        found = _ancestors(last.get(tensor.view.storage), parents)
        yield tensor, tuple(graph.ops[index] for index in sorted(found))


def _ancestors(start: int | None, parents: Sequence[Iterable[int]]) -> set[int]:
    found: set[int] = set()
    todo = [] if start is None else [start]
    while todo:
        index = todo.pop()
        if index not in found:
            found.add(index)
            todo.extend(parents[index])
    return found


# -- the graph as data --------------------------------------------------------------------------------------------------


def graph_json(graph: ParamGraph) -> dict[str, Any]:
    """Everything but the constants' contents, as plain data: sizes in bytes, dtypes as `float32`, views as objects."""
    ambient = graph.ambient
    return {
        "modules": [_module_json(module) for module in graph.modules],
        "tensors": [_tensor_json(tensor) for tensor in graph.tensors],
        "storages": [_storage_json(storage) for storage in graph.storages],
        "ops": [_op_json(op) for op in graph.ops],
        "ambient": {
            "default_dtype": describe_value(ambient.default_dtype),
            "default_device": ambient.default_device,
            "grad_enabled": ambient.grad_enabled,
            "inference_mode": ambient.inference_mode,
        },
        "reference": graph.reference,
        "seed_dependent": [_frame_json(frame) for frame in graph.seed_dependent],
        "host_random": graph.host_random,
        "notes": list(graph.notes),
    }


def _module_json(module: ModuleNode) -> dict[str, Any]:
    return {"names": list(module.names), "type": module.type, "training": module.training}


def _tensor_json(tensor: TensorNode) -> dict[str, Any]:
    return {
        "names": list(tensor.names),
        "kind": tensor.kind,
        "view": _view_json(tensor.view),
        "requires_grad": tensor.requires_grad,
        "persistent": tensor.persistent,
        "grad_fn": tensor.grad_fn,
        "type": tensor.type,
    }


def _storage_json(storage: Storage) -> dict[str, Any]:
    return {
        "index": storage.index,
        "nbytes": storage.nbytes,
        "device": storage.device,
        "constant": None if storage.constant is None else _constant_json(storage.constant),
        "exposed": storage.exposed,
        "held": storage.held,
    }


def _constant_json(constant: Constant) -> dict[str, Any]:
    return {"size": list(constant.size), "dtype": describe_value(constant.dtype), "digest": constant.digest}


def _op_json(op: Op) -> dict[str, Any]:
    return {
        "index": op.index,
        "name": op.name,
        "args": [_plain(value) for value in op.args],
        "kwargs": {name: _plain(value) for name, value in op.kwargs},
        "reads": [_view_json(view) for view in op.reads],
        "writes": [_view_json(view) for view in op.writes],
        "outputs": [None if view is None else _view_json(view) for view in op.outputs],
        "overwrites": op.overwrites,
        "init": op.site.init,
        "init_args": {name: _plain(value) for name, value in op.site.init_args},
        "frames": [_frame_json(frame) for frame in op.site.frames],
        "position": None if op.position is None else _position_json(op.position),
        "live": op.live,
        "unread": op.unread,
    }


def _view_json(view: View) -> dict[str, Any]:
    plain = {
        "storage": view.storage,
        "dtype": describe_value(view.dtype),
        "size": list(view.size),
        "stride": list(view.stride),
        "offset": view.offset,
    }
    return plain | {name: True for name in ("conj", "neg") if getattr(view, name)}


def _frame_json(frame: Frame) -> dict[str, Any]:
    return frame._asdict()


def _position_json(position: StreamPosition) -> dict[str, Any]:
    state = None if position.state is None else hashlib.sha256(position.state).hexdigest()
    return position._asdict() | {"state": state}


def _plain(value: Any) -> Any:
    """An argument as JSON data; what JSON cannot say (infinities, complex numbers, objects) becomes a string."""
    if isinstance(value, View):
        return _view_json(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float | complex | torch.dtype | torch.device | torch.layout | torch.memory_format):
        return str(value).removeprefix("torch.")
    return type(value).__name__
