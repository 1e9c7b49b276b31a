"""The doors of `plan.shard`: what cannot be divided that way is refused, with the names and the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .experts import check_experts, experts_of
from .kept import kept
from .sharding import NEVER_CALLED, ROLES, TORCH_STYLES, Sharding, TensorRule, cut_of, matches, parameters_by_module
from .stages import check_pipeline

_ORDER = ("pipeline", "replicate", "shard", "context", "tensor")


def check_axes(axes: Any) -> None:
    """Raise `DecisionError` for axes that no mesh has."""
    if not isinstance(axes, Mapping) or not axes:
        raise DecisionError(f'axes={axes!r} names no axis; give names and sizes, such as {{"dp": 8}} or {{"dp": 4, "tp": 2}}')
    for name, size in axes.items():
        if name not in ROLES:
            raise DecisionError(f"no axis is called {name!r} (known: {', '.join(ROLES)}){nearest(str(name), ROLES)}")
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise DecisionError(f"the axis {name!r} has the size {size!r}; it counts ranks, from 1 up")
    roles = [ROLES[name] for name in axes]
    twice = next((role for role in roles if roles.count(role) > 1), None)
    if twice is not None:
        same = ", ".join(each for each in axes if ROLES[each] == twice)
        raise DecisionError(f"{same} mean the same, to {twice}; keep one of them")
    if "replicate" in roles and "tensor" in roles and not {"shard", "context"} & set(roles):
        replicate, tensor = (next(name for name in axes if ROLES[name] == role) for role in ("replicate", "tensor"))
        raise DecisionError(
            "torch has no data parallelism without sharding beside tensor parallelism; say "
            f'{{"{replicate}": {axes[replicate]}, "dp_shard": 1, "{tensor}": {axes[tensor]}}}'
        )
    dense = [name for name in axes if ROLES[name] != "expert"]
    if dense != (wanted := sorted(dense, key=lambda name: _ORDER.index(ROLES[name]))):
        order = ", ".join(wanted)
        raise DecisionError(f"the axes are in the order {', '.join(dense)}; torch's mesh wants the innermost last: {order}")
    _check_expert_axis(axes)


def _check_expert_axis(axes: Mapping[str, int]) -> None:
    """The expert axis takes its ranks from the shard, context and tensor axes (torchtitan's `ParallelDims._validate`)."""
    expert = next((name for name in axes if ROLES[name] == "expert"), None)
    others = [name for name in axes if ROLES[name] in ("shard", "context", "tensor")]
    ranks = math.prod(axes[name] for name in others)
    if expert is not None and ranks % axes[expert]:
        among = f"{' * '.join(others)} = {ranks}" if others else "1, as there is none"
        raise DecisionError(
            f"{expert}={axes[expert]} takes its ranks from the shard, context and tensor axes, and does not divide {among}; "
            f'give a multiple, such as {{"dp_shard": {axes[expert]}, "{expert}": {axes[expert]}}}'
        )


def check_sharding(sharding: Sharding, graph: ParamGraph) -> None:
    """Raise `DecisionError` where a sharding does not fit the module that `graph` describes."""
    check_axes({axis.name: axis.size for axis in sharding.axes})
    _check_module(graph)
    _check_units(sharding, graph)
    _check_rules(sharding, graph)
    _check_ties(sharding, graph)
    _check_pipeline(sharding, graph)
    _check_experts(sharding, graph)
    _check_tensor_options(sharding)
    if sharding.shards:
        _check_fsdp(sharding, graph)


def _check_pipeline(sharding: Sharding, graph: ParamGraph) -> None:
    axis = sharding.axis("pipeline")
    if (axis is None) != (sharding.pipeline is None):
        raise DecisionError(f"{sharding.describe()} and pipeline={sharding.pipeline} do not belong together; shard once more")
    if axis is not None and sharding.pipeline is not None:
        check_pipeline(sharding.pipeline, axis.size, graph)


def _check_experts(sharding: Sharding, graph: ParamGraph) -> None:
    axis = sharding.axis("expert")
    if axis is None:
        if sharding.experts:
            raise DecisionError(f'experts={list(sharding.experts)} are for the axis "ep", which {sharding.describe()} has not')
        return
    if not sharding.experts:
        raise DecisionError(f'{axis.name}={axis.size} divides experts, and none are named: experts=["layers.*.mlp.experts"]')
    check_experts(sharding.experts, axis.size, graph)
    experts = experts_of(sharding.experts, graph)
    both = next((name for name in sharding.cuts(graph) if name in experts), None)
    if both is not None and sharding.engine == "torch":
        raise DecisionError(
            f"{both} is an expert's, which {axis.name}={axis.size} divides with the ranks of the tensor axis; leave out its rule"
        )


def _check_tensor_options(sharding: Sharding) -> None:
    given = [name for name in ("sequence_parallel", "loss_parallel") if getattr(sharding, name)]
    if given and sharding.axis("tensor") is None:
        raise DecisionError(f'{given[0]}=True goes with tensor parallelism, and {sharding.describe()} has no such axis; add "tp"')


@kept
def _check_module(graph: ParamGraph) -> None:
    if not any(module.name == "" for module in graph.modules):
        roots = ", ".join(sorted({module.name.partition(".")[0] for module in graph.modules}))
        raise DecisionError(f"the constructor returns several modules ({roots}); trace and shard each of them by itself")
    opaque = next((tensor for tensor in graph.parameters if tensor.opaque), None)
    if opaque is not None:
        raise DecisionError(f"{opaque.name} is a {opaque.type}, which the constructor has placed itself; leave plan.shard out")


# -- units --------------------------------------------------------------------------------------------------------------


def _check_units(sharding: Sharding, graph: ParamGraph) -> None:
    if sharding.reshard_rules and not sharding.shards:
        patterns = [rule.pattern for rule in sharding.reshard_rules]
        raise DecisionError(f"reshard of {patterns} is for FSDP, and {sharding.describe()} has no axis to shard along")
    if sharding.units and not sharding.shards:
        raise DecisionError(f"units={list(sharding.units)} are for FSDP, and {sharding.describe()} has no axis to shard along")
    _check_patterns(graph, sharding.units)


@kept
def _check_patterns(graph: ParamGraph, units: tuple[str, ...]) -> None:
    names = {module.name: module.type for module in graph.modules}
    holding = parameters_by_module(graph)
    for pattern in units:
        found = [name for name in names if matches(pattern, name)]
        if not found:
            raise DecisionError(f"the unit {pattern!r} matches no module{nearest(pattern, names)}")
        for name in found:
            if names[name] in NEVER_CALLED:
                raise DecisionError(f"the unit {name} is a {names[name]}, which is never called itself: say {pattern + '.*'!r}")
        if not any(each == name or each.startswith(f"{name}.") for name in found for each in holding):
            raise DecisionError(f"the unit {pattern!r} matches {found[0]}, which holds no parameters")


def _unit_of(name: str, units: list[str]) -> str:
    """The innermost unit that holds a parameter; the module as a whole is the empty string."""
    return next((unit for unit in units if name.startswith(f"{unit}.")), "")


def _check_ties(sharding: Sharding, graph: ParamGraph) -> None:
    units, cuts = sharding.unit_names(graph), sharding.cuts(graph)
    for tensor in graph.ties:
        if tensor.kind != "parameter":
            continue
        names = [name for name in tensor.names if "[" not in name]
        homes = {_unit_of(name, units) for name in names}
        if len(homes) > 1:
            raise DecisionError(
                f"{' and '.join(names)} are one tied parameter, and lie in different units ({_named_units(homes)}), each of "
                "which would gather and update a copy of its own: put them into one, by leaving out the inner one"
            )
        if len({cuts.get(name) for name in names}) > 1:
            each = ", ".join(f"{name} {_cut_text(cuts.get(name))}" for name in names)
            raise DecisionError(f"one tied parameter cannot be divided in two ways: {each}; give its names rules that agree")


def _named_units(homes: set[str]) -> str:
    return ", ".join(sorted(home or "the module as a whole" for home in homes))


def _cut_text(cut: Any) -> str:
    return "not at all" if cut is None else f"along dim {cut.dim}"


def _check_fsdp(sharding: Sharding, graph: ParamGraph) -> None:
    _check_reshard(sharding, graph)
    _check_dims(graph)


@kept
def _check_dims(graph: ParamGraph) -> None:
    for tensor in graph.parameters:
        if not tensor.shape:
            raise DecisionError(
                f"{tensor.name} is a single number without dims, which FSDP does not shard; give it the shape [1]"
            )
        if not tensor.view.is_contiguous:
            raise DecisionError(f"{tensor.name} does not lie in memory in the order of its dims, which FSDP does not shard")


def _check_reshard(sharding: Sharding, graph: ParamGraph) -> None:
    size = sharding.shard_ranks
    for reshard in (sharding.reshard, *(rule.reshard for rule in sharding.reshard_rules)):
        if not isinstance(reshard, bool) and (reshard < 1 or size % reshard):
            raise DecisionError(
                f"reshard={reshard} ranks cannot hold a unit between them: {size} ranks do not divide into such groups"
            )
    units = ["", *sharding.unit_names(graph)]
    deciding = [sharding.reshard_rule(unit) for unit in units]
    for rule in sharding.reshard_rules:
        if not any(found is rule for found in deciding):
            raise DecisionError(_no_unit(rule.pattern, sharding, units))


def _no_unit(pattern: str, sharding: Sharding, units: list[str]) -> str:
    found = next((unit for unit in units if matches(pattern, unit)), None)
    earlier = None if found is None else sharding.reshard_rule(found)
    if earlier is not None:
        return f"reshard: all that {pattern!r} matches is decided by {earlier.pattern!r} before it; put it first, or leave it out"
    return f"reshard: the pattern {pattern!r} matches no unit{nearest(pattern, units)}"


# -- tensor parallelism -------------------------------------------------------------------------------------------------


def _check_rules(sharding: Sharding, graph: ParamGraph) -> None:
    axis = sharding.axis("tensor")
    if axis is None and sharding.tensor:
        raise DecisionError(f'tensor= gives rules, and {sharding.describe()} has no tensor axis; add "tp" to the axes')
    if axis is not None and not sharding.tensor and axis.size > 1:
        raise DecisionError(f'the axis {axis.name}={axis.size} needs rules: tensor={{"layers.*.up": "colwise", ...}}, or "auto"')
    if sharding.engine == "torch":  # transformers' plan of a class of models names layers that some of them do not have
        _check_rules_of_torch(graph, sharding.tensor)
    if axis is not None:
        _check_divisible(sharding, graph, axis.size)


@kept
def _check_rules_of_torch(graph: ParamGraph, rules: tuple[TensorRule, ...]) -> None:
    modules = [module.name for module in graph.modules]
    own = parameters_by_module(graph)
    for rule in rules:
        if rule.style not in TORCH_STYLES:
            raise DecisionError(
                f"no style is called {rule.style!r} (known: {', '.join(TORCH_STYLES)}){nearest(rule.style, TORCH_STYLES)}; "
                "for others shard plan.meta_module() yourself"
            )
        found = [name for name in modules if matches(rule.pattern, name)]
        if not found:
            raise DecisionError(f"the rule {rule.pattern!r} matches no module{nearest(rule.pattern, modules)}")
        bare = next((name for name in found if not own.get(name)), None)
        if bare is not None:
            raise DecisionError(f"the rule {rule.pattern!r} matches {bare}, which holds no parameters of its own")


def _check_divisible(sharding: Sharding, graph: ParamGraph, size: int) -> None:
    for name, style in sharding.styles(graph).items():
        node: TensorNode | None = graph.by_name.get(name)
        cut = None if node is None else cut_of(style, name, len(node.shape))
        if node is not None and cut is not None and node.shape[cut.dim] % (size * cut.split):
            raise DecisionError(
                f"{name} has {node.shape[cut.dim]} elements along dim {cut.dim}, which {style!r} cannot divide between "
                f"{size} ranks"
            )
