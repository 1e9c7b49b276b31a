"""The treemap: areas are bytes, nothing overlaps, nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundplan.treemap import Leaf, Part, Rectangle, boxes, squarified, tree

WHOLE = Rectangle(0.0, 0.0, 1000.0, 560.0)
sizes = st.lists(st.integers(1, 10**9), min_size=1, max_size=60).map(lambda each: sorted(each, reverse=True))
names = st.lists(st.sampled_from(["a", "b", "c0", "w"]), min_size=1, max_size=4).map(".".join)


def overlap(a: Rectangle, b: Rectangle) -> float:
    width = min(a.x + a.width, b.x + b.width) - max(a.x, b.x)
    height = min(a.y + a.height, b.y + b.height) - max(a.y, b.y)
    return max(width, 0.0) * max(height, 0.0)


@given(sizes, st.floats(10, 2000), st.floats(10, 2000))
def test_rectangles_fill_the_place_in_proportion(sizes: list[int], width: float, height: float) -> None:
    found = squarified(sizes, Rectangle(3.0, 4.0, width, height))
    assert len(found) == len(sizes)
    for size, each in zip(sizes, found, strict=True):
        assert each.width * each.height == pytest.approx(width * height * size / sum(sizes), rel=1e-6, abs=1e-6 * width * height)
        assert each.x >= 3.0 - 1e-6 and each.x + each.width <= 3.0 + width * (1 + 1e-9) + 1e-6
        assert each.y >= 4.0 - 1e-6 and each.y + each.height <= 4.0 + height * (1 + 1e-9) + 1e-6
    for place, each in enumerate(found):
        assert sum(overlap(each, other) for other in found[place + 1 :]) <= 1e-6 * width * height


def test_the_example_of_the_paper() -> None:
    found = squarified([6, 6, 4, 3, 2, 2, 1], Rectangle(0, 0, 6, 4))
    assert [(round(each.width, 2), round(each.height, 2)) for each in found[:4]] == [(3, 2), (3, 2), (1.71, 2.33), (1.29, 2.33)]


def test_a_tree_joins_only_children_and_sorts_by_size() -> None:
    whole = tree(
        [Leaf("m.layers.0.w", 8, "L"), Leaf("m.layers.0.b", 1, "L"), Leaf("m.layers.10.w", 8, "L"), Leaf("head.w", 20, "H")]
    )
    assert [(part.label, part.nbytes, part.kind) for part in whole.parts] == [("head.w", 20, "H"), ("m.layers", 17, "L")]
    assert [part.path for part in whole.parts[1].parts] == ["m.layers.0", "m.layers.10.w"]
    numbered = tree([Leaf(f"l.{at}.w", 1, "L") for at in (10, 2, 1)] + [Leaf("x", 1, "L")])
    assert [part.label for part in numbered.parts[0].parts] == ["1.w", "2.w", "10.w"]


def test_a_name_that_is_also_a_prefix_keeps_its_bytes() -> None:
    whole = tree([Leaf("a", 5, "x"), Leaf("a.b", 3, "y"), Leaf("a.c", 1, "y"), Leaf("none", 0, "x")])
    assert whole.nbytes == 9 and whole.kind == "x"


@given(st.dictionaries(names, st.integers(1, 10**9), min_size=1, max_size=40))
def test_nothing_is_lost(found: dict[str, int]) -> None:
    whole = tree([Leaf(name, nbytes, "x") for name, nbytes in found.items()])
    assert whole.nbytes == sum(found.values())
    drawn = list(boxes(whole, WHOLE))
    assert drawn[0].part is whole
    for box in drawn:
        assert box.place.width >= 0 and box.place.height >= 0
        assert sum(part.nbytes for part in box.part.parts) <= box.part.nbytes


def test_many_tensors_stay_few_boxes() -> None:
    leaves = [Leaf(f"layers.{at // 256}.experts.{at % 256}.w", 1 + at % 7, "Linear") for at in range(20_000)]
    drawn = list(boxes(tree(leaves), WHOLE))
    assert len(drawn) < 20_000
    top = [box for box in drawn if box.depth == 1]
    assert sum(box.part.nbytes for box in top) == sum(leaf.nbytes for leaf in leaves)


def test_what_is_too_small_is_put_together() -> None:
    leaves = [Leaf("large", 10**9, "L"), *(Leaf(f"small{at}", 1, "S") for at in range(5))]
    drawn = [box.part.label for box in boxes(tree(leaves), WHOLE)]
    assert drawn == ["", "large", "5 more"]
    assert next(boxes(Part("", "", 0, ""), WHOLE)).is_leaf
