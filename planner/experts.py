"""The experts of a layer: what the expert axis divides, found by its structure or named by the user.

Experts are either *stacked*, parameters whose first dim counts them (`[experts, ...]`, as in transformers and torchtitan), which
are divided along that dim; or *listed*, modules of a `ModuleList`, which are whole on one rank each. The first ranks have the
first experts, as with `Shard(0)`. No names of architectures: a layer's experts are told by a router beside them, a matrix whose
rows are as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .kept import kept
from .sharding import holding_parameters, matches, parameters_by_module, repeated_layers


class Expert(NamedTuple):
    """A tensor is the `number`-th expert's of `total`; or has all of them along its first dim (`number` is None)."""

    total: int
    number: int | None = None


def experts_of(patterns: Sequence[str], graph: ParamGraph) -> Mapping[str, Expert]:
    """What each parameter under the patterns is of, by each of its names; raises `DecisionError` where that cannot be told.

    A pattern names stacked parameters, the module that has them, the list of experts, or each of its modules.
    """
    return _experts(graph, tuple(patterns))


@kept
def _experts(graph: ParamGraph, patterns: tuple[str, ...]) -> Mapping[str, Expert]:
    found: dict[str, Expert] = {}
    modules = [module.name for module in graph.modules]
    for pattern in patterns:
        names = [name for name in (*modules, *_parameters(graph)) if matches(pattern, name)]
        if not names:
            raise DecisionError(f"the experts {pattern!r} match no module{nearest(pattern, modules)}")
        for name in names:
            found |= _experts_under(name, graph)
    return found


def _experts_under(name: str, graph: ParamGraph) -> dict[str, Expert]:
    parameters = _parameters(graph)
    if name in parameters:
        return {name: Expert(_stacked(name, parameters[name]))}
    parent, _, number = name.rpartition(".")
    lists = _lists(graph)
    if name in lists:
        count = len(lists[name])
        return {each: Expert(count, number) for number in range(count) for each in _under(f"{name}.{number}", parameters)}
    if number.isdecimal() and parent in lists and int(number) < len(lists[parent]):
        return dict.fromkeys(_under(name, parameters), Expert(len(lists[parent]), int(number)))
    inner = _under(name, parameters)
    counts = {_stacked(each, parameters[each]) for each in inner}
    if len(counts) != 1:
        shapes = ", ".join(f"{each} {list(parameters[each].shape)}" for each in inner[:3])
        raise DecisionError(f"{name} is to hold experts, and its parameters do not have them along dim 0: {shapes or 'none'}")
    return dict.fromkeys(inner, Expert(counts.pop()))


def expert_modules(patterns: Sequence[str], graph: ParamGraph) -> list[str]:
    """The modules that hold the experts and are called: what FSDP gathers by itself, as it is between other ranks."""
    modules, parameters, lists = {module.name for module in graph.modules}, _parameters(graph), _lists(graph)
    found: dict[str, None] = {}
    for name in (*modules, *parameters):
        if any(matches(pattern, name) for pattern in patterns):
            found |= dict.fromkeys(lists.get(name, [name if name in modules else name.rpartition(".")[0]]))
    return list(found)


def homes_of_experts(patterns: Sequence[str], graph: ParamGraph) -> list[str]:
    """The modules whose code calls the experts: those around them, or around the list that they are in."""
    lists = _lists(graph)
    found: dict[str, None] = {}
    for name in expert_modules(patterns, graph):
        around = name.rpartition(".")[0]
        found[around.rpartition(".")[0] if around in lists else around] = None
    return list(found)


def _stacked(name: str, tensor: TensorNode) -> int:
    if len(tensor.shape) < 2:
        raise DecisionError(f"{name} has the shape {list(tensor.shape)}, so that it does not hold experts along dim 0")
    return tensor.shape[0]


def _parameters(graph: ParamGraph) -> dict[str, TensorNode]:
    return {name: tensor for tensor in graph.parameters for name in tensor.names}


def _under(name: str, parameters: Mapping[str, TensorNode]) -> list[str]:
    return [each for each in parameters if each.startswith(f"{name}.")]


def _lists(graph: ParamGraph) -> dict[str, list[str]]:
    """Every list of modules of one class with parameters, numbered from 0, as the names of its modules."""
    types = {name: module.type for module in graph.modules for name in module.names}
    holding = holding_parameters(graph)
    found: dict[str, list[str]] = {}
    for name in types:
        parent, _, number = name.rpartition(".")
        if parent and number.isdecimal() and name in holding:
            found.setdefault(parent, []).append(name)
    return {
        parent: names
        for parent, names in found.items()
        if len({types[name] for name in names}) == 1 and all(f"{parent}.{number}" in names for number in range(len(names)))
    }


# -- finding them -------------------------------------------------------------------------------------------------------


def found_experts(graph: ParamGraph) -> tuple[str, ...]:
    """Patterns for the experts of every layer that repeats, by their structure; raises `DecisionError` where there are none."""
    layers = repeated_layers(graph)
    inside = [module.name for module in graph.modules if any(matches(layer, module.name) for layer in layers)]
    found = dict.fromkeys(_as_pattern(name) for name in _candidates(graph) if any(name.startswith(f"{at}.") for at in inside))
    if not found:
        raise DecisionError(
            "no layer has experts that can be told by their structure (equal modules in a list, or parameters [experts, ...], "
            'beside a router with as many rows), which the axis "ep" divides; name them: experts=["layers.*.mlp.experts"]'
        )
    return tuple(found)


def _candidates(graph: ParamGraph) -> Iterator[str]:
    parameters = _parameters(graph)
    for name, modules in _lists(graph).items():
        shapes = {tuple(parameters[each].shape for each in _under(module, parameters)) for module in modules}
        if len(shapes) == 1 and len(modules) > 1 and _has_router(name, len(modules), _under(name, parameters), parameters):
            yield name
    for module, names in parameters_by_module(graph).items():
        stacks = [parameters[name].shape for name in names if name in parameters and len(parameters[name].shape) == 3]
        counts = {shape[0] for shape in stacks}
        if len(counts) == 1 and _are_stacks(stacks, count := counts.pop()) and _has_router(module, count, names, parameters):
            yield from (name for name in names if name in parameters and _counts(parameters[name], count))


def _are_stacks(shapes: Sequence[tuple[int, ...]], count: int) -> bool:
    """Whether they are matrices, one for each of several experts, and no kernels of convolutions, which are small instead."""
    return 1 < count <= min(size for shape in shapes for size in shape[1:])


def _counts(tensor: TensorNode, count: int) -> bool:
    return len(tensor.shape) in (2, 3) and tensor.shape[0] == count


def _has_router(name: str, count: int, own: Sequence[str], parameters: Mapping[str, TensorNode]) -> bool:
    """Whether a matrix with a row for every expert is beside the experts' `own` parameters."""
    beside = set(_under(name.rpartition(".")[0], parameters)) - set(own)
    return any(parameters[each].shape[:1] == (count,) and len(parameters[each].shape) == 2 for each in beside)


def _as_pattern(name: str) -> str:
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


# -- the doors ----------------------------------------------------------------------------------------------------------


def check_experts(patterns: Sequence[str], size: int, graph: ParamGraph) -> None:
    """Raise `DecisionError` where the expert axis cannot divide them."""
    for name, expert in experts_of(patterns, graph).items():
        if expert.total % size:
            raise DecisionError(f"{name} is one of {expert.total} experts, which {size} ranks cannot divide between them")
