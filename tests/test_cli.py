"""The command line: what it prints, what it writes, and that a failure leaves one message and nothing else."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

from groundplan import cli
from groundplan.progress import progress_bar

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"

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
    assert all(part in result.out for part in ("first.weight", "second.weight = first.weight", "kaiming_uniform_", "table"))
    assert max(map(len, result.out.splitlines())) <= 100
    assert "hello" not in result.out
    assert result.err == "the constructor says hello\n"


def test_report_as_json_is_one_object(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net", "--kwargs", '{"width": 8}', "--json")
    assert result.code == 0
    assert result.json["spec"] == "cli_zoo:Net"
    assert result.json["parameters"] == {"tensors": 3, "elements": 80, "trainable": 80}
    assert result.json["ties"] == {"first.weight": ["second.weight"]}
    assert list(result.json["memory"]["phases"]) == ["construct", "load", "checkpoint"]


def test_report_with_training_memory(groundplan: Runner) -> None:
    found = groundplan("report", "cli_zoo:Net", "--train", "adamw", "--json").json
    assert found["phases"] == found["memory"]["phases"]
    assert found["memory"]["binding"]["phase"] == "optimizer"
    shown = groundplan("report", "cli_zoo:Net", "--train", "adamw").out
    assert len(re.findall(r"^ +construct +\d", shown, re.MULTILINE)) == 1
    assert "first_step" in shown


def test_report_with_the_memory_of_serving(groundplan: Runner) -> None:
    config = str(CONFIGS / "llama-3.2-1b.json")
    pytest.importorskip("transformers")
    serving = ("--infer", "--batch-size", "2", "--seq-len", "64", "--new-tokens", "4", "--cache", "static", "--dtype", "bfloat16")
    found = groundplan("report", config, *serving, "--cluster", "24GB", "--json").json
    assert list(found["phases"]) == ["construct", "load", "first_step", "step", "checkpoint"]
    assert found["verdict"]["verdict"] == "fits" and found["memory"]["reserved"]["step"]["cuda:0"]["reserved"] > 0
    assert any(each["kind"] == "KV cache" for each in found["memory"]["at_peak"])


def test_report_with_a_cast_and_a_move(groundplan: Runner) -> None:
    found = groundplan("report", "cli_zoo:Net", "--dtype", "bfloat16", "--device", "cuda", "--json").json
    assert found["bytes"]["final"] == {"bfloat16": 2 * (16 + 4 + 4 + 6 + 2)}
    assert {tensor["device"] for tensor in found["tensors"]} == {"cuda"}


def test_report_says_whether_it_fits(groundplan: Runner, tmp_path: Path) -> None:
    found = groundplan("report", "cli_zoo:Net", "--cluster", "8xH100", "--json").json["verdict"]
    assert (found["verdict"], found["cluster"], found["binding"]["place"]) == ("fits", "8xH100-80GB", "cuda:0 on H100-80GB")
    shown = groundplan("report", "cli_zoo:Net", "--cluster", "8xH100").out
    assert "cluster 8xH100-80GB: fits" in shown and max(map(len, shown.splitlines())) <= 100
    on_host = groundplan("report", "cli_zoo:Net", "--device", "cpu", "--cluster", "24GB+64GB-cpu", "--json").json["verdict"]
    assert [room["place"] for room in on_host["rooms"]] == ["host memory of a node, 1 process"]
    (tmp_path / "cluster.json").write_text('{"devices": ["24GB"]}')
    assert groundplan("report", "cli_zoo:Net", "--cluster", "cluster.json", "--json").json["verdict"]["cluster"] == "24GB"
    assert groundplan("report", "cli_zoo:Net", "--json").json["verdict"] is None


def test_verify_says_what_each_phase_took(groundplan: Runner, tmp_path: Path) -> None:
    words = ("verify", "torch.nn:Linear", "--kwargs", '{"in_features": 30, "out_features": 40}', "--train", "sgd")
    shown = groundplan(*words, "--calibration", "cpu.json")
    assert shown.code == 0 and "predicted" not in shown.err and "first_step" in shown.out and "measured" in shown.out
    found = groundplan(*words, "--steps", "4", "--json", "--calibration", "cpu.json").json
    checks = {each["phase"]: each for each in found["ranks"][0]["checks"]}
    assert checks["step"]["difference"] == 0 and len(checks["step"]["repeats"]) == 3 and found["spec"] == "torch.nn:Linear"
    assert len(json.loads((tmp_path / "cpu.json").read_text())["records"]) == 2 * 8


def test_verify_says_of_which_option_something_is_wrong(groundplan: Runner) -> None:
    words = ("verify", "torch.nn:Linear", "--kwargs", '{"in_features": 30, "out_features": 40}')
    wrong = [
        (["--batch-size", "8"], "--train adamw"),
        (["--train", "adamv"], "--train: "),
        (["--train", "sgd", "--seq-len", "0"], "--seq-len: "),
    ]
    for arguments, part in wrong:
        result = groundplan(*words, *arguments)
        assert (result.code, result.out) == (1, "") and part in result.err, result.err


def test_report_by_a_calibration(groundplan: Runner) -> None:
    words = ("torch.nn:Linear", "--kwargs", '{"in_features": 30, "out_features": 40}')
    assert groundplan("verify", *words, "--calibration", "cpu.json").code == 0
    shown = groundplan("report", *words, "--cluster", "64GB-cpu", "--calibration", "cpu.json").out
    assert "calibrated on cpu" in re.sub(r"\s+", " ", shown) and "calibrated by 1 verification" in re.sub(r"\s+", " ", shown)
    other = groundplan("report", *words, "--cluster", "H100", "--calibration", "cpu.json")
    assert other.code == 1 and other.out == "" and "the calibration is of cpu" in other.err
    alone = groundplan("report", *words, "--calibration", "cpu.json")
    assert alone.code == 1 and "calibration= is for saying whether it fits" in alone.err
    missing = groundplan("report", *words, "--cluster", "64GB-cpu", "--calibration", "none.json")
    assert missing.code == 1 and "cannot read the calibration none.json" in missing.err


def test_report_as_a_page(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net", "--train", "adamw", "--html", "out.html", "--json")
    page = (groundplan.folder / "out.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and f'data-value="{result.json["peak"]}"' in page
    failed = groundplan("report", "cli_zoo:Net", "--html", "no/such/folder.html")
    assert failed.code == 1 and "no/such/folder.html cannot be written" in failed.err and "Traceback" not in failed.err


def test_a_cluster_that_cannot_be(groundplan: Runner) -> None:
    result = groundplan("report", "cli_zoo:Net", "--cluster", "8xH10O-80GB")
    assert (result.code, result.out) == (1, "")
    assert "'8xH10O-80GB'" in result.err and "did you mean H100-80GB" in result.err


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-405b", "deepseek-v3", "vit-base-patch16-224"])
def test_report_of_a_published_model(groundplan: Runner, name: str) -> None:
    pytest.importorskip("transformers")
    result = groundplan("report", str(CONFIGS / f"{name}.json"), "--dtype", "bfloat16", "--train", "adamw")
    assert result.code == 0, result.err
    assert re.search(r"parameters +\d+\.\d+[MB] \([\d,]+\) in \d[\d,]* tensors, all trainable", result.out)
    assert "peak" in result.out
    assert max(map(len, result.out.splitlines())) <= 100


def test_explain_one_tensor_and_everything(groundplan: Runner) -> None:
    one = groundplan("explain", "cli_zoo:Net", "first.weight").out
    assert "kaiming_uniform_" in one
    assert re.search(r"cli_zoo\.py:9 in\s+__init__", one)  # the folder's name may be long
    everything = groundplan("explain", "cli_zoo:Net", "--dtype", "bfloat16", "--device", "cuda").out
    assert everything.index("1. cast to bfloat16") < everything.index("2. move to cuda")


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
        (["--device", "gpu"], ["'gpu'", "cuda"]),
        (["--infer", "--train", "adamw"], ["--infer and --train", "one at a time"]),
        (["--infer", "--clip-grad-norm", "1"], ["--clip-grad-norm is about training"]),
        (["--infer", "--batch-size", "0"], ["--batch-size: batch_size is 0"]),
        (["--infer", "--cache", "statik"], ["--cache", "did you mean static"]),
        (["--infer", "--autocast", "int8"], ["--autocast", "floating-point"]),
        (["--new-tokens", "4"], ["--new-tokens is about serving", "--infer"]),
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
    assert set(result.err.splitlines()) == {"the constructor says hello"}
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


def test_materialize_reads_a_checkpoint(groundplan: Runner) -> None:
    groundplan("materialize", "cli_zoo:Net", "--out", "part", "--seed", "7")
    full = load_file("part/model.safetensors")
    save_file({"first.bias": full["first.bias"] + 1}, "part.safetensors")
    assert groundplan("materialize", "cli_zoo:Net", "--out", "made", "--checkpoint", "part.safetensors", "--seed", "7").code == 0
    loaded = load_file("made/model.safetensors")
    assert torch.equal(loaded["first.bias"], full["first.bias"] + 1)
    assert torch.equal(loaded["first.weight"], full["first.weight"])
    result = groundplan("materialize", "cli_zoo:Net", "--out", "other", "--checkpoint", "nowhere")
    assert result.code and "there is no nowhere" in result.err and not os.path.exists("other")


def test_materialize_casts(groundplan: Runner) -> None:
    groundplan("materialize", "cli_zoo:Net", "--out", "made", "--dtype", "bfloat16")
    model = eager(groundplan.folder).to(torch.bfloat16)
    loaded = load_file("made/model.safetensors")
    assert torch.equal(loaded["first.weight"], model.state_dict()["first.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_config_comes_back_through_from_pretrained(groundplan: Runner, dtype: torch.dtype) -> None:
    transformers = pytest.importorskip("transformers")
    (groundplan.folder / "tiny.json").write_text(json.dumps(TINY))
    cast = [] if dtype == torch.float32 else ["--dtype", str(dtype)]
    made = groundplan("materialize", "tiny.json", "--out", "made", "--kwargs", '{"num_hidden_layers": 2}', "--json", *cast)
    assert made.code == 0, made.err
    assert made.json["ties"] == {"lm_head.weight": "model.embed_tokens.weight"}
    assert sorted(os.listdir("made")) == ["config.json", "model.safetensors"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained("made")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    fields = {key: value for key, value in TINY.items() if key not in ("model_type", "quantization_config", "torch_dtype")}
    torch.manual_seed(0)
    eager = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**fields, "num_hidden_layers": 2}))
    expected = eager.to(dtype).state_dict()
    assert set(loaded.state_dict()) == set(expected)
    for name, value in loaded.state_dict().items():
        assert value.dtype == dtype, name
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
    monkeypatch.setattr("groundplan.save.save_file", full)
    result = groundplan("materialize", "cli_zoo:Net", "--out", "made", "--force")
    assert result.code == 1
    assert "No space left on device" in result.err
    assert os.listdir("made") == ["model.safetensors"]
    assert Path("made/model.safetensors").read_text() == "precious"


def test_what_the_machine_cannot_hold_is_refused_first(groundplan: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(cli, "_main_memory", lambda: 64 * 10**9)
    result = groundplan("materialize", str(CONFIGS / "llama-3.1-405b.json"), "--out", "made")
    assert result.code == 1
    assert "takes 1623.41 GB of main memory, and this machine has 64.00 GB" in result.err
    monkeypatch.setattr(cli, "_main_memory", lambda: None)
    result = groundplan("materialize", str(CONFIGS / "llama-3.1-405b.json"), "--out", "made")
    assert result.code == 1
    assert "the file takes 1623.41 GB, and made has" in result.err
    assert not Path("made").exists()


def test_the_main_memory_is_known_here() -> None:
    if sys.platform.startswith("linux"):
        assert (cli._main_memory() or 0) > 2**28


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


def test_progress_in_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress_bar(console) as show:
        show(1_500_000, 3_000_000)
    assert isinstance(console.file, io.StringIO)
    assert "1.5/3.0" in console.file.getvalue()
