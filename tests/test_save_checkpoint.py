"""`plan.save_checkpoint`: what is on the disk is what `materialize` would give, and nothing is left where it fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as load_dcp

import groundplan as gp

from . import law, test_place, zoo

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(nn.Module):
    """Ties, buffers of both kinds, a scalar, an empty tensor, several dtypes, a view and a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(8)
        self.register_buffer("table", torch.arange(6).view(2, 3).t())
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.scale = nn.Parameter(torch.rand((), dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(0, 3))
        flat = torch.randn(12)
        self.left, self.right = nn.Parameter(flat[:8].view(2, 4)), nn.Parameter(flat[4:])


def read(path: Path) -> dict[str, torch.Tensor]:
    if path.is_file():
        return load_file(path)
    index = path / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in files for name, tensor in load_file(path / file).items()}


def expected(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("rng", ["eager", "keyed"])
@pytest.mark.parametrize("path", ["one.safetensors", "folder"])
def test_a_seeds_values(path: str, rng: str, tmp_path: Path) -> None:
    plan = gp.trace(Model).cast(torch.bfloat16)
    before = law.generator_states()
    plan.save_checkpoint(5, tmp_path / "new" / path, rng=rng)
    law.assert_same_states(before, law.generator_states(), "saving moved")
    assert_equal(read(tmp_path / "new" / path), expected(plan.materialize(seed=5, rng=rng)))


@pytest.mark.parametrize("source", ["seed", "module"])
def test_files_of_a_size(source: str, tmp_path: Path) -> None:
    plan = gp.trace(Model)
    model = plan.materialize(seed=5)
    plan.save_checkpoint(5 if source == "seed" else model, tmp_path, max_shard_size=600)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(each.nbytes for each in load_file(tmp_path / file).values()) for file in files]
    assert all(size <= 600 or len(load_file(tmp_path / file)) == 1 for file, size in zip(files, sizes, strict=True))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert_equal(read(tmp_path), expected(model))
    law.assert_same(model, gp.trace(Model).materialize(seed=5))


