"""plan.place: several devices or the disk in one process; values, outputs, files, and every door."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.placing import device_map, is_placed

from .law import content

accelerate: Any = pytest.importorskip("accelerate")
utils: Any = pytest.importorskip("accelerate.utils")

SEED = 5
WORDS = torch.arange(12).reshape(3, 4)
DISK = {"*": "disk"}
MIXED = {"embed": "cpu", "layers.0": "cpu", "layers.1-2": "disk", "*": "cpu"}


class Block(nn.Module):
    """Parameters, buffers of two dtypes, and one that no state_dict has."""

    scale: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scale", torch.rand(width), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.norm((x + self.down(torch.relu(self.up(x)))).transpose(1, 2)).transpose(1, 2)
        return changed * self.scale


class Model(nn.Module):
    """An embedding, blocks, a head; the head's weight may be the embedding's."""

    def __init__(self, tied: bool = False, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.embed(words)
        for layer in self.layers:
            x = layer(x)
        scores: torch.Tensor = self.head(x)
        return scores


def tied() -> nn.Module:
    return Model(tied=True)


def eager(build: Callable[[], nn.Module] = Model, dtype: torch.dtype | None = None) -> nn.Module:
    torch.manual_seed(SEED)
    return build().to(dtype).eval()


def on_disk(folder: Path) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    return {name: utils.offload.load_offloaded_weight(str(folder / f"{name}.dat"), entry) for name, entry in index.items()}


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one.dtype, one.shape) == (other.dtype, other.shape) and content(one) == content(other)


def assert_equal(model: nn.Module, expected: nn.Module, folder: Path | None = None) -> None:
    """Every value, in memory or on disk, and what the module computes: eager's, bit for bit."""
    files = on_disk(folder) if folder is not None and folder.exists() else {}
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    for name, value in (*expected.named_parameters(remove_duplicate=False), *expected.named_buffers(remove_duplicate=False)):
        assert tensors[name].is_meta == (name in files), name
        assert_same(files.pop(name, tensors[name]).detach(), value.detach())
    assert not files
    with torch.no_grad():
        assert_same(model.eval()(WORDS), expected(WORDS))
        assert_same(model(WORDS), expected(WORDS))


