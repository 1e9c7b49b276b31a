"""The bytes that one rank takes where a module is filled in place, in closed form: its part of every tensor.

A rank holds `ceil(n / D)` of the `n` rows of a parameter that FSDP shards between `D` ranks (the last ranks fewer, or none),
after the tensor axis has divided it. FSDP2 pads what it holds to the first rank's size when it first runs; gradients have that
size too (torch/distributed/fsdp/_fully_shard/_fsdp_param.py), the optimizer's state is that of the part alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..tracer.draws import is_random_fill, is_trunc_normal
from ..tracer.elements import by_element
from ..tracer.graph import Op, ParamGraph, TensorNode
from .activity import reached, trained
from .changes import HOST, Change
from .decisions import Decisions, Move, cast_dtype, final_dtype
from .exchanges import attention_output, ring_attention
from .expert_profile import on_rank
from .fsdp_form import Fsdp
from .fsdp_units import fsdp_of
from .kept import kept_with
from .local_parts import LocalParts, coordinate_of
from .optimizer import Trained
from .pipeline_memory import pipeline_activity, pipeline_inputs
from .placing import DISK
from .profile import Profile
from .quantizing import quantized_names
from .records import dtype_named
from .sharding import Axis, Sharding
from .training_memory import Stepped, hidden_names, training_phases
from .workload import Training

READ_BYTES = 2**24
"""The bytes of a checkpoint that one thread reads at a time."""

LOAD_NOTE = "load reads a checkpoint straight into the tensors; on other devices than the CPU a piece at a time, through the host"


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


def rank_timelines(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, rank: int, profile: Profile | None = None
) -> dict[str, list[Change]]:
    """What one rank allocates and releases in every phase."""
    held = list(_held(graph, decisions, rank))
    constructed, weights = [], []
    for each in held:
        constructed += [_change(each, each.working), _change(each, each.nbytes), _change(each, -each.working)]
        weights.append(_change(each, each.nbytes))
    whole = [_change(each, max(each.nbytes, each.working)) for each in held]  # a layer is read before it is quantized
    found = {"construct": constructed, "load": [*weights, *(copied_to_host(whole) if decisions.quantizing else staged(weights))]}
    state: list[Change] = []
    if workload is not None:
        padded = [_change(each, each.padded * each.itemsize + each.quantized) for each in held]
        stepped = _stepped(held, graph, decisions, workload)
        buckets = [each.gradient for each in stepped] if is_ddp(decisions) else []
        device = computing_device(graph, decisions)
        if profile is not None:
            profile = on_rank(profile, decisions.sharding, graph, {name for each in held for name in each.tensor.names})
        fsdp = None if profile is None else fsdp_of(graph, decisions, held, device)
        weights_then = [*padded, *buckets]
        if profile is not None and decisions.sharding is not None and decisions.sharding.pipeline is not None:
            stepped = reached(graph, profile, stepped)
            active = _in_pipeline(profile, decisions.sharding, rank, [each.gradient for each in stepped], device, fsdp)
            given = _pipeline_inputs(profile, decisions.sharding, rank, device)
            phases, state = training_phases([*weights_then, *given], stepped, workload, active)
        else:
            phases, state = trained(graph, weights_then, stepped, workload, profile, device, fsdp)
        if profile is not None and decisions.sharding is not None and decisions.sharding.size("context") > 1:
            ring = _ring(profile, graph, decisions, workload, device)
            phases |= {name: [ring, *phases[name], ring._replace(nbytes=-ring.nbytes)] for name in ("first_step", "step")}
        found.update(phases)
    saved = [*weights, *state]
    found["checkpoint"] = [*saved, *copied_to_host(each for each in saved if each.device != HOST)]
    return found


def _ring(profile: Profile, graph: ParamGraph, decisions: Decisions, workload: Training, device: str) -> Change:
    """What ring attention takes while it runs, taken to be there at the peak; with as many heads of keys as of queries."""
    sharding = decisions.sharding
    assert sharding is not None
    computed = [dtype_named(sharding.compute_dtype)] if sharding.compute_dtype else []
    dtypes = [workload.autocast] if workload.autocast else computed or [final_dtype(each, decisions) for each in graph.parameters]
    output = attention_output(profile)
    peaks = ring_attention(2 * output, output, max(dtype.itemsize for dtype in dtypes), sharding.size("context"))
    return Change(device, "ring attention's keys, values and gradients", max(peaks))


def _in_pipeline(
    profile: Profile, sharding: Sharding, rank: int, gradients: Sequence[Change], device: str, fsdp: Fsdp | None
) -> list[Change]:
    assert sharding.pipeline is not None
    place = coordinate_of(sharding, rank)["pipeline"]
    return pipeline_activity(profile, sharding.pipeline, sharding.size("pipeline"), place, gradients, device, fsdp)


def _pipeline_inputs(profile: Profile, sharding: Sharding, rank: int, device: str) -> list[Change]:
    assert sharding.pipeline is not None
    place = coordinate_of(sharding, rank)["pipeline"]
    return pipeline_inputs(profile, sharding.pipeline, sharding.size("pipeline"), place, device)


def _stepped(held: Sequence[Held], graph: ParamGraph, decisions: Decisions, workload: Training) -> list[Stepped]:
    """What the optimizer steps: a rank's part, without the padding that its gradient has."""
    hidden = hidden_names(graph) if workload.optimizer == "muon" else set()
    found = []
    for each in (each for each in held if each.trains):
        tensor = each.tensor
        whole = tensor.shape if each.divided else None
        trained = Trained(each.device, each.shape, final_dtype(tensor, decisions), tensor.name in hidden, whole)
        found.append(Stepped(trained, _change(each, each.padded * each.itemsize)))
    return found


