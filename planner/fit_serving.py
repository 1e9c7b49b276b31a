"""Serving fitted to the devices of one node: the device map that offloads the fewest bytes and fits, checked by the verdict.

1. the model is a chain of units (`chain`), each with what a run of it keeps and needs where it runs
2. the best partition of that chain between devices, host memory and disk (`partition`) is made a plan
3. the plan's memory is found out as for any plan, and held against the cluster; where a place falls short, its room is made
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
from .partition import DISK, HOST, Partition, partition
from .placing import placing, ranges
from .verdict import Room, Verdict

_ROUNDS = 12
_LEAST = 2**20  # bytes: a room is made smaller by no less, so that the search ends
_WEIGHTS = ("parameter", "buffer")


@dataclass(frozen=True)
class Serving:
    """What was found: the decisions, with the memory and the verdict of that plan, and where each unit is."""

    decisions: Decisions
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
    """The plan for serving on one node of `cluster`; `run` is serving on one device, `memory_of` what a plan takes.

    The best that "fits", or else the best that is "tight". Nothing is put on disk unless `disk`. Raises `FitError` where nothing
    is found, with what is missing.
    """
    chain = with_needs(chain_of(graph, decisions, together), run)
    rooms, host = [device.memory for device in cluster.devices], cluster.host_memory or 0
    tight: Serving | None = None
    missing: tuple[Room, ...] = ()
    for _ in range(_ROUNDS):
        found = partition(chain.units, rooms, host, disk, chain.resident_bytes)
        if found is None:
            break
        chosen = _decided(graph, decisions, chain, found)
        memory = memory_of(chosen)
        tried = Serving(chosen, memory, memory.fits(cluster), chain, found)
        if tried.verdict.verdict == "fits":
            return tried
        if tried.verdict.verdict == "tight":
            tight = tight or tried
        missing = missing or tuple(room for room in tried.verdict.rooms if room.left < 0)
        short = {
            room.place.partition(" ")[0]: max(room.margin - room.left, _LEAST) for room in tried.verdict.rooms if _is_short(room)
        }
        if not short:  # what the prediction leaves out makes it tight, and no other map would change that
            break
        rooms = [max(room - short.get(f"cuda:{index}", 0), 0) for index, room in enumerate(rooms)]
        host = max(host - short.get("host", 0), 0)
    if tight is None:
        raise FitError(_nothing(chain, cluster, missing))
    return tight


def _is_short(room: Room) -> bool:
    return room.left < room.margin or bool(room.retries)


def _decided(graph: ParamGraph, decisions: Decisions, chain: Chain, found: Partition) -> Decisions:
    """One device that has all of it needs no hooks; else there is a rule for every module of a unit."""
    homes = set(found.homes)
    if len(homes) == 1 and min(homes) >= 0:
        return decisions.to(f"cuda:{min(homes)}")
    return decisions.place(placing(dict(_rules(chain, found, graph)), graph))


def _rules(chain: Chain, found: Partition, graph: ParamGraph) -> Iterator[tuple[str, str]]:
    """The main device's rules come first, as accelerate runs what is offloaded on the first device that is named."""
    main, names = f"cuda:{found.main}", {HOST: "cpu", DISK: "disk"}
    pairs = zip(chain.modules, found.homes, strict=True)
    named = ((name, home) for modules, home in pairs for module in modules for name in ([module] if module else _parts(graph)))
    entries = [(name, names.get(home, f"cuda:{home}")) for name, home in named]
    yield from sorted(ranges(entries), key=lambda entry: entry[1] != main)
    if chain.resident or not any(device == main for _, device in entries):
        yield "*", main


def _parts(graph: ParamGraph) -> list[str]:
    """What the module as a whole consists of, which no pattern names: modules with tensors, and its own tensors."""
    names = (name for tensor in graph.tensors if tensor.kind != "attribute" for name in tensor.names if not name.endswith("]"))
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


# -- what a run says of each unit ---------------------------------------------------------------------------------------


def with_needs(chain: Chain, run: Timeline) -> Chain:
    """The chain with what each unit keeps of the cache, and needs while it runs.

    What no unit makes (masks, positions) is there whatever runs, so it is a need of all of them.
    """
    homes = {name: number for number, names in enumerate(chain.modules) for name in names}
    caches = _peaks(run, homes, lambda kind: kind == "KV cache")
    needs = _peaks(run, homes, lambda kind: kind not in (*_WEIGHTS, "KV cache"))
    shared = needs.get(None, 0)
    units = (
        replace(unit, cache=unit.cache + caches.get(number, 0), working=needs.get(number, 0) + shared)
        for number, unit in enumerate(chain.units)
    )
    return replace(chain, units=tuple(units))


def _peaks(run: Timeline, homes: Mapping[str, int], counts: Callable[[str], bool]) -> dict[int | None, int]:
    """The most that each unit's modules have at once, of the kinds that count."""
    now: dict[int | None, int] = {}
    most: dict[int | None, int] = {}
    for moment in run.moments:
        each = run.allocations[moment.allocation]
        if counts(each.kind):
            home = _home(each.module, homes)
            now[home] = now.get(home, 0) + (each.nbytes if moment.born else -each.nbytes)
            most[home] = max(most.get(home, 0), now[home])
    return most


def _home(module: str, homes: Mapping[str, int]) -> int | None:
    """The unit that a module is a part of."""
    while module not in homes:
        if not module:
            return None
        module = module.rpartition(".")[0]
    return homes[module]


# -- nothing fits -------------------------------------------------------------------------------------------------------


def _nothing(chain: Chain, cluster: Cluster, missing: Sequence[Room]) -> str:
    """What is missing where in the best map that there is; without any, what the devices would have to hold."""
    weights = sum(unit.nbytes for unit in chain.units) + chain.resident_bytes
    cache, need = sum(unit.cache for unit in chain.units), max(unit.working for unit in chain.units)
    held = f"weights take {human_bytes(weights)}, cache and buffers {human_bytes(cache)}, running {human_bytes(need)} more"
    has = human_bytes(sum(device.memory for device in cluster.devices))
    short = "".join(f"; {room.describe()}" for room in missing)
    return f"nothing fits {cluster}: {held}, and its devices have {has}{short}"
