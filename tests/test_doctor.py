"""`groundplan doctor`: it says which way every kernel takes, and what is wrong here is said and not used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.doctor import examine
from groundplan.runtime import boxes, fill, pens, truncated
from groundplan.tracer import draws, places
from groundplan.tracer.native import native

from .test_parts import same_bits, shrink

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """What has been tried before is tried anew, and again afterwards."""
    tried = (draws.check_draws, fill._parts_are_whole, places.jumps_agree, pens._rounds_alike, truncated._is_compiled)
    for each in tried:
        each.cache_clear()
    yield
    for each in tried:
        each.cache_clear()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(70, 90) for _ in range(3))
        self.table = nn.Embedding(50, 40)


def assert_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything still has eager's values."""
    shrink(monkeypatch)
    torch.manual_seed(8)
    expected = Model()
    plan = gp.trace(Model)
    built = plan.materialize(seed=8, threads=2)
    for name, tensor in expected.named_parameters():
        assert same_bits(tensor.detach(), built.get_parameter(name).detach()), name
        part = plan.materialize_state({name: slice(7, 31)}, seed=8)[name]
        assert same_bits(tensor[7:31].detach(), part.detach()), name


def test_a_usual_machine_takes_the_fast_ways() -> None:
    found = examine()
    assert found.jumps
    assert found.paths["exponential_"]["float32"] == "pieces"
    assert found.paths["normal_"]["float64"] == "pieces"
    assert found.paths["log_normal_"]["float32"] == "counted"
    if native() is not None:
        assert found.paths["uniform_"]["float32"] in ("compiled", "pieces")


def test_the_text_is_within_100_columns() -> None:
    lines = str(examine()).splitlines()
    assert max(map(len, lines)) <= 100
    assert any("normal_" in line for line in lines)


def test_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pens, places, boxes, truncated):
        monkeypatch.setattr(module, "native", lambda: None)
    monkeypatch.setattr("groundplan.tracer.jump.native", lambda: None)
    monkeypatch.setattr("groundplan.runtime.filler.native", lambda: None)
    assert_right(monkeypatch)
    monkeypatch.setattr("groundplan.doctor.native", lambda: None)
    assert examine().paths["normal_"]["float32"] == "pieces"


def test_a_torch_that_draws_other_numbers_than_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(args: Any, dtype: Any, numel: int, contiguous: bool) -> Any:
        return places.Draw(numel + 1)

    monkeypatch.setitem(draws.FIGURES, aten.uniform_.default, wrong)
    monkeypatch.setitem(draws.FIGURES, aten.normal_.default, wrong)
    assert examine().paths["normal_"] == dict.fromkeys(["float32", "float64", "bfloat16", "float16"], "whole")
    assert_right(monkeypatch)


def test_a_kernel_whose_parts_are_not_its_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill, "_same_parts", lambda *_: False)
    assert set(examine().paths["uniform_"].values()) == {"counted"}
    assert_right(monkeypatch)


def test_jumps_that_lead_astray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "jumped", lambda block, distance: block)
    found = examine()
    assert not found.jumps
    assert "never placed" in str(found)
    assert_right(monkeypatch)


def test_the_command() -> None:
    command = [sys.executable, "-m", "groundplan", "doctor", "--json"]
    environment = os.environ | {"GROUNDPLAN_NATIVE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["compiled"] is False
    assert "GROUNDPLAN_NATIVE" in found["compiled_note"]
