"""Sharding: how a module is divided between ranks, as data; torch's FSDP2 and tensor parallelism carry it out.

The ranks form a mesh with named axes. What an axis is for is said by its name (`ROLES`): along a *replicate* axis every rank
holds the same, along a *shard* axis FSDP divides each parameter, along a *tensor* axis single layers are divided by a rule that
also divides their work. FSDP gathers and frees the parameters of one *unit* (a module) at a time.

Along a *pipeline* axis each rank has layers of its own (`stages`), along a *context* axis each has a part of every sequence, and
FSDP divides parameters along it as well. An *expert* axis divides the experts of a layer between ranks that the shard, context
and tensor axes already count: it is another view of the same ranks, and multiplies nothing. All that as torchtitan has it
(`torchtitan/distributed/parallel_dims.py`). A plan says these three, as it does sequence and loss parallelism, and memory is
known of them, activations included; the runtime carries out the first three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, StringConstraints, field_validator

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph
from .kept import kept
from .placing import is_component, owners
from .records import Record, dtype_name, dtype_named

Role = Literal["pipeline", "replicate", "shard", "context", "tensor", "expert"]
ROLES: Mapping[str, Role] = {
    "pp": "pipeline",
    "pipeline": "pipeline",
    "dp_replicate": "replicate",
    "replicate": "replicate",
    "ddp": "replicate",
    "dp": "shard",
    "fsdp": "shard",
    "dp_shard": "shard",
    "shard": "shard",
    "cp": "context",
    "context": "context",
    "tp": "tensor",
    "tensor": "tensor",
    "ep": "expert",
    "expert": "expert",
}
"""What each name of an axis means; torchtitan's, and the usual short ones."""

NEVER_CALLED = ("ModuleList", "ModuleDict", "ParameterList", "ParameterDict")
"""Classes of modules that only hold others."""

LAYERS = "layers"
"""The units where none are named: every layer that repeats."""


class Cut(NamedTuple):
    """A tensor is divided along `dim`, after being taken for `split` pieces that lie one behind the other."""

    dim: int
    split: int = 1


Schedule = Literal["1f1b", "gpipe", "interleaved1f1b"]
"""The orders of forward and backward in a pipeline; torch.distributed.pipelining's `Schedule1F1B`, `ScheduleGPipe` and
`ScheduleInterleaved1F1B`."""

Reshard = bool | int | Mapping[str, bool | int]
"""FSDP2's `reshard_after_forward`: of all units, or of those that patterns match."""

_Pattern = Annotated[str, StringConstraints(min_length=1)]
_Size = Annotated[int, Field(ge=1, le=2**20)]


class Axis(Record):
    """An axis of the mesh: its name and the number of ranks along it."""

    name: str
    size: _Size

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in ROLES:
            raise DecisionError(f"no axis is called {name!r} (known: {', '.join(ROLES)}){nearest(name, ROLES)}")
        return name

    @property
    def role(self) -> Role:
        """What the axis is for."""
        return ROLES[self.name]


class TensorRule(Record):
    """Modules (or parameters) whose names match `pattern` are divided along the tensor axis in the way that `style` says."""

    pattern: _Pattern
    style: _Pattern


class ReshardRule(Record):
    """Units whose names match `pattern` (the empty one: the module as a whole) have their own `reshard_after_forward`."""

    pattern: str
    reshard: bool | int


class Pipeline(Record):
    """How the layers are divided along the pipeline axis, and in which order micro-batches go through them.

    `stages` are the names of each stage's modules (and parameters that are none's), as torchtitan's `module_fqns_per_model_part`
    has them; buffers under none of the names are on every stage. Of `R` ranks the `i`-th has the stages `i`, `i + R`, ...
    A rank's batch is divided into `microbatches`.
    """

    schedule: Schedule
    microbatches: _Size
    stages: Annotated[tuple[tuple[_Pattern, ...], ...], Field(min_length=1)]


