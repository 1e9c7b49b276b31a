"""The examples run, and the README shows what they print.

`GROUNDPLAN_UPDATE=1 python -m pytest tests/test_examples.py` writes the README's blocks anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import groundplan as gp
from groundplan import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = ROOT / "README.md"
WRITTEN_WITH = {"torch": "2.13.0", "transformers": "5.24.0"}  # other versions print other lines
BLOCK = re.compile(r"<!-- block: (\w+) -->\n```\n(.*?)```\n", re.DOTALL)
_SHOWN_LINES = 17  # of the graph's text


def installed(name: str) -> str:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "none"


def run(*command: str | Path) -> str:
    """What a Python command prints, run from the examples' folder, as a user would."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), str(ROOT)]), "PYTHONWARNINGS": "ignore"}
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, cwd=ROOT / "examples", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path) -> None:
    if path.stem.startswith("deepspeed") and installed("deepspeed") == "none":
        pytest.skip("needs DeepSpeed")
    output = run(path)
    assert output.strip()
    assert '"""' in path.read_text(encoding="utf-8")[:3], "an example says first what it shows"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 75


@cache
def blocks() -> dict[str, str]:
    """What the README quotes, printed anew."""
    found: dict[str, str] = json.loads(run("-c", "import json, tagger; print(json.dumps(tagger.show()))"))
    graph = found["graph"].splitlines()
    found["graph"] = "\n".join([*graph[:_SHOWN_LINES], "..."])
    found["recipe"] = run("meta_device_recipe.py").rstrip("\n")
    return found


@pytest.mark.skipif(
    {name: installed(name) for name in WRITTEN_WITH} != WRITTEN_WITH, reason=f"the README is written with {WRITTEN_WITH}"
)
def test_the_readme_shows_what_is_printed() -> None:
    text = README.read_text(encoding="utf-8")
    renewed = BLOCK.sub(lambda match: f"<!-- block: {match[1]} -->\n```\n{blocks()[match[1]]}\n```\n", text)
    assert {name for name, _ in BLOCK.findall(text)} == set(blocks())
    if os.environ.get("GROUNDPLAN_UPDATE"):
        README.write_text(renewed, encoding="utf-8")
        return
    assert text == renewed, "run with GROUNDPLAN_UPDATE=1 to write the README's blocks anew"


class MyModel(nn.Module):
    """What the README's code is about."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.lm_head = nn.Linear(width, width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            value = torch.relu(layer(value))
        scores: torch.Tensor = self.lm_head(value)
        return scores


def readme_code() -> dict[str, list[str]]:
    """The README's Python blocks, by the heading that they are under."""
    text = README.read_text(encoding="utf-8")
    sections = re.split(r"^##+ ", text, flags=re.MULTILINE)
    found = {each.splitlines()[0]: re.findall(r"^```python\n(.*?)^```$", each, re.DOTALL | re.MULTILINE) for each in sections}
    return {heading: blocks for heading, blocks in found.items() if blocks}


SHARDED = "Sharded: each rank only its own part"
CHECKPOINTS = "Checkpoints"
FITTED = "Fitted to a cluster"


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in ("torchao", "transformers", "resvg_py"):
        pytest.importorskip(needed)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MyModel": MyModel, "args": (8,), "kwargs": {}}
    code = [
        block for heading, blocks in readme_code().items() if heading not in (SHARDED, CHECKPOINTS, FITTED) for block in blocks
    ]
    assert len(code) == 9
    for each in code:
        exec(each, names)
        torch.manual_seed(0)
        assert torch.equal(names["model"].lm_head.weight, MyModel(8).to(torch.bfloat16).lm_head.weight)


