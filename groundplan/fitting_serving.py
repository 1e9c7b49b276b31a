"""Serving fitted to a cluster: which decisions make a plan fit it; where none do, what would."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .fitting import PLENTY, has
from .planner.allocations import Timeline
from .planner.cluster import Cluster
from .planner.decisions import Decisions
from .planner.fit_serving import Serving, fit_serving
from .planner.fitted import FittedServing, InferenceRecord, Reason
from .planner.inference import Inference
from .planner.inference_memory import by_rule
from .planner.memory import Memory, human_bytes
from .planner.partition import DISK, HOST
from .planner.replayed_run import Allocator
from .runtime.fake_inference import fake_inference
from .tracer.errors import DecisionError, FitError

if TYPE_CHECKING:
    from .plan import Plan


def fit_serving_plan(plan: Plan, cluster: Cluster, workload: Inference, disk: bool, together: Sequence[str] | None) -> Decisions:
    """The decisions for serving on `cluster`; raises `FitError` with what would do, each of which was tried."""
    if cluster.nodes > 1 or not cluster.devices:
        raise DecisionError(f"serving is fitted to the devices of one node, and {cluster} has {has(cluster)}")
    run = fake_inference(plan._bound, plan.decisions.to("cuda"), workload)
    search = _Search(plan, workload, disk, together, run)
    try:
        return _recorded(cluster, workload, search.on(cluster))
    except FitError as error:
        ways = " or ".join(_ways(search, cluster))
        raise FitError(f"{error}. {f'What fits: {ways}' if ways else 'Neither host memory nor int8 weights would do'}") from None


def _recorded(cluster: Cluster, workload: Inference, found: Serving) -> Decisions:
    """What was found, with the record of it."""
    fitted = FittedServing(
        cluster=str(cluster),
        workload=InferenceRecord.of(workload),
        verdict=found.verdict.verdict,
        tier=found.memory.tier,
        peak=found.memory.peak,
        binding=found.verdict.binding.describe(),
        reasons=tuple(_reasons(found)),
    )
    return found.decisions.model_copy(update={"fitted": fitted})


def _reasons(found: Serving) -> Iterator[Reason]:
    units, partition = found.chain.units, found.partition
    weights = human_bytes(sum(unit.nbytes for unit in units) + found.chain.resident_bytes)
    if found.decisions.placing is None:
        why = f"{weights} of weights have room there, with what running takes"
        yield Reason(what=f"all of it on cuda:{partition.main}", why=why)
        return
    held: dict[int, int] = {}
    for unit, home in zip(units, partition.homes, strict=True):
        held[home] = held.get(home, 0) + unit.nbytes
    held = {home: nbytes for home, nbytes in held.items() if nbytes}
    shares = ", ".join(f"{human_bytes(nbytes)} of weights {_at(home)}" for home, nbytes in held.items())
    yield Reason(
        what=f"consecutive layers: {shares}", why=f"no device has room for all {weights}, what running takes and a margin"
    )
    if found.offloaded:
        yield Reason(
            what=f"{human_bytes(found.offloaded)} of the weights not on the devices",
            why="the fewest bytes for the room that the devices have, by an exact search",
        )


def _at(home: int) -> str:
    return {HOST: "in host memory", DISK: "on disk"}.get(home, f"on cuda:{home}")


@dataclass(frozen=True)
class _Search:
    """A search on one cluster or another, with one run of serving."""

    plan: Plan
    workload: Inference
    disk: bool
    together: Sequence[str] | None
    run: Timeline

    def on(self, cluster: Cluster) -> Serving:
        """The best on a cluster; raises `FitError`."""
        graph, allocator = self.plan.graph, Allocator.of(None, cluster)

        def memory_of(decisions: Decisions) -> Memory:
            return by_rule(graph, decisions, self.workload, self.run, allocator)

        return fit_serving(graph, self.plan.decisions, cluster, self.run, memory_of, self.disk, self.together)


# -- what would do ------------------------------------------------------------------------------------------------------


def _ways(search: _Search, cluster: Cluster) -> Iterator[str]:
    """Changes with which it fits, each tried."""
    yield from _with_host_memory(search, cluster)
    yield from _in_int8(search, cluster)


def _with_host_memory(search: _Search, cluster: Cluster) -> Iterator[str]:
    """The host memory that is needed where there is plenty; then with just that much."""
    try:
        found = search.on(cluster.model_copy(update={"host_memory": PLENTY}))
        enough = found.verdict.with_enough_host_memory
        found = search.on(enough)
    except FitError:
        return
    yield f"{enough}, with {human_bytes(found.offloaded)} of the weights in host memory ({found.verdict.verdict})"


def _in_int8(search: _Search, cluster: Cluster) -> Iterator[str]:
    """Quantized on the largest device alone, as a plan that quantizes has one."""
    try:
        config = importlib.import_module("torchao.quantization").Int8WeightOnlyConfig()
    except ImportError:
        return
    largest = max(range(len(cluster.devices)), key=lambda index: cluster.devices[index].memory)
    quantized = search.plan.to(f"cuda:{largest}").quantize(config)
    memory = quantized.memory(search.workload, cluster=cluster)
    word = memory.fits(cluster).verdict
    if word != "does not fit":
        yield f'plan.to("cuda:{largest}").quantize(Int8WeightOnlyConfig()) ({word})'
