"""The compiled accelerator next to torch: filling, passing over words, and what a jump is made of. One thread, one process.

Every figure is the median of several rounds in which the two sides alternate; `x torch` is the median of their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Result, print_table

from groundplan.tracer.native import DEGREE, PACKED, Kind, Native, native, state_of, why_not
from groundplan.tracer.places import skip

NUMEL = 1 << 22
KINDS: dict[Kind, tuple[float, float]] = {"uniform": (-0.1, 0.1), "normal": (0.0, 0.02)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def seconds(body: Callable[[], Any]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def alternating(one: Callable[[], Any], other: Callable[[], Any], repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios."""
    one(), other()
    rounds = [(seconds(one), seconds(other)) if turn % 2 else (seconds(other), seconds(one))[::-1] for turn in range(repeats)]
    ones, others = zip(*rounds, strict=True)
    return statistics.median(ones), statistics.median(others), statistics.median(a / b for a, b in rounds)


def fill(found: Native, kind: Kind, dtype: torch.dtype, repeats: int) -> Result:
    """Nanoseconds an element of a fill."""
    out, generator = torch.empty(NUMEL, dtype=dtype), torch.Generator().manual_seed(0)
    block, next = state_of(generator)
    a, b = KINDS[kind]
    with_torch, compiled = getattr(out, f"{kind}_"), getattr(found, kind)
    taken = alternating(lambda: compiled(block, next, out, a, b), lambda: with_torch(a, b, generator=generator), repeats)
    return row(f"{kind}_ of {str(dtype).removeprefix('torch.')}", taken, NUMEL)


def passing(found: Native, repeats: int) -> Result:
    """Nanoseconds a word that is passed over."""
    generator = torch.Generator().manual_seed(0)
    block, next = state_of(generator)
    return row(
        "word passed over", alternating(lambda: found.skip(block, next, NUMEL), lambda: skip(NUMEL, generator), repeats), NUMEL
    )


def row(what: str, taken: tuple[float, float, float], each: int) -> Result:
    ours, torchs, ratio = taken
    return {"what": what, "native ns": ours / each * 1e9, "torch ns": torchs / each * 1e9, "x torch": ratio}


def jumping(found: Native, repeats: int) -> list[Result]:
    """Microseconds of each step of a jump."""
    polynomial = np.random.default_rng(0).integers(0, 256, PACKED, np.uint8)
    polynomial[DEGREE // 8 :] = 0
    generator = torch.Generator().manual_seed(0)
    skip(1, generator)
    block, _ = state_of(generator)
    steps: dict[str, Callable[[], Any]] = {
        "jump": lambda: found.jump(block, polynomial),
        "multiply": lambda: found.multiply(polynomial, polynomial),
        "square": lambda: found.square(polynomial),
    }
    return [
        {"step": name, "native us": statistics.median(seconds(step) for _ in range(30 * repeats)) * 1e6}
        for name, step in steps.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    found = native()
    if found is None:
        raise SystemExit(why_not())
    torch.set_num_threads(1)
    rows = [fill(found, kind, dtype, repeats) for kind in KINDS for dtype in DTYPES if found.fills(dtype, kind)]
    rows.append(passing(found, repeats))
    steps = jumping(found, repeats)
    print_table(rows)
    print_table(steps)
    print(json.dumps({"benchmark": "native", "torch": torch.__version__, "repeats": repeats, "rows": rows + steps}))


if __name__ == "__main__":
    main()
