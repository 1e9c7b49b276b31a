"""The stages of a pipeline: which modules each holds, and the plan's record of it.

A stage is a contiguous range of the layers of one list; what the module has before that list is on the first stage, what it has
after it on the last. Layers are divided by count, the first stages having one more where they do not divide: torchtitan's
`_generate_llm_fqn_per_model_part` (`torchtitan/distributed/pipeline_parallel.py`) with its two weights 0. Its default takes the
embedding and the head for a layer each; `counts_of(layers, stages, 1, 1)` gives those numbers, for `plan.shard(stages=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .kept import kept
from .placing import owners
from .sharding import Pipeline, Schedule, holding_parameters, matches, parameters_by_module, repeated_layers

PER_RANK = {"1f1b": 1, "gpipe": 1, "interleaved1f1b": 2}
"""Stages of a rank where nothing is said: torchtitan's `_get_pipeline_metadata`."""


def pipeline_of(
    graph: ParamGraph,
    ranks: int | None,
    schedule: Schedule | None,
    microbatches: int | None,
    stages: int | Sequence[int] | Sequence[Sequence[str]] | None,
) -> Pipeline | None:
    """The pipeline over `ranks` ranks that the user asks for, None without such an axis; raises `DecisionError`."""
    if ranks is None:
        given = {"schedule": schedule, "microbatches": microbatches, "stages": stages}
        name = next((name for name, value in given.items() if value is not None), None)
        if name is not None:
            raise DecisionError(f'{name}={given[name]!r} is for a pipeline, and there is no such axis; add "pp" to the axes')
        return None
    chosen = schedule or "1f1b"
    if chosen not in PER_RANK:
        raise DecisionError(f"no schedule is called {chosen!r} (known: {', '.join(PER_RANK)}){nearest(str(chosen), PER_RANK)}")
    for what, number in (("microbatches", microbatches), ("stages", stages if isinstance(stages, int) else None)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise DecisionError(f"{what} is {number!r}; it counts from 1 up")
    names = stage_names(graph, ranks * PER_RANK[chosen] if stages is None else stages)
    return Pipeline(schedule=chosen, microbatches=microbatches or len(names), stages=names)


def stage_names(graph: ParamGraph, stages: int | Sequence[int] | Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """The names of each stage's modules: so many stages, so many layers each, or what the user names.

    Raises `DecisionError` where the layers of one list cannot be divided like that.
    """
    if isinstance(stages, int):
        layers = layers_of(graph)
        return _names(graph, layers, counts_of(len(layers), stages))
    given = list(stages)
    if given and all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in given):
        layers, counts = layers_of(graph), [int(str(count)) for count in given]
        if sum(counts) != len(layers):
            raise DecisionError(f"stages={counts} are {sum(counts)} layers, and there are {len(layers)} ({layers[0]}, ...)")
        return _names(graph, layers, counts)
    if given and all(isinstance(names, list | tuple) and all(isinstance(name, str) for name in names) for names in given):
        return tuple(tuple(str(name) for name in names) for names in given if isinstance(names, list | tuple))
    raise DecisionError(f"stages={stages!r} is neither a number of stages, nor each one's number of layers, nor each one's names")


def layers_of(graph: ParamGraph) -> list[str]:
    """The names of the layers that a pipeline divides, in order; raises `DecisionError` unless they are in one list."""
    lists = repeated_layers(graph)
    if len(lists) != 1:
        found = f"lists of layers ({', '.join(lists)})" if lists else "no layers that repeat"
        raise DecisionError(
            f"a pipeline divides the layers of one list, and there are {len(lists) if lists else ''}{' ' * bool(lists)}{found}: "
            'name what each stage holds, as in stages=[["embed", "layers.0"], ["layers.1", "norm", "head"]]'
        )
    return sorted({each.name for each in graph.modules if matches(lists[0], each.name)} & holding_parameters(graph), key=_number)


def _number(name: str) -> int:
    number = name.rpartition(".")[2]
    return int(number) if number.isdecimal() else -1


def counts_of(layers: int, stages: int, first_less: int = 0, last_less: int = 0) -> list[int]:
    """How many of `layers` layers each of `stages` stages has, the first and last so many less than their share.

    Raises `DecisionError` where there are more stages than layers.

    >>> counts_of(10, 4), counts_of(32, 4, 1, 1)
    ([3, 3, 2, 2], [8, 9, 8, 7])
    """
    share, more = divmod(layers + first_less + last_less, stages)
    if share < max(1, first_less, last_less):
        raise DecisionError(f"{layers} layers cannot be divided into {stages} stages; take fewer, or name what each stage holds")
    counts = [share + (stage < more) for stage in range(stages)]
    counts[0] -= first_less
    counts[-1] -= last_less
    return counts


def _names(graph: ParamGraph, layers: Sequence[str], counts: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    before, after = _around(graph, layers)
    ends = [sum(counts[: number + 1]) for number in range(len(counts))]
    found = [list(layers[end - count : end]) for count, end in zip(counts, ends, strict=True)]
    found[0][:0] = before
    found[-1] += after
    return tuple(map(tuple, found))


def _around(graph: ParamGraph, layers: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules before and after the list of layers, as they are registered, that hold parameters; and parameters there.

    Of what holds the list only the parts are named.
    """
    place = {module.name: number for number, module in enumerate(graph.modules)}
    holding, around = holding_parameters(graph), set(owners(layers[0]))
    names: dict[str, int] = {}
    for module in graph.modules:
        if module.name and module.name in holding - around - set(layers) and _parent(module.name) in around:
            names[module.name] = place[module.name]
    for owner in sorted(around & set(place), key=lambda name: place[name]):
        names |= dict.fromkeys(parameters_by_module(graph).get(owner, ()), place[owner])
    first = place[layers[0]]
    return [name for name, at in names.items() if at < first], [name for name, at in names.items() if at > first]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


# -- what is on a stage -------------------------------------------------------------------------------------------------


def stages_of(tensor: TensorNode, pipeline: Pipeline) -> tuple[int, ...]:
    """The stages that hold a tensor: those that any of its names is under; all of them for a buffer that is under none."""
    found = tuple(number for number, names in enumerate(pipeline.stages) if any(is_under(each, names) for each in tensor.names))
    return found or (tuple(range(len(pipeline.stages))) if tensor.kind != "parameter" else ())


@kept
def stages_by_name(graph: ParamGraph, stages: tuple[tuple[str, ...], ...]) -> Mapping[str, tuple[int, ...]]:
    """The same for every tensor of a graph, by the first of its names."""
    homes: dict[str, set[int]] = {}
    for number, names in enumerate(stages):
        for name in names:
            homes.setdefault(name, set()).add(number)
    everywhere = tuple(range(len(stages)))
    found = {}
    for tensor in graph.tensors:
        over = (homes.get(name, ()) for each in tensor.names for name in _at_and_above(each))
        on = tuple(sorted({number for numbers in over for number in numbers}))
        found[tensor.name] = on or (everywhere if tensor.kind != "parameter" else ())
    return found


def _at_and_above(tensor: str) -> Iterator[str]:
    """A tensor's name, and those that it may be under (`is_under`)."""
    yield tensor
    yield from (tensor[:at] for at, letter in enumerate(tensor) if letter in ".[")


def is_under(tensor: str, names: Sequence[str]) -> bool:
    """Whether one of the names is the tensor's, or of a module that it is in.

    >>> is_under("layers.1.up.weight", ["layers.1"]), is_under("layers.10.up.weight", ["layers.1"])
    (True, False)
    """
    return any(tensor == name or tensor.startswith((f"{name}.", f"{name}[")) for name in names)


def check_pipeline(pipeline: Pipeline, ranks: int, graph: ParamGraph) -> None:
    """Raise `DecisionError` where the stages do not fit the axis, the schedule or the module."""
    stages, microbatches = len(pipeline.stages), pipeline.microbatches
    one = pipeline.schedule != "interleaved1f1b"
    if stages % ranks or (one and stages != ranks):
        wants = f"{ranks}" if one else f"a multiple of {ranks}"
        raise DecisionError(f"there are {stages} stages, and {pipeline.schedule} over {ranks} ranks takes {wants}")
    if pipeline.schedule == "1f1b" and microbatches < stages:
        raise DecisionError(f"microbatches={microbatches} are fewer than the {stages} stages, which torch's 1f1b refuses")
    if not one and microbatches % (rounds := max(1, microbatches // ranks)):
        raise DecisionError(f"microbatches={microbatches} do not divide into {rounds} rounds, as interleaved1f1b wants")
    _check_names(pipeline, graph)


def _check_names(pipeline: Pipeline, graph: ParamGraph) -> None:
    known = dict.fromkeys(name for module in graph.modules for name in module.names if name)
    known |= dict.fromkeys(name for tensor in graph.tensors for name in tensor.names)
    seen: dict[str, int] = {}
    for number, names in enumerate(pipeline.stages):
        for name in names:
            if name not in known:
                raise DecisionError(f"stage {number} names {name!r}, and there is no such module{nearest(name, known)}")
            if name in seen:
                raise DecisionError(f"{name} is on stage {seen[name]} and on stage {number}; name it once")
            seen[name] = number
    on = stages_by_name(graph, pipeline.stages)
    missing = [tensor.name for tensor in graph.parameters if not on[tensor.name]]
    if missing:
        raise DecisionError(f"{missing[0]} is on no stage ({len(missing)} such parameters): name its module on one of them")


def tied_between(pipeline: Pipeline, graph: ParamGraph) -> Iterator[tuple[TensorNode, tuple[int, ...]]]:
    """The parameters that several stages hold, tied as they are, and those stages."""
    for tensor in graph.ties:
        if tensor.kind == "parameter" and len(stages := stages_of(tensor, pipeline)) > 1:
            yield tensor, stages


assert set(PER_RANK) == set(get_args(Schedule))
