"""What the search over plans for training finds is the best there is: held against all that could be chosen."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.fitting_training import FitTraining, TrainingOptions
from groundplan.planner.catalog import Device
from groundplan.planner.choices import bytes_of, cost_of
from groundplan.planner.estimate import memory
from groundplan.planner.fit_training import Allowed, Does, Layout, Search, Tried, decided
from groundplan.planner.layer_choices import bases, layer_classes
from groundplan.planner.memory import Memory
from groundplan.planner.mixed import TRACED, mixed, rounds_of
from groundplan.planner.profile import Profile
from groundplan.planner.rank_memory import rank_parts
from groundplan.planner.speeds import Link, Rate, Speeds
from groundplan.planner.step_time import step_time

GB = 10**9
SEEDS = 200
SAMPLE = {14, *range(0, SEEDS, 10)}
Rounds = tuple[tuple[Does, ...], ...]


class Layer(nn.Module):
    """A feed-forward block; those that are not `wide` have no norm."""

    def __init__(self, width: int, inner: int, wide: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if wide else nn.Identity()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = value + self.down(torch.tanh(self.up(self.norm(value))))
        return found


class Net(nn.Module):
    """Lists of layers, one after the other, each of one kind or of two that take turns, with an embedding and a head."""

    def __init__(self, width: int, lists: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        for number, inners in enumerate(lists):
            self.add_module(f"stack{number}", nn.ModuleList(Layer(width, inner, wide=inner % 3 == 0) for inner in inners))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = self.embed(tokens)
        for stack in self.children():
            for layer in stack if isinstance(stack, nn.ModuleList) else ():
                value = layer(value)
        found: torch.Tensor = self.head(value)
        return found


KINDS: dict[str, tuple[int, tuple[tuple[int, ...], ...]]] = {
    "activations": (64, ((96,) * 6,)),
    "weights": (192, ((768,) * 6,)),
    "two lists": (64, ((96,) * 5, (512,) * 5)),
    "taking turns": (64, ((96, 512) * 5,)),
}
LENGTHS = {"activations": 256, "weights": 8, "two lists": 64, "taking turns": 64}


@cache
def plan_of(kind: str) -> gp.Plan:
    return gp.trace(Net, *KINDS[kind])


@cache
def inputs_of(kind: str) -> tuple[torch.Tensor, ...]:
    return (torch.zeros(2, LENGTHS[kind], dtype=torch.int64),)


def speeds_of(seed: int) -> Speeds:
    """A machine, from one where links are slow to one where they are fast."""
    chance = random.Random(seed)
    return Speeds(
        device="drawn",
        flops=(("float32", Rate.of(10 ** chance.uniform(11, 13))),),
        memory=Rate.of(10 ** chance.uniform(11, 12)),
        launch=chance.choice([0.0, 2e-6]),
        ahead=chance.random() < 0.7,
        node=8,
        within=Link(bandwidth=10 ** chance.uniform(9, 11.5), latency=chance.choice([0.0, 1e-5])),
        overlap=chance.choice([0.0, 0.8, 1.0]),
    )


def cluster_of(devices: int, nbytes: int) -> gp.Cluster:
    return gp.Cluster(devices=(Device(name="drawn", memory=nbytes),) * devices)


@dataclass
class Instance:
    """What a seed draws: a model, machines, and what layers may do; the room is between what the leanest and the richest need."""

    seed: int
    kind: str
    devices: int
    accumulate: int
    speeds: int
    levels: tuple[Any, ...]
    gathered: tuple[bool, ...]
    share: float
    nbytes: int = 80 * GB

    def workload(self) -> gp.Training:
        return gp.Training("adamw", batch_size=2, inputs=inputs_of(self.kind), accumulate=self.accumulate)

    def question(self) -> FitTraining:
        cluster = cluster_of(self.devices, self.nbytes)
        return FitTraining(
            plan_of(self.kind), cluster, self.workload(), TrainingOptions(margin=0.05, speeds=speeds_of(self.speeds))
        )

    def search(self) -> Search:
        found = self.question().search(0.05)
        return replace(found, allowed=Allowed(self.levels, self.gathered, margin=0.05, free=0.05))

    def layouts(self) -> list[Layout]:
        return self.question().layouts(False)


def drawn(seed: int) -> Instance:
    chance = random.Random(seed)
    kind = chance.choice(list(KINDS))
    levels: list[tuple[Any, ...]] = [("full", "none"), ("none",), ("full", "selective", "none")]
    several = len(KINDS[kind][1]) > 1
    chosen = chance.choice(levels[:2] if several else levels)
    gathered = (False, True) if len(chosen) == 1 or (not several and len(chosen) == 2 and seed % 10 == 5) else (False,)
    found = Instance(
        seed=seed,
        kind=kind,
        devices=chance.choice([1, 2, 4, 8]),
        accumulate=chance.choice([1, 1, 2]),
        speeds=chance.randrange(4),
        levels=chosen,
        gathered=gathered,
        share=chance.uniform(-0.02, 1.02),
    )
    return replace(found, nbytes=_room(found))


def _room(instance: Instance) -> int:
    """Bytes of a device, at a share of the way from what the leanest plan of any mesh needs to what the richest does."""
    search, needed = instance.search(), list[int]()
    for layout in instance.layouts():
        does = search.allowed.does(layout)
        for each in (does[0], does[-1]):
            found = search.uniform(layout, each)
            assert found is not None
            needed.append(found.verdict.rooms[0].needed)
    return int((min(needed) + instance.share * (max(needed) - min(needed))) * 1.05) + 1


# -- all that could be chosen -------------------------------------------------------------------------------------------


def ways(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways of so many layers to take so many choices."""
    if parts == 1:
        yield (number,)
        return
    for first in range(number, -1, -1):
        yield from ((first, *rest) for rest in ways(number - first, parts - 1))


