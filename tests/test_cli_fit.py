"""`groundplan fit`: real runs on a small configuration, what is written, and one message where nothing fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import groundplan as gp

from .test_cli import TINY, Runner, groundplan  # noqa: F401  (a fixture)

transformers = pytest.importorskip("transformers")

TRAIN = ("--train", "adamw", "--batch-size", "2", "--seq-len", "64")
ALONE = ("--tensor", "none")  # no tensor axis, so that there is less to search


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(TINY | {"num_hidden_layers": 4, "torch_dtype": "float32"}))
    return str(path)


def bound(path: Path, config: str) -> gp.Plan:
    """The written plan with its constructor, as a script has it."""
    return gp.Plan.load(path).bind(transformers.LlamaForCausalLM, transformers.AutoConfig.from_pretrained(config))


def test_it_decides_explains_and_writes_the_plan(groundplan: Runner, config: str, tmp_path: Path) -> None:  # noqa: F811
    out, page = tmp_path / "plan.json", tmp_path / "page.html"
    result = groundplan("fit", config, "--cluster", "2x24GB", *TRAIN, *ALONE, "--out", str(out), "--html", str(page))
    assert result.code == 0, result.err
    text = " ".join(result.out.split())
    assert 'fitted to 2x24GB, for Training("adamw", batch_size=2, seq_len=64)' in text
    assert "verdict fits, checked by a run on fake tensors (T1)" in text and "layouts that were tried" in text
    plan = gp.Plan.load(out)
    assert plan.decisions.fitted is not None and plan.decisions.fitted.cluster == "2x24GB"
    assert "What plan.fit decided" in page.read_text(encoding="utf-8")
    assert max(map(len, result.out.splitlines())) <= 100


def test_the_written_plan_explains_itself_as_it_was_printed(groundplan: Runner, config: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "plan.json"
    result = groundplan("fit", config, "--cluster", "2x24GB", *TRAIN, *ALONE, "--tier", "T0", "--out", str(out))
    assert result.code == 0, result.err
    assert str(bound(out, config).explain()) == result.out.rstrip("\n")


def test_the_plan_is_carried_out_on_the_cpu(groundplan: Runner, config: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "plan.json"
    result = groundplan("fit", config, "--cluster", "8GB-cpu", *TRAIN, "--tier", "T0", "--out", str(out))
    assert result.code == 0, result.err
    model = bound(out, config).materialize(seed=0)
    torch.manual_seed(0)
    expected = transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(config)).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_json_is_one_object_with_the_decisions(groundplan: Runner, config: str) -> None:  # noqa: F811
    options = ("--axes", "dp_shard=2", "--compute-dtype", "bfloat16", "--reduce-dtype", "float32", "--checkpointing", "full")
    more = ("--reserve", "1GB", "--margin", "0.1", "--time-limit", "60", "--tier", "T0", "--json")
    result = groundplan("fit", config, "--cluster", "4x24GB", *TRAIN, *ALONE, *options, *more)
    assert result.code == 0, result.err
    found = result.json
    axes = {axis["name"]: axis["size"] for axis in found["sharding"]["axes"]}
    assert axes == {"dp_replicate": 2, "dp_shard": 2} and found["sharding"]["compute_dtype"] == "bfloat16"
    assert {rule["level"] for rule in found["checkpointing"]} == {"full"}
    fitted = found["fitted"]
    assert fitted["candidates"][0]["layout"] == "dp_replicate=2 x dp_shard=2" and fitted["verdict"] == "fits"
    assert fitted["workload"]["optimizer"] == "adamw" and found["phases"]["step"] <= fitted["peak"]
    said = {each["name"]: each["value"] for each in fitted["options"]}
    assert said["reserve"] == "1.00 GB" and said["axes"] == "{dp_shard: 2}" and said["margin"] == "0.1"


def test_micro_batches_and_dtypes_are_chosen_where_that_is_allowed(groundplan: Runner, config: str) -> None:  # noqa: F811
    allowed = ("--split-batch", "--dtype", "float32,bfloat16", "--tier", "T0", "--json")
    result = groundplan("fit", config, "--cluster", "1x24GB", *TRAIN, *allowed)
    assert result.code == 0, result.err
    layouts = {each["layout"] for each in result.json["fitted"]["candidates"]}
    assert any("2 micro-batches of 1" in each for each in layouts) and any("bfloat16" in each for each in layouts)


def test_serving(groundplan: Runner, config: str) -> None:  # noqa: F811
    asked = ("--infer", "--batch-size", "2", "--seq-len", "64", "--dtype", "bfloat16", "--json")
    result = groundplan("fit", config, "--cluster", "2x24GB", *asked)
    assert result.code == 0, result.err
    assert [step["kind"] for step in result.json["steps"]] == ["cast", "move"]
    fitted = result.json["fitted"]
    assert fitted["workload"]["seq_len"] == 64 and fitted["steps"] == [1] and fitted["verdict"] == "fits"


def test_where_nothing_fits_there_is_one_message_and_no_file(groundplan: Runner, config: str, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "plan.json"
    wide = ("--kwargs", '{"vocab_size": 200000, "hidden_size": 512}')
    result = groundplan("fit", config, *wide, "--cluster", "1x3GB", *TRAIN, "--tier", "T0", "--out", str(out))
    assert result.code == 1 and result.out == "" and not out.exists()
    messages = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert len(messages) == 1 and messages[0].startswith(
        'error: nothing fits 3GB for Training("adamw", batch_size=2, seq_len=64)'
    )
    assert "Traceback" not in result.err and "The nearest is" in result.err
    ways = [line for line in result.err.splitlines() if line.startswith("  - ")]
    assert ways and all("fits" in way or "tight" in way for way in ways)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "fit it to what? say --train with an optimizer"),
        (("--infer", "--train", "adamw"), "--infer and --train are two workloads"),
        (("--infer", "--axes", "tp=2"), "--axes is about training, and --infer is not"),
        (("--infer", "--no-offload"), "--offload is about training, and --infer is not"),
        (("--train", "adamw", "--disk"), "--disk is about serving"),
        (("--train", "adam w"), "--train: no optimizer is called 'adam w'"),
        (("--train", "adamw", "--axes", "tp"), "--axes takes sizes of axes such as tp=8 or dp_shard=4,tp=2; 'tp' is none"),
        (("--train", "adamw", "--axes", "tp=2,tp=4"), "--axes gives tp twice"),
        (("--train", "adamw", "--axes", "pp=2"), "a pipeline axis is for plan.shard"),
        (("--train", "adamw", "--reserve", "2"), "--reserve: '2' is no size"),
        (("--train", "adamw", "--tier", "T2"), "--tier 'T2'"),
        (("--train", "adamw", "--dtype", "float32,int8"), "--dtype 'int8' is no floating-point dtype"),
        (("--train", "adamw", "--checkpointing", "none,some"), "--checkpointing 'some' is not known: none, selective, full"),
        (("--train", "adamw", "--tensor", "[1]"), "--tensor takes a JSON object"),
        (("--train", "adamw", "--speeds", "nowhere.json"), "--speeds: the speeds nowhere.json cannot be read"),
        (("--train", "adamw", "--cluster", "8xH1000"), "the cluster '8xH1000' cannot be"),
    ],
)
def test_what_cannot_be_is_said_of_the_option(
    groundplan: Runner,  # noqa: F811
    config: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    cluster = () if "--cluster" in options else ("--cluster", "2x24GB")
    result = groundplan("fit", config, *cluster, *options)
    assert result.code == 1 and message in " ".join(result.err.split()), result.err


def test_a_plan_that_cannot_be_written_says_so(groundplan: Runner, config: str) -> None:  # noqa: F811
    asked = (*TRAIN, *ALONE, "--tier", "T0", "--out", "nowhere/plan.json")
    result = groundplan("fit", config, "--cluster", "1x24GB", *asked)
    assert result.code == 1 and "nowhere/plan.json" in result.err and "Traceback" not in result.err
