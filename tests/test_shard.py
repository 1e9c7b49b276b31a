"""plan.shard in one process: what is refused and how, what is found by itself, what is kept, and what each rank will hold."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import groundplan as gp
from groundplan.planner.local_parts import coordinate_of, local_shape
from groundplan.planner.memory import RankError
from groundplan.planner.sharding import Axis, Cut, Sharding, cut_of, matches
from groundplan.runtime.regions import Indices, Unplaced, assembled, boxes_of, region_at, shape_of

from . import layouts

# -- models -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 12), nn.ReLU(), nn.Linear(12, width)
        self.norm = nn.LayerNorm(width)


class Net(nn.Module):
    """Blocks between an embedding and a head, tied or not."""

    def __init__(self, tied: bool = True, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 10, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Scaled(nn.Module):
    """Has a parameter without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(4, 4)


class Turned(nn.Module):
    """Has a parameter that lies in memory by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3, 4).t())


def untied() -> nn.Module:
    return Net(tied=False)


def two_modules() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 3), nn.Linear(3, 4)


RULES = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
VOCABULARY = {"embed": "embedding_rowwise", "head": "colwise_gather_output"}

# -- the doors ----------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], list[str]]] = {
    "unknown axis": (Net, {"dpp": 2}, {}, ["'dpp'", "dp_shard", "did you mean"]),
    "axis no text": (Net, {3: 2}, {}, ["no axis is called 3"]),
    "size 0": (Net, {"dp": 0}, {}, ["'dp'", "size 0"]),
    "negative size": (Net, {"dp": -2}, {}, ["'dp'", "size -2"]),
    "size a boolean": (Net, {"dp": True}, {}, ["'dp'", "size True"]),
    "size a float": (Net, {"dp": 2.0}, {}, ["'dp'", "size 2.0"]),
    "wrong order": (Net, {"tp": 2, "dp": 2}, {"tensor": RULES}, ["tp, dp", "dp, tp"]),
    "copies inside": (Net, {"dp_shard": 2, "dp_replicate": 2}, {}, ["dp_shard, dp_replicate", "dp_replicate, dp_shard"]),
    "one role twice": (Net, {"dp": 2, "fsdp": 4}, {}, ["dp, fsdp", "to shard"]),
    "copies beside tensors": (Net, {"ddp": 2, "tp": 4}, {"tensor": RULES}, ['"ddp": 2', '"dp_shard": 1', '"tp": 4']),
    "empty": (Net, {}, {}, ["axes={} names no axis"]),
    "axes a list": (Net, ["dp"], {}, ["axes=['dp'] names no axis"]),
    "axes a number": (Net, 8, {}, ["axes=8 names no axis"]),
    "unit without match": (Net, {"dp": 2}, {"units": ["layer.*"]}, ["'layer.*' matches no module"]),
    "unit deeper than any": (Net, {"dp": 2}, {"units": "layers.*.*.*"}, ["'layers.*.*.*' matches no module"]),
    "unit a list": (
        layouts.transformer,
        {"dp": 2},
        {"units": ["*coder.layers"]},
        ["unit encoder.layers is a ModuleList", "'*coder.layers.*'"],
    ),
    "unit without parameters": (Net, {"dp": 2}, {"units": ["layers.*.act"]}, ["'layers.*.act'", "layers.0.act", "no parameters"]),
    "units without FSDP": (Net, {"ddp": 2}, {"units": ["layers.*"]}, ["units=['layers.*']", "ddp=2"]),
    "rules without axis": (Net, {"dp": 2}, {"tensor": RULES}, ["dp=2 has no tensor axis"]),
    "axis without rules": (Net, {"tp": 2}, {}, ["tp=2 needs rules"]),
    "axis with no rules": (Net, {"dp": 2, "tp": 2}, {"tensor": {}}, ["tp=2 needs rules"]),
    "rule without match": (Net, {"tp": 2}, {"tensor": {"layers.*.upp": "colwise"}}, ["'layers.*.upp' matches no module"]),
    "rule for a container": (Net, {"tp": 2}, {"tensor": {"layers.*": "colwise"}}, ["'layers.*'", "layers.0", "no parameters"]),
    "unknown style": (Net, {"tp": 2}, {"tensor": {"layers.*.up": "colwize"}}, ["'colwize'", "did you mean colwise"]),
    "style of another engine": (Net, {"tp": 2}, {"tensor": {"head": "packed_colwise"}}, ["'packed_colwise'", "rowwise"]),
    "not divisible": (Net, {"tp": 5}, {"tensor": RULES}, ["layers.0.up.", "12 elements along dim 0", "'colwise'", "5 ranks"]),
    "rows not divisible": (Net, {"tp": 5}, {"tensor": {"layers.*.down": "rowwise"}}, ["down.weight", "12", "dim 1", "'rowwise'"]),
    "reshard in no groups": (Net, {"dp": 4}, {"reshard": 3}, ["reshard=3", "4 ranks"]),
    "reshard 0 ranks": (Net, {"dp": 4}, {"reshard": 0}, ["reshard=0"]),
    "scalar": (Scaled, {"dp": 2}, {}, ["scale", "[1]"]),
    "by columns": (Turned, {"dp": 2}, {}, ["weight", "in the order of its dims"]),
    "tie across units": (Net, {"dp": 2}, {"units": ["embed"]}, ["embed.weight", "head.weight", "units (embed, the module as"]),
    "tie under two rules": (
        Net,
        {"tp": 2},
        {"tensor": {"embed": "embedding_colwise", "head": "colwise"}},
        ["embed.weight along dim 1", "head.weight along dim 0"],
    ),
    "tie under one rule": (
        Net,
        {"tp": 2},
        {"tensor": {"head": "colwise"}},
        ["embed.weight not at all", "head.weight along dim 0"],
    ),
    "several modules": (two_modules, {"dp": 2}, {}, ["several modules", "0, 1"]),
    "no plan of its own": (Net, {"tp": 2}, {"tensor": "auto"}, ["Net", "tp_plan", '"auto"']),
    "neither auto nor rules": (Net, {"tp": 2}, {"tensor": "other"}, ["tensor='other'", '"auto"']),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused_with_its_values(kind: str) -> None:
    build, axes, options, said = REFUSED[kind]
    plan = gp.trace(build)
    with pytest.raises(gp.DecisionError) as caught:
        plan.shard(axes, **options)
    for each in said:
        assert each in str(caught.value)
    assert len(str(caught.value)) < 500
    assert plan.decisions.sharding is None


@pytest.mark.parametrize("option", ["compute_dtype", "reduce_dtype"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "nonsense"])
def test_what_nothing_computes_in_is_refused(option: str, dtype: Any) -> None:
    options: dict[str, Any] = {option: dtype}
    with pytest.raises(gp.DecisionError, match=str(dtype)):
        gp.trace(Net).shard({"dp": 2}, **options)


def test_sharding_and_placing_exclude_each_other() -> None:
    plan = gp.trace(Net)
    with pytest.raises(gp.DecisionError, match="place"):
        plan.shard({"dp": 2}).place({"*": "cpu"})
    with pytest.raises(gp.DecisionError, match="sharded"):
        plan.place({"*": "cpu"}).shard({"dp": 2})


def test_a_size_that_does_not_divide_is_no_matter_to_fsdp() -> None:
    assert gp.trace(Net).shard({"dp": 7}).decisions.sharding is not None


# -- what is found ------------------------------------------------------------------------------------------------------


class Grid(nn.Module):
    """Lists of layers in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.ModuleList(nn.ModuleList(Block() for _ in range(3)) for _ in range(2))