class Sharding(Record):
    """Everything that is decided about how a module is divided.

    `units` are patterns of the names of modules that FSDP gathers one at a time; the module as a whole is one besides. `reshard`
    is FSDP2's `reshard_after_forward`, of units that none of `reshard_rules` matches. Parameters are gathered in `compute_dtype`
    and gradients reduced in `reduce_dtype` (None: as they are); with `offload` shards stay in host memory. `engine` says whose
    tensor parallelism the rules are for.
    `experts` are patterns of what the expert axis divides (`experts.py`). With `sequence_parallel`, norms and residuals between
    the layers that the tensor axis divides are divided along the sequence; with `loss_parallel` logits are along the vocabulary.
    """

    axes: Annotated[tuple[Axis, ...], Field(min_length=1)]
    units: tuple[_Pattern, ...] = ()
    tensor: tuple[TensorRule, ...] = ()
    engine: Literal["torch", "transformers"] = "torch"
    reshard: bool | int = True
    compute_dtype: str | None = None
    reduce_dtype: str | None = None
    offload: bool = False
    pipeline: Pipeline | None = None
    experts: tuple[_Pattern, ...] = ()
    sequence_parallel: bool = False
    loss_parallel: bool = False
    reshard_rules: tuple[ReshardRule, ...] = ()

    @field_validator("compute_dtype", "reduce_dtype")
    @classmethod
    def _is_a_dtype(cls, name: str | None) -> str | None:
        if name is not None:
            dtype_named(name)
        return name

    @property
    def ranks(self) -> int:
        """How many ranks the mesh has; those of the expert axis are counted by others."""
        return math.prod(axis.size for axis in self.dense_axes)

    @property
    def dense_axes(self) -> tuple[Axis, ...]:
        """The axes that multiply: all but the expert axis."""
        return tuple(axis for axis in self.axes if axis.role != "expert")

    def axis(self, role: Role) -> Axis | None:
        """The axis of a role."""
        return next((axis for axis in self.axes if axis.role == role), None)

    def size(self, role: Role) -> int:
        """The ranks along the axis of a role; 1 where there is none."""
        axis = self.axis(role)
        return 1 if axis is None else axis.size

    @property
    def shards(self) -> bool:
        """Whether FSDP divides the parameters: along the shard axis, the context axis, or both as one."""
        return self.axis("shard") is not None or self.axis("context") is not None

    @property
    def shard_ranks(self) -> int:
        """Between how many ranks FSDP divides a parameter that is no expert's."""
        return self.size("shard") * self.size("context")

    @property
    def expert_shard_ranks(self) -> int:
        """Between how many ranks FSDP divides what the expert axis has divided: those that hold the same experts."""
        return self.shard_ranks * self.size("tensor") // self.size("expert")

    def describe(self) -> str:
        """The mesh in words: `dp=8 x tp=2`, or `dp_shard=8 x tp=2, ep=4 within`."""
        expert = self.axis("expert")
        dense = " x ".join(f"{axis.name}={axis.size}" for axis in self.dense_axes)
        return dense if expert is None else f"{dense}, {expert.name}={expert.size} within"

    def unit_names(self, graph: ParamGraph) -> list[str]:
        """The modules that are units, inner ones first; the module as a whole, which is one too, is not named.

        Those that hold experts are, where there is an expert axis: their parameters lie between other ranks than the rest.
        """
        apart = self.experts if self.shards and self.size("expert") > 1 else ()
        return list(_unit_names(graph, self.units, apart))

    def reshard_of(self, unit: str) -> bool | int:
        """The `reshard_after_forward` of a unit, by its name; the first rule that matches wins."""
        rule = self.reshard_rule(unit)
        return self.reshard if rule is None else rule.reshard

    def reshard_rule(self, unit: str) -> ReshardRule | None:
        """The rule that decides about a unit."""
        return next((rule for rule in self.reshard_rules if rule.pattern == unit or matches(rule.pattern, unit)), None)

    def cuts(self, graph: ParamGraph) -> Mapping[str, Cut]:
        """How the tensor axis divides each parameter that it divides, by the parameter's name, every one of a tied one's."""
        return cuts_of(graph, self.tensor)

    def styles(self, graph: ParamGraph) -> Mapping[str, str]:
        """The style of every parameter and module that a rule matches: a module's parameters come before it, with its style."""
        return _styles_of(graph, self.tensor)


