"""SPEC: what it accepts, and that every mistake says the wrong value and the right form."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from groundplan.spec import Spec, parse_spec
from groundplan.tracer.errors import SpecError

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

class Zoo:
    @staticmethod
    def small():
        return Net(2)

built = nn.Linear(2, 2)
number = 3
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
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    "rope_theta": 10000.0,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current directory with one module, `spec_zoo`; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spec_zoo.py").write_text(MODULE)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def write_config(path: Path, **changes: Any) -> str:
    fields = {key: value for key, value in {**TINY, **changes}.items() if value is not None}
    path.write_text(json.dumps(fields))
    return str(path)


def build(spec: Spec) -> Any:
    return spec.build(*spec.args, **spec.kwargs)


def error(spec: str, kwargs: dict[str, Any] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(spec, kwargs)
    return str(caught.value)


# -- package.module:callable --------------------------------------------------------------------------------------------


def test_a_class_in_the_current_directory() -> None:
    spec = parse_spec("spec_zoo:Net", {"width": 3})
    assert spec.name == "spec_zoo:Net"
    assert spec.kwargs == {"width": 3}
    assert spec.config is None
    assert build(spec).layers[1].weight.shape == (3, 3)


def test_a_dotted_path_after_the_colon() -> None:
    assert len(build(parse_spec("spec_zoo:Zoo.small")).layers) == 2


def test_a_module_in_a_package() -> None:
    assert parse_spec("torch.nn:LSTM", {"input_size": 1, "hidden_size": 1}).build is torch.nn.LSTM


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("spec_zo:Net", ["'spec_zo'", "no module", "package.module:callable"]),
        ("spec_zoo.inner:Net", ["spec_zoo.inner", "no module"]),
        ("spec_zoo", ["'spec_zoo'", "no colon", "package.module:callable"]),
        ("spec_zoo:", ["after the colon"]),
        (":Net", ["before the colon"]),
        ("spec_zoo:Nett", ["'Nett'", "did you mean Net"]),
        ("spec_zoo:Zoo.smal", ["spec_zoo.Zoo", "'smal'", "did you mean small"]),
        ("spec_zoo:number", ["3", "int", "cannot be called"]),
        ("spec_zoo:built", ["already built"]),
        ("models/vit.py:ViT", ["models.vit:ViT"]),
        ("models/vit.py", ["models.vit:MyModel"]),
        ("missing/config.json", ["'missing/config.json'", "is no file"]),
        ("meta-llama/Llama-3.2-1B", ["not looked up", "config.json"]),
    ],
)
def test_mistakes_show_the_value_and_the_form(spec: str, parts: list[str]) -> None:
    message = error(spec)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("kwargs", "part"),
    [({}, "missing a required argument: 'width'"), ({"width": 1, "dept": 2}, "'dept'")],
)
def test_arguments_that_do_not_fit(kwargs: dict[str, Any], part: str) -> None:
    message = error("spec_zoo:Net", kwargs)
    assert part in message
    assert "(width, depth=2)" in message


def test_a_module_that_fails_to_import(folder: Path) -> None:
    (folder / "spec_broken.py").write_text("raise ValueError('no such table')")
    assert "importing spec_broken failed: ValueError: no such table" in error("spec_broken:Net")


def test_a_module_whose_own_import_is_missing(folder: Path) -> None:
    (folder / "spec_needy.py").write_text("import spec_absent")
    message = error("spec_needy:Net")
    assert "importing spec_needy failed" in message
    assert "spec_absent" in message


# -- a transformers config.json -----------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")


def test_a_config_builds_its_class(folder: Path) -> None:
    model = build(parse_spec(write_config(folder / "tiny.json")))
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config.vocab_size == 32


def test_a_directory_means_its_config_json(folder: Path) -> None:
    write_config(folder / "config.json")
    assert parse_spec(str(folder)).build is transformers.LlamaForCausalLM


def test_kwargs_replace_fields_and_leave_the_file_alone(folder: Path) -> None:
    file = write_config(folder / "tiny.json")
    spec = parse_spec(file, {"num_hidden_layers": 3})
    assert spec.args[0].num_hidden_layers == 3
    assert spec.config == {**TINY, "num_hidden_layers": 3}
    assert json.loads(Path(file).read_text()) == TINY


def test_two_parses_of_one_file_share_nothing(folder: Path) -> None:
    file = write_config(folder / "tiny.json")
    assert parse_spec(file).args[0] is not parse_spec(file).args[0]


def test_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("reached for the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    build(parse_spec(write_config(folder / "tiny.json")))


def test_the_hub_client_is_set_back(folder: Path) -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    parse_spec(write_config(folder / "tiny.json"))
    assert constants.HF_HUB_OFFLINE is before


@pytest.mark.parametrize(
    "changes",
    [{"auto_map": {"AutoModel": "modeling_x.X"}}, {"text_config": {"auto_map": {}}}, {"parts": [{"auto_map": {}}]}],
)
def test_remote_code_is_refused(folder: Path, changes: dict[str, Any]) -> None:
    message = error(write_config(folder / "remote.json", **changes))
    assert "auto_map" in message
    assert "never runs" in message


def test_remote_code_in_kwargs_is_refused(folder: Path) -> None:
    assert "auto_map" in error(write_config(folder / "tiny.json"), {"auto_map": {}})


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": None}, ["no `architectures`", '["LlamaForCausalLM"]', "--kwargs"]),
        ({"architectures": []}, ["no `architectures`"]),
        ({"architectures": "LlamaForCausalLM"}, ["a list of class names"]),
        ({"architectures": ["LlamaForCausalML"]}, ["'LlamaForCausalML'", "did you mean", "LlamaForCausalLM"]),
        ({"architectures": ["LlamaConfig"]}, ["'LlamaConfig'", "no model class"]),
        ({"model_type": None}, ["`model_type` is None"]),
        ({"model_type": "lama"}, ["'lama'", "did you mean llama"]),
        ({"hidden_size": "wide"}, ["llama refuses these fields", "hidden_size"]),
    ],
)
def test_mistakes_in_a_config(folder: Path, changes: dict[str, Any], parts: list[str]) -> None:
    message = error(write_config(folder / "wrong.json", **changes))
    assert all(part in message for part in ["wrong.json", *parts]), message


def test_architectures_may_come_from_kwargs(folder: Path) -> None:
    file = write_config(folder / "bare.json", architectures=None)
    assert parse_spec(file, {"architectures": ["LlamaModel"]}).build is transformers.LlamaModel


def test_a_misspelled_override_is_an_error(folder: Path) -> None:
    message = error(write_config(folder / "tiny.json"), {"num_hiden_layers": 2})
    assert "'num_hiden_layers'" in message
    assert "did you mean num_hidden_layers" in message


@pytest.mark.parametrize(
    ("content", "part"),
    [(b'{"model_type": ', "not valid JSON"), (b"[1, 2]", "a JSON list"), (b"\xff\xfe\x00", "not valid JSON")],
)
def test_a_file_that_is_no_config(folder: Path, content: bytes, part: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert part in error("config.json")


def test_a_directory_without_a_config(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "without a config.json" in error("empty")


def test_transformers_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_config(folder / "tiny.json")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers>=5'" in error(file)


# -- the published configurations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-405b", 405_853_388_800),
        ("deepseek-v3", 671_026_404_352),
        ("vit-base-patch16-224", 86_567_656),
    ],
)
def test_the_example_configs_have_the_published_size(name: str, parameters: int) -> None:
    spec = parse_spec(str(CONFIGS / f"{name}.json"))
    with torch.device("meta"):
        model = build(spec)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert name in (CONFIGS / "README.md").read_text()
    assert f"{parameters:,}" in (CONFIGS / "README.md").read_text()