def units_of(build: Callable[..., Any], *args: Any, **options: Any) -> tuple[str, ...]:
    found = gp.trace(build, *args).shard({"dp": 2}, **options).decisions.sharding
    assert found is not None
    return found.units


def test_every_layer_that_repeats_is_a_unit() -> None:
    assert units_of(layouts.MODELS["Llama"].build) == ("model.layers.*",)
    assert units_of(Grid) == ("rows.0.*", "rows.1.*")
    assert units_of(layouts.MODELS["T5"].build) == ("encoder.block.*", "decoder.block.*")
    assert units_of(layouts.transformer) == ("encoder.layers.*", "decoder.layers.*")
    assert units_of(Net) == ("layers.*",)


def test_layers_of_a_sequential_are_units() -> None:
    assert units_of(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))) == ("*",)
    plan = gp.trace(lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))).shard({"dp": 2})
    assert plan.decisions.sharding is not None
    assert plan.decisions.sharding.unit_names(plan.graph) == ["0", "1"]  # the module as a whole is one besides
    assert units_of(lambda: nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3))) == ()
    assert units_of(nn.Linear, 3, 3) == ()


def test_inner_layers_are_no_units_of_their_own() -> None:
    def nested() -> nn.Module:
        return nn.ModuleDict({"stages": nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))})

    assert units_of(nested) == ("stages.*",)


