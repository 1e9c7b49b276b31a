"""Measures how fast this machine is, on all ranks of the running process group at once: what `planner.speeds.Speeds` holds.

1. products of matrices, attention, and ops that only read and write, each at several sizes
2. what the host takes for an op, and for a view
3. each collective at two sizes, in groups of 2, 4, ... ranks, all groups at once as in training
4. how much of a collective a computation hides that goes on meanwhile

Ranks that share cores, or a memory, are measured while they do. Of several samples the lower quartile counts, as others' load
only ever adds; of the ranks their mean.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from ..planner.records import dtype_name
from ..planner.speeds import Link, Rate, Speeds, Talk
from ..planner.work import Collective
from ..planner.work_time import sent_by
from ..tracer.errors import DecisionError
from ..tracer.streams import generators_kept
from .op_work import TF32

_SAMPLES, _SAMPLE_SECONDS = 7, 0.02
_SIDES = {"cpu": (64, 128, 256, 512, 1024), "cuda": (256, 1024, 2048, 4096, 8192)}
_LENGTHS = {"cpu": (128, 512), "cuda": (1024, 4096)}
_BYTES = {"cpu": (2**16, 2**20, 2**23, 2**25, 2**27), "cuda": (2**20, 2**24, 2**28)}
_MESSAGES = {"cpu": (2**16, 2**23), "cuda": (2**16, 2**28)}
_OPS = 50


def measure_speeds(device: str | None = None) -> Speeds:
    """The speeds of a device, on all ranks together; `gp.measure_speeds` says more."""
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in _SIDES or (kind == "cuda" and not torch.cuda.is_available()):
        raise DecisionError(f'speeds are measured of "cpu", or of "cuda" where there is one, not of {device!r}')
    with generators_kept(), torch.enable_grad(), torch.inference_mode(False):
        return _measured(_Clock(kind))


def _measured(clock: _Clock) -> Speeds:
    kind = clock.device
    memory = Rate(points=tuple(_memory(clock)))
    talks = tuple(_talks(clock))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", clock.ranks))
    return Speeds(
        device=torch.cuda.get_device_name() if kind == "cuda" else f"cpu, {torch.get_num_threads()} threads a rank",
        flops=tuple((name, Rate(points=tuple(_matmuls(clock, name, dtype)))) for name, dtype in _dtypes(kind).items()),
        attention=tuple((name, Rate(points=tuple(_attention(clock, dtype)))) for name, dtype in _halves(kind).items()),
        memory=memory,
        launch=_of_host(clock, torch.sigmoid),
        view=_of_host(clock, torch.t),
        ahead=kind == "cuda",
        node=max(1, min(local, clock.ranks)),
        within=talks[-1].link if talks else None,
        talks=talks,
        host=_host_transfers(clock) if kind == "cuda" else memory.points[-1][1],
        host_memory=None if kind == "cuda" else memory.points[-1][1],
        overlap=_overlap(clock) if talks else 1.0,
        notes=(f"measured on {clock.ranks} rank{'s' * (clock.ranks > 1)} with torch {torch.__version__}",),
    )


# -- the clock ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clock:
    """Times calls on a device, on all ranks together."""

    device: str

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def seconds(self, call: Callable[[], Any], waits: bool = True) -> float:
        """How long one call takes; with `waits` until the device has done it."""
        call()
        times = max(1, int(self._agreed(_SAMPLE_SECONDS / self._sample(call, 1, waits), largest=True)))
        self._meet()
        samples = [self._sample(call, times, waits) for _ in range(_SAMPLES)]
        return self._agreed(statistics.quantiles(samples, n=4)[0] / times)

    def _sample(self, call: Callable[[], Any], times: int, waits: bool) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(times):
            call()
        if waits:
            self.wait()
        return max(time.perf_counter() - start, 1e-9)

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _meet(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def _agreed(self, value: float, largest: bool = False) -> float:
        """The mean of all ranks, or the largest."""
        if self.ranks == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return float(told) if largest else float(told) / self.ranks


# -- one device ---------------------------------------------------------------------------------------------------------


def _dtypes(device: str) -> Mapping[str, torch.dtype]:
    known = {dtype_name(each): each for each in (torch.float32, torch.bfloat16, torch.float16)}
    if device == "cpu":
        return {name: dtype for name, dtype in known.items() if dtype != torch.float16}
    return {TF32: torch.float32, **known}


def _halves(device: str) -> Mapping[str, torch.dtype]:
    return _dtypes("cpu") if device == "cpu" else {dtype_name(each): each for each in (torch.bfloat16, torch.float16)}


@contextmanager
def _precision(name: str) -> Iterator[None]:
    """float32 by itself, or by tensor cores: what the user has set is there again afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == TF32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _matmuls(clock: _Clock, name: str, dtype: torch.dtype) -> Iterator[tuple[float, float]]:
    for side in _SIDES[clock.device]:
        one, other = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
        flops = 2.0 * side**3
        with _precision(name):
            seconds = clock.seconds(partial(torch.mm, one, other))
        yield flops, flops / seconds


