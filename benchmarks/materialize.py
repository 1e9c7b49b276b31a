"""The time and the peak of building a model without a cast: `gp.trace(build).materialize(seed=0)` next to `build()`.

Times are those of trace and build together: `speed-up` is eager's divided by groundplan's, `time x eager` the other way round,
`trace x eager` the trace alone, in CPU time. `skipped` is the share of random numbers that no final value depends on, and that
are therefore passed over instead of being turned into floats. Peaks are the growth of resident memory over a process that has
everything imported, divided by the model's bytes. Both sides must give the same values and generator state.

What is warmed up before is what has nothing to do with the model's places in the random stream: the imports, a build of an
`nn.Linear(2, 2)`, and a trace of the model with one layer.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from common import (
    BUILT,
    Build,
    Result,
    alternating,
    digest,
    fetch_memory,
    measured,
    megabytes,
    members,
    middle,
    ratio,
    script,
    tensor_bytes,
    warm_up,
)

SIDES = ("groundplan", "eager")


def measure(side: str, model: str) -> Result:
    """Build one model, once."""
    build = warm_up(model)
    fetch_memory(build)
    built, result = (planned if side == "groundplan" else eager)(build)
    return result | {"final": tensor_bytes(list(members(built).values())), "digest": digest(built)}


def planned(build: Build) -> tuple[torch.nn.Module, Result]:
    import groundplan as gp

    result: Result = {}
    with measured(result):
        start = time.process_time()
        plan = gp.trace(build)
        traced = time.process_time() - start
        built = plan.materialize(seed=0)
    draws = [(op.writes[0].numel, op.unread) for op in plan.graph.ops if op.random and op.writes]
    skipped = sum(numel for numel, unread in draws if unread) / max(1, sum(numel for numel, _ in draws))
    return built, result | {"trace_cpu_seconds": traced, "skipped": skipped}


def eager(build: Build) -> tuple[torch.nn.Module, Result]:
    result: Result = {}
    with measured(result):
        torch.manual_seed(0)
        built = build()
    return built, result


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model."""
    return [row(model, alternating(model, SIDES, repeats)) for model in models]


def row(model: str, rounds: list[dict[str, Result]]) -> Result:
    first = rounds[0]["groundplan"]
    traces = statistics.median(each["groundplan"]["trace_cpu_seconds"] / each["eager"]["cpu_seconds"] for each in rounds)
    return {
        "model": model,
        "final MB": megabytes(first["final"]),
        "skipped": round(first["skipped"], 3),
        "speed-up": round(ratio(rounds, "eager", "groundplan", "seconds"), 2),
        "time x eager": round(ratio(rounds, "groundplan", "eager", "seconds"), 3),
        "CPU x eager": round(ratio(rounds, "groundplan", "eager", "cpu_seconds"), 3),
        "trace x eager": round(traces, 3),
        "peak/final": round(middle(rounds, "groundplan", "peak_growth") / first["final"], 3),
        "eager peak/final": round(middle(rounds, "eager", "peak_growth") / first["final"], 3),
        "same values": len({each[side]["digest"] for each in rounds for side in SIDES}) == 1,
    }


if __name__ == "__main__":
    script(measure, compare, BUILT)
