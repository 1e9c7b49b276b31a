"""The partition of a chain of units: equal to the best of all that there are, and never behind accelerate's device map."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.chain import Chain, chain_of
from groundplan.planner.partition import DISK, HOST, Partition, Unit, partition, used

accelerate = pytest.importorskip("accelerate")

Cost = tuple[int, int, int]


def cost(units: Sequence[Unit], found: Partition) -> Cost:
    return found.offloaded(units), found.on_disk(units), found.hops


def fits(units: Sequence[Unit], found: Partition, devices: Sequence[int], host: int, resident: int = 0) -> bool:
    in_host = sum(unit.nbytes for unit, home in zip(units, found.homes, strict=True) if home == HOST)
    rooms = [room - resident * (device == found.main) for device, room in enumerate(devices)]
    return in_host <= host and all(used(units, found, device) <= room for device, room in enumerate(rooms))


# -- against every partition there is -----------------------------------------------------------------------------------


def is_chain(homes: Sequence[int]) -> bool:
    """Whether each device has consecutive units, and so has what is offloaded, and its part in host memory."""
    runs = [key for key, _ in itertools.groupby(HOST if home < 0 else home for home in homes)]
    return len(set(runs)) == len(runs) and [key for key, _ in itertools.groupby(homes)].count(HOST) <= 1


def best_of_all(units: Sequence[Unit], devices: Sequence[int], host: int, disk: bool, resident: int) -> Cost | None:
    places = [*range(len(devices)), HOST, *([DISK] if disk else [])]
    chains = [homes for homes in itertools.product(places, repeat=len(units)) if is_chain(homes)]
    found = (Partition(homes, main) for homes in chains for main in range(len(devices)))
    return min((cost(units, each) for each in found if fits(units, each, devices, host, resident)), default=None)


units_strategy = st.lists(
    st.builds(
        Unit, st.just("unit"), st.integers(0, 6), cache=st.integers(0, 2), working=st.integers(0, 3), streamed=st.integers(0, 3)
    ),
    min_size=1,
    max_size=5,
)


@given(
    units=units_strategy,
    devices=st.lists(st.integers(1, 12), min_size=1, max_size=3) | st.integers(1, 9).map(lambda room: [room] * 3),
    host=st.integers(0, 9),
    disk=st.booleans(),
    resident=st.integers(0, 2),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_better(units: list[Unit], devices: list[int], host: int, disk: bool, resident: int) -> None:
    found = partition(units, devices, host, disk, resident)
    assert (None if found is None else cost(units, found)) == best_of_all(units, devices, host, disk, resident)
    assert found is None or fits(units, found, devices, host, resident)
    assert found is None or disk or DISK not in found.homes, "not even what has no bytes"


def test_many_devices_and_units_take_no_search_over_all_of_them() -> None:
    units = [Unit("embed", 50, streamed=50), *(Unit("layer", 100, 3, 7, 40) for _ in range(126)), Unit("head", 50, streamed=50)]
    found = partition(units, [1000] * 8, host=3000)
    assert found is not None and fits(units, found, [1000] * 8, 3000)
    assert found.offloaded(units) == 5600 and found.on_disk(units) == 2600


# -- against accelerate -------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Linear layers, which are not divided."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(8, width, bias=bool(width % 2)) for width in widths)
        self.register_buffer("scale", torch.zeros(widths[0]))


class Model(nn.Module):
    """A random model: an embedding, layers that are alike or not, a head that may be tied to the embedding."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        self.embed = nn.Embedding(chance.randint(4, 400), 8)
        same = [chance.randint(1, 60) for _ in range(chance.randint(1, 4))] if chance.random() < 0.5 else None
        count = chance.randint(2, 24)
        self.layers = nn.ModuleList(
            Layer(same or [chance.randint(1, 90) for _ in range(chance.randint(1, 4))]) for _ in range(count)
        )
        self.more = nn.Sequential(*(nn.Linear(8, chance.randint(1, 50)) for _ in range(chance.randint(0, 4))))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, self.embed.num_embeddings, bias=False)
        if chance.random() < 0.4:
            self.head.weight = self.embed.weight


def as_partition(chain: Chain, entries: Mapping[str, int | str]) -> Partition:
    """Accelerate's device map as a partition; it runs what is offloaded on the first device in use (`dispatch_model`)."""
    homes = []
    for names in chain.modules:
        entry = max((key for key in entries if key in ("", names[0]) or names[0].startswith(f"{key}.")), key=len)
        homes.append({"cpu": HOST, "disk": DISK}.get(str(entries[entry]), entries[entry]))
    main = next((home for home in homes if isinstance(home, int) and home >= 0), 0)
    return Partition(tuple(int(home) for home in homes), int(main))


def test_never_more_is_offloaded_than_by_accelerate() -> None:
    """300 random instances. Maps with which accelerate runs out of memory, as it forgets what it brings there, do not count."""
    better, compared = 0, 0
    for seed in range(300):
        chance, plan = random.Random(seed), gp.trace(Model, seed)
        chain = chain_of(plan.graph, plan.decisions)
        total = sum(unit.nbytes + unit.cache for unit in chain.units)
        count = chance.randint(1, 3)
        devices = [int(total * chance.uniform(0.1, 1.3) / count) for _ in range(count)]
        devices = devices[:1] * count if chance.random() < 0.4 else devices
        host = int(total * chance.uniform(0, 1.2))
        rooms: dict[int | str, int] = dict(enumerate(devices))
        entries = accelerate.infer_auto_device_map(
            plan.meta_module(), rooms | {"cpu": host, "disk": 10**12}, no_split_module_classes=["Layer"]
        )
        theirs, found = as_partition(chain, entries), partition(chain.units, devices, host)
        if found is not None:
            assert fits(chain.units, found, devices, host)
        if fits(chain.units, theirs, devices, host):
            compared += 1
            assert found is not None and cost(chain.units, found)[:2] <= cost(chain.units, theirs)[:2], seed
            better += found.offloaded(chain.units) < theirs.offloaded(chain.units)
    assert compared >= 150 and better >= compared / 4
