"""What a random number costs: torch's own call next to the runtime's, by operator and dtype, in memory that was written before.

The first table has nanoseconds an element: CPU time with one thread, then wall time with every core. `speed-up` is the median of
the ratios of neighboring runs, torch's divided by groundplan's. `fill_` and `copy_` on the same tensor stand beside, as what
writing memory costs at least. `same` is whether values and the generator's place afterwards are torch's. A fill that groundplan
leaves to torch has no figures of its own.

The second table is about memory that is written for the first time: a little that the kernel has just got back, and much after
some idle seconds, in which a virtual machine may have given its free memory back to the host. The last two are about places in
the random stream: what it costs to pass over words, or to jump. A jump is prepared once for each distance; those of the fills are
before they are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Result, print_table
from torch import nn

from groundplan.runtime.filler import Threaded
from groundplan.runtime.pages import huge_pages, prefer_huge_pages
from groundplan.runtime.workers import Workers, usable_cores
from groundplan.tracer.draws import draw_of_call, is_trunc_normal
from groundplan.tracer.native import native, state_of, why_not
from groundplan.tracer.places import Place, skip

aten = torch.ops.aten
TRUNCATE = nn.init._no_grad_trunc_normal_
FILLS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "uniform_": (aten.uniform_.default, (-0.1, 0.1)),
    "normal_": (aten.normal_.default, (0.0, 0.02)),
    "exponential_": (aten.exponential_.default, (1.0,)),
    "trunc_normal_, bounds never met": (TRUNCATE, (0.0, 0.02, -2.0, 2.0)),
    "trunc_normal_, 3 sigma": (TRUNCATE, (0.0, 0.02, -0.06, 0.06)),
    "trunc_normal_, 2 sigma": (TRUNCATE, (0.0, 0.02, -0.04, 0.04)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DISTANCES = (10**6, 10**8, 10**10, 10**12)
NEW = 1 << 24  # elements of float32: so much memory goes back to the kernel when it is freed
MANY = 32  # tensors of these, 2 GB
IDLE = 5  # seconds
Body = Callable[[], Any]
Clock = Callable[[], float]


# -- measuring ----------------------------------------------------------------------------------------------------------


def spent(body: Body, clock: Clock) -> float:
    start = clock()
    body()
    return clock() - start


def alternating(one: Body, other: Body, clock: Clock, repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median of their ratios."""
    one(), other()
    rounds = []
    for turn in range(repeats):
        order = (one, other) if turn % 2 == 0 else (other, one)
        taken = {body: spent(body, clock) for body in order}
        rounds.append((taken[one], taken[other]))
    ones, others = zip(*rounds, strict=True)
    return statistics.median(ones), statistics.median(others), statistics.median(a / b for a, b in rounds)


# -- fills --------------------------------------------------------------------------------------------------------------


def by_torch(name: str, out: torch.Tensor) -> torch.Generator:
    """Fill `out`; the generator afterwards."""
    func, args = FILLS[name]
    generator = torch.Generator().manual_seed(0)
    if is_trunc_normal(func):
        nn.init.trunc_normal_(out, *args, generator=generator)
    else:
        func(out, *args, generator=generator)
    return generator


def by_groundplan(name: str, out: torch.Tensor, threaded: Threaded) -> Place | None:
    """The same; the place afterwards, or None where nothing was done."""
    func, args = FILLS[name]
    start = Place.at(torch.Generator().manual_seed(0).get_state())
    if not is_trunc_normal(func):
        return threaded.fill(func, out, args, start)
    if draw_of_call(func, (None, *args), out.dtype, out.numel(), True) is not None:
        return threaded.fill(aten.normal_.default, out, args[:2], start)
    done = threaded.truncated(out, args, start)
    return None if done is None else done[0]


def cast_by_torch(first: torch.Tensor, out: torch.Tensor) -> None:
    by_torch("normal_", first)
    out.copy_(first)