def sharding(
    axes: Mapping[str, int],
    graph: ParamGraph,
    units: str | Sequence[str] = LAYERS,
    tensor: Mapping[str, str] | None = None,
    engine: Literal["torch", "transformers"] = "torch",
    reshard: Reshard = True,
    compute_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    offload: bool = False,
    schedule: Schedule | None = None,
    microbatches: int | None = None,
    stages: int | Sequence[int] | Sequence[Sequence[str]] | None = None,
    experts: Sequence[str] | None = None,
    sequence_parallel: bool = False,
    loss_parallel: bool = False,
) -> Sharding:
    """The record of what the user asks for; raises `DecisionError` where it cannot be, or does not fit `graph`."""
    from .check_sharding import check_axes, check_sharding
    from .experts import found_experts
    from .stages import pipeline_of

    check_axes(axes)
    found = tuple(Axis(name=name, size=size) for name, size in axes.items())
    by_role = {axis.role: axis.size for axis in found}
    default, rules = _resharding(reshard)
    made = Sharding(
        axes=found,
        units=_unit_patterns(units, graph, shards="shard" in by_role or "context" in by_role),
        tensor=tuple(TensorRule(pattern=pattern, style=style) for pattern, style in (tensor or {}).items()),
        engine=engine,
        reshard=default,
        reshard_rules=rules,
        compute_dtype=_floating(compute_dtype),
        reduce_dtype=_floating(reduce_dtype),
        offload=offload,
        pipeline=pipeline_of(graph, by_role.get("pipeline"), schedule, microbatches, stages),
        experts=found_experts(graph) if experts is None and "expert" in by_role else tuple(experts or ()),
        sequence_parallel=sequence_parallel,
        loss_parallel=loss_parallel,
    )
    check_sharding(made, graph)
    return made


def _unit_patterns(units: str | Sequence[str], graph: ParamGraph, shards: bool) -> tuple[str, ...]:
    """What is asked for; every layer that repeats where nothing else is, and none of them where nothing is sharded."""
    if units == LAYERS and not shards:
        return ()
    wanted = [units] if isinstance(units, str) else list(units)
    return tuple(repeated_layers(graph) if wanted == [LAYERS] else wanted)


def _resharding(reshard: Reshard) -> tuple[bool | int, tuple[ReshardRule, ...]]:
    """What holds for all units, `"*"` in a mapping, and the rules before it."""
    if not isinstance(reshard, Mapping):
        return reshard, ()
    for pattern, after in reshard.items():
        if not isinstance(pattern, str) or not isinstance(after, int):
            raise DecisionError(
                f"reshard={{{pattern!r}: {after!r}}} is no pattern of units with True, False or a number of ranks; say "
                'reshard={"layers.0-3": False, "*": True}'
            )
    patterns = list(reshard)
    if "*" in patterns[:-1]:
        raise DecisionError(f'reshard={dict(reshard)!r}: "*" is every unit, so that nothing after it counts; put it last')
    rules = (ReshardRule(pattern=pattern, reshard=after) for pattern, after in reshard.items() if pattern != "*")
    return reshard.get("*", True), tuple(rules)


def _floating(dtype: torch.dtype | None) -> str | None:
    """The name of a dtype that FSDP computes or reduces in."""
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise DecisionError(f"gradients and parameters are of floating point, which {dtype!r} is not; give torch.bfloat16, say")
    return dtype_name(dtype)


# -- what is said by name ------------------------------------------------------------------------------------------------


@kept
def _unit_names(graph: ParamGraph, patterns: tuple[str, ...], apart: tuple[str, ...]) -> tuple[str, ...]:
    from .experts import expert_modules

    experts = set(expert_modules(apart, graph))
    named = [module.name for module in graph.modules if module.name]
    names = [name for name in named if name in experts or any(matches(pattern, name) for pattern in patterns)]
    return tuple(sorted(names, key=lambda name: -name.count(".")))


@kept
def cuts_of(graph: ParamGraph, rules: tuple[TensorRule, ...]) -> Mapping[str, Cut]:
    """How rules divide each parameter that they divide, by every one of its names."""
    found: dict[str, Cut] = {}
    for name, style in _styles_of(graph, rules).items():
        node = graph.by_name.get(name)
        cut = None if node is None else cut_of(style, name, len(node.shape))
        if cut is not None:
            found[name] = cut
    return found