def _attention(clock: _Clock, dtype: torch.dtype) -> Iterator[tuple[float, float]]:
    """Causal, forward and backward, as one op with the mean of their operations, half of which the mask spares."""
    for length in _LENGTHS[clock.device]:
        shape = (1, 8, length, 64)
        heads = [torch.randn(shape, device=clock.device).to(dtype).requires_grad_() for _ in range(3)]
        flops = (sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)) / 2

        def both(heads: list[torch.Tensor] = heads) -> None:
            out = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
            torch.autograd.grad(out, heads, out.detach())

        yield flops / 2, flops / clock.seconds(both)


def _memory(clock: _Clock) -> Iterator[tuple[float, float]]:
    """A mean of what layers do: sums, products, an activation and a copy; results are new, as in a step."""
    for nbytes in _BYTES[clock.device]:
        one, other = (torch.randn(nbytes // 12, device=clock.device) for _ in range(2))

        def ops(one: torch.Tensor = one, other: torch.Tensor = other) -> None:
            torch.add(one, other)
            torch.mul(one, other)
            F.silu(one)
            one.clone()

        moved = 10 * one.nbytes
        yield moved / 4, moved / clock.seconds(ops)


def _of_host(clock: _Clock, function: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """What an op on next to nothing takes the host, forward and backward alike."""
    start = torch.ones(1, 1, device=clock.device, requires_grad=True)

    def chain() -> None:
        value = start
        for _ in range(_OPS):
            value = function(value)
        torch.autograd.grad(value, start, torch.ones_like(value))

    return clock.seconds(chain, waits=False) / (2 * _OPS)


def _host_transfers(clock: _Clock) -> float:
    there, here = torch.empty(2**26, dtype=torch.uint8, device="cuda"), torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    return 2**26 / clock.seconds(lambda: there.copy_(here, non_blocking=True))


# -- several ------------------------------------------------------------------------------------------------------------


def _talks(clock: _Clock) -> Iterator[Talk]:
    """Groups of neighbors, each of them at once."""
    size = 2
    while size <= clock.ranks:
        if clock.ranks % size == 0:
            with _neighbors(size, clock.ranks) as group:
                for kind in ("all-gather", "reduce-scatter", "all-reduce"):
                    yield Talk(kind=kind, ranks=size, link=_link(clock, kind, size, group))
        size *= 2


@contextmanager
def _neighbors(size: int, ranks: int) -> Iterator[Any]:
    if size == ranks:
        yield None
        return
    own, every = dist.new_subgroups(size)
    try:
        yield own
    finally:
        for group in every:
            if group is not dist.GroupMember.NON_GROUP_MEMBER and dist.get_rank() in dist.get_process_group_ranks(group):
                dist.destroy_process_group(group)


def _link(clock: _Clock, kind: Collective, size: int, group: Any) -> Link:
    """A line through the seconds of a small message and of a large one."""
    small, large = _MESSAGES[clock.device]
    few, many = (clock.seconds(_collective(kind, nbytes, size, group, clock.device)) for nbytes in (small, large))
    sent_few, sent_many = (sent_by(kind, nbytes, size) for nbytes in (small, large))
    bandwidth = (sent_many - sent_few) / max(many - few, 1e-9)
    return Link(bandwidth=bandwidth, latency=max(0.0, few - sent_few / bandwidth))


def _collective(kind: Collective, nbytes: int, size: int, group: Any, device: str, **options: Any) -> Callable[[], Any]:
    whole, part = (torch.ones(nbytes // 4 // each, device=device) for each in (1, size))
    if kind == "all-gather":
        return lambda: dist.all_gather_into_tensor(whole, part, group=group, **options)
    if kind == "reduce-scatter":
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group, **options)
    whole.zero_()  # sums stay finite
    return lambda: dist.all_reduce(whole, group=group, **options)


def _overlap(clock: _Clock) -> float:
    """The share of the shorter of a computation and a collective that takes no time when both go on at once."""
    size = _MESSAGES[clock.device][1]
    talk = _collective("all-reduce", size, clock.ranks, None, clock.device, async_op=True)
    side = _SIDES[clock.device][-2]
    one = torch.randn(side, side, device=clock.device)
    alone = clock.seconds(lambda: talk().wait())
    once = clock.seconds(lambda: torch.mm(one, one))
    times = max(1, round(alone / once))

    def compute() -> None:
        for _ in range(times):
            torch.mm(one, one)

    def both() -> None:
        work = talk()
        compute()
        work.wait()

    computed, together = clock.seconds(compute), clock.seconds(both)
    return min(1.0, max(0.0, (alone + computed - together) / min(alone, computed)))
