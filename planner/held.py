"""What a rank holds of every tensor, and how a tensor is made: of those that are alike, once.

Tensors are alike where all but their names is the same, and decisions that go by names say the same of them. A module of many
layers has some ten kinds of tensors; a rank's part, its padding and its dtype are worked out for the first of each kind.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..tracer.draws import is_random_fill, is_trunc_normal
from ..tracer.elements import by_element
from ..tracer.graph import Op, ParamGraph, TensorNode
from .alike import Alike, alike
from .changes import HOST
from .decisions import Cast, Decisions, Move, cast_dtype, castable, final_dtype
from .experts import experts_of
from .kept import kept
from .local_parts import LocalParts
from .placing import DISK, Placing
from .quantizing import quantized_names
from .sharding import Axis, Sharding, TensorRule, cuts_of
from .stages import stages_by_name
from .training_memory import hidden_names


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds of a tensor: elements, those that it is padded to, and bytes that are there only while it is made.

    `quantized` are the bytes of what has been made of it, which it may have been dropped for; `divided` is so of a DTensor.
    """

    tensor: TensorNode
    device: str
    shape: tuple[int, ...]
    numel: int
    padded: int
    working: int
    itemsize: int
    trains: bool
    quantized: int = 0
    divided: bool = False

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize + self.quantized


def held_by(graph: ParamGraph, decisions: Decisions, rank: int) -> Alike[Held]:
    """What a rank holds of every tensor, in the order in which they are made: whole ones first."""
    sharding = decisions.sharding or Sharding(axes=(Axis(name="dp_replicate", size=1),))
    parts = LocalParts.of_rank(sharding, graph, rank)
    together = None if decisions.placing is not None else _device_of_all(graph, decisions)
    return _tensors_alike(graph, Naming.of(decisions)).to(lambda made: _held(made, decisions, parts, together))


def _held(made: Made, decisions: Decisions, parts: LocalParts, together: str | None) -> Held | None:
    tensor = made.tensor
    if (shape := parts.shape(tensor)) is None:
        return None
    numel = math.prod(shape)
    held = Held(
        tensor,
        together or _placed(tensor, decisions),
        shape,
        numel,
        padded=math.prod(parts.shape(tensor, first=True) or ()) if parts.is_sharded(tensor) else numel,
        working=_working(made, decisions, numel),
        itemsize=final_dtype(tensor, decisions).itemsize,
        trains=tensor.kind == "parameter" and tensor.requires_grad,
        divided=parts.is_divided(tensor),
    )
    if held.device == DISK:
        return _on_disk(held)
    return _quantized(held, decisions) if decisions.quantizing else held


def _on_disk(held: Held) -> Held:
    """A tensor that is written to disk as soon as it is made: in memory it is there only meanwhile."""
    return replace(held, device=HOST, numel=0, padded=0, working=held.working + held.nbytes, trains=False)


def _quantized(held: Held, decisions: Decisions) -> Held:
    """The same of a quantized weight: whole only meanwhile, unless a module that is not quantized has it as well."""
    tensor, whole = held.tensor, held.numel * held.itemsize
    layers = quantized_names(tensor, decisions.quantizing)
    sizes = [each.size_of(tensor.shape, final_dtype(tensor, decisions)) for each in layers.values()]
    made = [size.nbytes if size is not None and size.nbytes is not None else whole for size in sizes]
    working = max((size.working or 0 for size in sizes if size is not None), default=0)
    if not layers or made == [whole]:
        return held
    if set(layers) < set(tensor.names):
        return replace(held, quantized=sum(made), working=max(held.working, working))
    return replace(held, numel=0, padded=0, quantized=sum(made), working=max(held.working, working) + whole, trains=False)


def _placed(tensor: TensorNode, decisions: Decisions) -> str:
    """Where `materialize` puts it by the plan's placing."""
    assert decisions.placing is not None
    placed = decisions.placing.device_for(tensor) or HOST
    placed = decisions.placing.main if placed == DISK and tensor.kind != "parameter" else placed
    return "cuda:0" if placed == "cuda" else placed


def _device_of_all(graph: ParamGraph, decisions: Decisions) -> str:
    """Where `materialize` puts all tensors: in host memory, or where the constructor's default is."""
    offload = decisions.sharding is not None and decisions.sharding.offload
    return HOST if offload else computing_device(graph, decisions)


def computing_device(graph: ParamGraph, decisions: Decisions) -> str:
    """The device of a plan for one: where it is moved to, or where the constructor's default is."""
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    device = moves[-1] if moves else graph.ambient.default_device
    return "cuda:0" if device == "cuda" else device


