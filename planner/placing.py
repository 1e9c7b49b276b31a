"""Placing: which device each tensor goes to where one process has several, as data; accelerate dispatches what is placed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeVar

from pydantic import Field, StringConstraints, field_validator

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .records import Record, device_name

T = TypeVar("T")
DISK = "disk"
_RANGE = re.compile(r"(\d+)-(\d+)")


class PlaceRule(Record):
    """Tensors whose names match `pattern` go to `device`: `cpu`, `cuda`, `cuda:N`, or `disk`, from where they are fetched."""

    pattern: Annotated[str, StringConstraints(min_length=1)]
    device: str

    @field_validator("device")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return place_name(name)


class Placing(Record):
    """A device for every tensor: the first rule that matches a tensor's name wins."""

    rules: Annotated[tuple[PlaceRule, ...], Field(min_length=1)]

    @property
    def main(self) -> str:
        """Where accelerate runs what is on disk, or in host memory: the first device that is neither."""
        return next((rule.device for rule in self.rules if rule.device not in (DISK, "cpu")), "cpu")

    def device_for(self, tensor: TensorNode) -> str | None:
        """The device the rules give to a tensor, or None where no rule matches.

        Raises `DecisionError` where the names of one tied tensor lead to different devices.
        """
        found = {name: rule.device for name in tensor.names if (rule := self._rule_named(name)) is not None}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} on {device}" for name, device in found.items())
            raise DecisionError(f"one tied tensor cannot be on two devices: the rules put {each}; give its names the same device")
        return next(iter(found.values()), None)

    def rule_for(self, tensor: TensorNode) -> PlaceRule | None:
        """The rule that decides about a tensor: that of the first of its names that any matches."""
        return next((rule for name in tensor.names if (rule := self._rule_named(name)) is not None), None)

    def _rule_named(self, name: str) -> PlaceRule | None:
        return next((rule for rule in self.rules if is_placed(rule.pattern, name)), None)


def placing(devices: Mapping[str, Any], graph: ParamGraph) -> Placing:
    """The record of what the user asks for; raises `DecisionError` where it does not fit `graph`."""
    if not isinstance(devices, Mapping) or not devices:
        raise DecisionError(f'devices={devices!r} places nothing; give patterns and devices, such as {{"*": "cpu"}}')
    rules = tuple(PlaceRule(pattern=pattern, device=place_name(device)) for pattern, device in devices.items())
    found = Placing(rules=rules)
    check_placing(found, graph)
    return found


def check_placing(found: Placing, graph: ParamGraph) -> None:
    """Raise `DecisionError` where a rule matches nothing, a tensor is matched by none, or a tied one goes to two devices."""
    names = [name for tensor in graph.tensors for name in tensor.names]
    for rule in found.rules:
        if not any(is_placed(rule.pattern, name) for name in names):
            raise DecisionError(f"the pattern {rule.pattern!r} matches no tensor{nearest(rule.pattern, names)}")
    homeless = [tensor.name for tensor in graph.tensors if found.device_for(tensor) is None and tensor.kind != "attribute"]
    if homeless:
        more = f" and {len(homeless) - 1} more" if len(homeless) > 1 else ""
        raise DecisionError(f'no pattern matches {homeless[0]}{more}; say where the rest goes, by {{"*": "cpu"}} as the last one')
    if not any(module.name == "" for module in graph.modules):
        raise DecisionError("the constructor returns several modules; trace and place each of them by itself")


def place_name(device: object) -> str:
    """The name a device, or the disk, is saved under."""
    return DISK if device == DISK else device_name(device)


def is_placed(pattern: str, name: str) -> bool:
    """Whether a pattern matches a tensor's name, or that of something that holds it; `3-7` stands for the numbers from 3 to 7.

    >>> is_placed("layers.0-15.*", "layers.7.mlp.weight"), is_placed("layers.0-15", "layers.16.mlp.weight")
    (True, False)
    """
    if fnmatchcase(name, pattern):
        return True
    parts, wanted = name.split("."), pattern.split(".")
    if wanted[-1] == "*":
        wanted.pop()
    return bool(wanted) and len(parts) >= len(wanted) and all(map(is_component, wanted, parts))


def is_component(wanted: str, part: str) -> bool:
    """Whether one component of a name is as `wanted` says: a number from 3 to 7 by `3-7`, else as `fnmatch` has it."""
    numbers = _RANGE.fullmatch(wanted)
    if numbers is not None and part.isdecimal():
        return int(numbers[1]) <= int(part) <= int(numbers[2])
    return fnmatchcase(part, wanted)


def device_map(found: Placing, graph: ParamGraph) -> dict[str, str]:
    """The same as accelerate's `device_map`: a device for each of the largest modules whose tensors share one.

    A parameter of a module whose submodules are elsewhere is named itself. Raises `DecisionError` where that would be on disk.
    """
    homes: dict[str, set[str]] = {}
    for tensor in graph.tensors:
        device = found.device_for(tensor)
        if device is not None and tensor.kind != "attribute":
            for name in tensor.names:
                for owner in owners(name):
                    homes.setdefault(owner, set()).add(device)
    entries: dict[str, str] = {}
    _divide("", graph, homes, children_of(graph), found, entries)
    return entries


def _divide(
    name: str,
    graph: ParamGraph,
    homes: Mapping[str, set[str]],
    children: Mapping[str, Sequence[str]],
    found: Placing,
    entries: dict[str, str],
) -> None:
    devices = homes.get(name, set())
    if len(devices) == 1:
        entries[name] = next(iter(devices))
    elif devices:
        for tensor in graph.tensors:
            for own in tensor.names:
                if own.rpartition(".")[0] == name and tensor.kind != "attribute":
                    entries[own] = _in_memory(own, found.device_for(tensor))
        for child in children.get(name, ()):
            _divide(child, graph, homes, children, found, entries)


def _in_memory(name: str, device: str | None) -> str:
    if device == DISK:
        raise DecisionError(
            f"{name} cannot stay on disk while other tensors of its module do not, as accelerate fetches whole modules; give it "
            "a device"
        )
    return device or "cpu"


def ranges(entries: Sequence[tuple[str, T]]) -> list[tuple[str, T]]:
    """The same with numbers that follow each other and have one value in one pattern.

    >>> ranges([("layers.0", "cpu"), ("layers.1", "cpu"), ("layers.2", "disk"), ("head", "disk")])
    [('layers.0-1', 'cpu'), ('layers.2', 'disk'), ('head', 'disk')]
    """
    found: list[tuple[str, T]] = []
    for module, value in entries:
        parent, _, number = module.rpartition(".")
        if found and number.isdecimal() and found[-1][1] == value:
            before, _, last = found[-1][0].rpartition(".")
            first, _, end = last.partition("-")
            if before == parent and first.isdecimal() and int(end or first) + 1 == int(number):
                found[-1] = (f"{parent}.{first}-{number}".lstrip("."), value)
                continue
        found.append((module, value))
    return found


def owners(name: str) -> list[str]:
    """The modules that hold a tensor, from the outermost on: the empty name is all of it."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:count]) for count in range(len(parts) + 1)]


def children_of(graph: ParamGraph) -> dict[str, list[str]]:
    """The names of every module's submodules, by each of the module's names, in order."""
    found: dict[str, list[str]] = {}
    for module in graph.modules:
        for name in module.names:
            if name:
                found.setdefault(name.rpartition(".")[0], []).append(name)
    return found