def test_units_are_what_is_named_and_inner_ones_come_first() -> None:
    assert units_of(Net, units="layers.1") == ("layers.1",)
    assert units_of(Net, units=()) == ()
    plan = gp.trace(Net).shard({"dp": 2}, units=["layers.*", "layers.*.up"])
    assert plan.decisions.sharding is not None
    assert plan.decisions.sharding.unit_names(plan.graph)[:3] == ["layers.0.up", "layers.1.up", "layers.2.up"]


def test_without_fsdp_there_are_no_units() -> None:
    plan = gp.trace(Net)
    for axes, rules in (({"ddp": 2}, None), ({"tp": 2}, RULES)):
        found = plan.shard(axes, tensor=rules).decisions.sharding
        assert found is not None and found.units == ()


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("layers.*", "layers.3", True),
        ("layers.*", "layers.3.mlp", False),
        ("layers.*", "layers", False),
        ("*", "head", True),
        ("*", "a.b", False),
        ("*", "", False),
        ("layers.[02]", "layers.1", False),
        ("layers.[02]", "layers.2", True),
        ("*.*.[qkv]_proj", "layers.0.k_proj", True),
        ("layers.?", "layers.10", False),
        ("Layers.*", "layers.0", False),
        ("layers.1*.mlp", "layers.12.mlp", True),
    ],
)
def test_patterns_match_component_by_component(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_auto_takes_the_models_own_rules() -> None:
    plan = gp.trace(layouts.MODELS["Qwen3"].build).shard({"tp": 2}, tensor="auto")
    found = plan.decisions.sharding
    assert found is not None and found.engine == "transformers"
    cuts = found.cuts(plan.graph)
    assert cuts["model.layers.1.self_attn.q_proj.weight"] == Cut(0)
    assert cuts["model.layers.0.mlp.down_proj.weight"] == Cut(1)
    assert "model.norm.weight" not in cuts


def test_rules_divide_weights_and_biases_as_torch_does() -> None:
    plan = gp.trace(Net).shard({"tp": 2}, tensor=RULES | VOCABULARY)
    assert plan.decisions.sharding is not None
    assert plan.decisions.sharding.cuts(plan.graph) == {
        "embed.weight": Cut(0),
        "head.weight": Cut(0),
        **{f"layers.{number}.up.{key}": Cut(0) for number in range(3) for key in ("weight", "bias")},
        **{f"layers.{number}.down.weight": Cut(1) for number in range(3)},
    }
    assert cut_of("packed_colwise", "w", 2) == Cut(0, 2) and cut_of("packed_rowwise", "b", 1) is None


# -- keeping ------------------------------------------------------------------------------------------------------------


def test_a_sharded_plan_survives_the_file(tmp_path: Path) -> None:
    plan = gp.trace(Net).cast(torch.bfloat16)
    plan = plan.shard(
        {"dp_replicate": 2, "dp_shard": 4, "tp": 2},
        units=["layers.*"],
        tensor=RULES | VOCABULARY,
        reshard=2,
        compute_dtype=torch.float16,
        reduce_dtype=torch.float32,
        offload=True,
    )
    plan.save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    assert loaded.decisions == plan.decisions and loaded.decisions.sharding is not None
    bound = loaded.bind(Net)
    assert bound.decisions == plan.decisions
    assert bound.memory() == plan.memory() and str(bound.report()) == str(plan.report())


def test_a_loaded_plan_refuses_a_module_that_it_does_not_fit(tmp_path: Path) -> None:
    gp.trace(Net).shard({"dp": 2}).save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    with pytest.raises(gp.PlanFileError, match="another constructor"):
        loaded.bind(Net, width=9)
    with pytest.raises(gp.PlanFileError, match="bind"):
        loaded.materialize(seed=0)


def test_decisions_are_checked_against_the_module_once_more(tmp_path: Path) -> None:
    plan = gp.trace(Net)
    wrong = Sharding(axes=(Axis(name="dp", size=2),), units=("blocks.*",))
    broken = plan.decisions.shard(wrong)
    from groundplan.planner.plan_file import save_decisions

    save_decisions(broken, tmp_path / "plan.json")
    with pytest.raises(gp.DecisionError, match=re.escape("'blocks.*' matches no module")):
        gp.Plan.load(tmp_path / "plan.json").bind(Net)


def test_sharding_again_replaces_and_the_plan_before_stays() -> None:
    plan = gp.trace(Net)
    first = plan.shard({"dp": 2})
    second = first.shard({"ddp": 3})
    assert [each.decisions.sharding and each.decisions.sharding.describe() for each in (plan, first, second)] == [
        None,
        "dp=2",
        "ddp=3",
    ]


# -- saying -------------------------------------------------------------------------------------------------------------


def test_the_mesh_is_in_report_and_explanation() -> None:
    plan = gp.trace(Net).shard({"dp": 4, "tp": 2}, tensor=RULES)
    assert "shard between 8 ranks (dp=4 x tp=2)" in str(plan.report())
    explained = str(plan.explain())
    assert "dp=4 x tp=2" in explained and "layers.*.up: colwise" in explained and "layers.{0-2}" in explained
    assert plan.report().to_json()["sharding"]["axes"] == [{"name": "dp", "size": 4}, {"name": "tp", "size": 2}]


def test_a_tensors_placement_is_explained() -> None:
    plan = gp.trace(Net).shard({"dp": 4, "tp": 2}, tensor=RULES)
    down = " ".join(str(plan.explain("layers.1.down.weight")).split())
    assert "along dim 1 between 2 ranks, then along dim 0 between 4 ranks (FSDP); rank 0 holds [2, 6]" in down
    assert "every rank holds all" in str(gp.trace(Net).shard({"ddp": 2}).explain("embed.weight"))
    assert "placement" not in str(gp.trace(Net).explain("embed.weight"))


# -- what each rank holds -----------------------------------------------------------------------------------------------


def test_local_shapes_are_torchs() -> None:
    """As FSDP2 and tensor parallelism place their parameters, for random shapes, meshes and cuts."""
    numbers = random.Random(0)
    for _ in range(500):
        shape = tuple(numbers.randint(0, 13) for _ in range(numbers.randint(1, 3)))
        shards, tensors = numbers.randint(1, 6), numbers.randint(1, 4)
        cut = Cut(numbers.randrange(len(shape))) if numbers.random() < 0.8 else None
        sharded = numbers.random() < 0.8
        by_tensor: Placement = Replicate() if cut is None else Shard(cut.dim)
        by_fsdp: Placement = Replicate()
        if sharded:
            by_fsdp = _StridedShard(0, split_factor=tensors) if cut is not None and cut.dim == 0 else Shard(0)
            if cut is not None and cut.dim == 0:  # only what divides evenly is sharded twice along one dim
                shape = (shape[0] * tensors, *shape[1:])
        mesh = Sharding(axes=(Axis(name="dp", size=shards), Axis(name="tp", size=tensors)))
        for rank in range(mesh.ranks):
            place = coordinate_of(mesh, rank)
            at = [place["shard"], place["tensor"]]
            expected, _ = _compute_local_shape_and_global_offset(shape, (shards, tensors), at, [by_fsdp, by_tensor])
            assert local_shape(shape, cut, sharded, mesh, place) == expected, (shape, shards, tensors, rank, cut, sharded)


def test_packed_pieces_are_divided_one_by_one() -> None:
    mesh = Sharding(axes=(Axis(name="tp", size=2),))
    assert local_shape((12, 4), Cut(0, 2), False, mesh, coordinate_of(mesh, 1)) == (6, 4)


def test_ranks_are_counted_with_the_last_axis_fastest() -> None:
    mesh = Sharding(axes=(Axis(name="dp_replicate", size=2), Axis(name="dp_shard", size=3), Axis(name="tp", size=4)))
    mesh_of_torch = torch.arange(24).view(2, 3, 4)
    for rank in range(24):
        place = coordinate_of(mesh, rank)
        assert mesh_of_torch[place["replicate"], place["shard"], place["tensor"]] == rank


def saved(memory: gp.Memory) -> int:
    return sum(memory.by_device["checkpoint"].values())


@pytest.mark.parametrize("build", [Net, untied, layouts.transformer, layouts.Tagger])
@pytest.mark.parametrize("axes", [{"dp": 1}, {"ddp": 1}, {"dp_replicate": 1, "dp_shard": 1}])
def test_a_world_of_one_holds_everything(build: Callable[[], nn.Module], axes: dict[str, int]) -> None:
    plan = gp.trace(build)
    assert saved(plan.shard(axes).memory()) == saved(plan.memory())


@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        ({"dp": 2}, None),
        ({"dp": 5}, None),
        ({"dp": 64}, None),
        ({"tp": 2}, RULES | VOCABULARY),
        ({"dp": 3, "tp": 2}, RULES | VOCABULARY),
        ({"dp_replicate": 2, "dp_shard": 3}, None),
        ({"ddp": 3}, None),
    ],
)
@pytest.mark.parametrize("build", [Net, untied])
def test_the_ranks_hold_everything_together(build: Callable[[], nn.Module], axes: dict[str, int], rules: Any) -> None:
    plan = gp.trace(build)
    memory = plan.shard(axes, tensor=rules).memory()
    each = [saved(memory.rank(rank)) for rank in range(math.prod(axes.values()))]
    copies = axes.get("dp_replicate", axes.get("ddp", 1))
    assert sum(each) >= copies * saved(plan.memory())
    assert max(each) == each[0] == saved(memory)
    if "tp" not in axes:
        assert sum(each) == copies * saved(plan.memory())


