"""The repository's commands. They need Python 3.11 or newer and nothing else:

    python3.11 dev.py demo           the main job on a real model (examples/quickstart.py)
    python3.11 dev.py test [ARGS]    the tests and the doctests; ARGS go to pytest
    python3.11 dev.py lint           ruff check, ruff format --check
    python3.11 dev.py types          mypy, strict
    python3.11 dev.py wheel          build the wheel, compare its file list with the tree

The first one makes `.venv` and installs into it; later ones install again only after pyproject.toml or
the C source has changed.
`--dry-run` before the command prints what would be run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAGES = ("tracer", "planner", "runtime")
# What pytest runs when no path is given: the tests, and the examples in the docstrings.
MOST_WORKERS = 4  # of pytest: each takes up to 2 GB, and some tests start four processes themselves
TESTED = ("--doctest-modules", "groundplan", "tests")


class Failed(Exception):
    """A command that failed; its exit code becomes ours."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class Shell:
    """Prints each command, and runs it unless this is a dry run. Commands run in the repository root, without stdin."""

    def __init__(self, dry: bool = False) -> None:
        self.dry = dry

    def run(self, *command: str | Path) -> None:
        words = [str(word) for word in command]
        print("$", shlex.join(words), flush=True)
        if self.dry:
            return
        code = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, check=False).returncode
        if code:
            raise Failed(code if code > 0 else 128 - code)


# -- the environment ----------------------------------------------------------------------------------------------------


def venv_python(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def wanted_stamp(root: Path) -> str:
    """What the environment was made for: this pyproject.toml, at this place (an editable install points to it), with this C."""
    found = hashlib.sha256((root / "pyproject.toml").read_bytes() + os.fsencode(root))
    for source in sorted((root / "tracer").glob("*.c")):
        found.update(source.read_bytes())
    return found.hexdigest()


def is_current(root: Path, venv: Path) -> bool:
    stamp = venv / "groundplan-stamp"
    return venv_python(venv).exists() and stamp.exists() and stamp.read_text() == wanted_stamp(root)


def pinned_torch(root: Path) -> str:
    """The dev extra's torch requirement, such as `torch==2.13.0`."""
    import tomllib  # here, so that an older Python gets as far as the message about its version

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements: list[str] = project["optional-dependencies"]["dev"]
    return next(requirement for requirement in requirements if requirement.startswith("torch=="))


def is_usable(python: Path) -> bool:
    """Whether this is a Python that groundplan runs on, with pip."""
    if not python.exists():
        return False
    code = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def environment(shell: Shell) -> Path:
    """The environment's Python, made or brought up to date where needed."""
    python = venv_python(VENV)
    if is_current(ROOT, VENV):
        return python
    if not is_usable(python):
        shell.run(sys.executable, "-m", "venv", "--clear", VENV)
    pip = (python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input")
    shell.run(*pip, pinned_torch(ROOT))
    shell.run(*pip, "-e", ".[dev]")
    if not shell.dry:
        (VENV / "groundplan-stamp").write_text(wanted_stamp(ROOT))
    return python


# -- the wheel ----------------------------------------------------------------------------------------------------------


def expected_files(root: Path) -> set[str]:
    """What the wheel holds: every module and data file of the four packages. (And, where a compiler was, the library.)"""
    files = {f"groundplan/{path.name}" for end in ("py", "css", "js") for path in (root / "groundplan").glob(f"*.{end}")}
    files.add("groundplan/py.typed")
    for stage in STAGES:
        files |= {f"groundplan/{stage}/{path.name}" for end in ("py", "toml") for path in (root / stage).glob(f"*.{end}")}
    return files


def is_library(name: str) -> bool:
    """Whether this is the library of tracer/mersenne.c, compiled; it is optional."""
    path = PurePosixPath(name)
    return path.parent == PurePosixPath("groundplan/tracer") and path.name in {f"_mersenne{end}" for end in EXTENSION_SUFFIXES}


def wheel_problems(root: Path, wheel: Path) -> list[str]:
    """How the wheel's file list differs from the tree; empty when it does not."""
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    files = {name for name in held if ".dist-info/" not in name and not is_library(name)}
    expected = expected_files(root)
    problems = [f"missing from the wheel: {name}" for name in sorted(expected - files)]
    problems += [f"should not be in the wheel: {name}" for name in sorted(files - expected)]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in held):
        problems.append("missing from the wheel: LICENSE")
    nested = sorted({path.parent for stage in STAGES for path in (root / stage).glob("*/*.py")})
    problems += [f"a subpackage without a line under `packages`: {path.relative_to(root)}" for path in nested]
    return problems


def copy_sources(root: Path, target: Path) -> None:
    """What building needs, without the links and without an older build's leftovers."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, target / name)
    leftovers = ("__pycache__", "*.so", "*.pyd")
    shutil.copytree(root / "groundplan", target / "groundplan", ignore=shutil.ignore_patterns(*leftovers, *STAGES))
    for stage in STAGES:
        shutil.copytree(root / stage, target / stage, ignore=shutil.ignore_patterns(*leftovers))


def build_wheel(shell: Shell, python: Path, out: Path) -> None:
    """Build the wheel into `out`, with the setuptools of `python`'s environment: no network."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        copy_sources(ROOT, source)
        shell.run(python, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)


# -- the commands -------------------------------------------------------------------------------------------------------


def demo(shell: Shell, python: Path, args: list[str]) -> None:
    shell.run(python, "examples/quickstart.py", *args)


def pytest_arguments(args: list[str]) -> list[str]:
    """`args`, behind the default paths where they name none; then on several cores, a file of tests at a time."""
    named = any((ROOT / arg.split("::")[0]).exists() for arg in args if not arg.startswith("-"))
    workers = str(min(MOST_WORKERS, os.cpu_count() or 1))
    return args if named else [*TESTED, "--numprocesses", workers, "--dist", "loadfile", *args]


def test(shell: Shell, python: Path, args: list[str]) -> None:
    shell.run(python, "-m", "pytest", *pytest_arguments(args))


def lint(shell: Shell, python: Path, args: list[str]) -> None:
    shell.run(python, "-m", "ruff", "check", ".", *args)
    shell.run(python, "-m", "ruff", "format", "--check", ".")


def types(shell: Shell, python: Path, args: list[str]) -> None:
    shell.run(python, "-m", "mypy", *args)


def wheel(shell: Shell, python: Path, args: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        build_wheel(shell, python, Path(folder))
        for path in Path(folder).glob("*.whl"):
            problems = wheel_problems(ROOT, path)
            print("\n".join(problems) or f"{path.name}: {len(expected_files(ROOT))} files, as in the tree", flush=True)
            if problems:
                raise Failed(1)


COMMANDS = {"demo": demo, "test": test, "lint": lint, "types": types, "wheel": wheel}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("args", nargs=argparse.REMAINDER, help="passed on")
    options = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036 (any Python may be told to run this file)
        print(f"groundplan needs Python 3.11 or newer; this is {sys.version.split()[0]}", file=sys.stderr)
        return 1
    shell = Shell(options.dry_run)
    try:
        COMMANDS[options.command](shell, environment(shell), options.args)
    except Failed as failed:
        return failed.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
