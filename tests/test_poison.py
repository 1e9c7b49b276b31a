"""Nothing uninitialized leaks through the fills that are left out: the same bytes whatever fresh memory holds.

glibc fills fresh memory with a byte pattern when MALLOC_PERTURB_ is set, so each build runs in a process of its own.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys, warnings, torch
warnings.simplefilter("ignore")
import groundplan as gp
import groundplan.runtime.waiting
from tests import zoo
from tests.law import content, named_tensors
from torch.nn.parameter import is_lazy
import hashlib

how = sys.argv[1]
parts = how.endswith("parts")
if how == "waiting":
    groundplan.runtime.waiting.WAITING_BYTES = 1

def digest(tensors):
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        if not is_lazy(tensor) and not tensor.is_meta and not (parts and "[" in name):
            found.update(name.encode() + content(tensor))
    return found.hexdigest()

def built(build):
    if how.startswith("eager"):
        torch.manual_seed(1)
        return named_tensors(build())
    plan = gp.trace(build)
    if how == "waiting":
        return named_tensors(plan.cast(torch.float64).materialize(seed=1))
    whole = named_tensors(plan.materialize(seed=1))
    if not parts:
        return whole
    names = [name for name, tensor in whole.items() if name in plan.graph.by_name and not is_lazy(tensor)]
    found = plan.materialize_state(names, seed=1)
    return {name: found[name] for name in names}

skipped = {"from outside"}
for name, build in (zoo.builtins() | zoo.awkward() | zoo.transformers_types()).items():
    if name not in skipped:
        print(name, digest(built(build)))
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fresh memory is poisoned by glibc")


def digests(how: str, pattern: int) -> dict[str, str]:
    environment = os.environ | {"MALLOC_PERTURB_": str(pattern), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(line.rsplit(" ", 1) for line in done.stdout.strip().splitlines() if " " in line)


def test_the_poison_works() -> None:
    program = "import torch; print(torch.empty(1000).view(torch.uint8).unique().tolist())"
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"MALLOC_PERTURB_": pattern},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for pattern in ("85", "170")
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize("how", ["whole", "parts"])
def test_every_build_is_eagers_under_any_poison(how: str) -> None:
    expected = digests(f"eager {how}", 85)
    assert len(expected) > 80
    for pattern in (85, 170):
        assert digests(how, pattern) == expected


def test_waiting_fills_are_the_same_under_any_poison() -> None:
    assert digests("waiting", 85) == digests("waiting", 170)
