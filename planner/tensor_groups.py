"""Tensor parallelism that a module brings no plan for: which linear layers go together, and the rules that divide them.

Several linear layers, divided by columns, each give a part of the last dim; where all that follows works on each part by itself
until one linear layer takes the whole in, that one is divided by rows, and the sum over the ranks is what the undivided layers
give (Shoeybi et al., Megatron-LM, arXiv:1909.08053, section 3). Such layers are a *group*: all of it is divided, or none.

What is here is reckoning alone; `runtime/tensor_flow.py` finds out by a trace what reaches what.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .sharding import Cut


@dataclass(frozen=True, slots=True)
class Group:
    """Linear layers by name: the outputs of `columns` reach `row`, and nothing else; `largest` is a multiple of every number
    of ranks that the divided dims, heads among them, come out even for.
    """

    columns: tuple[str, ...]
    row: str
    largest: int

    @property
    def styles(self) -> dict[str, str]:
        """What each layer of the group is divided by."""
        return dict.fromkeys(self.columns, "colwise") | {self.row: "rowwise"}

    @property
    def names(self) -> frozenset[str]:
        """The layers of the group."""
        return frozenset((*self.columns, self.row))


@dataclass(frozen=True, slots=True)
class Alone:
    """Layers that are divided without others, each giving the whole: an embedding of a vocabulary, and the head that goes with
    it; tied ones go together."""

    styles: Mapping[str, str]
    largest: int

    @property
    def names(self) -> frozenset[str]:
        """The layers."""
        return frozenset(self.styles)


@dataclass(slots=True)
class Paths:
    """What a trace has seen: where what linear layers give goes. `order` is that of their first calls."""

    order: list[str] = field(default_factory=list)
    joined: list[frozenset[str]] = field(default_factory=list)  # parts of these meet in one op
    into: dict[str, set[str]] = field(default_factory=dict)  # the linear layers that a layer's output reaches
    reads: dict[str, list[frozenset[str]]] = field(default_factory=dict)  # of which layers each call of a layer takes a part in
    sizes: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why a layer's columns cannot be divided
    barred: dict[str, str] = field(default_factory=dict)  # why a layer cannot be divided in any way

    def refuse(self, names: Iterable[str], why: str) -> None:
        """The first reason counts: what comes later follows from it."""
        for name in names:
            self.refused.setdefault(name, why)


def groups_of(paths: Paths) -> tuple[list[Group], dict[str, str]]:
    """The groups, none of which share a layer, and why the other layers are in none."""
    found: list[Group] = []
    taken: set[str] = set()
    why: dict[str, str] = dict(paths.barred)
    for columns in _together(paths):
        reason = _reason_against(columns, paths, taken)
        if reason is None:
            row = next(iter(paths.into[columns[0]]))
            group = Group(columns, row, math.gcd(*(paths.sizes[name] for name in columns)))
            found.append(group)
            taken |= group.names
        else:
            for name in columns:
                why.setdefault(name, reason)
    return found, {name: reason for name, reason in why.items() if name not in taken}


def _together(paths: Paths) -> list[tuple[str, ...]]:
    """The layers whose parts meet, in the order of their first calls."""
    sets: dict[str, set[str]] = {name: {name} for name in paths.order}
    for names in paths.joined:
        merged = set().union(*(sets[name] for name in names))
        for name in merged:
            sets[name] = merged
    found: dict[int, set[str]] = {id(each): each for each in sets.values()}
    return [tuple(name for name in paths.order if name in each) for each in found.values()]


def _reason_against(columns: tuple[str, ...], paths: Paths, taken: set[str]) -> str | None:
    """Why these layers cannot be the columns of a group; None if they can."""
    for name in columns:
        if name in paths.barred:
            return paths.barred[name]
    for name in columns:
        if name in paths.refused:
            return paths.refused[name]
    rows = set().union(*(paths.into.get(name, set()) for name in columns))
    if len(rows) != 1:
        return "what it gives reaches no linear layer" if not rows else f"what it gives reaches {_listed(rows)}, not one layer"
    row = next(iter(rows))
    if row in paths.barred:
        return f"{row}, which it reaches, {paths.barred[row]}"
    if row in columns or taken & {row, *columns}:
        return f"{row}, which it reaches, is divided with other layers"
    if any(not sources or not sources <= set(columns) for sources in paths.reads[row]):
        return f"{row}, which it reaches, takes in something else besides"
    return None


def _listed(names: Iterable[str]) -> str:
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


# -- names --------------------------------------------------------------------------------------------------------------


def pattern_of(name: str) -> str:
    """The pattern of all names that differ in numbers alone.

    >>> pattern_of("layers.3.up")
    'layers.*.up'
    """
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def rules_of(styles: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """The same as rules: one pattern for layers that differ in numbers alone, where all of them are divided in one way.

    `names` are those of all modules that hold parameters.

    >>> rules_of({"layers.0.up": "colwise", "layers.1.up": "colwise"}, ["layers.0.up", "layers.1.up", "head"])
    {'layers.*.up': 'colwise'}
    """
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(pattern_of(name), []).append(name)
    found: dict[str, str] = {}
    for name, style in styles.items():
        pattern = pattern_of(name)
        same = all(styles.get(other) == style for other in alike.get(pattern, ()))
        found[pattern if same else name] = style
    return found


def reason_lines(why: Mapping[str, str], most: int = 12) -> list[str]:
    """Why layers are not divided, one line for those that differ in numbers alone.

    >>> reason_lines({"layers.0.up": "leaves the module as it is", "layers.1.up": "leaves the module as it is"})
    ['layers.*.up: leaves the module as it is']
    """
    found: dict[str, str] = {}
    for name, reason in why.items():
        found.setdefault(pattern_of(name), reason)
    lines = [f"{pattern}: {reason}" for pattern, reason in found.items()]
    return lines[:most] + ([f"and {len(lines) - most} more"] if len(lines) > most else [])


# -- dims ---------------------------------------------------------------------------------------------------------------


def viewed(cut: Cut, shape: Sequence[int], new: Sequence[int]) -> Cut | None:
    """Where a division is found again in a tensor of another shape with the same elements in the same order; None: nowhere.

    Heads that the last dim is split into, and merged from; the head dim merged with the batch before it, which is then divided
    as so many pieces one behind the other.

    >>> viewed(Cut(2), (4, 7, 96), (4, 7, 8, 12)), viewed(Cut(1), (4, 8, 7, 12), (32, 7, 12))
    (Cut(dim=2, split=1), Cut(dim=0, split=4))
    """
    if 0 in shape or 0 in new:
        return None
    period = shape[cut.dim] // cut.split * math.prod(shape[cut.dim + 1 :])  # what is divided lies within so many elements
    inner = 1
    for dim in reversed(range(len(new))):
        if inner < period <= inner * new[dim]:
            split, left = divmod(inner * new[dim], period)
            return None if left or period % inner else Cut(dim, split)
        inner *= new[dim]
    return None


def part_shape(shape: Sequence[int], cut: Cut | None, ranks: int) -> tuple[int, ...]:
    """The shape of one rank's part."""
    return tuple(size // ranks if cut is not None and dim == cut.dim else size for dim, size in enumerate(shape))
