"""What tier T2 and the drawing cost beside T1: replaying a run through the allocator's rules, and making its timeline short.

The run is that of a Llama at T1, on CUDA. `times` puts so many runs one into the other, moment by moment of each phase, for a
timeline of hundreds of thousands of moments, as many as there are ranks in flight.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from common import print_table

import groundplan as gp
from groundplan.planner.allocations import Moment, Timeline
from groundplan.planner.replayed_run import Allocator, replay_run
from groundplan.planner.series import series_of_run
from groundplan.timeline import drawing

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
SETTINGS = ("", "expandable_segments:True")
DEVICE = "cuda:0"


def run_of(config: str, seq_len: int) -> tuple[Timeline, float]:
    """The run of a training step, and the seconds that it took."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plan = gp.trace(LlamaForCausalLM, LlamaConfig.from_json_file(str(CONFIGS / f"{config}.json"))).to("cuda")
    start = time.perf_counter()
    run = plan.memory(gp.Training("adamw", batch_size=1, seq_len=seq_len, autocast=torch.bfloat16), tier="T1").run
    assert run is not None
    return run, time.perf_counter() - start


def repeated(run: Timeline, times: int) -> Timeline:
    """So many of the run, phase by phase one after the other."""
    moments: list[Moment] = []
    for phase, found in groupby(run.moments, key=attrgetter("phase")):
        kept = list(found)
        for copy in range(times):
            moments += [Moment(phase, each.allocation + copy * len(run.allocations), each.born) for each in kept]
    return Timeline(run.allocations * times, tuple(moments))


def measured(run: Timeline, setting: str) -> dict[str, Any]:
    """One row: a run and a setting."""
    start = time.perf_counter()
    replayed = replay_run(run, Allocator.of(setting))
    after = time.perf_counter()
    series = series_of_run(run, DEVICE, replayed.reserved[DEVICE])
    made = time.perf_counter()
    size = len(drawing(series))
    usage = replayed.peaks["step"][DEVICE]
    return {
        "moments": len(run.moments),
        "setting": setting or "torch's defaults",
        "replay, s": round(after - start, 3),
        "series, s": round(made - after, 3),
        "drawing, s": round(time.perf_counter() - made, 3),
        "drawing, kB": round(size / 1000, 1),
        "points": sum(len(each.points) for each in series.stretches),
        "step: reserved / active": round(usage.reserved / usage.active, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="llama-3.2-1b")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 30])
    options = parser.parse_args()
    run, seconds = run_of(options.config, options.seq_len)
    rows = [measured(repeated(run, times), setting) for times in options.times for setting in SETTINGS]
    print_table(rows, markdown=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"\nT1 of {options.config}: {seconds:.2f} s; resident at most: {peak / 1024:.0f} MiB")
    print(json.dumps({"benchmark": "replay", "torch": torch.__version__, "T1": round(seconds, 2), "rows": rows}))


if __name__ == "__main__":
    main()
