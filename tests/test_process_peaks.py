"""Construct and load against the peaks of whole processes: within 5 % and 100 MB of what is predicted, all of Python included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.overheads import OVERHEADS
from groundplan.planner.process import process_bytes

from .jobs import MIB, can_watch, launch
from .measured_steps import MODELS

SIZE = 16 * 16 * MIB

pytestmark = pytest.mark.skipif(not can_watch, reason="the peak of resident memory cannot be watched here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("peaks")


def check(world: int, folder: Path) -> None:
    for found in launch("tests.process_peaks", folder, world=world):
        assert len(found) == 5
        for case, each in found.items():
            predicted = each["tensors"] + each["beside"]
            assert abs(each["peak"] - predicted) <= 0.05 * predicted + 100e6, (case, each)
            half = 2 if case.endswith("bfloat16") else 1
            assert each["tensors"] >= SIZE // (half * world), "and not the slack alone"


@pytest.mark.parametrize("world", [1, 2])
def test_a_process_s_peak_is_predicted(world: int, folder: Path) -> None:
    check(world, folder)


@pytest.mark.conformance
def test_the_peaks_of_four(folder: Path) -> None:
    check(4, folder)


def test_what_a_process_holds_besides_is_named() -> None:
    plan = gp.trace(MODELS["Llama"].build)
    always = {"host process"} | ({"host process, torch for cuda"} if torch.version.cuda else set())
    assert set(process_bytes(plan.graph, plan.decisions)) == always | {
        "host process, torch.distributed",
        "host process, transformers",
    }
    plain = gp.trace(nn.Transformer, 16, 2, 2, 2, 32)
    assert process_bytes(plain.graph, plain.decisions) == {name: OVERHEADS[name].low for name in always}
    sharded = plain.shard({"dp": 2})
    assert set(process_bytes(sharded.graph, sharded.decisions)) == always | {"host process, torch.distributed"}


class Orthogonal(nn.Module):
    """Weights that are made of others, which are dropped."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(512, 512, bias=False) for _ in range(4)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
        self.layers = nn.ModuleList(layers)


def test_what_a_constructor_drops_is_counted_while_values_need_it() -> None:
    """`orthogonal_` holds the random matrix and both factors until it returns (torch/nn/init.py)."""
    weight = 512 * 512 * 4
    assert gp.trace(Orthogonal).memory().phases["construct"] >= 4 * weight + 3 * weight
    assert gp.trace(Orthogonal).memory().phases["load"] == 4 * weight
    found = gp.trace(Orthogonal).verify(seed=0, saving=False).check("construct")
    assert abs(found.percent) < 15, found.parts


def test_what_is_dropped_unread_takes_nothing() -> None:
    def build() -> nn.Module:
        torch.empty(10**6).normal_()
        return nn.Linear(8, 8)

    assert gp.trace(build).memory().phases["construct"] == (8 * 8 + 8) * 4
