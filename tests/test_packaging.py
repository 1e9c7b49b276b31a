"""The wheel: exactly the modules of the tree, and stages that a user's own `planner.py` cannot shadow. And `dev.py`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]

MINE = """
import torch

OWNER = {name!r}

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
"""

SHADOWS = """
import groundplan as gp, groundplan.planner, groundplan.tracer.graph, groundplan.runtime
import planner, runtime, tracer
assert gp.__file__.startswith({site!r}), gp.__file__
assert groundplan.planner.__file__.startswith({site!r}), groundplan.planner.__file__
assert [planner.OWNER, runtime.OWNER, tracer.OWNER] == ["planner", "runtime", "tracer"]
assert gp.trace(planner.Net).materialize(seed=0).weight.shape == (3, 2)
assert gp.__version__ == {version!r}, gp.__version__
print("both are there")
"""


@pytest.fixture(scope="module")
def dev() -> ModuleType:
    """A copy of dev.py that tests may change."""
    spec = importlib.util.spec_from_file_location("groundplan_dev", ROOT / "dev.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wheel(dev: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network from a copy of the sources that has no links."""
    out = tmp_path_factory.mktemp("wheel")
    dev.build_wheel(dev.Shell(), sys.executable, out)
    (built,) = out.glob("*.whl")
    return Path(built)


# -- the wheel ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_wheel_holds_the_tree_and_nothing_else(dev: ModuleType, wheel: Path) -> None:
    assert dev.wheel_problems(ROOT, wheel) == []
    names = zipfile.ZipFile(wheel).namelist()
    assert {"groundplan/py.typed", "groundplan/cli.py", "groundplan/tracer/graph.py"} <= set(names)
    assert {"groundplan/planner/devices.toml", "groundplan/page.css", "groundplan/page.js"} <= set(names)
    if shutil.which("gcc") and sys.platform == "linux":
        assert sum(map(dev.is_library, names)) == 1
    assert not [name for name in names if name.startswith(("tests", "examples", "tracer", "dev"))]


