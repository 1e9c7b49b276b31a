"""What a safetensors file holds of a state_dict, and what a folder holds after a command that failed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from groundplan.save import Output, Saved, named_state, save_state
from groundplan.tracer.errors import MaterializeError


def save(tmp_path: Path, state: dict[str, Any]) -> tuple[Saved, dict[str, torch.Tensor]]:
    saved = save_state(state, tmp_path / "model.safetensors")
    return saved, load_file(tmp_path / "model.safetensors")


def test_a_part_of_a_whole_is_stored_once(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    saved, loaded = save(tmp_path, {"part": whole[:3], "whole": whole})
    assert saved.ties == {"part": "whole"}
    assert torch.equal(loaded["whole"], whole)


def test_overlapping_parts_without_a_whole_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    saved, loaded = save(tmp_path, {"left": whole[:4], "right": whole[2:], "again": whole[2:]})
    assert saved.ties == {"again": "right"}
    assert saved.nbytes == 32
    assert torch.equal(loaded["right"], whole[2:])


def test_an_expanded_tensor_is_no_whole(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    saved, loaded = save(tmp_path, {"wide": base[:2].expand(2, 2), "base": base})
    assert saved.ties == {"wide": "base"}
    assert torch.equal(loaded["base"], base)


def test_strides_and_lazy_bits_are_resolved(tmp_path: Path) -> None:
    square, value = torch.arange(4.0).view(2, 2), torch.tensor([1 + 2j])
    _, loaded = save(tmp_path, {"turned": square.t(), "conjugate": value.conj()})
    assert torch.equal(loaded["turned"], square.t())
    assert torch.equal(loaded["conjugate"], torch.tensor([1 - 2j]))


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (torch.empty(2, device="meta"), "meta device"),
        (nn.LazyLinear(2).weight, "lazy"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        ({"step": 1}, "dict"),
    ],
)
def test_what_a_file_cannot_hold(tmp_path: Path, value: object, part: str) -> None:
    with pytest.raises(MaterializeError, match=r"odd .*torch\.save") as caught:
        save(tmp_path, {"fine": torch.ones(1), "odd": value})
    assert part in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_members_of_a_tuple_or_a_dict_come_under_their_key() -> None:
    linear = nn.Linear(1, 1)
    assert set(named_state((linear, {"b": linear}))) == {"0.weight", "0.bias", "1.b.weight", "1.b.bias"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    save(tmp_path, {"one": torch.ones(1)})
    (tmp_path / "other").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# -- the folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_gets_all_files_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "deep"
    with pytest.raises(ZeroDivisionError), Output(folder, ("a", "b"), force=False) as output:
        output.temporary("a").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with Output(folder, ("a", "b"), force=False) as output:
        output.temporary("a").write_text("one")
        output.temporary("b").write_text("two")
        output.commit()
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"a": "one", "b": "two"}


def test_what_somebody_else_put_there_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Output(tmp_path / "made", ("a",), force=False):
        (tmp_path / "made" / "notes").write_text("mine")
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["notes"]