def test_the_readmes_code_on_sharding_runs(process_group: None) -> None:
    """In one process: the first block as it stands, FSDP1, the last until it needs sixteen, and what it places without a GPU."""
    by_hand, by_unit, by_plan, by_layer, reckoned = readme_code()[SHARDED]
    mesh = init_device_mesh("cpu", (1,))
    names: dict[str, Any] = {"gp": gp, "torch": torch, "MyModel": MyModel, "config": 8, "mesh": mesh, "fully_shard": fully_shard}
    exec(by_hand, names)
    torch.manual_seed(0)
    assert torch.equal(names["module"].lm_head.weight.full_tensor(), MyModel(8).lm_head.weight)

    names |= {"FSDP": FullyShardedDataParallel, "policy": ModuleWrapPolicy({nn.Linear}), "device": torch.device("cpu")}
    exec(by_unit.partition("\n\n")[0], names)  # examples/deepspeed_zero3.py does what the rest does
    with FullyShardedDataParallel.summon_full_params(names["module"]):
        torch.manual_seed(0)
        assert torch.equal(names["module"].state_dict()["lm_head.weight"], MyModel(8).lm_head.weight)

    names["plan"] = gp.trace(llama)
    decided, built = by_plan.split("model = plan.materialize")
    exec(decided, names)
    assert names["plan"].decisions.sharding.describe() == "dp_shard=8 x tp=2"
    assert "place(" in built
    names["plan"] = gp.trace(llama)
    few = by_layer.replace("0-11", "0").replace("12-20", "1").replace("28-31", "1")  # the small model has two layers
    exec(few, names)
    assert [rule.level for rule in names["plan"].decisions.checkpointing] == ["full", "selective"]
    names["plan"] = gp.trace(llama)
    exec(reckoned.replace('"pp": 4', '"pp": 2').replace(', "ep": 8', ""), names)  # the small model has two layers, no experts
    names["plan"] = gp.trace(MyModel, 8)
    with pytest.raises(gp.GroundplanError, match="cuda:0"):
        exec(built.partition("\n\n")[2], names)


def test_the_readmes_code_on_checkpoints_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = MyModel(8).state_dict()
    save_file(state, "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "lm_head.bias"}, "part.safetensors")
    torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()} | {"old": torch.ones(1)}}, "trainer.ckpt")
    (block,) = readme_code()[CHECKPOINTS]
    names: dict[str, Any] = {"gp": gp, "MyModel": MyModel, "args": (8,), "kwargs": {}}
    exec(block, names)
    for name, value in names["model"].state_dict().items():
        assert torch.equal(value, state[name])
    assert load_file("initial/model.safetensors").keys() == state.keys()


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    module: nn.Module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))
    return module


def test_the_readmes_code_on_fitting_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a small model, and its commands as well."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    (block,) = readme_code()[FITTED]
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2)
    names: dict[str, Any] = {"gp": gp, "torch": torch, "transformers": transformers, "config": config}
    exec(block, names)
    assert "two plans of" in capsys.readouterr().out
    assert gp.Plan.load("llama.plan.json").decisions == names["plan"].decisions
    text = README.read_text(encoding="utf-8").replace("\\\n", "")
    fits, none = re.findall(r"^\$ groundplan (fit .*)$", text, re.MULTILINE)
    small = ["--kwargs", json.dumps({"num_hidden_layers": 2, "vocab_size": 128, "hidden_size": 64}), "--tier", "T0"]
    for line in (fits, none):
        command = [part.replace("examples", str(ROOT / "examples")) for part in shlex.split(line)]
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, *small])
        assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "llama.html").exists()


def test_the_readmes_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    text = README.read_text(encoding="utf-8").replace("\\\n", "")
    lines = [line for line in re.findall(r"^\$ groundplan (.*)$", text, re.MULTILINE) if not line.startswith("fit")]
    assert [line.split()[0] for line in lines] == ["report", "report", "report", "report", "explain", "materialize", "doctor"]
    for line in (*lines[1:5], lines[6]):  # the first is the user's own model, the sixth writes gigabytes
        for name in ("report.html", "memory.svg"):
            line = line.replace(name, str(tmp_path / name))
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line))
        assert not ended.value.code, capsys.readouterr().err
    assert (tmp_path / "report.html").exists() and (tmp_path / "memory.svg").exists()


def test_the_readmes_files_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:examples|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    named = set(re.findall(r"`(\w+\.py)`", text.partition("## More")[2]))
    assert named | {"tagger.py"} == {path.name for path in EXAMPLES}