def rank_parts(graph: ParamGraph, decisions: Decisions, workload: Training, rank: int = 0) -> tuple[Fsdp | None, list[Trained]]:
    """How FSDP2 is applied to what a rank holds, and the parameters that its optimizer steps."""
    held = list(_held(graph, decisions, rank))
    stepped = [each.parameter for each in _stepped(held, graph, decisions, workload)]
    return fsdp_of(graph, decisions, held, computing_device(graph, decisions)), stepped


def weights_of(graph: ParamGraph, decisions: Decisions, rank: int) -> list[Change]:
    """What one rank holds of every tensor while the module runs: what FSDP shards is padded to the first rank's size."""
    return [_change(each, each.padded * each.itemsize + each.quantized) for each in _held(graph, decisions, rank)]


def is_ddp(decisions: Decisions) -> bool:
    """Whether gradients are reduced in buckets, which hold every one of them once more."""
    sharding = decisions.sharding
    return sharding is not None and not sharding.shards and sharding.axis("replicate") is not None


def _change(held: Held, nbytes: int) -> Change:
    return Change(held.device, held.tensor.name, nbytes)


def staged(weights: Sequence[Change]) -> list[Change]:
    """What a checkpoint's pieces take in host memory on their way to another device; what stays there is read in place."""
    away = [change for change in weights if change.device != HOST]
    largest = max(away, key=lambda change: change.nbytes, default=None)
    return [] if largest is None else [Change(HOST, largest.tensor, min(largest.nbytes, READ_BYTES))]


def copied_to_host(changes: Iterable[Change]) -> list[Change]:
    """A copy in host memory of the largest one."""
    largest = max(changes, key=lambda change: change.nbytes, default=None)
    return [] if largest is None else [largest._replace(device=HOST)]


def _held(graph: ParamGraph, decisions: Decisions, rank: int) -> Iterator[Held]:
    """What a rank holds of every tensor, in the order in which they are made: whole ones first."""
    sharding = decisions.sharding or Sharding(axes=(Axis(name="dp_replicate", size=1),))
    parts = LocalParts.of_rank(sharding, graph, rank)
    together = None if decisions.placing is not None else _device_of_all(graph, decisions)
    for made in _made(graph):
        tensor = made.tensor
        if (shape := parts.shape(tensor)) is None:
            continue
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
            yield _on_disk(held)
        else:
            yield _quantized(held, decisions) if decisions.quantizing else held


@dataclass(frozen=True, slots=True)
class _Made:
    """How a tensor is made: bytes of what is there `whole` meanwhile, if it is not made element by element; else, whether it is
    converted while it is drawn.
    """

    tensor: TensorNode
    whole: int | None
    converted: bool


def _made(graph: ParamGraph) -> list[_Made]:
    """Every storage's tensor, in the order in which they are made; worked out once, as it is the same for all decisions."""
    known = kept_with(graph)
    if _Made not in known:
        tensors = {tensor.view.storage: tensor for tensor in reversed(graph.tensors) if not _is_meta(tensor, graph)}
        order = sorted(tensors.values(), key=lambda each: (each.kind == "parameter", _finished(each, graph)))
        known[_Made] = [_making(tensor, graph) for tensor in order]
    found: list[_Made] = known[_Made]
    return found


def _making(tensor: TensorNode, graph: ParamGraph) -> _Made:
    recipe = graph.recipe(tensor.name)
    if all(_is_by_element(op) for op in recipe):
        return _Made(tensor, None, _is_converted(tensor, recipe))
    storages = {view.storage for op in recipe for view in op.targets}
    return _Made(tensor, sum(graph.storages[storage].nbytes for storage in storages), False)


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


def _is_meta(tensor: TensorNode, graph: ParamGraph) -> bool:
    return graph.storages[tensor.view.storage].device == "meta"


def _finished(tensor: TensorNode, graph: ParamGraph) -> int:
    writers = graph.writers.get(tensor.view.storage, ())
    return writers[-1].index if writers else -1


def _working(made: _Made, decisions: Decisions, numel: int) -> int:
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