# -- where there is what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Model, tied])
@pytest.mark.parametrize("devices", [{"*": "cpu"}, MIXED, DISK], ids=["cpu", "cpu and disk", "disk"])
def test_it_is_eagers_model(build: Callable[[], nn.Module], devices: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    model = gp.trace(build).place(devices).materialize(seed=SEED, offload_dir=folder)
    after = torch.get_rng_state()
    expected = eager(build)
    assert torch.equal(after, torch.get_rng_state())
    assert folder.exists() == ("disk" in devices.values())
    assert_equal(model, expected, folder)


@pytest.mark.parametrize("devices", [MIXED, DISK], ids=["cpu and disk", "disk"])
def test_buffers_of_modules_on_disk_are_in_memory(devices: dict[str, str], tmp_path: Path) -> None:
    model = gp.trace(Model).place(devices).materialize(seed=SEED, offload_dir=tmp_path / "offload")
    for name, buffer in model.named_buffers():
        assert buffer.device.type == "cpu", name
        assert not (tmp_path / "offload" / f"{name}.dat").exists()


def test_a_tie_on_disk_is_one_file_under_two_names(tmp_path: Path) -> None:
    gp.trace(tied).place({"embed": "disk", "head": "disk", "*": "cpu"}).materialize(seed=SEED, offload_dir=tmp_path)
    one, other = tmp_path / "embed.weight.dat", tmp_path / "head.weight.dat"
    assert one.stat().st_ino == other.stat().st_ino and sorted(on_disk(tmp_path)) == ["embed.weight", "head.weight"]


@pytest.mark.parametrize("devices", [{"*": "cpu"}, MIXED, DISK], ids=["cpu", "cpu and disk", "disk"])
def test_a_cast_is_done_before(devices: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "offload"
    model = gp.trace(Model).cast(torch.bfloat16).place(devices).materialize(seed=SEED, offload_dir=folder)
    assert_equal(model, eager(Model, torch.bfloat16), folder)
    if folder.exists():
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        assert {entry["dtype"] for entry in index.values()} == {"bfloat16"}
        assert (folder / "layers.1.up.weight.dat").stat().st_size == 2 * 16 * 8


def test_a_cast_after_placing_is_the_same(tmp_path: Path) -> None:
    plan = gp.trace(Model).place(MIXED).cast(torch.bfloat16)
    assert_equal(plan.materialize(seed=SEED, offload_dir=tmp_path), eager(Model, torch.bfloat16), tmp_path)


def test_without_a_seed_the_global_generator_is_drawn_from(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    model = gp.trace(Model).place(MIXED).materialize(offload_dir=tmp_path)
    assert_equal(model, eager(), tmp_path)


def test_keyed_values_are_those_of_any_plan(tmp_path: Path) -> None:
    plan = gp.trace(Model)
    before = torch.get_rng_state()
    model = plan.place(MIXED).materialize(seed=SEED, rng="keyed", offload_dir=tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert_equal(model, plan.materialize(seed=SEED, rng="keyed").eval(), tmp_path)


def test_it_is_built_any_number_of_times(tmp_path: Path) -> None:
    plan = gp.trace(Model).place(MIXED)
    first = plan.materialize(seed=SEED, offload_dir=tmp_path / "first")
    second = plan.materialize(seed=SEED, offload_dir=tmp_path / "second")
    assert_equal(second, eager(), tmp_path / "second")
    assert_equal(first, eager(), tmp_path / "first")


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = gp.trace(Model).place(MIXED)
    plan.save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    assert loaded.decisions == plan.decisions
    model = loaded.bind(Model).materialize(seed=SEED, offload_dir=tmp_path / "offload")
    assert_equal(model, eager(), tmp_path / "offload")


def test_it_is_reported_and_explained() -> None:
    plan = gp.trace(Model).place(MIXED)
    for each in (plan.report(), plan.explain()):
        assert "place embed on cpu, layers.0 on cpu, layers.1-2 on disk, * on cpu" in " ".join(str(each).split())


# -- patterns -----------------------------------------------------------------------------------------------------------


def homes(devices: dict[str, Any]) -> dict[str, str]:
    plan = gp.trace(Model).place(devices)
    assert plan.decisions.placing is not None
    return {tensor.name: plan.decisions.placing.device_for(tensor) or "" for tensor in plan.graph.tensors}


def test_a_range_of_numbers() -> None:
    found = homes({"layers.0-2": "disk", "*": "cpu"})
    assert {name.split(".")[1] for name, device in found.items() if device == "disk"} == {"0", "1", "2"}
    assert is_placed("layers.0-3", "layers.3.up.weight") and not is_placed("layers.0-3", "layers.30.up.weight")
    assert is_placed("layers.9-11", "layers.10.up.weight") and not is_placed("layers.9-11", "layers.1.up.weight")
    assert not is_placed("layers.0-3", "layers.x.up.weight") and not is_placed("layers.0-3.up.weight", "layers.3")


def test_the_first_match_wins() -> None:
    found = homes({"layers.1": "cpu", "layers.*": "disk", "*": "cpu"})
    assert found["layers.1.up.weight"] == "cpu" and found["layers.2.up.weight"] == "disk" and found["head.weight"] == "cpu"
    found = homes({"layers.*": "disk", "layers.1": "cpu", "*": "cpu"})
    assert found["layers.1.up.weight"] == "disk"


def test_devices_are_named_as_torch_names_them() -> None:
    found = homes({"layers.*": torch.device("cuda", 1), "*": torch.device("cpu")})
    assert set(found.values()) == {"cuda:1", "cpu"}


def test_the_largest_modules_are_dispatched() -> None:
    plan = gp.trace(Model).place(MIXED)
    assert plan.decisions.placing is not None
    entries = device_map(plan.decisions.placing, plan.graph)
    layers = {"layers.0": "cpu", "layers.1": "disk", "layers.2": "disk", "layers.3": "cpu"}
    assert entries == {"embed": "cpu", **layers, "head": "cpu"}


# -- doors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({}, r"devices=\{\} places nothing"),
        ("disk", "devices='disk' places nothing"),
        ({"*": "floppy"}, "floppy"),
        ({"*": "mps"}, "mps"),
        ({"*": "meta"}, "meta"),
        ({"*": 7}, "7"),
        ({"layer.*": "cpu", "*": "cpu"}, "the pattern 'layer.*' matches no tensor"),
        ({"layers.7-9": "cpu", "*": "cpu"}, "the pattern 'layers.7-9' matches no tensor"),
        ({"layers.*": "cpu"}, "no pattern matches embed.weight and 1 more"),
    ],
)
def test_what_does_not_fit_is_refused(devices: Any, said: str) -> None:
    with pytest.raises(gp.DecisionError, match=said):
        gp.trace(Model).place(devices)


def test_a_tie_on_two_devices_is_refused() -> None:
    with pytest.raises(gp.DecisionError, match=r"the rules put embed\.weight on cpu, head\.weight on disk"):
        gp.trace(tied).place({"head": "disk", "*": "cpu"})


def test_one_of_a_modules_tensors_on_disk_is_refused(tmp_path: Path) -> None:
    plan = gp.trace(Model)
    with pytest.raises(gp.DecisionError, match=r"layers\.1\.up\.weight cannot stay on disk"):
        plan.place({"layers.1.up.weight": "disk", "*": "cpu"}).materialize(seed=SEED, offload_dir=tmp_path / "offload")
    assert not (tmp_path / "offload").exists()


def test_beside_other_decisions_about_devices_it_is_refused() -> None:
    plan = gp.trace(Model)
    with pytest.raises(gp.DecisionError, match="leave out"):
        plan.shard({"dp": 2}).place({"*": "cpu"})
    with pytest.raises(gp.DecisionError, match="cannot be sharded as well"):
        plan.place({"*": "cpu"}).shard({"dp": 2})
    with pytest.raises(gp.DecisionError, match="leave out"):
        plan.to("cpu").place({"*": "cpu"})
    with pytest.raises(gp.DecisionError, match=r"leave out \.to\('cpu'\)"):
        plan.place({"*": "cpu"}).to("cpu")


def test_several_modules_are_refused() -> None:
    with pytest.raises(gp.DecisionError, match="place each of them by itself"):
        gp.trace(lambda: (nn.Linear(2, 2), nn.Linear(2, 2))).place({"*": "cpu"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    plan = gp.trace(Model).place({"layers.*": "cuda:0", "*": "disk"})
    with pytest.raises(gp.MaterializeError, match="has no CUDA device; place it elsewhere"):
        plan.materialize(seed=SEED, offload_dir=tmp_path / "offload")
    assert not (tmp_path / "offload").exists()


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gp.trace(Model).place({"*": "cpu"})
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(gp.MaterializeError, match="pip install accelerate"):
        plan.materialize(seed=SEED)


# -- the folder ---------------------------------------------------------------------------------------------------------


def refused(offload_dir: Any, said: str, error: type[Exception] = gp.MaterializeError) -> str:
    """What is said; the generators are as before."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with pytest.raises(error, match=said) as raised:
        gp.trace(Model).place(MIXED).materialize(seed=SEED, offload_dir=offload_dir)
    assert torch.equal(before, torch.get_rng_state())
    return str(raised.value)


def test_a_folder_is_needed() -> None:
    refused(None, "offload_dir=PATH")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    assert str(tmp_path) in refused(tmp_path, "is not empty")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        refused(tmp_path / "offload", "cannot write to")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["file", "file/offload"])
def test_a_file_is_no_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious", encoding="utf-8")
    refused(tmp_path / name, "cannot write to")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "precious"


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at the fourth tensor."""
    original, calls = utils.offload_weight, []

    def offload_weight(weight: torch.Tensor, name: str, *rest: Any) -> Any:
        calls.append(name)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        return original(weight, name, *rest)

    monkeypatch.setattr(utils, "offload_weight", offload_weight)


@pytest.mark.parametrize("existed", [True, False])
def test_a_full_disk_leaves_nothing(existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offload"
    if existed:
        folder.mkdir()
    failing(monkeypatch)
    said = refused(folder, "No space left on device")
    assert re.match(rf"cannot write layers\.[12]\.\w+\.(weight|bias) to {re.escape(str(folder))}: No space left", said)
    assert folder.exists() == existed and not list(tmp_path.rglob("*.dat")) and not list(tmp_path.rglob(".groundplan*"))


LIMITED = """
import resource, signal, sys
import torch, groundplan as gp
from torch import nn
plan = gp.trace(nn.Linear, 600, 600).place({"*": "disk"})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
try:
    plan.materialize(seed=0, offload_dir=sys.argv[1])
except gp.MaterializeError as error:
    print(error)
"""


def run(code: str, *arguments: str) -> str:
    """What a process of its own prints."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    said = run(LIMITED, str(tmp_path / "offload"))
    assert said.startswith(f"cannot write weight to {tmp_path / 'offload'}: File too large")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_leaves_nothing(small_disk: Path) -> None:
    said = run(LIMITED.replace("(2**20, 2**20)", "(2**30, 2**30)"), str(small_disk / "offload"))
    assert said.startswith(f"cannot write weight to {small_disk / 'offload'}: No space left on device")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("existed", [True, False])
def test_a_failing_dispatch_leaves_nothing(existed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "offload"
    if existed:
        folder.mkdir()

    def dispatch_model(*_: Any, **__: Any) -> None:
        raise ValueError("no dispatch today")

    monkeypatch.setattr(accelerate, "dispatch_model", dispatch_model)
    refused(folder, "no dispatch today", ValueError)
    assert list(tmp_path.rglob("*")) == ([folder] if existed else [])


def test_folders_above_that_were_made_are_gone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch)
    refused(tmp_path / "one" / "two" / "offload", "No space left on device")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mkdtemp(**_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", mkdtemp)
    refused(tmp_path / "offload", "No space left on device")
    assert not list(tmp_path.iterdir())


# -- memory -------------------------------------------------------------------------------------------------------------


def test_what_is_on_disk_counts_only_while_it_is_made() -> None:
    plan = gp.trace(Model, width=64)
    whole = sum(tensor.nbytes for tensor in eager(lambda: Model(width=64)).state_dict().values())
    disk, mixed = plan.place(DISK).memory(), plan.place({"layers.*": "disk", "*": "cpu"}).memory()
    largest = 20 * 64 * 4 + 2 * 64 * 64 * 4
    buffers = 4 * (3 * 64 * 4 + 8)
    assert buffers < disk.phases["construct"] <= buffers + largest
    assert disk.phases["construct"] < mixed.phases["construct"] < plan.memory().phases["construct"]
    assert plan.memory().phases["construct"] >= whole > 2 * disk.peak
    assert disk.by_device.keys() >= {"construct"} and set(disk.by_device["construct"]) == {"cpu"}


RESIDENT = """
import sys, tempfile
from benchmarks.common import measured
from torch import nn
import groundplan as gp
def build(width, count):
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))
with tempfile.TemporaryDirectory() as folder:
    gp.trace(build, 8, 2).place({"*": "disk"}).materialize(seed=0, offload_dir=folder + "/small")
    plan = gp.trace(build, 2500, 12).place({"*": "disk"})
    found = {}
    with measured(found):
        model = plan.materialize(seed=0, offload_dir=folder + "/large")
print(found["peak_growth"], plan.memory().phases["construct"])
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="resident memory cannot be watched")
def test_a_model_on_disk_is_never_in_memory() -> None:
    growth, predicted = map(int, run(RESIDENT).split()[-2:])
    assert growth < 120e6, "the model is 300 MB, its largest tensor 25"
    assert predicted < 30e6