def assignments(rounds: Sequence[int], does: Sequence[Does]) -> Iterator[Rounds]:
    """All that layers can do: the first and the last two anything, those between in the order of `does`."""
    runs = []
    for count in rounds:
        middles = [
            tuple(each for each, number in zip(does, numbers, strict=True) for _ in range(number))
            for numbers in ways(count - TRACED + 1, len(does))
        ]
        runs.append([(first, *middle, *last) for first in does for middle in middles for last in itertools.product(does, does)])
    return itertools.product(*runs)


@dataclass
class Whole:
    """A plan of an assignment: its time on each machine, and its memory, each found out once."""

    search: Search
    layout: Layout
    profile: Profile
    rounds: Rounds
    times: dict[int, float] = field(default_factory=dict)
    known: list[Memory] = field(default_factory=list)

    def seconds(self, speeds: int) -> float:
        if speeds not in self.times:
            decisions = decided(self.search.graph, self.layout.decisions, self.profile, self.rounds)
            fsdp, parameters = rank_parts(self.search.graph, decisions, self.layout.workload)
            sharding, workload = decisions.sharding, self.layout.workload
            taken = step_time(self.profile, sharding, fsdp, parameters.each, workload, speeds_of(speeds))
            self.times[speeds] = taken.total / self.layout.samples
        return self.times[speeds]

    @property
    def memory(self) -> Memory:
        if not self.known:
            decisions = decided(self.search.graph, self.layout.decisions, self.profile, self.rounds)
            self.known.append(memory(self.search.graph, decisions, self.layout.workload, self.profile))
        return self.known[0]


KNOWN: dict[Any, Whole] = {}


def all_of(instance: Instance, search: Search) -> Iterator[Whole]:
    """Every assignment of every mesh."""
    for layout in instance.layouts():
        does = search.allowed.does(layout)
        profiles = profiles_of(search, layout, does)
        for rounds in assignments(rounds_of(profiles[does[0]]), does):
            key = (instance.kind, instance.accumulate, str(layout.axes), rounds)
            if key not in KNOWN:
                KNOWN[key] = Whole(search, layout, mixed(profiles, rounds), rounds)
            yield KNOWN[key]


def profiles_of(search: Search, layout: Layout, does: Sequence[Does]) -> dict[Does, Profile]:
    found = {}
    for each in does:
        profile = search.profile_of(layout.decisions, replace(layout.workload, checkpointing=each.level))
        assert isinstance(profile, Profile)
        found[each] = profile
    return found


