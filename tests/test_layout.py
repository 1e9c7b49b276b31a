"""How the sources hang together: the import direction of the stages, and documented public names."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = ("tracer", "planner", "runtime")
MAY_IMPORT = {"tracer": {"tracer"}, "planner": {"tracer", "planner"}, "runtime": {"tracer", "planner", "runtime"}}
FILES = [path for stage in STAGES for path in sorted((ROOT / stage).glob("*.py"))]


def imports(file: Path) -> Iterator[str]:
    """The absolute name of everything that `file` (in a stage's folder) imports, wherever the statement stands."""
    package = ["groundplan", file.parent.name]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def wrong_imports(file: Path) -> list[str]:
    """The imports of `file` that its stage may not have."""
    allowed = {f"groundplan.{stage}" for stage in MAY_IMPORT[file.parent.name]}
    ours = [name for name in imports(file) if name.partition(".")[0] in ("groundplan", *STAGES)]
    return [name for name in ours if ".".join(name.split(".")[:2]) not in allowed]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_a_stage_imports_only_what_comes_before_it(file: Path) -> None:
    assert not wrong_imports(file)


@pytest.mark.parametrize(
    ("stage", "line", "wrong"),
    [
        ("tracer", "from .graph import View", []),
        ("tracer", "from ..planner.decisions import Decisions", ["groundplan.planner.decisions.Decisions"]),
        ("tracer", "from .. import planner", ["groundplan.planner"]),
        ("tracer", "def late():\n    import groundplan", ["groundplan"]),
        ("planner", "from ..tracer.graph import View", []),
        ("planner", "from ..runtime import materialize", ["groundplan.runtime.materialize"]),
        ("planner", "from ..plan import Plan", ["groundplan.plan.Plan"]),
        ("runtime", "from ..planner import decisions, memory", []),
        ("runtime", "from tracer.graph import View", ["tracer.graph.View"]),
    ],
)
def test_the_check_sees_every_form(tmp_path: Path, stage: str, line: str, wrong: list[str]) -> None:
    (tmp_path / stage).mkdir()
    file = tmp_path / stage / "some.py"
    file.write_text(line)
    assert wrong_imports(file) == wrong


def test_stages_are_flat() -> None:
    assert not [path for stage in STAGES for path in (ROOT / stage).glob("*/*.py")]


def test_every_file_says_what_it_is_for() -> None:
    files = [*FILES, *sorted((ROOT / "groundplan").glob("*.py"))]
    assert not [str(file) for file in files if not ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))]


def test_public_names_exist_and_are_documented() -> None:
    groundplan = importlib.import_module("groundplan")
    assert groundplan.__doc__
    for name in groundplan.__all__:
        value = getattr(groundplan, name)
        if inspect.isclass(value) or callable(value):
            assert inspect.getdoc(value), f"groundplan.{name} has no docstring"
            assert not (inspect.isclass(value) and "__doc__" in vars(value) and not value.__doc__), name


def test_public_methods_are_documented() -> None:
    groundplan = importlib.import_module("groundplan")
    for name in groundplan.__all__:
        value = getattr(groundplan, name)
        if not inspect.isclass(value) or not value.__module__.startswith("groundplan"):
            continue
        for method, function in vars(value).items():
            if inspect.isfunction(function) and not method.startswith("_"):
                assert inspect.getdoc(function), f"groundplan.{name}.{method} has no docstring"
