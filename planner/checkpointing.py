"""Activation checkpointing, as a decision: which modules keep their inputs alone, or by op, and run again in the backward.

Rules give patterns of the names of modules a level, the first match first. `full` keeps a module's inputs; `selective` keeps
besides what attention, reduce-scatter and every other matrix product give (torchtitan's policy, `runtime/checkpointing.py`);
`none` leaves what it matches as it is, where a later pattern would match it as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, get_args

from pydantic import StringConstraints

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ModuleNode, ParamGraph
from .kept import kept_with
from .placing import owners
from .records import Record
from .sharding import NEVER_CALLED, matches
from .workload import Checkpointing, Training, check_choice


class CheckpointRule(Record):
    """Modules whose names match `pattern`, component by component (`0-11` are numbers), are checkpointed by `level`."""

    pattern: Annotated[str, StringConstraints(min_length=1)]
    level: Checkpointing


Rules = tuple[CheckpointRule, ...]


def checkpoint_rules(levels: Mapping[str, Any], graph: ParamGraph) -> Rules:
    """The record of what the user asks for; raises `DecisionError` where it does not fit `graph`."""
    if not isinstance(levels, Mapping) or not levels:
        raise DecisionError(
            f'levels={levels!r} says nothing; give patterns of modules and levels, such as {{"layers.*": "full"}}'
        )
    for pattern, level in levels.items():
        if not isinstance(pattern, str) or not pattern:
            raise DecisionError(f"levels are given to patterns of the names of modules; {pattern!r} is no pattern")
        check_choice(f"the level of {pattern!r}", level, get_args(Checkpointing))
    rules = tuple(CheckpointRule(pattern=pattern, level=level) for pattern, level in levels.items())
    check_checkpointing(rules, graph)
    return rules


def levels_of(rules: Rules, graph: ParamGraph) -> Mapping[str, Checkpointing]:
    """The level of every module that is checkpointed, by the first of its names, in the order of the modules.

    Raises `DecisionError` where the names of one module lead to two levels.
    """
    return {name: rule.level for name, rule in matched_modules(rules, graph).items() if rule.level != "none"}


def matched_modules(rules: Rules, graph: ParamGraph) -> Mapping[str, CheckpointRule]:
    """The rule that decides about each module with parameters that any matches; raises as `levels_of`."""
    known = kept_with(graph)
    if ("checkpointed", rules) not in known:
        holding = _holding(graph) if rules else set()
        found = ((module, _rule_of(module, rules)) for module in graph.modules if not holding.isdisjoint(module.names))
        known["checkpointed", rules] = {module.name: rule for module, rule in found if rule is not None}
    matched: Mapping[str, CheckpointRule] = known["checkpointed", rules]
    return matched


def _holding(graph: ParamGraph) -> set[str]:
    return {owner for tensor in graph.parameters for name in tensor.names for owner in owners(name)}


def _rule_of(module: ModuleNode, rules: Rules) -> CheckpointRule | None:
    found = {name: rule for name in module.names if (rule := _first(name, rules)) is not None}
    if len({rule.level for rule in found.values()}) > 1:
        each = ", ".join(f"{name} {rule.level!r}" for name, rule in found.items())
        raise DecisionError(f"one shared module cannot be checkpointed by two levels: {each}; give its names the same level")
    return next(iter(found.values()), None)


def _first(name: str, rules: Rules) -> CheckpointRule | None:
    return next((rule for rule in rules if matches(rule.pattern, name)), None)


# -- the doors ----------------------------------------------------------------------------------------------------------


def check_checkpointing(rules: Rules, graph: ParamGraph) -> None:
    """Raise `DecisionError` for a pattern that decides about nothing, for modules that are never called, or inside each other."""
    matched = matched_modules(rules, graph)
    types = {module.name: module.type for module in graph.modules}
    for rule in rules:
        if not any(found == rule for found in matched.values()):
            raise DecisionError(_no_match(rule, matched, graph))
    for name, rule in matched.items():
        if types[name] in NEVER_CALLED:
            raise DecisionError(
                f"{rule.pattern!r} matches {name}, a {types[name]}, which is never called itself: say {rule.pattern + '.*'!r}"
            )
    _check_apart(matched)


def _no_match(rule: CheckpointRule, matched: Mapping[str, CheckpointRule], graph: ParamGraph) -> str:
    earlier = next((other for name, other in matched.items() if matches(rule.pattern, name)), None)
    if earlier is not None:
        return f"all that {rule.pattern!r} matches is decided by {earlier.pattern!r} before it; put it first, or leave it out"
    holding = _holding(graph)
    names = [name for module in graph.modules for name in module.names if name in holding and name]
    return f"the pattern {rule.pattern!r} matches no module that holds parameters{nearest(rule.pattern, names)}"


def _check_apart(matched: Mapping[str, CheckpointRule]) -> None:
    for name in matched:
        around = next((owner for owner in owners(name) if owner in matched), None)
        if around is not None:
            raise DecisionError(
                f"{name}, by {matched[name].pattern!r}, lies within {around}, by {matched[around].pattern!r}, and would run again "
                "with it: name one of them"
            )


def check_said_once(rules: Iterable[CheckpointRule], workload: object) -> None:
    """Raise `DecisionError` where both the plan and the workload say what is checkpointed."""
    if isinstance(workload, Training) and workload.checkpointing != "none" and any(True for _ in rules):
        raise DecisionError(
            f'checkpointing="{workload.checkpointing}" is for every layer that repeats, and the plan says by itself what is '
            "checkpointed (plan.checkpoint_activations): leave one of the two out"
        )
