"""A treemap of bytes by module: nested rectangles whose areas are as the bytes, as square as can be.

After Bruls, Huizing and van Wijk, "Squarified treemaps" (2000): a row grows as long as that makes its worst rectangle squarer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

_LEAST_SIDE = 3.0
_LEAST_NESTED = 26.0
_TITLE = 15.0
_PADDING = 1.5


class Leaf(NamedTuple):
    """A tensor: its dotted name, its bytes, and what it is colored by."""

    name: str
    nbytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Part:
    """A module or a tensor: `label` is its name within the part around it, `kind` that of most of its bytes."""

    label: str
    path: str
    nbytes: int
    kind: str
    parts: tuple[Part, ...] = ()


class Rectangle(NamedTuple):
    """A place in the drawing; the origin is at the top left."""

    x: float
    y: float
    width: float
    height: float


class Box(NamedTuple):
    """A part and where it is drawn; `is_leaf` where nothing is drawn inside it."""

    part: Part
    place: Rectangle
    depth: int
    is_leaf: bool


def tree(leaves: Iterable[Leaf], label: str = "") -> Part:
    """The parts of a module, by the dots in the names of what it holds, the largest first; only children are joined with theirs.

    >>> [(part.label, part.nbytes) for part in tree([Leaf("a.b.w", 4, "x"), Leaf("a.b.v", 2, "x"), Leaf("c.w", 1, "x")]).parts]
    [('a.b', 6), ('c.w', 1)]
    """
    return _part(label, "", [(tuple(leaf.name.split(".")), leaf) for leaf in leaves if leaf.nbytes > 0])


def _part(label: str, path: str, leaves: Sequence[tuple[tuple[str, ...], Leaf]]) -> Part:
    """The part of `leaves`, each given with what of its name lies within the part."""
    kinds = Counter[str]()
    groups: dict[str, list[tuple[tuple[str, ...], Leaf]]] = {}
    for names, leaf in leaves:
        kinds[leaf.kind] += leaf.nbytes
        if names:
            groups.setdefault(names[0], []).append((names[1:], leaf))
    kind = max(kinds, key=lambda each: (kinds[each], each), default="")
    parts = [_part(name, f"{path}.{name}" if path else name, inside) for name, inside in groups.items()]
    if len(parts) == 1 and label:
        return Part(f"{label}.{parts[0].label}", parts[0].path, parts[0].nbytes, parts[0].kind, parts[0].parts)
    return Part(
        label, path, sum(kinds.values()), kind, tuple(sorted(parts, key=lambda part: (-part.nbytes, _numbered(part.path))))
    )


def _numbered(path: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(int(name), "") if name.isdecimal() else (-1, name) for name in path.split(".")]


def boxes(part: Part, place: Rectangle, depth: int = 0) -> Iterator[Box]:
    """Where a part is drawn and, as far as there is room to see them, the parts inside it; outer ones first."""
    inner = place if depth == 0 else _inside(place)
    nested = bool(part.parts) and min(inner.width, inner.height) >= _LEAST_NESTED
    yield Box(part, place, depth, not nested)
    if nested:
        shown = _large_enough(part, inner.width * inner.height)
        for each, where in zip(shown, squarified([each.nbytes for each in shown], inner), strict=True):
            yield from boxes(each, where, depth + 1)


def _inside(place: Rectangle) -> Rectangle:
    """What is left of a place for the parts inside, below its title."""
    title = _TITLE if place.width >= 50 and place.height >= 80 else _PADDING
    return Rectangle(
        place.x + _PADDING,
        place.y + title,
        max(place.width - 2 * _PADDING, 0),
        max(place.height - title - _PADDING, 0),
    )


def _large_enough(part: Part, area: float) -> list[Part]:
    """The parts that can be seen, and one that stands for the others."""
    least = _LEAST_SIDE**2 / area * part.nbytes
    shown = [each for each in part.parts if each.nbytes >= least]
    hidden = part.parts[len(shown) :]
    if len(hidden) > 1:
        rest = sum(each.nbytes for each in hidden)
        return [
            *shown,
            Part(f"{len(hidden):,} more", f"{part.path}: {len(hidden):,} smaller ones".lstrip(": "), rest, hidden[0].kind),
        ]
    return [*shown, *hidden]


def squarified(sizes: Sequence[int], place: Rectangle) -> list[Rectangle]:
    """Rectangles that fill `place`, with areas as `sizes`, which are positive and descend.

    >>> [tuple(map(round, each)) for each in squarified([2, 1, 1], Rectangle(0, 0, 40, 20))]
    [(0, 0, 20, 20), (20, 0, 20, 10), (20, 10, 20, 10)]
    """
    found: list[Rectangle] = []
    rest, left = list(sizes), place
    while rest:
        scale = left.width * left.height / sum(rest)
        row = _row([size * scale for size in rest], min(left.width, left.height))
        placed, left = _laid(row, left, last=len(row) == len(rest))
        found += placed
        rest = rest[len(row) :]
    return found


def _row(areas: Sequence[float], side: float) -> list[float]:
    """As many of the first areas as make the worst of them as square as it gets along a side."""
    count, total = 1, areas[0]
    worst = _worst(areas[0], areas[0], total, side)
    while count < len(areas):
        total += areas[count]
        after = _worst(areas[0], areas[count], total, side)
        if after > worst:
            break
        count, worst = count + 1, after
    return list(areas[:count])


def _worst(largest: float, smallest: float, total: float, side: float) -> float:
    if not (smallest and total and side):
        return float("inf")
    return max(side**2 * largest / total**2, total**2 / (side**2 * smallest))


def _laid(row: Sequence[float], left: Rectangle, last: bool) -> tuple[list[Rectangle], Rectangle]:
    """A row along the shorter side of what is left, and what is left then."""
    total, side = sum(row), min(left.width, left.height)
    across = left.width >= left.height
    thick = (left.width if across else left.height) if last else (total / side if side else 0.0)
    placed, along = [], 0.0
    for area in row:
        length = side * area / total if total else 0.0
        x, y = (left.x, left.y + along) if across else (left.x + along, left.y)
        placed.append(Rectangle(x, y, thick, length) if across else Rectangle(x, y, length, thick))
        along += length
    if across:
        return placed, Rectangle(left.x + thick, left.y, max(left.width - thick, 0.0), left.height)
    return placed, Rectangle(left.x, left.y + thick, left.width, max(left.height - thick, 0.0))
