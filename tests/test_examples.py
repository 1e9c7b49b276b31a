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
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

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
        self.lm_head = nn.Linear(width, width)


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"MyModel": MyModel, "args": (8,), "kwargs": {}}
    code = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(code) == 3
    for each in code:
        exec(each, names)
        torch.manual_seed(0)
        assert torch.equal(names["model"].lm_head.weight, MyModel(8).to(torch.bfloat16).lm_head.weight)


def test_the_readmes_commands_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^\$ groundplan (.*)$", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["report", "report", "explain", "materialize", "doctor"]
    for line in (*lines[1:3], lines[4]):  # the first is the user's own model, the fourth writes gigabytes
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(line))
        assert not ended.value.code, capsys.readouterr().err


def test_the_readmes_files_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:examples|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    named = set(re.findall(r"`(\w+\.py)`", text.partition("## More")[2]))
    assert named | {"tagger.py"} == {path.name for path in EXAMPLES}
