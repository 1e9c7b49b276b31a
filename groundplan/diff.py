"""What differs between two plans of one constructor: what they decide, and what that does to memory and time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .differences import Difference, asked_differently, decided_differently
from .forecast import Workload
from .planner.cluster import Cluster, cluster_of
from .planner.decisions import Decisions
from .planner.memory import Memory
from .planner.speeds import Speeds
from .planner.step_time import StepTime, human_seconds, samples_of
from .planner.tiers import Tier
from .planner.workload import Training
from .shown import Shown, heading, shortened, write_atomically
from .tracer.errors import DecisionError
from .units import format_bytes

if TYPE_CHECKING:
    from .plan import Plan


@dataclass(frozen=True, slots=True)
class Timed:
    """A step of a plan: its time, or why that is not known, and the samples that all ranks go through in it."""

    time: StepTime | None
    samples: int
    unknown: str = ""

    @property
    def seconds(self) -> float | None:
        """For each sample."""
        return None if self.time is None else self.time.total / self.samples

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        time = None if self.time is None else self.time.to_json()
        return {"time": time, "samples": self.samples, "seconds_per_sample": self.seconds, "unknown": self.unknown}


@dataclass(frozen=True, eq=False, repr=False)
class PlanDiff(Shown):
    """Two plans side by side, `this` and `other`: what they decide differently, bytes by phase, and seconds of a step.

    True, as a condition, where they decide anything differently. `times` are None without a training workload and a cluster.
    """

    constructor: str
    differences: tuple[Difference, ...]
    memories: tuple[Memory, Memory]
    times: tuple[Timed, Timed] | None = None

    def __bool__(self) -> bool:
        return bool(self.differences)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The same as plain data, bytes and seconds; written to `path` as JSON as well, if one is given."""
        data = {
            "constructor": self.constructor,
            "differences": [{"what": each.what, "this": each.this, "other": each.other} for each in self.differences],
            "phases": {phase: {"this": this, "other": other} for phase, this, other in self.phases},
            "peak": {"this": self.memories[0].peak, "other": self.memories[1].peak},
            "step": None if self.times is None else {"this": self.times[0].to_json(), "other": self.times[1].to_json()},
        }
        if path is not None:
            write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        return data

    @property
    def phases(self) -> Iterator[tuple[str, int, int]]:
        """Every phase that both plans have, with the peak bytes of the worst rank in each."""
        this, other = (memory.phases for memory in self.memories)
        yield from ((phase, this[phase], other[phase]) for phase in this if phase in other)

    def blocks(self, width: int) -> Iterator[RenderableType]:
        """What is shown, one below the other, none wider than `width` columns."""
        yield Text(shortened(f"two plans of {self.constructor}", width), style="bold")
        yield heading("what they decide differently" if self.differences else "they decide the same")
        if self.differences:
            yield _decided(self.differences)
        yield heading("memory of the worst rank")
        yield _sizes([*self.phases, ("peak", self.memories[0].peak, self.memories[1].peak)])
        if self.times is not None:
            yield heading("time of a training step, predicted")
            yield _times(*self.times)


# -- asking -------------------------------------------------------------------------------------------------------------


def diff(
    plan: Plan, other: Plan, workload: Workload | None, cluster: Cluster | str | None, tier: Tier, speeds: Speeds | None
) -> PlanDiff:
    """The difference; `Plan.diff` says what the others mean, and what is raised."""
    _check(plan, other)
    plan, other = _bound_like(plan, other), _bound_like(other, plan)
    workloads = _workloads(plan, other, workload)
    memories = (
        plan.memory(workloads[0], tier=tier, cluster=cluster),
        other.memory(workloads[1], tier=tier, cluster=cluster),
    )
    differences = (*decided_differently(plan.graph, plan.decisions, other.decisions), *asked_differently(*workloads))
    times = _both_timed((plan, other), workloads, cluster, speeds)
    return PlanDiff(plan.decisions.constructor, tuple(differences), memories, times)


def _check(plan: Plan, other: Plan) -> None:
    if not isinstance(other, type(plan)):
        raise DecisionError(f"a plan is compared with another gp.Plan, not with {other!r}")
    if plan.decisions.fingerprint != other.decisions.fingerprint:
        raise DecisionError(
            f"the plans are of different constructors, or of different arguments: {_of(plan.decisions)} and "
            f"{_of(other.decisions)}; compare plans of one trace"
        )