@pytest.mark.parametrize("source", ["seed", "module"])
def test_torchs_own_form(source: str, tmp_path: Path) -> None:
    plan = gp.trace(Model)
    model = plan.materialize(seed=5)
    before = law.generator_states()
    plan.save_checkpoint(5 if source == "seed" else model, tmp_path / "dcp", format="dcp")
    law.assert_same_states(before, law.generator_states(), "saving moved")
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected(model).items()}
    load_dcp(loaded, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert_equal(loaded, expected(model))
    again = plan.materialize(checkpoint=tmp_path / "dcp", missing="error")
    assert_equal(again.state_dict(), model.state_dict())


def test_without_a_seed_the_generators_state_counts(tmp_path: Path) -> None:
    plan = gp.trace(Model)
    torch.manual_seed(17)
    plan.save_checkpoint(None, tmp_path / "a")
    plan.save_checkpoint(None, tmp_path / "b", format="dcp")
    model = plan.materialize()  # from the same state
    assert_equal(read(tmp_path / "a"), expected(model))
    assert_equal(plan.materialize(checkpoint=tmp_path / "b").state_dict(), model.state_dict())


@pytest.mark.parametrize("name", zoo.transformers_types())
def test_of_transformers(name: str, tmp_path: Path) -> None:
    plan = gp.trace(zoo.transformers_types()[name])
    plan.save_checkpoint(3, tmp_path, max_shard_size="50kB")
    model = plan.materialize(seed=3)
    loaded = plan.materialize(checkpoint=tmp_path, missing="error")
    assert_equal(loaded.state_dict(), model.state_dict())


# -- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options"), [("a.safetensors", {}), ("folder", {}), ("folder", {"max_shard_size": 100}), ("dcp", {"format": "dcp"})]
)
def test_nothing_is_overwritten(path: str, options: Any, tmp_path: Path) -> None:
    plan = gp.trace(Model)
    plan.save_checkpoint(1, tmp_path / path, **options)
    before = {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}
    with pytest.raises(gp.CheckpointError, match="is there already, and would be lost"):
        plan.save_checkpoint(2, tmp_path / path, **options)
    assert before == {each: each.read_bytes() for each in tmp_path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("path", ["a.safetensors", "folder"])
def test_a_full_disk_leaves_nothing(
    path: str, existed: bool, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    if existed:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    done, write = [0], os.pwrite

    def full(*args: Any) -> int:
        done[0] += 1
        if done[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    before = law.generator_states()
    with pytest.raises(gp.CheckpointError, match=r"cannot write \S+ to .*No space left on device"):
        gp.trace(Model).save_checkpoint(1, folder / path)
    law.assert_same_states(before, law.generator_states(), "a failure moved")
    assert [each.name for each in tmp_path.rglob("*")] == (["new", "config.json"] if existed else [])


small_disk = test_place.small_disk


@pytest.mark.parametrize("source", ["seed", "module"])
@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_a_disk_that_is_really_full_leaves_nothing(form: str, source: str, small_disk: Path) -> None:
    plan = gp.trace(lambda: nn.Sequential(*[nn.Linear(400, 400) for _ in range(3)]))  # 1.9 MB, on 1 MiB
    with pytest.raises(gp.CheckpointError, match=rf"cannot write .*to {small_disk / 'new'}[:,].*name another path"):
        plan.save_checkpoint(1 if source == "seed" else plan.materialize(seed=1), small_disk / "new", format=form)
    assert not list(small_disk.iterdir())


def test_room_is_taken_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(gp.CheckpointError, match="No space left"):
        gp.trace(Model).save_checkpoint(1, tmp_path / "new")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (1, {"format": "pickle"}, r"format='pickle' is neither"),
        (1, {"max_shard_size": "5 parsecs"}, r"max_shard_size='5 parsecs' is no size"),
        (1, {"max_shard_size": 0}, r"max_shard_size=0 is no size"),
        ("model", {}, r"of a seed, of None or of a module, not of 'model'"),
        (True, {}, r"not of True"),
    ],
)
def test_what_makes_no_sense(source: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(gp.CheckpointError, match=message):
        gp.trace(Model).save_checkpoint(source, tmp_path / "new", **options)
    assert not any(tmp_path.iterdir())


def test_a_meta_module_has_nothing_to_save(tmp_path: Path) -> None:
    plan = gp.trace(Model)
    with pytest.raises(gp.CheckpointError, match=r"scale is still on the meta device"):
        plan.save_checkpoint(plan.meta_module(), tmp_path / "new")


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_a_lazy_module_has_no_values_yet(form: str, tmp_path: Path) -> None:
    with pytest.raises(gp.CheckpointError, match=r"weight belongs to a lazy module.*build the module, call it once"):
        gp.trace(nn.LazyLinear, 3).save_checkpoint(1, tmp_path / "new", format=form)
    assert not any(tmp_path.iterdir())


def test_a_dtype_that_safetensors_lacks(tmp_path: Path) -> None:
    plan = gp.trace(lambda: nn.Linear(2, 2, dtype=torch.complex128))
    with pytest.raises(
        gp.CheckpointError, match=r'weight is torch.complex128, which a safetensors file does not hold; say format="dcp"'
    ):
        plan.save_checkpoint(1, tmp_path / "new")
    plan.save_checkpoint(1, tmp_path / "new", format="dcp")
    assert torch.equal(plan.materialize(checkpoint=tmp_path / "new").weight, plan.materialize(seed=1).weight)


MEASURE = """
import resource, sys, torch, groundplan as gp
def build(): return torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(24)])  # 403 MB
gp.trace(torch.nn.Linear, 8, 8).save_checkpoint(0, sys.argv[1] + "/warm", format=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gp.trace(build).save_checkpoint(0, sys.argv[1] + "/out", format=sys.argv[2])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_the_model_is_never_there(form: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path), form], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 120e6, f"{int(done.stdout):,} bytes beside 403 MB"
