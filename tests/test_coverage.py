"""Which tensors a constructor leaves without values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import groundplan as gp


def built(fill: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[], nn.Module]:
    """A module with one 6x8 parameter made by `torch.empty` and then `fill`."""

    def build() -> nn.Module:
        module = nn.Module()
        weight = torch.empty(6, 8)
        made = fill(weight)
        module.weight = nn.Parameter(weight if made is None else made)
        return module

    return build


def _blocks(weight: torch.Tensor) -> None:
    weight[:3, ::2].fill_(1)
    weight[:3, 1::2].uniform_()
    weight[3:].t().normal_()


def _rows(weight: torch.Tensor) -> None:
    for row in weight:
        row.fill_(1)


def _all_but_a_row(weight: torch.Tensor) -> None:
    weight[1:].normal_()


def _every_other_column(weight: torch.Tensor) -> None:
    weight[:, ::2].normal_()


def _all_but_one(weight: torch.Tensor) -> None:
    weight.view(-1)[:47].zero_()


def _by_copy(weight: torch.Tensor) -> None:
    weight.copy_(torch.empty(6, 8))


def _spread(weight: torch.Tensor) -> None:
    weight.normal_()
    weight[0].copy_(torch.empty(8))


def _mended(weight: torch.Tensor) -> None:
    weight[0].copy_(torch.empty(8))
    weight[1:].normal_()
    weight[0].fill_(2)


DEFINED: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "whole": lambda weight: weight.normal_(),
    "in blocks": _blocks,
    "rows": _rows,
    "copied": lambda weight: weight.copy_(torch.ones(8)),
    "expression": lambda weight: torch.ones(6, 8) * 2,
    "defined part of a larger one": lambda weight: weight.normal_()[1:3],
    "mended": _mended,
    "zeros_like of empty": lambda weight: torch.zeros_like(weight),
    "no elements": lambda weight: torch.empty(0, 4),
}

UNDEFINED: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "nothing": lambda weight: None,
    "all but one": _all_but_one,
    "a row": _all_but_a_row,
    "every other column": _every_other_column,
    "copied from empty": _by_copy,
    "spread by a partial copy": _spread,
    "arithmetic on empty": lambda weight: weight * 0 + 1,
    "in place on empty": lambda weight: weight.mul_(0),
}


@pytest.mark.parametrize("name", DEFINED)
def test_defined(name: str) -> None:
    assert gp.trace(built(DEFINED[name])).graph.uninitialized == ()


@pytest.mark.parametrize("name", UNDEFINED)
def test_undefined(name: str) -> None:
    assert [tensor.name for tensor in gp.trace(built(UNDEFINED[name])).graph.uninitialized] == ["weight"]


def test_large_partial_writes_are_counted_in_blocks() -> None:
    """A mask of one element a byte would need 400 GB."""

    def halves() -> nn.Module:
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(10**6, 10**5))
        with torch.no_grad():
            module.weight[: 5 * 10**5].normal_()
            module.weight[5 * 10**5 :].normal_()
        return module

    assert gp.trace(halves).graph.uninitialized == ()
