"""`groundplan report`: the options that say what is trained, how it is divided, by which tier, and what is written."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest
import torch

import groundplan as gp

from .test_cli import TINY, Runner, groundplan  # noqa: F401  (a fixture)

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
    def forward(self, x: torch.Tensor):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x
"""


@pytest.fixture
def llama(groundplan: Runner) -> Runner:  # noqa: F811
    """The runner, in a folder with a tiny Llama's `config.json`."""
    pytest.importorskip("transformers")
    fields = {key: value for key, value in TINY.items() if key not in ("torch_dtype", "quantization_config")}
    (groundplan.folder / "config.json").write_text(json.dumps(fields))
    return groundplan


TRAINING = ["--train", "adamw", "--batch-size", "3", "--seq-len", "7", "--autocast", "bfloat16"]
TRAINING += ["--checkpointing", "full", "--clip-grad-norm", "1.0"]


def test_training_is_what_the_options_say(llama: Runner) -> None:
    result = llama("report", "config.json", *TRAINING, "--tier", "T1", "--json")
    assert result.code == 0, result.err
    memory = result.json["memory"]
    workload = gp.Training("adamw", 3, 7, autocast=torch.bfloat16, checkpointing="full", clip_grad_norm=1.0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_json_file(str(llama.folder / "config.json"))
    expected = gp.trace(LlamaForCausalLM, config).memory(workload, tier="T1")
    known = json.loads(json.dumps(expected.to_json()))
    assert {**memory, "timeline": None} == {**known, "timeline": None}, "when garbage is collected differs from run to run"
    assert [each["device"] for each in memory["timeline"]] == ["cpu"]
    assert memory["tier"] == "T1" and "reserved" not in memory
    plain = llama("report", "config.json", "--train", "adamw", "--batch-size", "3", "--seq-len", "9", "--tier", "T1", "--json")
    assert plain.json["peak"] > result.json["peak"]


def test_everything_at_once(llama: Runner) -> None:
    files = ["--html", "out.html", "--svg", "out.svg"]
    more = ["--tier", "T2", "--allocator", "expandable_segments:True", "--cluster", "8xH100-80GB"]
    result = llama("report", "config.json", *TRAINING, *more, *files, "--json")
    assert result.code == 0, result.err
    found = result.json
    memory = found["memory"]
    assert memory["tier"] == "T2" and memory["allocator"]["settings"] == "expandable_segments=True"
    assert memory["allocator"]["workspaces"][0] == 32 * 2**20, "the cluster's devices are Hopper's"
    assert memory["reserved"]["step"]["cuda:0"]["reserved"] >= memory["reserved"]["step"]["cuda:0"]["active"]
    assert found["verdict"]["cluster"] == "8xH100-80GB" and "reserved beyond them" in found["verdict"]["binding"]["added"]
    (cpu, cuda) = memory["timeline"]
    assert (cpu["device"], cuda["device"]) == ("cpu", "cuda:0") and "reserved" in cuda["phases"][0]
    step = next(phase for phase in cuda["phases"] if phase["phase"] == "step")
    assert max(map(sum, zip(*step["bytes"], strict=True))) == memory["by_device"]["step"]["cuda:0"]
    assert "<svg" in (llama.folder / "out.html").read_text(encoding="utf-8")
    assert ElementTree.fromstring((llama.folder / "out.svg").read_text(encoding="utf-8")).tag.endswith("svg")


def test_what_is_reserved_is_printed(llama: Runner) -> None:
    shown = llama("report", "config.json", *TRAINING, "--device", "cuda", "--tier", "T2").out
    assert "cuda:0, active" in shown and "cuda:0, reserved" in shown
    assert max(map(len, shown.splitlines())) <= 100


@pytest.fixture
def net(groundplan: Runner) -> Runner:  # noqa: F811
    """The runner, in a folder with a module of layers."""
    (groundplan.folder / "cli_net.py").write_text(MODEL)
    return groundplan


def test_shards_are_what_the_options_say(net: Runner) -> None:
    options = ["--shard", '{"dp": 8}', "--compute-dtype", "bfloat16", "--reduce-dtype", "float32"]
    found = net("report", "cli_net:Net", "--train", "adamw", *options, "--cluster", "8xH100-80GB", "--json").json
    assert found["sharding"]["axes"] == [{"name": "dp", "size": 8}]
    assert (found["sharding"]["compute_dtype"], found["sharding"]["reduce_dtype"]) == ("bfloat16", "float32")
    assert [each["ranks"] for each in found["ranks"]] == [list(range(8))]
    rules = ["--shard", '{"dp": 2, "tp": 2}', "--tensor", '{"layers.*": "colwise"}']
    found = net("report", "cli_net:Net", *rules, "--json").json
    assert found["sharding"]["tensor"] == [{"pattern": "layers.*", "style": "colwise"}]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--train", "adamv"], ["--train", "'adamv'", "adamw"]),
        (["--train", "adamw", "--batch-size", "0"], ["--batch-size", "0", "from 1 up"]),
        (["--train", "adamw", "--seq-len", "-3"], ["--seq-len", "-3"]),
        (["--train", "adamw", "--autocast", "bf16"], ["--autocast", "'bf16'", "bfloat16"]),
        (["--train", "adamw", "--autocast", "float32"], ["--autocast", "float32", "bfloat16"]),
        (["--train", "adamw", "--checkpointing", "ful"], ["--checkpointing", "'ful'", "full"]),
        (["--train", "adamw", "--clip-grad-norm", "0"], ["--clip-grad-norm", "above 0"]),
        (["--batch-size", "2"], ["--batch-size", "--train adamw"]),
        (["--clip-grad-norm", "2"], ["--clip-grad-norm", "--train adamw"]),
        (["--train", "adamw", "--tier", "T3"], ["--tier", "'T3'", "T0, T1, T2"]),
        (["--tier", "T1"], ["--tier T1", "--train adamw"]),
        (["--train", "adamw", "--tier", "T1", "--allocator", "expandable_segments:True"], ["--allocator", "--tier T2"]),
        (["--train", "adamw", "--tier", "T2", "--allocator", "expandible:True"], ["--allocator", "'expandible'"]),
        (["--shard", "{dp: 8}"], ["--shard", "'{dp: 8}'", "not valid JSON"]),
        (["--shard", "8"], ["--shard", "JSON object", "got 8"]),
        (["--shard", '{"dp": "8"}'], ["--shard", "'dp' is \"8\""]),
        (["--shard", '{"dq": 8}'], ["--shard", "dq"]),
        (["--compute-dtype", "bfloat16"], ["--compute-dtype", "--shard"]),
        (["--tensor", "auto"], ["--tensor", "--shard"]),
        (["--shard", '{"tp": 2}', "--tensor", "[]"], ["--tensor", "JSON object"]),
        (["--shard", '{"dp": 2}', "--reduce-dtype", "int8"], ["--reduce-dtype", "'int8'"]),
        (["--svg", "no/such/folder.svg"], ["no/such/folder.svg cannot be written"]),
    ],
    ids=lambda each: "_".join(each) if isinstance(each, list) and each[0].startswith("--") and len(each) < 8 else "",
)
def test_what_is_wrong_is_said_of_its_option(net: Runner, arguments: list[str], parts: list[str]) -> None:
    result = net("report", "cli_net:Net", *arguments)
    assert (result.code, result.out) == (1, ""), result
    assert all(part in result.err for part in parts), result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("flag", "value"), [("--batch-size", "two"), ("--clip-grad-norm", "much")])
def test_what_is_no_number(net: Runner, flag: str, value: Any) -> None:
    result = net("report", "cli_net:Net", "--train", "adamw", flag, value)
    assert result.code == 2 and f"Invalid value for '{flag}'" in result.err
