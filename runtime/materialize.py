"""The verb of the third stage: build the module that a plan says.

The constructor runs a second time, for real. The steps of `materialize`:

1. what cannot be built is refused before anything runs
2. the random states are set: the seed's, or the user's own
3. the constructor runs, guided by the tape; if it does something else than under trace, once more without shortcuts
4. the plan's casts and moves are done on the finished module, then whatever still waits is filled; modules that the plan
   checkpoints are told so
5. it is checked that nothing is left; on any failure the user's random states come back
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..planner.check import check_decisions
from ..planner.decisions import Decisions
from ..tracer.ambient import ambient_applied, host_random_now, one_at_a_time, restore_host_random
from ..tracer.collect import roots_of
from ..tracer.errors import MaterializeError
from ..tracer.graph import ParamGraph
from ..tracer.liveness import is_anchor
from ..tracer.streams import generator_states, generators_kept, restore_generators
from ..tracer.trace import Origin
from .build import Build
from .check import check_devices, check_done, check_rng, check_uninitialized
from .filler import Threaded
from .guided import Diverged, Guided
from .keyed import KeyedSource, Keys, drawn_seed
from .sources import EagerSource
from .steps import apply_steps
from .workers import Workers

Progress = Callable[[int, int], None]


def materialize(
    build: Build,
    decisions: Decisions,
    seed: int | None = None,
    uninitialized: str = "error",
    progress: Progress | None = None,
    threads: int | None = None,
    rng: str = "eager",
) -> Any:
    """The module that `build()` returns, with the steps of `decisions` done to it, bit for bit as eager would have it.

    `seed` is as `torch.manual_seed(seed)` before; None draws from the global generators as they are. They are left as eager
    leaves them. With `rng="keyed"` every value depends on the seed and the tensor alone; the global generators are left alone,
    except that one number of 64 bits is drawn where there is no seed. `progress(done, total)` is called with bytes. `threads`
    draw random numbers; None: one for each usable core. Raises `UninitializedError`, `MaterializeError`, or what the constructor
    raises.
    """
    check_decisions(decisions, build.graph)
    check_devices(build.graph, decisions)
    check_rng(rng, build.graph)
    with one_at_a_time, restored_on_failure(), Workers(threads) as workers:
        if rng == "keyed":
            number = drawn_seed() if seed is None else seed
            return _checkpointed(_run_keyed(build, decisions, number, workers, uninitialized, progress), build, decisions)
        if seed is not None:
            torch.manual_seed(seed)
        with _host_random_of(build.origin):
            build = build.under_current_state()
            check_uninitialized(build.graph, uninitialized)
            built = _run(build, decisions, EagerSource(Threaded(workers)), uninitialized == "zero", progress)
            return _checkpointed(built, build, decisions)


def _checkpointed(built: Any, build: Build, decisions: Decisions) -> Any:
    if decisions.checkpointing:
        from .checkpointing import checkpoint_by_plan

        checkpoint_by_plan(built, decisions, build.graph)
    return built


def _run_keyed(
    build: Build, decisions: Decisions, seed: int, workers: Workers, uninitialized: str, progress: Progress | None
) -> Any:
    """The guided run with keyed numbers; it cannot do without the tape."""
    check_uninitialized(build.graph, uninitialized)
    source = KeyedSource(Keys.of(seed, build.graph), workers)
    report = _Bytes(build.graph, progress)
    mode = Guided(build.graph, source, bool(decisions.steps), uninitialized == "zero", report.add)
    with generators_kept(), _host_random_of(build.origin):
        try:
            built = _guided(build, decisions, mode)
        except Diverged as difference:
            raise MaterializeError(
                f"the constructor does something else than under trace ({difference}), so nothing says which numbers belong to "
                'which tensor; take rng="eager"'
            ) from None
    report.finish()
    return built


def _run(build: Build, decisions: Decisions, source: EagerSource, zeros: bool, progress: Progress | None) -> Any:
    """The guided run; where the constructor turns out to behave differently from its trace, a plain one instead."""
    states, host = generator_states(), host_random_now()
    report = _Bytes(build.graph, progress)
    mode = Guided(build.graph, source, bool(decisions.steps), zeros, report.add)
    try:
        built = _guided(build, decisions, mode)
    except Diverged:
        restore_generators(states)
        restore_host_random(host)
        with ambient_applied(build.graph.ambient):
            built = apply_steps(build(), decisions, build.graph)
    report.finish()
    return built


def _guided(build: Build, decisions: Decisions, mode: Guided) -> Any:
    with mode:
        with ambient_applied(build.graph.ambient), mode.constructing():
            built = build()
        roots_of(built)
        apply_steps(built, decisions, build.graph)
    mode.waiting.fill_all()
    check_done(mode)
    return built


@contextmanager
def restored_on_failure() -> Iterator[None]:
    """Where the body raises, random states come back."""
    states, host = generator_states(), host_random_now()
    try:
        yield
    except BaseException:
        restore_generators(states)
        restore_host_random(host)
        raise


@contextmanager
def _host_random_of(origin: Origin) -> Iterator[None]:
    """Python's and numpy's random states as the trace found them.

    Afterwards they stand where the constructor leaves them, or, if the user has drawn since the trace, where the user left them.
    """
    user = host_random_now()
    restore_host_random(origin.host)
    yield
    if not user.same(origin.host):
        restore_host_random(user)


class _Bytes:
    """Adds up the bytes filled so far, for whoever wants to watch."""

    def __init__(self, graph: ParamGraph, progress: Progress | None) -> None:
        self._total = sum(op.writes[0].nbytes for op in graph.ops if is_anchor(op.func) and not op.unread)
        self._done = 0
        self._progress = progress

    def add(self, nbytes: int) -> None:
        if self._progress is not None and nbytes:
            self._done = min(self._done + nbytes, self._total)
            self._progress(self._done, self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)