# -- kinds --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Made:
    """How a tensor is made: bytes of what is there `whole` meanwhile, if it is not made element by element; else, whether it is
    converted while it is drawn.
    """

    tensor: TensorNode
    whole: int | None
    converted: bool


class Naming(NamedTuple):
    """All that decisions say of tensors by their names. What is quantized is so by the names of layers, each `apart`."""

    casts: tuple[Cast, ...]
    rules: tuple[TensorRule, ...]
    experts: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    placing: Placing | None
    apart: bool

    @classmethod
    def of(cls, decisions: Decisions) -> Naming:
        sharding = decisions.sharding
        pipeline = None if sharding is None else sharding.pipeline
        return cls(
            decisions.casts,
            () if sharding is None else sharding.tensor,
            () if sharding is None or sharding.axis("expert") is None else sharding.experts,
            () if pipeline is None else pipeline.stages,
            decisions.placing,
            bool(decisions.quantizing),
        )


@kept
def _tensors_alike(graph: ParamGraph, naming: Naming) -> Alike[Made]:
    """Every storage's tensor, in the order in which they are made, as the first of those that are alike."""
    firsts: dict[Hashable, Made] = {}
    keys = _keys(graph, naming)
    return alike((made.tensor.name, firsts.setdefault(key, made)) for made, key in zip(_made(graph), keys, strict=True))


def _keys(graph: ParamGraph, naming: Naming) -> Iterator[Hashable]:
    """What is equal for tensors that are alike."""
    cuts, experts, hidden = cuts_of(graph, naming.rules), experts_of(naming.experts, graph), hidden_names(graph)
    stages = stages_by_name(graph, naming.stages)
    for made in _made(graph):
        tensor = made.tensor
        yield (
            (tensor.kind, tensor.shape, tensor.dtype, tensor.requires_grad, made.whole, made.converted),
            tuple(cast.dtype_for(tensor.names) for cast in naming.casts) if castable(tensor) else (),
            next((cuts[name] for name in tensor.names if name in cuts), None) if cuts else None,
            next((experts[name] for name in tensor.names if name in experts), None) if experts else None,
            stages[tensor.name],
            tensor.name in hidden,
            None if naming.placing is None else naming.placing.device_for(tensor),
            tensor.name if naming.apart else None,
        )


@kept
def _made(graph: ParamGraph) -> tuple[Made, ...]:
    """Every storage's tensor, in the order in which they are made."""
    tensors = {tensor.view.storage: tensor for tensor in reversed(graph.tensors) if not _is_meta(tensor, graph)}
    order = sorted(tensors.values(), key=lambda each: (each.kind == "parameter", _finished(each, graph)))
    return tuple(_making(tensor, graph) for tensor in order)


@kept
def made_parameters(graph: ParamGraph) -> tuple[str, ...]:
    """The names of the parameters, in the order in which they are made."""
    return tuple(made.tensor.name for made in _made(graph) if made.tensor.kind == "parameter")


def _making(tensor: TensorNode, graph: ParamGraph) -> Made:
    recipe = graph.recipe(tensor.name)
    if all(_is_by_element(op) for op in recipe):
        return Made(tensor, None, _is_converted(tensor, recipe))
    storages = {view.storage for op in recipe for view in op.targets}
    return Made(tensor, sum(graph.storages[storage].nbytes for storage in storages), False)


def _is_meta(tensor: TensorNode, graph: ParamGraph) -> bool:
    return graph.storages[tensor.view.storage].device == "meta"


def _finished(tensor: TensorNode, graph: ParamGraph) -> int:
    writers = graph.writers.get(tensor.view.storage, ())
    return writers[-1].index if writers else -1


def _working(made: Made, decisions: Decisions, numel: int) -> int:
    """Bytes that are there only while a tensor is made: the whole of what is not made by element, a part that is converted."""
    if made.whole is not None:
        return made.whole
    casts = [cast_dtype(made.tensor, cast) for cast in decisions.casts]
    changed = any(dtype != made.tensor.dtype for dtype in casts)
    return numel * made.tensor.dtype.itemsize if changed and not (len(casts) == 1 and made.converted) else 0


def _is_converted(tensor: TensorNode, recipe: Sequence[Op]) -> bool:
    """Whether it is converted while it is drawn: nothing but one fill of all of it, whose length is known."""
    return len(recipe) == 1 and is_random_fill(recipe[0].func) and recipe[0].targets == (tensor.view,)


def _is_by_element(op: Op) -> bool:
    return by_element(op, lambda drawing: is_random_fill(drawing.func) or is_trunc_normal(drawing.func) or not drawing.reads)
