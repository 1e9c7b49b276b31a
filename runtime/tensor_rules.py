"""Rules of tensor parallelism for a module that brings none: found in a traced forward, checked, and kept with the plan.

1. a trace of the undivided module says what can be divided (`tensor_trace.py`)
2. for a number of ranks, what comes out even is divided by torch and run as one rank of many (`tensor_check.py`); what does
   otherwise than the undivided module is dropped, with the reason
3. layers that differ in numbers alone get one rule
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..planner.decisions import Decisions
from ..planner.kept import kept_with
from ..planner.sharding import parameters_by_module
from ..planner.tensor_groups import Group, pattern_of, reason_lines, rules_of
from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph
from .build import Build
from .example_inputs import Workload
from .profiles import quiet
from .tensor_check import Differs, difference
from .tensor_trace import SHORT, Divisible, Part, TensorTrace, trace_tensor_flow

_KEY = "tensor rules"


@dataclass(frozen=True, slots=True)
class TensorRules:
    """The rules for a number of ranks, checked, and why other layers have none, by their names."""

    rules: Mapping[str, str]
    left_out: Mapping[str, str]


def tensor_rules(
    build: Build, decisions: Decisions, workload: Workload | None = None, ranks: int | None = None
) -> Mapping[str, str] | None:
    """The rules that divide the plan's module between `ranks`, as `plan.shard(tensor=...)` takes them; None: nothing can be.

    `ranks` is the size of the plan's tensor axis if None, else the most that everything can be divided between. Found once for a
    plan and kept. Raises as a run on fake tensors does: `DecisionError` for inputs that cannot be made, `MemoryRunError` for code
    that looks at values, and what the module's own code raises.
    """
    if ranks is None:
        axis = None if decisions.sharding is None else decisions.sharding.axis("tensor")
        ranks = divisible(build, decisions, workload).largest if axis is None else axis.size
    return checked_rules(build, decisions, ranks, workload).rules or None


def divisible(build: Build, decisions: Decisions, workload: Workload | None = None) -> Divisible:
    """What of the plan's module can be divided, and between how many ranks, before it is checked; raises as `tensor_rules`."""
    return _trace_of(build, decisions, workload)[0].divisible


def checked_rules(build: Build, decisions: Decisions, ranks: int, workload: Workload | None = None) -> TensorRules:
    """The rules for so many ranks, with the reasons; raises as `tensor_rules` does."""
    traced, checked, _ = _trace_of(build, decisions, workload)
    if ranks not in checked:
        checked[ranks] = _check(traced, ranks)
    return checked[ranks]


def inferred_rules(build: Build, decisions: Decisions, ranks: int, workload: Workload | None = None) -> Mapping[str, str]:
    """The rules alone; raises `DecisionError` where nothing can be divided, with the reason for each kind of layer."""
    found = checked_rules(build, decisions, ranks, workload)
    if not found.rules:
        reasons = "\n".join(f"  {line}" for line in reason_lines(found.left_out) or [_no_linear(build.graph)])
        raise DecisionError(
            f'tensor="infer" finds nothing in {decisions.constructor} that {ranks} ranks can divide and compute the same:\n'
            f'{reasons}\ngive rules, such as tensor={{"*.up": "colwise", "*.down": "rowwise"}}, or leave the axis out'
        )
    return found.rules


def left_whole(build: Build, decisions: Decisions) -> list[str]:
    """Why layers of a plan whose rules were inferred have none, in words; nothing where they were not, or not in this process."""
    if decisions.sharding is None:
        return []
    rules = {rule.pattern: rule.style for rule in decisions.sharding.tensor}
    traces = [value for key, value in kept_with(build).items() if key[0] == _KEY]
    found = (each for _, checked, _ in traces for each in checked.values() if rules and each.rules == rules)
    return next((reason_lines(each.left_out) for each in found), [])


def _no_linear(graph: ParamGraph) -> str:
    holding = parameters_by_module(graph)
    types = sorted({module.type.rpartition(".")[2] for module in graph.modules if module.name in holding})
    return f"its parameters are those of {', '.join(types)}, and none is an nn.Linear that is called"


def _trace_of(
    build: Build, decisions: Decisions, workload: Workload | None
) -> tuple[TensorTrace, dict[int, TensorRules], Workload]:
    """The trace and what was found with it; the workload beside, so that the ids of its inputs stay theirs."""
    chosen: Workload = SHORT if workload is None else workload
    known = kept_with(build)
    own = None if chosen.inputs is None else (chosen.batch_size, chosen.seq_len, id(chosen.inputs))
    key = _KEY, decisions.casts, type(chosen), chosen.autocast, own, id(getattr(chosen, "loss", None))
    if key not in known:
        known[key] = trace_tensor_flow(build, decisions, chosen), {}, chosen
    found: tuple[TensorTrace, dict[int, TensorRules], Workload] = known[key]
    return found


# -- checking -----------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def _check(traced: TensorTrace, ranks: int) -> TensorRules:
    """Divide what comes out even; drop what then does otherwise, and see to the rest again."""
    left_out = dict(traced.divisible.left_out)
    parts = [part for part in traced.divisible.parts if part.largest % ranks == 0]
    for part in traced.divisible.parts:
        if part.largest % ranks:
            left_out |= dict.fromkeys(
                part.styles, f"{ranks} ranks do not divide it evenly: its dims and heads have {part.largest}"
            )
    with quiet():
        while parts and (dropped := _dropped(traced, parts, ranks)):
            left_out |= {name: why for part, why in dropped for name in part.styles}
            parts = [part for part in parts if all(part is not each for each, _ in dropped)]
    holding = parameters_by_module(traced.build.graph)
    return TensorRules(rules_of(traced.with_skipped(_styles(parts)), holding), left_out)


def _dropped(traced: TensorTrace, parts: Sequence[Part], ranks: int) -> list[tuple[Part, str]]:
    """What does otherwise: as far as a run of all says, else each kind that does so when it is divided alone, else everything."""
    found = _difference(traced, parts, ranks)
    if found is None:
        return []
    kinds = {_kind(part): found.why for part in parts if part.names & found.sources}
    if not kinds:
        for kind in dict.fromkeys(map(_kind, parts)):
            other = _difference(traced, [part for part in parts if _kind(part) == kind], ranks)
            if other is not None:
                kinds[kind] = other.why
    return [(part, kinds.get(_kind(part), found.why)) for part in parts if not kinds or _kind(part) in kinds]


def _difference(traced: TensorTrace, parts: Sequence[Part], ranks: int) -> Differs | None:
    module, inputs = traced.module()
    columns = frozenset(name for part in parts if isinstance(part, Group) for name in part.columns)
    return difference(module, traced.build.graph, inputs, traced.training, traced.flow, _styles(parts), columns, ranks)


def _styles(parts: Sequence[Part]) -> dict[str, str]:
    return {name: style for part in parts for name, style in part.styles.items()}


def _kind(part: Part) -> frozenset[str]:
    return frozenset(map(pattern_of, part.names))