def cast_by_groundplan(first: torch.Tensor, out: torch.Tensor, threaded: Threaded) -> bool:
    start = Place.at(torch.Generator().manual_seed(0).get_state())
    return threaded.convert(*FILLS["normal_"], start, first, out)


def fill_rows(numel: int, repeats: int) -> list[Result]:
    """One row for each operator and dtype, those that draw nothing last."""
    rows = [fill_row(name, torch.empty(numel, dtype=dtype), repeats) for name in FILLS for dtype in DTYPES]
    rows.append(cast_row(torch.empty(numel), torch.empty(numel, dtype=torch.bfloat16), repeats))
    return rows + [plain_row(name, torch.zeros(numel, dtype=dtype), repeats) for name in ("fill_", "copy_") for dtype in DTYPES]


def fill_row(name: str, out: torch.Tensor, repeats: int) -> Result:
    def sides(threaded: Threaded) -> tuple[Body, Body]:
        return partial(by_torch, name, out), partial(by_groundplan, name, out, threaded)

    return {"op": name, "dtype": short(out.dtype)} | both(sides, out.numel(), repeats, same_fill(name, out))


def cast_row(first: torch.Tensor, out: torch.Tensor, repeats: int) -> Result:
    def sides(threaded: Threaded) -> tuple[Body, Body]:
        return partial(cast_by_torch, first, out), partial(cast_by_groundplan, first, out, threaded)

    return {"op": "normal_, then cast", "dtype": "float32 to bfloat16"} | both(sides, out.numel(), repeats, same_cast(first, out))


def both(sides: Callable[[Threaded], tuple[Body, Body]], numel: int, repeats: int, same: bool | None) -> Result:
    """The figures of torch and groundplan, with one thread and with every core."""
    found: Result = {}
    for cores, clock in settings().items():
        torch.set_num_threads(cores)
        with Workers(cores) as workers:
            torchs, ours, speed_up = alternating(*sides(Threaded(workers)), clock, repeats)
        known = same is not None
        figures = (torchs / numel * 1e9, ours / numel * 1e9 if known else "", speed_up if known else "left to torch")
        found |= dict(zip(columns(cores), figures, strict=True))
    return found | {"same": "" if same is None else same}


def plain_row(name: str, out: torch.Tensor, repeats: int) -> Result:
    """`fill_` and `copy_`, in torch only."""
    source = torch.ones_like(out) if name == "copy_" else 0.5
    found: Result = {"op": name, "dtype": short(out.dtype)}
    for cores, clock in settings().items():
        torch.set_num_threads(cores)
        body = partial(getattr(out, name), source)
        seconds = statistics.median(spent(body, clock) for _ in range(repeats + 1))
        found |= dict(zip(columns(cores), (seconds / out.numel() * 1e9, "", ""), strict=True))
    return found | {"same": ""}


def settings() -> dict[int, Clock]:
    """How many threads, and the clock that goes with them."""
    return {1: time.process_time, usable_cores(): time.perf_counter} if usable_cores() > 1 else {1: time.process_time}


def columns(cores: int) -> tuple[str, str, str]:
    what = "CPU ns, 1 thread" if cores == 1 else f"wall ns, {cores} threads"
    return f"torch {what}", f"groundplan {what}", f"speed-up, {cores}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- whether they are the same ------------------------------------------------------------------------------------------


def same_fill(name: str, out: torch.Tensor) -> bool | None:
    """Whether both give the same; None where groundplan does nothing."""
    generator = by_torch(name, out)
    expected = out.clone()
    with Workers() as workers:
        place = by_groundplan(name, out.zero_(), Threaded(workers))
    if place is None:
        return None
    return torch.equal(out, expected) and torch.equal(place.state(), generator.get_state())


def same_cast(first: torch.Tensor, out: torch.Tensor) -> bool | None:
    cast_by_torch(first, out)
    expected = out.clone()
    with Workers() as workers:
        done = cast_by_groundplan(first, out.zero_(), Threaded(workers))
    return torch.equal(out, expected) if done else None


