"""What two plans of one constructor decide differently, by what that means for its modules, however it was written."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .fold import fold_names
from .forecast import Workload
from .planner.checkpointing import matched_modules
from .planner.decisions import Decisions, Move, final_device
from .planner.fitted import InferenceRecord, TrainingRecord
from .planner.sharding import Sharding
from .planner.workload import Training
from .report_text import step_line
from .tracer.graph import ParamGraph

_SHOWN = 4
_NOTHING = "none"
_AS_STORED = "the dtype of the parameters"
_AS_COMPUTED = "the dtype of the gradients"


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that the two plans decide differently, in words."""

    what: str
    this: str
    other: str


def decided_differently(graph: ParamGraph, this: Decisions, other: Decisions) -> Iterator[Difference]:
    """What two plans of one graph decide differently, one thing after the other."""
    yield from _differing("device", _device(this), _device(other))
    yield from _differing("casts", _casts(this), _casts(other))
    yield from _sharded_differently(graph, this.sharding, other.sharding)
    yield from _by_name("checkpointing of", _levels(graph, this), _levels(graph, other))
    yield from _placed_differently(graph, this, other)
    yield from _differing("quantizing", _quantizing(this), _quantizing(other))


def _differing(what: str, this: str, other: str) -> Iterator[Difference]:
    if this != other:
        yield Difference(what, this, other)


def _device(decisions: Decisions) -> str:
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    return moves[-1] if moves else "as constructed"


def _casts(decisions: Decisions) -> str:
    return ", then ".join(map(step_line, decisions.casts)) or _NOTHING


def _quantizing(decisions: Decisions) -> str:
    return "; ".join(f"{len(each.layers):,} layers by {each.describe()}" for each in decisions.quantizing) or _NOTHING


# -- sharding -----------------------------------------------------------------------------------------------------------


def _sharded_differently(graph: ParamGraph, this: Sharding | None, other: Sharding | None) -> Iterator[Difference]:
    for what, (words, without) in _OF_SHARDING.items():
        yield from _differing(what, *(without if each is None else words(each) for each in (this, other)))
    mine, theirs = _units(graph, this), _units(graph, other)
    if mine and theirs and mine.keys() != theirs.keys():
        yield Difference("units of FSDP", _names(mine), _names(theirs))
    both = [unit for unit in mine if unit in theirs]
    yield from _by_name("after their forward,", {unit: mine[unit] for unit in both}, {unit: theirs[unit] for unit in both})


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _rules(sharding: Sharding) -> str:
    return ", ".join(f"{rule.pattern} {rule.style}" for rule in sharding.tensor) or _NOTHING


def _pipeline(sharding: Sharding) -> str:
    found = sharding.pipeline
    if found is None:
        return _NOTHING
    return f"{found.schedule}, {found.microbatches} micro-batches, {len(found.stages)} stages"


_OF_SHARDING: Mapping[str, tuple[Callable[[Sharding], str], str]] = {
    "mesh": (lambda sharding: " x ".join(f"{axis.name}={axis.size}" for axis in sharding.axes), "one rank"),
    "computes in": (lambda sharding: sharding.compute_dtype or _AS_STORED, _AS_STORED),
    "reduces gradients in": (lambda sharding: sharding.reduce_dtype or _AS_COMPUTED, _AS_COMPUTED),
    "shards in host memory": (lambda sharding: _yes(sharding.offload), "no"),
    "tensor parallel rules": (_rules, _NOTHING),
    "sequence parallel": (lambda sharding: _yes(sharding.sequence_parallel), "no"),
    "loss parallel": (lambda sharding: _yes(sharding.loss_parallel), "no"),
    "pipeline": (_pipeline, _NOTHING),
    "experts divided": (lambda sharding: ", ".join(sharding.experts) or _NOTHING, _NOTHING),
}
"""What of a sharding is compared: how it is said, and what a plan without one does."""


def _units(graph: ParamGraph, sharding: Sharding | None) -> dict[str, str]:
    """What each unit of FSDP does after its forward."""
    if sharding is None or not sharding.shards:
        return {}
    return {unit: _after(sharding.reshard_of(unit)) for unit in (*sorted(sharding.unit_names(graph)), "")}


def _after(reshard: bool | int) -> str:
    if isinstance(reshard, bool):
        return "freed" if reshard else "stay gathered"
    return f"kept in shares of {reshard} ranks"


# -- by module and tensor -------------------------------------------------------------------------------------------------


def _levels(graph: ParamGraph, decisions: Decisions) -> dict[str, str]:
    return {name: rule.level for name, rule in matched_modules(decisions.checkpointing, graph).items() if rule.level != "none"}


def _by_name(what: str, this: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Difference]:
    """What differs for modules, those together that differ in the same way."""
    together: dict[tuple[str, str], list[str]] = {}
    for name in dict.fromkeys([*this, *other]):
        pair = (this.get(name, _NOTHING), other.get(name, _NOTHING))
        together.setdefault(pair, []).append(name)
    yield from (Difference(f"{what} {_names(names)}", *pair) for pair, names in together.items() if pair[0] != pair[1])


def _names(names: Iterable[str]) -> str:
    folds = [fold.name or "all else together" for fold in fold_names(list(names))]
    more = f", … and {len(folds) - _SHOWN} more" if len(folds) > _SHOWN else ""
    return ", ".join(folds[:_SHOWN]) + more


def _placed_differently(graph: ParamGraph, this: Decisions, other: Decisions) -> Iterator[Difference]:
    """Where a plan places each tensor by itself: the rules, where any tensor is elsewhere."""
    if this.placing is None and other.placing is None:
        return
    if _homes(graph, this) != _homes(graph, other):
        yield Difference("placing", _placing(this), _placing(other))


def _homes(graph: ParamGraph, decisions: Decisions) -> Hashable:
    storages = {storage.index: storage for storage in graph.storages}
    return tuple(final_device(tensor, storages[tensor.view.storage], decisions) for tensor in graph.tensors)


def _placing(decisions: Decisions) -> str:
    if decisions.placing is None:
        return f"all on {_device(decisions)}"
    return ", ".join(f"{rule.pattern} on {rule.device}" for rule in decisions.placing.rules)


def asked_differently(this: Workload | None, other: Workload | None) -> Iterator[Difference]:
    """The workloads, where the plans have different ones."""
    yield from _differing("workload", _workload(this), _workload(other))


def _workload(workload: Workload | None) -> str:
    if workload is None:
        return _NOTHING
    record = TrainingRecord.of(workload) if isinstance(workload, Training) else InferenceRecord.of(workload)
    return record.describe()