def test_optimizer_state_is_divided_too() -> None:
    plan, workload = gp.trace(Net), gp.Training(optimizer="adamw")
    whole, part = (saved(each.memory(workload)) for each in (plan, plan.shard({"dp": 2})))
    assert part < 0.6 * whole
    assert saved(plan.shard({"ddp": 2}).memory(workload)) == whole


@pytest.mark.parametrize("rank", [-1, 4, True, 1.0, "0", None])
def test_a_rank_that_is_not_there_is_refused(rank: Any) -> None:
    memory = gp.trace(Net).shard({"dp": 4}).memory()
    with pytest.raises(RankError, match=re.escape(f"ranks 0 to 3, so there is no rank {rank!r}")):
        memory.rank(rank)


def test_a_plan_for_one_process_has_one_rank() -> None:
    memory = gp.trace(Net).memory()
    assert memory.rank(0) == memory
    with pytest.raises(RankError, match="for one process"):
        memory.rank(1)


# -- building -----------------------------------------------------------------------------------------------------------


def test_a_process_on_its_own_is_told_to_start_more() -> None:
    state = torch.get_rng_state()
    with pytest.raises(gp.MaterializeError, match=re.escape("4 ranks (dp=4)")) as caught:
        gp.trace(Net).shard({"dp": 4}).materialize(seed=0)
    assert "torchrun --nproc-per-node 4" in str(caught.value) and "init_process_group" in str(caught.value)
    assert torch.equal(state, torch.get_rng_state())


