"""Published runs predicted: what torchtitan says that its GPUs reserved at most, and what tier T2 says of the same step.

The step is torchtitan's own in structure (tests/titan.py), under torch's own FSDP2, on fake tensors, as rank 0 of a process group
that talks to nobody (T1); what it allocates goes through the rules of CUDA's caching allocator (T2). Nothing is fitted to the
published figures (tests/published.py says where they are from).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import print_table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.published import ALLOCATORS, RUNS, Published, reserved, run_of_plan, step_of


def compared(run: Published) -> list[dict[str, Any]]:
    """A row for each way in which the allocator may have been set; as torchtitan prepares the model, and as a plan does."""
    rows = []
    for step_by, way in ((step_of, "torchtitan's"), (run_of_plan, "plan.memory")):
        start = time.perf_counter()
        step = step_by(run)
        seconds = time.perf_counter() - start
        rows += [row(run, way, reserved(run, step, setting), setting, seconds) for setting in ALLOCATORS]
    return rows


def row(run: Published, way: str, found: dict[str, float], setting: str, seconds: float) -> dict[str, Any]:
    return {
        "run": run.name,
        "step": way,
        "allocator": setting or "torch's defaults",
        "active, GiB": round(found["active"], 2),
        "reserved, GiB": round(found["reserved"], 2),
        "published, GiB": run.gib,
        "off": f"{100 * (found['reserved'] / run.gib - 1):+.1f} %",
        "seconds": round(seconds, 1),
    }


def main() -> None:
    rows = [each for run in RUNS for each in compared(run)]
    print_table(rows, markdown=True)
    print(json.dumps({"benchmark": "published", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
