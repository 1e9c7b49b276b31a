"""Serving fitted to the devices of one node: the device map that offloads the fewest bytes and fits, checked by the verdict.

1. the model is a chain of units (`chain`), each with what a run of it keeps and needs where it runs
2. the best partition of that chain between devices, host memory and disk (`partition`) is made a plan's placing
3. the plan's memory is found out as for any plan, and held against the cluster; where a device falls short its room is made
   smaller by what is missing, and 2. comes again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..tracer.errors import FitError
from ..tracer.graph import ParamGraph
from .allocations import Timeline
from .chain import Chain, chain_of
from .cluster import Cluster
from .decisions import Decisions
from .memory import Memory, human_bytes
from .partition import DISK, HOST, Partition, Unit, partition
from .placing import Placing, placing
from .verdict import Room, Verdict

_ROUNDS = 12
_LEAST = 2**20  # bytes: a room is made smaller by no less, so that the search ends


@dataclass(frozen=True)
class Serving:
    """What was found: where each unit is (None where one device has all), with the memory and the verdict of that plan."""

    placing: Placing | None
    memory: Memory
    verdict: Verdict
    chain: Chain
    partition: Partition

    @property
    def offloaded(self) -> int:
        """Bytes of weights in host memory and on disk."""
        return self.partition.offloaded(self.chain.units)


def fit_serving(
    graph: ParamGraph,
    decisions: Decisions,
    cluster: Cluster,
    run: Timeline,
    memory_of: Callable[[Decisions], Memory],
    disk: bool = False,
    together: Sequence[str] | None = None,
) -> Serving:
    """The device map for serving on one node of `cluster`; `run` is serving on one device, `memory_of` what a plan takes.

    The best that "fits", or else the best that is "tight". Nothing is put on disk unless `disk`. Raises `FitError` where nothing
    is found, with what is missing.
    """
    chain = _with_needs(chain_of(graph, decisions, together), run)
    tight: Serving | None = None
    missing: tuple[Room, ...] = ()
    rooms = [device.memory for device in cluster.devices]
    host = cluster.host_memory or 0
    for _ in range(_ROUNDS):
        found = partition(chain.units, rooms, host, disk, chain.resident_bytes)
        if found is None:
            break
        tried = _tried(graph, decisions, cluster, chain, found, memory_of)
        if tried.verdict.verdict == "fits":
            return tried
        if tried.verdict.verdict == "tight":
            tight = tight or tried
        else:
            missing = missing or tried.verdict.rooms
        shortage = dict(_shortages(tried.verdict, cluster))
        if not shortage:  # what is left out of the prediction makes it tight, and no other map would change that
            break
        rooms = [room - shortage.get(f"cuda:{index}", 0) for index, room in enumerate(rooms)]
        host -= shortage.get("host", 0)
    if tight is None:
        raise FitError(_nothing(graph, chain, cluster, missing))
    return tight


def _tried(
    graph: ParamGraph,
    decisions: Decisions,
    cluster: Cluster,
    chain: Chain,
    found: Partition,
    memory_of: Callable[[Decisions], Memory],
) -> Serving:
    used = set(found.homes)
    if len(used) == 1 and min(used) >= 0:
        index, placed = min(used), None
        chosen = decisions.to(f"cuda:{index}")
    else:
        placed = placing(dict(_rules(chain, found)), graph)
        chosen = decisions.place(placed)
    memory = memory_of(chosen)
    return Serving(placed, memory, memory.fits(cluster), chain, found)


def _rules(chain: Chain, found: Partition) -> Iterator[tuple[str, str]]:
    """A rule for each module of a unit; the main device comes first, as accelerate takes the first one for it."""
    main = f"cuda:{found.main}"
    names = {HOST: "cpu", DISK: "disk"}
    entries = [
        (module, names.get(home, f"cuda:{home}"))
        for modules, home in zip(chain.modules, found.homes, strict=True)
        for module in modules
    ]
    yield from sorted(entries, key=lambda entry: entry[1] != main)
    if chain.resident or not any(device == main for _, device in entries):
        yield "*", main


def _shortages(verdict: Verdict, cluster: Cluster) -> Iterator[tuple[str, int]]:
    """Bytes by which each place falls short of "fits"."""
    for room in verdict.rooms:
        short = room.margin - room.left
        if short > 0 or room.retries:
            name = room.place.partition(" ")[0]
            yield ("host" if name == "host" else name), max(short, _LEAST)


# -- what a run says of each unit ---------------------------------------------------------------------------------------


def _with_needs(chain: Chain, run: Timeline) -> Chain:
    """The chain with what each unit keeps of the cache and needs while it runs; what nobody makes is any unit's need."""
    homes = {name: number for number, names in enumerate(chain.modules) for name in names}
    caches, needs = [0] * len(chain.units), [0] * len(chain.units)
    now: dict[int | None, int] = {}
    most: dict[int | None, int] = {}
    kept: dict[int | None, int] = {}
    for moment in run.moments:
        each = run.allocations[moment.allocation]
        if each.kind in ("parameter", "buffer"):
            continue
        home, sign = _home(each.module, homes), 1 if moment.born else -1
        held = kept if each.kind == "KV cache" else now
        held[home] = held.get(home, 0) + sign * each.nbytes
        for number, peak in ((home, held[home]),):
            if held is now:
                most[number] = max(most.get(number, 0), peak)
            else:
                caches_of = kept[home]
                if home is not None:
                    caches[home] = max(caches[home], caches_of)
    for number in range(len(needs)):
        needs[number] = most.get(number, 0) + most.get(None, 0)
    units = tuple(
        replace(unit, cache=unit.cache + cache, working=need)
        for unit, cache, need in zip(chain.units, caches, needs, strict=True)
    )
    return replace(chain, units=units)


def _home(module: str, homes: Mapping[str, int]) -> int | None:
    parts = module.split(".")
    return next((homes[name] for count in range(len(parts), -1, -1) if (name := ".".join(parts[:count])) in homes), None)


# -- nothing fits -------------------------------------------------------------------------------------------------------


def _nothing(graph: ParamGraph, chain: Chain, cluster: Cluster, missing: Sequence[Room]) -> str:
    """What is missing where, in the best map that there is, or the unit that no device has room for."""
    weights = sum(unit.nbytes + unit.cache for unit in chain.units) + chain.resident_bytes
    short = "; ".join(room.describe() for room in missing if room.left < 0)
    largest = max(chain.units, key=lambda unit: unit.streamed)
    why = short or f"the largest part brought to a device at a time, of {largest.name}, is {human_bytes(largest.streamed)}"
    return f"nothing fits {cluster}: weights and cache take {human_bytes(weights)}, and {why}"