# -- new memory ---------------------------------------------------------------------------------------------------------


def touch_rows(repeats: int) -> list[Result]:
    """The CPU time of the first `fill_` of float32 memory, with and without huge pages, and of another one."""
    torch.set_num_threads(1)
    kinds = {
        "written before": (1, None),
        "new": (1, False),
        "new, huge pages asked for": (1, True),
        "new, 2 GB after idling": (MANY, False),
        "new, 2 GB after idling, huge pages asked for": (MANY, True),
    }
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(repeats):
        for kind, (count, huge) in list(kinds.items())[:: 1 if turn % 2 == 0 else -1]:
            found[kind].append(touched(count, huge))
    return [
        {
            "memory": kind,
            "ns an element": statistics.median(seconds) * 1e9,
            "us for each 2 MiB": statistics.median(seconds) / 4 * 2**21 * 1e6,
            "worst ns": max(seconds) * 1e9,
        }
        for kind, seconds in found.items()
    ]


def touched(count: int, huge: bool | None) -> float:
    """Seconds an element of filling `count` tensors, all of which stay; `huge` is None for memory that was written before."""
    if count == MANY:
        time.sleep(IDLE)
    tensors = [torch.empty(NEW) for _ in range(count)]
    for out in tensors:
        if huge is None:
            out.fill_(0.0)
        elif huge:
            prefer_huge_pages(out.untyped_storage())
    return sum(spent(partial(out.fill_, 0.5), time.process_time) for out in tensors) / (count * NEW)


# -- places in the stream -----------------------------------------------------------------------------------------------


def passing_rows(repeats: int) -> list[Result]:
    """What a word costs that is passed over, by torch's generator and by compiled code."""
    words, generator = 1 << 24, torch.Generator().manual_seed(0)
    found = {"drawn by torch and dropped": partial(skip, words, generator)}
    if (compiled := native()) is not None:
        block, next = state_of(generator)
        found["passed over by compiled code"] = partial(compiled.skip, block, next, words)
    return [{"words": how, "ns a word": middle(body, repeats) / words * 1e9} for how, body in found.items()]


def place_rows(repeats: int) -> list[Result]:
    """What it costs to put a generator so many words into a stream: the first time, and in another stream after that."""
    return [place_row(distance, repeats) for distance in DISTANCES]


def place_row(distance: int, repeats: int) -> Result:
    firsts, seconds = [], []
    for turn in range(repeats):
        words = distance + 624 * 1000 * turn  # another jump every time
        firsts.append(spent(partial(reach, words, 1), time.process_time))
        seconds.append(spent(partial(reach, words, 2), time.process_time))
    return {
        "words ahead": f"10^{len(str(distance)) - 1}",
        "first ms": statistics.median(firsts) * 1e3,
        "again ms": statistics.median(seconds) * 1e3,
    }


def reach(words: int, seed: int) -> torch.Tensor:
    return Place.at(torch.Generator().manual_seed(seed).get_state()).moved(words).state()


def middle(body: Body, repeats: int) -> float:
    body()
    return statistics.median(spent(body, time.process_time) for _ in range(repeats))


# -- the script ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--numel", type=int, default=1 << 24, help="elements of a tensor")
    options = parser.parse_args()
    machine = {
        "torch": torch.__version__,
        "cores": usable_cores(),
        "compiled code": why_not() or "all of it",
        "huge pages": huge_pages(),
        "elements": options.numel,
    }
    print("; ".join(f"{what}: {value}" for what, value in machine.items()))
    tables = {
        "fills": fill_rows(options.numel, options.repeats),
        "memory": touch_rows(options.repeats),
        "passing": passing_rows(options.repeats),
        "places": place_rows(options.repeats),
    }
    for rows in tables.values():
        print()
        print_table(rows, markdown=True)
    print()
    print(json.dumps({"benchmark": "fills", "repeats": options.repeats} | machine | tables))


if __name__ == "__main__":
    main()
