"""Training fitted to a cluster: what the search may choose from, the search, its check by a run of the step, and its record.

1. what is allowed is spelled out as layouts: meshes, precision, offload, micro-batches
2. the closed form finds the best of them (`planner/fit_training.py`); offload only where nothing fits without
3. the step of what was found is run on fake tensors (tier T1); where that takes more than the closed form says, 2. comes again
   with so much less
4. what was chosen and why is written down (`planner/fitted.py`)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .fitting_tensor import TensorAxis
from .forecast import forecast
from .planner.checkpointing import check_checkpointing
from .planner.cluster import Cluster
from .planner.decisions import Decisions
from .planner.fit_training import LEVELS, Allowed, Found, Layout, Search, Short, Tried, in_order
from .planner.fitted import Fitted, TrainingRecord
from .planner.fitted_reasons import candidates, reasons
from .planner.memory import Memory
from .planner.meshes import meshes
from .planner.profile import NoProfile, Profile
from .planner.sharding import ROLES, sharding
from .planner.speeds import Speeds
from .planner.tiers import Tier
from .planner.verdict import MARGIN, Verdict
from .planner.workload import Checkpointing, Training, check_choice
from .runtime.profiles import profile_of
from .tracer.errors import DecisionError, FitError, MemoryRunError

if TYPE_CHECKING:
    from .plan import Plan

Dtypes = torch.dtype | Sequence[torch.dtype | None] | None
_RECHECKS = 8  # runs of a step


@dataclass(frozen=True)
class TrainingOptions:
    """What the user allows the search; `Plan.fit` says what each means."""

    axes: Mapping[str, int] | None = None
    tensor: str | Mapping[str, str] | None = "auto"
    offload: bool | None = None
    checkpointing: Checkpointing | Sequence[Checkpointing] | None = None
    dtype: Dtypes = None
    compute_dtype: Dtypes = None
    reduce_dtype: Dtypes = None
    split_batch: bool = False
    reserve: int = 0
    margin: float | None = None
    time_limit: float | None = None
    tier: Tier = "T1"
    speeds: Speeds | None = None

    def __post_init__(self) -> None:
        if self.tier not in ("T0", "T1"):
            raise DecisionError(f'tier={self.tier!r}: a plan that fits is checked in closed form, "T0", or by a run, "T1"')
        if not isinstance(self.reserve, int) or isinstance(self.reserve, bool) or self.reserve < 0:
            raise DecisionError(f"reserve is {self.reserve!r}; it is a number of bytes to leave free on each device")
        if self.time_limit is not None and not self.time_limit > 0:
            raise DecisionError(f"time_limit is {self.time_limit!r}; it is a number of seconds")
        for level in self.levels:
            check_choice("checkpointing", level, LEVELS)

    @property
    def levels(self) -> tuple[Checkpointing, ...]:
        """The levels of checkpointing that layers may have."""
        if self.checkpointing is None:
            return LEVELS
        return (self.checkpointing,) if isinstance(self.checkpointing, str) else tuple(self.checkpointing)


@dataclass(frozen=True)
class FitTraining:
    """A question to the search: which plan, for which cluster and workload, with which options."""

    plan: Plan
    cluster: Cluster
    workload: Training
    options: TrainingOptions
    started: float = field(default_factory=time.monotonic)
    short: list[Short] = field(default_factory=list)  # layouts in which nothing fits, of searches that found nothing

    def decisions(self) -> Decisions:
        """What is decided; raises `FitError` where nothing fits, with what would."""
        found = self.found()
        if found is None:
            from .relaxing import nothing_fits

            raise FitError(nothing_fits(self))
        best, verdict = found.best, found.verdict
        check_checkpointing(best.decisions.checkpointing, self.plan.graph)
        with_earlier = replace(found.found, short=(*self.short, *found.found.short))
        record = Fitted(
            cluster=str(self.cluster),
            workload=TrainingRecord.of(best.layout.workload),
            verdict=verdict.verdict,
            tier=found.memory.tier,
            peak=found.memory.peak,
            binding=verdict.binding.describe(),
            seconds=best.time.total,
            samples=best.layout.samples,
            reasons=tuple(reasons(best, with_earlier, found.search)),
            candidates=tuple(candidates(best, with_earlier)),
            would_help=tuple(self._would_help(best)),
            proven=found.found.proven,
        )
        return best.decisions.model_copy(update={"fitted": record})

    def _would_help(self, best: Tried) -> Iterator[str]:
        """What the runtime does not carry out yet, where a plan has to run layers again or offload to fit."""
        from .would_help import would_help

        sharding = best.decisions.sharding
        if best.decisions.checkpointing or (sharding is not None and sharding.offload):
            yield from would_help(self, best.layout, best.decisions, best.memory.peak)

    def found(self) -> Checked | None:
        """What fits: with the whole margin, or else "tight"; without offload, or else with it."""
        for free in dict.fromkeys([self.margin, 0.0]):
            for offload in self._offloads():
                if (found := self.checked(self.layouts(offload), free)) is not None:
                    return found
        return None

    @cached_property
    def _tensor(self) -> TensorAxis:
        return TensorAxis(self.plan, self.options.tensor, self.workload)

    @property
    def margin(self) -> float:
        """The share of what is needed that "fits" leaves free."""
        return MARGIN if self.options.margin is None else self.options.margin

    def _offloads(self) -> list[bool]:
        if self.options.offload is not None:
            return [self.options.offload]
        return [False, True] if self.cluster.host_memory is not None and self.cluster.devices else [False]

    # -- the search -----------------------------------------------------------------------------------------------------

    def search(self, free: float, reserve: int = 0) -> Search:
        """The search, with that share and so many bytes left free."""
        limit = self.options.time_limit
        allowed = Allowed(
            levels=self._levels,
            margin=self.margin,
            free=free,
            reserve=self.options.reserve + reserve,
            deadline=None if limit is None else self.started + limit,
        )
        speeds = self.options.speeds or Speeds.of(self.cluster)
        return Search(self.plan.graph, self.cluster, speeds, self.profile_of, allowed)

    @property
    def _levels(self) -> tuple[Checkpointing, ...]:
        """The levels that layers may have: the workload's, where it says one."""
        return self.options.levels if self.workload.checkpointing == "none" else (self.workload.checkpointing,)

    @property
    def leanest_level(self) -> Checkpointing:
        """The one of them that keeps least."""
        return next(level for level in LEVELS if level in self._levels)

    def profile_of(self, decisions: Decisions, workload: Training) -> Profile | NoProfile:
        """What a plan's forward and backward allocate, or why that is not known."""
        return profile_of(self.plan._bound, decisions, workload)

    def checked(self, layouts: Sequence[Layout], free: float) -> Checked | None:
        """The best layout that a run of its step bears out; a layout that falls short has so much less to go by from then on."""
        search = self.search(free)
        found = search.over(layouts)
        reserves: dict[int, int] = {}
        for _ in range(_RECHECKS):
            if not found.tried:
                break
            layout = found.tried[0].layout
            best = self.search(free, reserves.get(id(layout), 0)).simplified(found.tried[0])
            memory, verdict = self._checked_by(best)
            missing = search.missing(verdict)
            if missing <= 0:
                return Checked(search, found, best, memory, verdict)
            self.short.append(Short(layout, max(verdict.rooms, key=search.missing_at), memory))
            reserves[id(layout)] = missing - search.missing(best.verdict)  # less than it came to, whatever was left
            found = _instead(found, layout, self.search(free, reserves[id(layout)]).of(layout))
        self.short.extend(found.short)
        return None

    def _checked_by(self, best: Tried) -> tuple[Memory, Verdict]:
        """Memory and verdict by a run of the step; by the closed form where it cannot be run without values, or is not to be."""
        if self.options.tier == "T0":
            return best.memory, best.verdict
        try:
            memory = forecast(self.plan._bound, best.decisions, best.layout.workload, "T1", None, self.cluster)
        except MemoryRunError:
            return best.memory, best.verdict
        return memory, memory.fits(self.cluster, self.margin)

    # -- layouts --------------------------------------------------------------------------------------------------------

    def layouts(self, offload: bool) -> list[Layout]:
        """Every layout that is allowed, offloaded or not."""
        sizes = self._tensor.sizes(len(self.cluster.devices) or self.cluster.ranks)
        return [
            Layout(axes, decided, workload, self._precision(compute, reduce))
            for decisions in self._stored()
            for workload in self._workloads()
            for compute in _several(self.options.compute_dtype)
            for reduce in _several(self.options.reduce_dtype)
            for axes in meshes(self.cluster, sizes, self.options.axes, sharded=offload or compute is not None)
            if (decided := self._sharded(decisions, axes, offload, compute, reduce)) is not None
        ]

    def _precision(self, *dtypes: torch.dtype | None) -> str:
        """What a layout computes and reduces in, where that is among what is chosen."""
        given = (("computed", self.options.compute_dtype), ("reduced", self.options.reduce_dtype))
        told = [(what, dtype) for (what, options), dtype in zip(given, dtypes, strict=True) if len(_several(options)) > 1]
        return ", ".join(f"{what} {'as it is' if dtype is None else f'in {dtype}'}" for what, dtype in told)

    def _stored(self) -> Iterator[Decisions]:
        decisions = self.plan.decisions
        for dtype in _several(self.options.dtype):
            found = decisions if dtype is None else decisions.cast(dtype, self.plan.graph)
            yield found.to("cuda") if self.cluster.devices else found

    def _workloads(self) -> Iterator[Training]:
        """The batch as it is, and in as many micro-batches as divide it."""
        workload = replace(self.workload, checkpointing="none")
        size = workload.batch_size
        for parts in range(1, size + 1 if self.options.split_batch else 2):
            if size % parts == 0:
                yield replace(workload, batch_size=size // parts, accumulate=workload.accumulate * parts)

    def _sharded(
        self,
        decisions: Decisions,
        axes: Mapping[str, int],
        offload: bool,
        compute: torch.dtype | None,
        reduce: torch.dtype | None,
    ) -> Decisions | None:
        """A layout's decisions; None where the model cannot be divided so."""
        if not axes:
            return decisions
        ranks = next((size for name, size in axes.items() if ROLES[name] == "tensor"), 1)
        rules = self._tensor.rules(ranks) if ranks > 1 else None
        if ranks > 1 and rules is None:
            return None
        try:
            made = sharding(
                axes,
                self.plan.graph,
                tensor=None if rules is None else rules[0],
                engine="torch" if rules is None else rules[1],
                compute_dtype=compute,
                reduce_dtype=reduce,
                offload=offload,
            )
        except DecisionError:
            if rules is None:
                raise
            return None
        return decisions.shard(made)


@dataclass(frozen=True)
class Checked:
    """What was found, and of the best the memory and the verdict that it was checked by."""

    search: Search
    found: Found
    best: Tried
    memory: Memory
    verdict: Verdict


def _instead(found: Found, layout: Layout, again: Tried | Short | NoProfile) -> Found:
    """What was found, with something else for a layout, or nothing."""
    others = [each for each in found.tried if each.layout is not layout]
    tried = in_order([*others, again] if isinstance(again, Tried) else others)
    return replace(found, tried=tuple(tried))


def _several(dtypes: Dtypes) -> list[torch.dtype | None]:
    return [dtypes] if dtypes is None or isinstance(dtypes, torch.dtype) else list(dtypes)