@pytest.mark.parametrize(
    "seed",
    [seed if seed in SAMPLE else pytest.param(seed, marks=pytest.mark.conformance) for seed in range(SEEDS)],
)
def test_nothing_that_fits_is_faster_than_what_is_found(seed: int) -> None:
    instance = drawn(seed)
    search = instance.search()
    found = search.over(instance.layouts())
    everything = list(all_of(instance, search))
    best = min((each.seconds for each in found.tried), default=float("inf"))
    for each in found.tried:
        assert search.shortest(each.verdict) is None
    for whole in everything:
        if whole.seconds(instance.speeds) < best * (1 - 1e-6):
            verdict = whole.memory.fits(search.cluster, 0.05)
            does = [list(map(str, run)) for run in whole.rounds]
            assert search.shortest(verdict) is not None, f"{whole.layout.describe()}: {does}"
    assert not found.tried or any(abs(whole.seconds(instance.speeds) / best - 1) < 1e-6 for whole in everything)


@pytest.mark.parametrize("seed", range(4, 44, 4))
def test_the_program_has_the_bytes_and_the_seconds_of_the_closed_form(seed: int) -> None:
    instance = drawn(seed)
    search, chance = instance.search(), random.Random(seed)
    for layout in instance.layouts():
        does = search.allowed.does(layout)
        profiles = profiles_of(search, layout, does)
        pure = search.pure(layout, profiles)
        classes, base = layer_classes(pure), bases(layer_classes(pure), next(iter(pure.values())).passes)
        beside, offsets = set(), []
        for rounds in chance.choices(list(assignments(rounds_of(profiles[does[0]]), does)), k=8):
            parts = [part for run in rounds for part in (run[:1], run[1:-2], run[-2:-1], run[-1:])]
            counts = [tuple(part.count(each) for each in does) for part in parts]
            whole = Whole(search, layout, mixed(profiles, rounds), rounds)
            beside.add(whole.memory.phases["step"] - max(bytes_of(classes, counts, base).values()))
            offsets.append(whole.seconds(instance.speeds) * layout.samples - cost_of(classes, counts))
        assert len(beside) == 1
        assert max(offsets) - min(offsets) < 1e-6 * whole.seconds(instance.speeds) * layout.samples


@pytest.mark.parametrize(
    "seed", [seed if seed in (5, 15, 30) else pytest.param(seed, marks=pytest.mark.conformance) for seed in range(SEEDS)]
)
def test_what_is_found_fits_in_a_run_of_its_step(seed: int) -> None:
    """Within the budget, and with the margin left free where the verdict is "fits"."""
    instance = drawn(seed)
    cluster, workload = cluster_of(instance.devices, instance.nbytes), instance.workload()
    levels, speeds = instance.levels, speeds_of(instance.speeds)
    try:
        plan = plan_of(instance.kind).fit(cluster, workload, checkpointing=levels, margin=0.05, speeds=speeds, tensor=None)
    except gp.FitError:
        pytest.skip("nothing fits, not even with all freed in each layer")
    found, verdict = plan.decisions.fitted, plan.memory(workload, tier="T1").fits(cluster, 0.05)
    assert found is not None and found.tier == "T1"
    assert all(room.left >= (room.margin if found.verdict == "fits" else 0) for room in verdict.rooms)


def test_less_room_is_made_the_most_of_at_every_size() -> None:
    """Also where the closed form has more bytes than the program: what a checkpointed first layer keeps beside others."""
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(vocab_size=512, num_hidden_layers=12, **sizes)
    plan, workload = gp.trace(transformers.LlamaForCausalLM, config), gp.Training("adamw", batch_size=8, seq_len=2048)
    options = TrainingOptions(axes={"dp_shard": 2}, compute_dtype=torch.bfloat16)
    question = FitTraining(plan, gp.Cluster.parse("2x24GB"), workload, options)
    (layout,) = question.layouts(False)
    richest = question.search(0.2).of(layout)
    leanest = question.search(0.2).uniform(layout, Does("full"))
    assert isinstance(richest, Tried) and leanest is not None
    left, span = -question.search(0.2).missing(richest.verdict), richest.memory.peak - leanest.memory.peak
    seconds = []
    for step in range(3, 150, 4):
        found = question.search(0.2, left + int(1.2 * span * step / 150)).of(layout)
        assert isinstance(found, Tried) and found.proven
        seconds.append(found.seconds)
    assert seconds == sorted(seconds) and len(set(seconds)) > 20
