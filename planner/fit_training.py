"""Training fitted to a cluster: which mesh, what stays gathered, and which layers run again, so that a step is fast and fits.

1. every mesh of the cluster's ranks that the model can be divided along is a `Layout`, plain or offloaded, in each precision that
   is allowed
2. a layout in which no layer keeps more than it must is held against the cluster: where that does not fit, nothing in it does
3. what the layers do is chosen by a mixed-integer program (`choices.py`): the least seconds within the bytes that are left
4. what was chosen is put together as one profile (`mixed.py`), from which memory and time are found out as for any plan; where a
   place falls short, the program gets less, and 3. comes again
5. of all layouts the one that takes the least time for a sample is the best
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph
from .block_time import Talking, block_time, edges
from .changes import HOST
from .checkpointing import CheckpointRule
from .choices import OutOfTime, bytes_of, choose
from .cluster import Cluster
from .decisions import Decisions
from .estimate import memory
from .fsdp_form import Fsdp, with_fsdp
from .held import computing_device
from .kept import kept
from .layer_choices import Pass, Pure, bases, keys_chosen, layer_classes
from .memory import Memory
from .mixed import NoMix, check_mixable, mixed, places_of, rounds_of
from .placing import ranges
from .profile import NoProfile, Profile
from .rank_memory import rank_parts
from .sharding import ReshardRule, matches, repeated_layers
from .speeds import Speeds
from .step_form import Script, peak_of, plain
from .step_time import StepTime, samples_of, step_time
from .verdict import MARGIN, Room, Verdict
from .workload import Checkpointing, Training

LEVELS: tuple[Checkpointing, ...] = ("full", "selective", "none")
"""From what keeps least to what keeps most."""

ALIKE = 0.01
"""Steps that differ by a smaller share of their time count as alike: then the simpler layout is better."""

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class Does:
    """What a layer does: by which level it is checkpointed, and whether its parameters stay gathered after its forward."""

    level: Checkpointing
    gathered: bool = False

    def __str__(self) -> str:
        return f"{self.level}{', stays gathered' if self.gathered else ''}"


@dataclass(frozen=True)
class Layout:
    """How ranks and precision are arranged, with what layers do still open: decisions and workload without that."""

    axes: Mapping[str, int]
    decisions: Decisions
    workload: Training
    precision: str = ""  # in words, where there are several

    @property
    def samples(self) -> int:
        """Samples that all ranks go through in one step."""
        return samples_of(self.decisions.sharding, self.workload)

    @property
    def group(self) -> Hashable:
        """What layouts with the same profiles have in common."""
        sharding = self.decisions.sharding
        divided = () if sharding is None else (sharding.size("tensor"), sharding.shards, sharding.compute_dtype)
        return divided, self.decisions.casts, self.workload.batch_size, self.workload.accumulate > 1

    def describe(self) -> str:
        """The layout in words: `dp_shard=64 x tp=8, offloaded`."""
        sharding, workload = self.decisions.sharding, self.workload
        parts = [" x ".join(f"{name}={size}" for name, size in self.axes.items()) or "one device"]
        parts += ["offloaded"] if sharding is not None and sharding.offload else []
        parts += [f"weights in {self.decisions.casts[-1].uniform}"] if self.decisions.casts else []
        parts += [self.precision] if self.precision else []
        parts += [f"{workload.accumulate} micro-batches of {workload.batch_size}"] if workload.accumulate > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Tried:
    """A plan that the search arrived at: all its decisions, with its memory, verdict and time."""

    layout: Layout
    decisions: Decisions
    memory: Memory
    verdict: Verdict
    time: StepTime
    does: tuple[tuple[Does, ...], ...] = ()
    proven: bool = True

    @property
    def seconds(self) -> float:
        """Of a step for each of its samples."""
        return self.time.total / self.layout.samples

    @cached_property
    def order(self) -> tuple[float, ...]:
        """What is simpler comes first, then what is faster."""
        sharding = self.decisions.sharding
        offload = sharding is not None and sharding.offload
        return (len(self.layout.axes), offload, len(self.layout.decisions.casts), self.seconds)


@dataclass(frozen=True, slots=True)
class Short:
    """A layout in which nothing fits, and the place that is most short of room, with what keeps least in it."""

    layout: Layout
    room: Room
    memory: Memory


@dataclass(frozen=True)
class Allowed:
    """What the search may choose, and how much it leaves free: a share of what is needed, and bytes on each device.

    Verdicts say "fits" where `margin` is left free; `free`, at most as much, is what the search insists on.
    """

    levels: tuple[Checkpointing, ...] = LEVELS
    gathered: tuple[bool, ...] = (False, True)
    margin: float = MARGIN
    free: float = MARGIN
    reserve: int = 0
    deadline: float | None = None

    def does(self, layout: Layout) -> list[Does]:
        """What layers may do in a layout, those that keep least first."""
        sharding = layout.decisions.sharding
        divided = sharding is not None and sharding.shards and sharding.shard_ranks > 1
        gathered = self.gathered if divided else (False,)
        return [Does(level, each) for each in gathered for level in LEVELS if level in self.levels]


@dataclass(frozen=True)
class Found:
    """All that the search tried: plans that fit, best first, layouts in which none does, and those of which nothing is known."""

    tried: tuple[Tried, ...]
    short: tuple[Short, ...]
    unknown: tuple[tuple[Layout, str], ...] = ()
    proven: bool = True


ProfileOf = Callable[[Decisions, Training], Profile | NoProfile]


@dataclass
class Search:
    """The search over layouts; `profile_of` traces what a plan's forward and backward allocate, or gives what was traced."""

    graph: ParamGraph
    cluster: Cluster
    speeds: Speeds
    profile_of: ProfileOf
    allowed: Allowed = field(default_factory=Allowed)

    def over(self, layouts: Sequence[Layout]) -> Found:
        """The best of every layout, in order; raises `DecisionError` where none could be looked at."""
        tried: list[Tried] = []
        short: list[Short] = []
        unknown: list[tuple[Layout, str]] = []
        in_time = True
        for layout in sorted(layouts, key=lambda each: (str(each.group), str(each.axes))):
            if tried and self._is_late():
                in_time = False
                break
            found = self.of(layout)
            if isinstance(found, Tried):
                tried.append(found)
            elif isinstance(found, Short):
                short.append(found)
            else:
                unknown.append((layout, found.reason))
        if not tried and not short:
            raise DecisionError(f"nothing can be said of a step: {'; '.join(dict.fromkeys(reason for _, reason in unknown))}")
        proven = in_time and all(each.proven for each in tried)
        return Found(tuple(in_order(tried)), tuple(short), tuple(unknown), proven)

    def _is_late(self) -> bool:
        return self.allowed.deadline is not None and time.monotonic() > self.allowed.deadline

    def simplified(self, best: Tried) -> Tried:
        """The same layout with no layer that stays gathered, where that is as fast."""
        if not any(each.gathered for run in best.does for each in run):
            return best
        found = replace(self, allowed=replace(self.allowed, gathered=(False,))).of(best.layout)
        return found if isinstance(found, Tried) and found.seconds <= best.seconds * (1 + ALIKE) else best

    def uniform(self, layout: Layout, does: Does) -> Tried | None:
        """The plan in which every layer does the same, whether it fits or not."""
        found = self._uniform(layout, does)
        return found if isinstance(found, Tried) else None

    # -- one layout -----------------------------------------------------------------------------------------------------

    def of(self, layout: Layout) -> Tried | Short | NoProfile:
        """The best plan of a layout."""
        if (short := self._without_activations(layout)) is not None:
            return short
        does = self.allowed.does(layout)
        leanest = self._leanest(layout, does)
        if isinstance(leanest, NoProfile):
            return leanest
        if (room := self.shortest(leanest.verdict)) is not None:
            return Short(layout, room, leanest.memory)
        profiles: dict[Does, Profile] = {}
        for each in does:
            found = self.profile_of(layout.decisions, replace(layout.workload, checkpointing=each.level))
            if isinstance(found, Profile):
                profiles[each] = found
        try:
            check_mixable(profiles)
            return self._chosen(layout, profiles, leanest)
        except NoMix:
            return self._best_uniform(layout, list(profiles), leanest)

    def _without_activations(self, layout: Layout) -> Short | None:
        """What falls short by its weights, gradients and optimizer state alone need not be traced."""
        found = memory(self.graph, layout.decisions, layout.workload)
        room = self.shortest(found.fits(self.cluster, self.allowed.margin))
        return None if room is None else Short(layout, room, found)

    def _leanest(self, layout: Layout, does: Sequence[Does]) -> Tried | NoProfile:
        """The plan in which every layer keeps least; layers that do not repeat can only keep all."""
        found = self._uniform(layout, does[0])
        return self._leanest(layout, does[1:]) if isinstance(found, NoProfile) and len(does) > 1 else found

    def _uniform(self, layout: Layout, does: Does) -> Tried | NoProfile:
        """The plan in which every layer does the same."""
        profile = self.profile_of(layout.decisions, replace(layout.workload, checkpointing=does.level))
        if isinstance(profile, NoProfile):
            return profile
        rounds = tuple((does,) * count for count in rounds_of(profile)) or ((does,),)
        return self.tried(layout, profile, rounds)

    def _best_uniform(self, layout: Layout, does: Sequence[Does], leanest: Tried) -> Tried:
        found = [self._uniform(layout, each) for each in does]
        fitting = [each for each in found if isinstance(each, Tried) and self.shortest(each.verdict) is None]
        return min(fitting, key=lambda each: each.seconds, default=leanest)

    def _chosen(self, layout: Layout, profiles: Mapping[Does, Profile], leanest: Tried) -> Tried:
        """What the program chooses, with less for it to go by than that came to for as long as it turns out to fall short."""
        pure = self.pure(layout, profiles)
        classes = layer_classes(pure)
        base = bases(classes, next(iter(pure.values())).passes)
        budget = self._left_for_layers(leanest, pure[next(iter(pure))])
        best = leanest
        for _ in range(_ROUNDS):
            try:
                chosen = choose(classes, base, dict.fromkeys(base, budget), self._seconds_left())
            except OutOfTime:
                break
            if chosen is None:
                return best
            rounds = tuple(map(tuple, keys_chosen(chosen, list(pure))))
            found = self.tried(layout, mixed(profiles, rounds), rounds, chosen.proven)
            room = self.shortest(found.verdict)
            if room is None:
                return found if found.seconds <= best.seconds else best
            budget = min(budget - self.missing_at(room), max(bytes_of(classes, chosen.counts, base).values()) - 1)
        return replace(best, proven=False)

    def tried(self, layout: Layout, profile: Profile, does: tuple[tuple[Does, ...], ...], proven: bool = True) -> Tried:
        """The plan of a layout in which layers do so, whether it fits or not, by the profile of just that."""
        decisions = decided(self.graph, layout.decisions, profile, does)
        found = memory(self.graph, decisions, layout.workload, profile)
        fsdp, parameters = rank_parts(self.graph, decisions, layout.workload)
        taken = step_time(profile, decisions.sharding, fsdp, parameters.each, layout.workload, self.speeds)
        return Tried(layout, decisions, found, found.fits(self.cluster, self.allowed.margin), taken, does, proven)

    def pure(self, layout: Layout, profiles: Mapping[Does, Profile]) -> dict[Does, Pure]:
        """The steps in which every layer does the same, of which the program knows what each layer takes."""
        several = len({each.gathered for each in profiles}) > 1
        return {each: self._pure(layout, profile, each, several) for each, profile in profiles.items()}

    def _pure(self, layout: Layout, profile: Profile, does: Does, several: bool) -> Pure:
        rounds = [(does,) * count for count in rounds_of(profile)]
        decisions = decided(self.graph, layout.decisions, profile, rounds)
        fsdp, _ = rank_parts(self.graph, decisions, layout.workload)
        talking = Talking.of(decisions.sharding, fsdp)
        times = [(block, block_time(block, profile, talking, self.speeds)) for block in profile.blocks]
        accumulate = layout.workload.accumulate
        seconds = [accumulate * time.seconds for _, time in times]
        passes = tuple(_passes(profile, fsdp, accumulate, several))
        return Pure(profile, passes, seconds, accumulate * edges(times), does.gathered)

    # -- room -----------------------------------------------------------------------------------------------------------

    def shortest(self, verdict: Verdict) -> Room | None:
        """The place that is most short of room, if one is."""
        short = [room for room in verdict.rooms if self.missing_at(room) > 0 or room.retries]
        return max(short, key=self.missing_at, default=None)

    def missing(self, verdict: Verdict) -> int:
        """Bytes that a rank lacks where it lacks most; 0 or below where all is well."""
        return max(self.missing_at(room) for room in verdict.rooms)

    def missing_at(self, room: Room) -> int:
        """Bytes that a rank lacks there, with the margin and the reserve."""
        ranks = self._ranks_at(room)
        free = int(room.needed * self.allowed.free) + ranks * self.allowed.reserve
        return -(-(free - room.left) // ranks)

    def _ranks_at(self, room: Room) -> int:
        """How many ranks share a place."""
        return max(len(self.cluster.devices), 1) if room.on_host else 1

    def _left_for_layers(self, leanest: Tried, pure: Pure) -> int:
        """Bytes that forward and backward may come to in a rank, besides what is there all the time."""
        device = computing_device(self.graph, leanest.decisions)
        scripts = max(each.base + peak_of(each.scripts, each.added).nbytes for each in pure.passes)
        always = leanest.memory.by_device["step"][device] - scripts
        rooms = [room for room in leanest.verdict.rooms if room.on_host == (device == HOST)]
        return min(int(self._usable(room)) for room in rooms) - always

    def _usable(self, room: Room) -> float:
        """Bytes of tensors that a rank may have there."""
        ranks = self._ranks_at(room)
        return ((room.usable - ranks * self.allowed.reserve) / (1 + self.allowed.free) - sum(room.added.values())) / ranks

    def _seconds_left(self) -> float | None:
        deadline = self.allowed.deadline
        return None if deadline is None else max(deadline - time.monotonic(), 1.0)


def _passes(profile: Profile, fsdp: Fsdp | None, accumulate: int, several: bool) -> Iterator[Pass]:
    """The first micro-batch, and a later one, which FSDP adds where it reduces; `several`: also beside layers of another kind."""
    for later in (False, True)[: 1 + (accumulate > 1)]:
        if fsdp is None:
            yield Pass(plain(profile), later, base=later * sum(profile.gradients.values()))
        else:
            now = replace(fsdp, accumulates=later)
            other = _beside_others(profile, now) if several else ()
            yield Pass(with_fsdp(profile, now), other=other, base=later * _gradients(profile, now))


def _gradients(profile: Profile, fsdp: Fsdp) -> int:
    """A rank's part of them on its device."""
    parts = (part for unit in fsdp.units.values() for part in unit.parts if part.name in profile.gradients)
    return 0 if fsdp.offload else sum(part.numel * part.itemsize for part in parts)


def _beside_others(profile: Profile, fsdp: Fsdp) -> list[Script]:
    """The scripts of every block where the layers before are gathered for longer, or less long, than its own."""
    first, second = (with_fsdp(profile, _alternating(profile, fsdp, own)) for own in (0, 1))
    return [(first, second)[place.traced % 2][index] for index, place in enumerate(places_of(profile))]


def _alternating(profile: Profile, fsdp: Fsdp, own: int) -> Fsdp:
    """FSDP with every other round the other way: those that a profile names by an even number, or an odd one, as they are."""
    units = dict(fsdp.units)
    for run in profile.repeated:
        last = len(run.layers) // run.period - 1
        for traced, number in enumerate((0, 1, 2, last)):
            layers = run.layers[number * run.period : (number + 1) * run.period] if traced % 2 != own else ()
            units |= {
                name: replace(unit, reshard=not unit.reshard)
                for name, unit in fsdp.units.items()
                if any(name == layer or name.startswith(f"{layer}.") for layer in layers)
            }
    return replace(fsdp, units=units)


def in_order(tried: Sequence[Tried]) -> list[Tried]:
    """The best first: the simplest of those that are as fast as the fastest, then the others by their time."""
    if not tried:
        return []
    fastest = min(each.seconds for each in tried)
    best = min((each for each in tried if each.seconds <= fastest * (1 + ALIKE)), key=lambda each: each.order)
    return [best, *sorted((each for each in tried if each is not best), key=lambda each: each.seconds)]


# -- decisions ----------------------------------------------------------------------------------------------------------


def decided(graph: ParamGraph, decisions: Decisions, profile: Profile, rounds: Sequence[Sequence[Does]]) -> Decisions:
    """A layout's decisions with what each round of each of a profile's runs does.

    A layer that is in no run does what the one before it does, or else the first of all, as `mixed.mixed` has it.
    """
    doing = _of_layers(graph, profile, rounds)
    levels = [(pattern, level) for pattern, level in ranges([(layer, does.level) for layer, does in doing]) if level != "none"]
    rules = tuple(CheckpointRule(pattern=pattern, level=level) for pattern, level in levels)
    found = decisions.model_copy(update={"checkpointing": rules})
    if found.sharding is None or not found.sharding.shards:
        return found
    units = set(found.sharding.unit_names(graph))
    stays = [(layer, does.gathered) for layer, does in doing if layer in units]
    kept = tuple(ReshardRule(pattern=pattern, reshard=False) for pattern, gathered in ranges(stays) if gathered)
    return found.model_copy(update={"sharding": found.sharding.model_copy(update={"reshard_rules": kept})})


def _of_layers(graph: ParamGraph, profile: Profile, rounds: Sequence[Sequence[Does]]) -> list[tuple[str, Does]]:
    """What every layer that repeats does, in order."""
    known = {
        layer: does
        for run, doing in zip(profile.repeated, rounds, strict=False)
        for number, does in enumerate(doing)
        for layer in run.layers[number * run.period : (number + 1) * run.period]
    }
    now, found = rounds[0][0], []
    for layer in _layers(graph):
        now = known.get(layer, now)
        found.append((layer, now))
    return found


@kept
def _layers(graph: ParamGraph) -> Sequence[str]:
    """The names of all layers that repeat, in order."""
    patterns = repeated_layers(graph)
    return [each.name for each in graph.modules if any(matches(pattern, each.name) for pattern in patterns)]
