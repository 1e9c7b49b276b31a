"""Two real ranks save what they hold together, and load it by a sharded plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import groundplan as gp

from .jobs import launch
from .save_ranks import SEED, Model, Packed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    folder = Path(tmp_path_factory.mktemp("saved"))
    return folder, launch("tests.save_ranks", folder)


def eager() -> dict[str, torch.Tensor]:
    torch.manual_seed(SEED)
    return Model().state_dict()


def test_what_is_on_the_disk_is_the_whole_model(found: tuple[Path, list[Any]]) -> None:
    folder, _ = found
    plan, expected = gp.trace(Model), eager()
    one = load_file(folder / "one.safetensors")
    assert one.keys() == expected.keys() - {"head.weight"}
    assert len(list((folder / "several").glob("*.safetensors"))) > 1
    for path in (folder / "one.safetensors", folder / "several", folder / "dcp"):
        model = plan.materialize(checkpoint=path, missing="error")
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, expected[name]), (path, name)


def test_packed_columns_are_put_together(found: tuple[Path, list[Any]]) -> None:
    """Of such a part torch 2.11 has no `full_tensor`."""
    torch.manual_seed(SEED)
    assert torch.equal(load_file(found[0] / "packed.safetensors")["weight"], Packed().weight)


def test_sharded_plans_load_it(found: tuple[Path, list[Any]]) -> None:
    expected = {name: tensor.tolist() for name, tensor in eager().items()}
    ones = {"embed.weight": torch.ones(31, 8).tolist(), "head.weight": torch.ones(31, 8).tolist()}
    for rank in found[1]:
        assert rank["loaded"]["one.safetensors"] == expected and rank["loaded"]["dcp"] == expected
        assert rank["loaded"]["part"] == expected | ones


def test_all_raise_and_nothing_is_left(found: tuple[Path, list[Any]]) -> None:
    folder, ranks = found
    for rank in ranks:
        assert "one.safetensors is there already, and would be lost" in rank["refused"]
        assert "No space left on device" in rank["full"] and "No space left on device" in rank["no room"]
    assert sorted(each.name for each in folder.iterdir()) == [
        "0.json",
        "1.json",
        "dcp",
        "one.safetensors",
        "packed.safetensors",
        "several",
    ]
