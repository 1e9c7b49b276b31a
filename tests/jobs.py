"""Jobs of several real processes: a test module is started once per rank, and each rank writes down what it finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
MIB = 2**20
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}
"""Has glibc give large memory back as soon as it is free: small parts would keep the holes between them resident otherwise."""
can_watch = os.access("/proc/self/clear_refs", os.W_OK)
"""Whether the peak of resident memory can be watched here."""


def launch(module: str, folder: Path, *args: str, world: int = 2, seconds: int = 300, **environment: str) -> list[Any]:
    """Run `python -m module FOLDER ARGS` on `world` ranks; what each has written to `FOLDER/RANK.json`.

    Raises `RuntimeError` with what a crash says.
    """
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, "-m", *torchrun, "-m", module, str(folder), *args]
    surroundings = os.environ | QUIET | GIVEN_BACK | environment
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"the job of {world} processes ended with {done.returncode}:\n{done.stderr[-8000:]}")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]


def finish(folder: str | Path, found: Any) -> NoReturn:
    """Write down what this rank has found, and end it when all of them have.

    Past Python's own end: a thread of gloo that drops a tensor while Python ends aborts the process
    (`c10d::ProcessGroupGloo::runLoop`, where the last reference to a tensor's Python object asks for Python's lock).
    """
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class Deep(torch.nn.Module):
    """16 equal layers of 16 MiB: what one rank of two holds, and what one unit is, can be told apart."""

    layers = 16
    unit = 16 * MIB

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(self.layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


@contextmanager
def watched() -> Iterator[dict[str, int]]:
    """By how many bytes resident memory grows: at its peak, and in the end."""
    found: dict[str, int] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = _status("VmRSS")
    yield found
    found |= {"peak": _status("VmHWM") - before, "end": _status("VmRSS") - before}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