@pytest.mark.slow
def test_a_wheel_without_a_compiler(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    dev.build_wheel(dev.Shell(), sys.executable, tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert dev.wheel_problems(ROOT, built) == []
    assert not any(map(dev.is_library, zipfile.ZipFile(built).namelist()))


@pytest.mark.slow
def test_the_wheel_names_its_script_and_license(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "groundplan = groundplan.cli:main" in archive.read(info["entry_points.txt"]).decode()
        assert "License-Expression: Apache-2.0" in archive.read(info["METADATA"]).decode()


@pytest.fixture(scope="module")
def installed(dev: ModuleType, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that holds nothing but the wheel, and sees this one's packages for its dependencies."""
    environment = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = str(dev.venv_python(environment))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, stdin=subprocess.DEVNULL)
    (site_of(python) / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return environment


def site_of(python: str) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())


@pytest.fixture
def users_folder(tmp_path: Path) -> Path:
    """A folder with a user's own `planner.py`, `runtime.py` and `tracer.py`."""
    for name in ("planner", "runtime", "tracer"):
        (tmp_path / f"{name}.py").write_text(MINE.format(name=name))
    return tmp_path


def run_in(folder: Path, *command: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_wheel_beside_a_users_own_planner(dev: ModuleType, installed: Path, users_folder: Path) -> None:
    python = dev.venv_python(installed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    code = SHADOWS.format(site=str(site_of(str(python))), version=project["version"])
    assert run_in(users_folder, python, "-c", code) == "both are there\n"


@pytest.mark.slow
def test_the_installed_command_reads_a_users_own_planner(dev: ModuleType, installed: Path, users_folder: Path) -> None:
    command = dev.venv_python(installed).parent / "groundplan"
    assert "kaiming_uniform_" in run_in(users_folder, command, "report", "planner:Net")
    run_in(users_folder, command, "materialize", "planner:Net", "--out", "made")
    assert (users_folder / "made" / "model.safetensors").exists()


def test_what_differs_is_named(dev: ModuleType, tmp_path: Path) -> None:
    for folder in ("groundplan", "tracer/inner", "planner", "runtime"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("groundplan/cli.py", "tracer/graph.py", "tracer/inner/deep.py"):
        (tmp_path / file).touch()
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        for name in ("groundplan/cli.py", "groundplan/py.typed", "tests/test_cli.py", "groundplan-1.dist-info/RECORD"):
            archive.writestr(name, "")
        for stage in ("tracer", "planner"):
            archive.writestr(f"groundplan/{stage}/_mersenne{EXTENSION_SUFFIXES[0]}", "")
        archive.writestr("groundplan/tracer/mersenne.c", "")
    assert dev.wheel_problems(tmp_path, tmp_path / "some.whl") == [
        "missing from the wheel: groundplan/tracer/graph.py",
        f"should not be in the wheel: groundplan/planner/_mersenne{EXTENSION_SUFFIXES[0]}",
        "should not be in the wheel: groundplan/tracer/mersenne.c",
        "should not be in the wheel: tests/test_cli.py",
        "missing from the wheel: LICENSE",
        f"a subpackage without a line under `packages`: {Path('tracer/inner')}",
    ]


# -- dev.py -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty repository with this one's pyproject.toml, which dev.py takes for its own."""
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    monkeypatch.setattr(dev, "ROOT", tmp_path)
    monkeypatch.setattr(dev, "VENV", tmp_path / ".venv")
    return tmp_path


def pretend_installed(dev: ModuleType, repository: Path) -> None:
    python = dev.venv_python(repository / ".venv")
    python.parent.mkdir(parents=True)
    python.touch()
    (repository / ".venv" / "groundplan-stamp").write_text(dev.wanted_stamp(repository))


def commands(dev: ModuleType, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    assert dev.main(["--dry-run", *argv]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]


def test_the_first_run_makes_the_environment(dev: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, torch, ours, run = commands(dev, capsys, "demo")
    assert make.endswith(f"-m venv --clear {repository / '.venv'}")
    assert torch.endswith("torch==2.13.0")
    assert ours.endswith("-e '.[dev]'")
    assert run.endswith("examples/quickstart.py")
    assert not (repository / ".venv").exists()


def test_later_runs_install_nothing(dev: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretend_installed(dev, repository)
    assert len(commands(dev, capsys, "demo")) == 1


def test_an_environment_that_cannot_be_used_is_made_again(
    dev: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = dev.venv_python(repository / ".venv")
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    assert len(commands(dev, capsys, "demo")) == 3  # it is one, and only lacks the packages
    python.unlink()
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert "-m venv --clear" in commands(dev, capsys, "demo")[0]


def test_a_changed_pyproject_installs_again(dev: ModuleType, repository: Path) -> None:
    pretend_installed(dev, repository)
    assert dev.is_current(repository, repository / ".venv")
    with (repository / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert not dev.is_current(repository, repository / ".venv")


def test_a_changed_c_source_installs_again(dev: ModuleType, repository: Path) -> None:
    (repository / "tracer").mkdir()
    (repository / "tracer" / "mersenne.c").write_text("int a;")
    pretend_installed(dev, repository)
    assert dev.is_current(repository, repository / ".venv")
    (repository / "tracer" / "mersenne.c").write_text("int b;")
    assert not dev.is_current(repository, repository / ".venv")


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], "--doctest-modules groundplan tests --numprocesses 4 --dist loadfile"),
        (["-n", "2", "-x"], "--doctest-modules groundplan tests --numprocesses 4 --dist loadfile -n 2 -x"),
        (["tests/test_cli.py::test_version"], "tests/test_cli.py::test_version"),
    ],
)
def test_pytest_arguments(
    dev: ModuleType,
    repository: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    passed: str,
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    pretend_installed(dev, repository)
    (repository / "tests").mkdir()
    (repository / "tests" / "test_cli.py").touch()
    (line,) = commands(dev, capsys, "test", *given)
    assert line.endswith(f"-m pytest {passed}")


def test_the_exit_code_is_passed_on(dev: ModuleType, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(dev, repository)
    monkeypatch.setattr(dev, "venv_python", lambda _: Path(sys.executable))
    (repository / "examples").mkdir()
    (repository / "examples" / "quickstart.py").write_text("raise SystemExit(5)")
    assert dev.main(["demo"]) == 5


def test_the_development_torch_satisfies_the_library(dev: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dev.pinned_torch(ROOT) == "torch==2.13.0"
    assert "torch>=2.11" in project["dependencies"]


def test_continuous_integration_is_executable() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "dev.py test\n" in script.read_text()
