"""The examples run, and the README shows what they print.

`GROUNDPLAN_UPDATE=1 python -m pytest tests/test_examples.py` writes the README's blocks anew.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- block: (\w+) -->\n```\n(.*?)```\n", re.DOTALL)
_SHOWN_LINES = 17  # of the graph's text


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


@pytest.mark.skipif(not torch.__version__.startswith("2.13.0"), reason="the README is written with torch 2.13.0")
def test_the_readme_shows_what_is_printed() -> None:
    text = README.read_text(encoding="utf-8")
    renewed = BLOCK.sub(lambda match: f"<!-- block: {match[1]} -->\n```\n{blocks()[match[1]]}\n```\n", text)
    if os.environ.get("GROUNDPLAN_UPDATE"):
        README.write_text(renewed, encoding="utf-8")
    assert {name for name, _ in BLOCK.findall(text)} == set(blocks())
    assert text == renewed, "run with GROUNDPLAN_UPDATE=1 to write the README's blocks anew"


def test_the_readmes_files_are_there() -> None:
    text = README.read_text(encoding="utf-8")
    for path in re.findall(r"`((?:examples|benchmarks|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path
    named = set(re.findall(r"`(\w+\.py)`", text.partition("## More")[2]))
    assert named | {"tagger.py"} == {path.name for path in EXAMPLES}