def test_a_mesh_is_for_plans_that_shard() -> None:
    mesh: Any = object()
    with pytest.raises(gp.MaterializeError, match=r"mesh= is given.*plan\.shard"):
        gp.trace(Net).materialize(seed=0, mesh=mesh)


# -- regions ------------------------------------------------------------------------------------------------------------


def torchs_indices(shape: Sequence[int], sizes: Sequence[int], at: Sequence[int], placements: Sequence[Placement]) -> list[Any]:
    """The indices along each dim that torch leaves a rank with: what its placements do to the numbers of the dim."""
    found = [torch.arange(size) for size in shape]
    for size, place, placement in zip(sizes, at, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            whole = found[placement.dim].view(*[1] * placement.dim, -1)
            parts, _ = placement._split_tensor(whole, size, with_padding=False, contiguous=False)
            found[placement.dim] = parts[place].reshape(-1)
    return [each.tolist() for each in found]


def a_placement(numbers: random.Random, dims: int) -> Placement:
    kind = numbers.random()
    if kind < 0.2:
        return Replicate()
    dim = numbers.randrange(dims)
    return Shard(dim) if kind < 0.6 else _StridedShard(dim, split_factor=numbers.randint(1, 4))


def test_regions_are_torchs() -> None:
    numbers = random.Random(1)
    kinds = {"empty": 0, "apart": 0}
    for _ in range(2000):
        shape = tuple(numbers.choice((0, 1, 2, 3, 5, 8, 12, 17)) for _ in range(numbers.randint(1, 3)))
        sizes = tuple(numbers.randint(1, 5) for _ in range(numbers.randint(1, 3)))
        placements = [a_placement(numbers, len(shape)) for _ in sizes]
        at = [numbers.randrange(size) for size in sizes]
        case = (shape, sizes, placements, at)
        region = region_at(shape, sizes, at, placements)
        indices = [[index for stretch in each for index in stretch] for each in region]
        assert indices == torchs_indices(*case[:2], at, placements), case
        local, offset = _compute_local_shape_and_global_offset(shape, sizes, at, placements)
        assert shape_of(region) == local, case
        if all(local):
            assert tuple(each[0] for each in indices) == offset, case
        kinds["empty"] += not all(local)
        kinds["apart"] += any(len(each) > 1 for each in region)
    assert min(kinds.values()) > 100


def test_regions_put_together_are_what_indexing_gives() -> None:
    numbers = random.Random(2)
    for _ in range(500):
        shape = tuple(numbers.choice((0, 1, 3, 8, 12)) for _ in range(numbers.randint(1, 3)))
        sizes = tuple(numbers.randint(1, 3) for _ in range(2))
        placements = [a_placement(numbers, len(shape)) for _ in sizes]
        tensor = torch.arange(math.prod(shape)).view(shape)
        for at in product(*map(range, sizes)):
            region: list[Indices] = region_at(shape, sizes, at, placements)
            pieces = [tensor[tuple(slice(part.start, part.stop, part.step) for part in box)] for box in boxes_of(region)]
            expected = tensor
            for dim, each in enumerate(region):
                expected = expected.index_select(dim, torch.tensor([index for part in each for index in part], dtype=torch.long))
            assert torch.equal(assembled(region, pieces), expected), (shape, sizes, placements, at)


def test_what_says_nothing_about_elements_is_refused() -> None:
    from torch.distributed.tensor import Partial

    with pytest.raises(Unplaced, match="does not say which elements"):
        region_at((4,), (2,), (0,), [Partial()])
