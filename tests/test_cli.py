"""The command line: what it prints, what it writes, and that a failure leaves one message and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from groundplan import cli
from groundplan.tracer.errors import MaterializeError

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        print("the constructor says hello")
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("scratch", torch.ones(2), persistent=False)

class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2)
        raise ValueError("width must be even")

class Extra(nn.Linear):
    def __init__(self):
        super().__init__(2, 2)
    def get_extra_state(self):
        return {"step": 1}
    def set_extra_state(self, state):
        pass
"""

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8"},
}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class Runner:
    """Runs one command in this process, in an empty folder that holds the module `cli_zoo`."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, *argv: str) -> Result:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        out, err = self._capsys.readouterr()
        return Result(int(ended.value.code or 0), out, err)


@pytest.fixture
def groundplan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Runner]:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cli_zoo.py").write_text(MODULE)
    yield Runner(tmp_path, capsys)
    sys.modules.pop("cli_zoo", None)


def eager(folder: Path, seed: int = 0) -> nn.Module:
    """What the eager constructor of `cli_zoo:Net` gives."""
    namespace: dict[str, Any] = {}
    exec((folder / "cli_zoo.py").read_text(), namespace)
    torch.manual_seed(seed)
    model: nn.Module = namespace["Net"]()
    return model


# -- report and explain -------------------------------------------------------------------------------------------------


def test_version(groundplan: Runner) -> None:
    result = groundplan("--version")
    assert result.code == 0
    assert result.out.startswith("groundplan ")
    assert torch.__version__ in result.out


def test_report_names_the_parameters(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net")
    assert result.code == 0
    assert "hello" not in result.out
    assert "hello" in result.err


def test_report_as_json_is_one_object(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net", "--kwargs", '{"width": 8}', "--json")
    assert result.code == 0
    assert result.json["spec"] == "cli_zoo:Net"
    assert "memory" not in result.json


def test_report_with_training_memory(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net", "--train", "adamw", "--json")
    assert result.json["memory"]


def test_report_of_a_config_with_a_cast(groundplan: Runner) -> None:
    pytest.importorskip("transformers")
    (groundplan.folder / "config.json").write_text(json.dumps(TINY))
    assert groundplan("report", ".", "--dtype", "bfloat16", "--json").code == 0


def test_explain_one_tensor_and_everything(groundplan: Runner) -> None:
    assert "first.weight" in groundplan("explain", "cli_zoo:Net", "first.weight").out
    assert groundplan("explain", "cli_zoo:Net").code == 0


def test_explain_an_unknown_tensor(groundplan: Runner) -> None:
    result = groundplan("explain", "cli_zoo:Net", "first.wieght")
    assert result.code == 1
    assert "'first.wieght'" in result.err
    assert "first.weight" in result.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--kwargs", "{width: 3}"], ["'{width: 3}'", "not valid JSON", "--kwargs"]),
        (["--kwargs", "[3]"], ["[3]", "JSON object"]),
        (["--kwargs", '{"wdith": 3}'], ["'wdith'", "width=4"]),
        (["--dtype", "bf16"], ["'bf16'", "bfloat16"]),
        (["--dtype", "int8"], ["'int8'", "floating-point"]),
        (["--dtype", "nn"], ["'nn'", "floating-point"]),
        (["--train", "adamv"], ["adamv", "adamw"]),
    ],
)
def test_wrong_options(groundplan: Runner, arguments: list[str], parts: list[str]) -> None:
    result = groundplan("report", "cli_zoo:Net", *arguments)
    assert result.code == 1
    assert result.out == ""
    assert all(part in result.err for part in parts), result.err
    assert "Traceback" not in result.err


# -- materialize --------------------------------------------------------------------------------------------------------


def test_materialize_writes_the_eager_values(groundplan: Runner) -> None:
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made/deep", "--seed", "1234")
    assert result.code == 0
    model = eager(groundplan.folder, 1234)
    loaded = load_file("made/deep/model.safetensors")
    assert set(loaded) == {"first.weight", "first.bias", "second.bias", "table"}
    for name, value in loaded.items():
        assert torch.equal(value, model.state_dict()[name])
    assert os.listdir("made/deep") == ["model.safetensors"]


def test_materialize_as_json_is_one_object(groundplan: Runner) -> None:
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made", "--json")
    size = 4 * (16 + 4 + 4 + 6)
    assert {"tensors": 4, "bytes": size, "ties": {"second.weight": "first.weight"}, "seed": 0}.items() <= result.json.items()
    assert result.json["files"] == ["made/model.safetensors"]


def test_ties_are_in_the_metadata_and_load_model_reads_them(groundplan: Runner) -> None:
    groundplan("materialize", "cli_zoo:Net", "--out", "made", "--seed", "7")
    with safe_open("made/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "second.weight": "first.weight"}
    model = eager(groundplan.folder, 0)
    load_model(model, "made/model.safetensors")
    assert torch.equal(model.state_dict()["second.weight"], eager(groundplan.folder, 7).state_dict()["first.weight"])


def test_materialize_casts(groundplan: Runner) -> None:
    groundplan("materialize", "cli_zoo:Net", "--out", "made", "--dtype", "bfloat16")
    model = eager(groundplan.folder).to(torch.bfloat16)
    loaded = load_file("made/model.safetensors")
    assert torch.equal(loaded["first.weight"], model.state_dict()["first.weight"])


def test_a_config_comes_back_through_from_pretrained(groundplan: Runner) -> None:
    transformers = pytest.importorskip("transformers")
    (groundplan.folder / "tiny.json").write_text(json.dumps(TINY))
    assert groundplan("materialize", "tiny.json", "--out", "made", "--kwargs", '{"num_hidden_layers": 2}').code == 0
    assert sorted(os.listdir("made")) == ["config.json", "model.safetensors"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained("made")
    fields = {key: value for key, value in TINY.items() if key not in ("model_type", "quantization_config", "torch_dtype")}
    torch.manual_seed(0)
    expected = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, "num_hidden_layers": 2})).state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, value in loaded.state_dict().items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value, expected[name]), name


def test_existing_files_are_kept_unless_forced(groundplan: Runner) -> None:
    Path("made").mkdir()
    Path("made/model.safetensors").write_text("precious")
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made")
    assert result.code == 1
    assert "--force" in result.err
    assert Path("made/model.safetensors").read_text() == "precious"
    assert groundplan("materialize", "cli_zoo:Net", "--out", "made", "--force").code == 0
    assert len(load_file("made/model.safetensors")) == 4


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (
            "cli_zoo:Broken",
            ["constructor cli_zoo:Broken raised ValueError: width must be even", "cli_zoo.py:", "raise ValueError"],
        ),
        ("cli_zoo:Extra", ["_extra_state", "dict"]),
        ("cli_zoo:Nothing", ["'Nothing'"]),
    ],
)
def test_a_failure_leaves_one_message_and_no_files(groundplan: Runner, spec: str, parts: list[str]) -> None:
    result = groundplan("materialize", spec, "--out", "made/deep")
    assert result.code == 1
    assert result.out == ""
    assert all(part in result.err for part in parts), result.err
    assert "Traceback" not in result.err
    assert not Path("made").exists()


def test_a_failed_write_keeps_the_old_file(groundplan: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object, path: Path, __: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    Path("made").mkdir()
    Path("made/model.safetensors").write_text("precious")
    monkeypatch.setattr(cli, "save_file", full)
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made", "--force")
    assert result.code == 1
    assert "No space left on device" in result.err
    assert os.listdir("made") == ["model.safetensors"]
    assert Path("made/model.safetensors").read_text() == "precious"


def test_a_file_in_the_way_of_the_folder(groundplan: Runner) -> None:
    Path("made").write_text("a file")
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made/deep")
    assert result.code == 1
    assert "made/deep cannot be written to" in result.err


def test_errors_of_groundplan_itself_keep_their_traceback(groundplan: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    inside = str(Path(cli.__file__).parent / "plan.py")
    exec(compile("def trace(*args, **kwargs): raise ZeroDivisionError", inside, "exec"), namespace)
    monkeypatch.setattr("groundplan.trace", namespace["trace"])
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "cli_zoo:Net"])


def test_python_dash_m(groundplan: Runner) -> None:
    root = Path(cli.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, "-m", "groundplan", "report", "cli_zoo:Net", "--json"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["spec"] == "cli_zoo:Net"


# -- what a file holds --------------------------------------------------------------------------------------------------


def save(tmp_path: Path, state: dict[str, Any]) -> tuple[cli.Saved, dict[str, torch.Tensor]]:
    saved = cli.save_state(state, tmp_path / "model.safetensors")
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
    assert set(cli._named_state((linear, {"b": linear}))) == {"0.weight", "0.bias", "1.b.weight", "1.b.bias"}


def test_progress_reaches_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with cli._progress() as progress:
        assert callable(progress)
        progress(1_500_000, 3_000_000)
    assert "1.5/3.0" in capsys.readouterr().err


def test_progress_is_silent_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with cli._progress() as progress:
        assert progress is False