def _of(decisions: Decisions) -> str:
    return f"{decisions.constructor} (fingerprint {decisions.fingerprint[:12]})"


def _bound_like(plan: Plan, other: Plan) -> Plan:
    """A plan that was loaded, with the constructor of the other, which has the same fingerprint."""
    return plan if plan._build is not None else replace(plan, _build=other._build)


def _workloads(plan: Plan, other: Plan, workload: Workload | None) -> tuple[Workload | None, Workload | None]:
    """What is asked about, or what each was fitted to; a plan that was not fitted goes by the other's."""
    if workload is not None:
        return workload, workload
    this, others = plan._workload_of(None), other._workload_of(None)
    return this or others, others or this


def _both_timed(
    plans: tuple[Plan, Plan],
    workloads: tuple[Workload | None, Workload | None],
    cluster: Cluster | str | None,
    speeds: Speeds | None,
) -> tuple[Timed, Timed] | None:
    machine = _cluster(plans, cluster)
    training = [each for each in workloads if isinstance(each, Training)]
    if len(training) < 2 or (machine is None and speeds is None):
        return None
    return _timed(plans[0], training[0], machine, speeds), _timed(plans[1], training[1], machine, speeds)


def _cluster(plans: Iterable[Plan], cluster: Cluster | str | None) -> Cluster | None:
    """The cluster that is given, or that one of the plans was fitted to, where its name says all of it."""
    if cluster is not None:
        return cluster_of(cluster)
    for plan in plans:
        if plan.decisions.fitted is not None:
            try:
                return Cluster.parse(plan.decisions.fitted.cluster)
            except DecisionError:
                continue
    return None


def _timed(plan: Plan, workload: Training, cluster: Cluster | None, speeds: Speeds | None) -> Timed:
    samples = samples_of(plan.decisions.sharding, workload)
    try:
        return Timed(plan.step_time(workload, cluster, speeds=speeds), samples)
    except DecisionError as error:
        return Timed(None, samples, str(error))


# -- showing --------------------------------------------------------------------------------------------------------------


def _decided(differences: Iterable[Difference]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in ("  ", "this", "other"):
        table.add_column(name, overflow="fold")
    for each in differences:
        table.add_row(Text(f"  {each.what}"), Text(each.this), Text(each.other))
    return table


def _sizes(rows: Iterable[tuple[str, int, int]]) -> Table:
    table = _numbers("  phase")
    for name, this, other in rows:
        table.add_row(f"  {name}", format_bytes(this), format_bytes(other), _change(this, other))
    return table


def _times(this: Timed, other: Timed) -> Table:
    table = _numbers("  ")
    totals = [None if each.time is None else each.time.total for each in (this, other)]
    table.add_row("  a step", *(_time(each) for each in totals), _change(*totals))
    samples = (this.samples, other.samples)
    table.add_row("  samples of all ranks", *(f"{count:,}" for count in samples), _change(*samples))
    table.add_row("  a sample", *(_time(each.seconds) for each in (this, other)), _change(this.seconds, other.seconds))
    for name in ("compute", "recompute", "optimizer"):
        seconds = [None if each.time is None else getattr(each.time, name) for each in (this, other)]
        table.add_row(f"  of a step: {name}", *map(_time, seconds), _change(*seconds))
    exposed = [None if each.time is None else sum(each.time.exposed.values()) for each in (this, other)]
    table.add_row("  of a step: communication waited for", *map(_time, exposed), _change(*exposed))
    for name, each in (("this", this), ("other", other)):
        if each.unknown:
            table.add_row(Text(f"  {name}: {each.unknown}"))
    return table


def _numbers(first: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column(first, overflow="fold")
    for name in ("this", "other", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _time(seconds: float | None) -> str:
    return "not known" if seconds is None else human_seconds(seconds)


def _change(this: float | None, other: float | None) -> str:
    """From this to the other, in percent."""
    if not this or other is None:
        return "" if this is None or other is None or this == other else "new"
    return "" if this == other else f"{100 * (other - this) / this:+.1f} %"