@kept
def _styles_of(graph: ParamGraph, rules: tuple[TensorRule, ...]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    own = parameters_by_module(graph) if rules else {}
    for module in graph.modules if rules else ():
        style = _style_of(module.name, rules)
        for name in own.get(module.name, ()):
            if (each := _style_of(name, rules) or style) is not None:
                found[name] = each
        if style is not None:
            found[module.name] = style
    return found


def _style_of(name: str, rules: Sequence[TensorRule]) -> str | None:
    return next((rule.style for rule in rules if matches(rule.pattern, name)), None)


# -- names --------------------------------------------------------------------------------------------------------------


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches a name, component by component: `layers.*` is every layer, and nothing inside one.

    `layers.0-15` are those with the numbers from 0 to 15. None matches the module as a whole, whose name is empty.

    >>> matches("layers.*.mlp", "layers.3.mlp"), matches("layers.*", "layers.3.mlp")
    (True, False)
    """
    parts, wanted = name.split("."), pattern.split(".")
    return bool(name) and len(parts) == len(wanted) and all(map(is_component, wanted, parts))


@kept
def parameters_by_module(graph: ParamGraph) -> Mapping[str, Sequence[str]]:
    """The names of every module's own parameters, by the first of its names: a tied parameter is there once for each."""
    modules = {name: module.name for module in graph.modules for name in module.names}
    found: dict[str, dict[str, None]] = {}
    for tensor in graph.parameters:
        for name in tensor.names:
            owner, _, key = name.rpartition(".")
            if owner in modules:  # else an attribute's name: `cells[0]`
                first = modules[owner]
                found.setdefault(first, {})[f"{first}.{key}" if first else key] = None
    return {module: list(names) for module, names in found.items()}


@kept
def holding_parameters(graph: ParamGraph) -> frozenset[str]:
    """The modules that hold parameters, their own or inner modules'."""
    return frozenset(owner for name in parameters_by_module(graph) for owner in (*owners(name), name))


@kept
def repeated_layers(graph: ParamGraph) -> tuple[str, ...]:
    """A pattern for every list of layers: modules of one class, numbered from 0, that hold parameters; inner lists left out.

    Lists in a list are no layers, as they are never called; what they hold may be.
    """
    lists: dict[str, dict[str, list[int]]] = {}
    holding = holding_parameters(graph)
    for module in graph.modules:
        parent, _, number = module.name.rpartition(".")
        if number.isdecimal() and module.name in holding and module.type not in NEVER_CALLED:
            lists.setdefault(parent, {}).setdefault(module.type, []).append(int(number))
    repeated = [parent for parent, classes in lists.items() if max(map(len, classes.values())) >= 2]
    if "" in repeated:
        return ("*",)
    return tuple(f"{parent}.*" for parent in repeated if not any(parent.startswith(f"{other}.") for other in repeated))


# -- styles of tensor parallelism ---------------------------------------------------------------------------------------

TORCH_STYLES = ("colwise", "colwise_gather_output", "embedding_colwise", "rowwise", "rowwise_split_input", "embedding_rowwise")
"""The styles that torch's `parallelize_module` carries out, under the names that transformers gives them."""


def cut_of(style: str, name: str, dims: int) -> Cut | None:
    """How a style divides the parameter called `name`; None where every rank holds all of it.

    As transformers/distributed/tensor_parallel.py and torch/distributed/tensor/parallel/style.py have it.
    """
    bias = dims == 1
    if style in ("colwise", "colwise_gather_output", "colwise_rep"):
        return Cut(0 if bias else dims - 2)
    if style in ("rowwise", "rowwise_split_input", "rowwise_rep"):
        return None if bias else Cut(dims - 1)
    if style == "embedding_rowwise":
        return Cut(0)
    if style == "embedding_colwise":
        return Cut(dims - 1)
    if style == "packed_colwise":
        return Cut(0) if bias else Cut(dims - 2, 2)
    if style == "packed_rowwise":
        return None if bias else Cut(dims - 1, 2)
    return None
