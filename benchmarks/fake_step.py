"""Training steps on fake tensors next to real ones: the peak bytes of every phase, which are to be equal.

Real is `torch.profiler`: the running sum of its memory events over two steps of the same module, built for real on the CPU, with
torch's own kernels (oneDNN off) on one thread. `off` is the largest difference of any phase in bytes, `table` the largest share
of a phase's peak that comes from the table of corrections (groundplan/runtime/scratch.py). The models are those of the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import print_table

import groundplan as gp
from groundplan.planner.allocations import START

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.measured_steps import MODELS, SETTINGS, measured_peaks, plain_kernels, table_share

OPTIMIZERS = ("sgd", "adamw")


def compared(model: str, setting: str, optimizer: str) -> dict[str, Any]:
    """One row: a model, a setting and an optimizer, fake and real."""
    plan = gp.trace(MODELS[model].build)
    training = gp.Training(optimizer, inputs=MODELS[model].inputs, **SETTINGS[setting])
    with plain_kernels():
        start = time.perf_counter()
        run = plan.memory(training, tier="T1").run
        seconds = time.perf_counter() - start
        assert run is not None
        real = measured_peaks(plan, training)
    fake = {phase: devices["cpu"] for phase, devices in run.peaks.items()}
    return {
        "model": f"{model}, {setting}, {optimizer}",
        **{f"{phase}, fake": fake[phase] for phase in ("first_step", "step", "optimizer")},
        "step, real": real["step"],
        "off": max(abs(fake[phase] - real[phase]) for phase in real),
        "table": f"{100 * max(table_share(run, phase) for phase in real if phase != START):.2f} %",
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = [compared(*each) for each in ((m, s, o) for m in options.models for s in SETTINGS for o in OPTIMIZERS)]
    print_table(rows, markdown=True)
    equal = sum(row["off"] == 0 for row in rows)
    print(f"\n{equal} of {len(rows)} are equal in every phase, to the byte")
    print(json.dumps({"benchmark": "fake_step", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
