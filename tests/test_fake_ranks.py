"""One rank's step on fake tensors: what real ranks over gloo take, with what is where, and a process that is as it was."""

from __future__ import annotations

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import groundplan as gp
from groundplan.planner.allocations import FIRST_OPTIMIZER, OPTIMIZER, START, STEP, Timeline
from groundplan.planner.rank_runs import rank_class
from groundplan.runtime.fake_world import fake_world

from . import rank_steps
from .measured_steps import MODELS, plain_kernels
from .rank_steps import MIXED, RULES

Job = Callable[[str, int], list[list[dict[str, Any]]]]
TEXT = MODELS["Llama"].inputs


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        yield


def memory_of(model: str, axes: dict[str, int], training: dict[str, Any] | None = None, **options: Any) -> gp.Memory:
    plan = gp.trace(MODELS[model].build).shard(axes, **options)
    return plan.memory(gp.Training(inputs=MODELS[model].inputs, **(training or {})), tier="T1")


def run_of(memory: gp.Memory) -> Timeline:
    assert memory.run is not None
    return memory.run


# -- next to real ranks -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """What the ranks of a job have found; each job runs once, even where it crashes."""

    @cache
    def outcome(which: str, world: int) -> list[list[dict[str, Any]]] | str:
        try:
            return rank_steps.launch(world, which, Path(tmp_path_factory.mktemp("ranks")))
        except RuntimeError as error:
            return str(error)

    def found(which: str, world: int) -> list[list[dict[str, Any]]]:
        ranks = outcome(which, world)
        return pytest.fail(ranks, pytrace=False) if isinstance(ranks, str) else ranks

    return found


NUMBER = 4
"""Bytes that a number takes which DTensor makes a tensor of, before it gets to the op: SGD's momentum, Muon's."""


def check(job: Job, which: str, case: rank_steps.RankCase) -> None:
    """Every phase of every rank within 2 %, and of like ranks the one that took least equal to the byte, but for a number.

    What a thread of gloo gives back the profiler does not see, so that a real rank may seem to take more than it does. Under DDP,
    whose compiled reducer waits for collectives by itself, that is so on all ranks.
    """
    found = [each for rank in job(which, case.world) for each in rank if each["case"] == str(case)]
    for each in found:
        assert "error" not in each, each["error"]
        assert each["real"].keys() == each["fake"].keys()
        for phase, real in each["real"].items():
            assert each["fake"][phase] == pytest.approx(real, rel=0.02)
    for like in {json.dumps(each["fake"]) for each in found}:
        fake = json.loads(like)
        real = [each["real"] for each in found if each["fake"] == fake]
        more = {phase: min(each[phase] for each in real) - fake[phase] for phase in fake}
        assert "ddp" in case.axes or set(more.values()) <= set(range(NUMBER + 1)), more


@pytest.mark.parametrize("case", rank_steps.SHORT, ids=str)
def test_a_fake_rank_takes_what_a_real_one_does(job: Job, case: rank_steps.RankCase) -> None:
    check(job, "short", case)


@pytest.mark.conformance
@pytest.mark.parametrize("case", rank_steps.LONG, ids=str)
def test_so_it_does_under_every_option(job: Job, case: rank_steps.RankCase) -> None:
    check(job, "long", case)


# -- what is where ------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers of odd sizes, which two ranks do not share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False)])

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = torch.tanh(layer(value))
        return value


def two(axes: dict[str, int], **options: Any) -> gp.Memory:
    return gp.trace(Two).shard(axes, **options).memory(gp.Training(inputs=(torch.ones(3, 7),)), tier="T1")


def test_what_fsdp_gathers_and_sends_has_its_kind_and_its_name() -> None:
    run = run_of(two({"dp": 2}))
    gathered = Counter((each.name, each.nbytes) for each in run.allocations if each.kind == "gathered parameter" and each.nbytes)
    whole = 8 * 7 * 4  # padded to two ranks' equal parts
    assert gathered == {("layers.0.weight", whole): 4, ("layers.1.weight", whole): 4}  # forward and backward, twice
    sent = [each for each in run.allocations if each.kind == "communication buffer"]
    buffers = Counter(each.describe() for each in sent if each.nbytes == whole)
    # in each of two steps: two gatherings, each with gloo's own copy, and what goes into the reduction
    assert buffers == {f"communication buffer of layers.{number}": 2 * (2 * 2 + 1) for number in range(2)}
    parts = [each for each in run.allocations if each.kind == "gradient" and each.nbytes == whole // 2]
    assert Counter(each.name for each in parts) == {"layers.0.weight": 2, "layers.1.weight": 2}
    state = Counter((each.name, each.nbytes) for each in run.allocations if each.kind == "optimizer state")
    assert state == {
        (f"layers.{number}.weight", nbytes): times for number in range(2) for nbytes, times in ((4 * 7 * 4, 2), (4, 1))
    }


def test_allocations_come_from_the_pools_of_fsdps_streams() -> None:
    plan = gp.trace(Two).to("cuda").shard({"dp": 2}, **MIXED)
    run = run_of(plan.memory(gp.Training(inputs=(torch.ones(3, 7),)), tier="T1"))
    streams = {(each.kind, each.stream) for each in run.allocations}
    assert {stream for _, stream in streams} == {"", "all_gather_copy_in", "reduce_scatter"}
    assert {kind for kind, stream in streams if stream == "reduce_scatter"} == {"gradient"}
    assert {kind for kind, stream in streams if stream == "all_gather_copy_in"} == {"communication buffer"}
    assert {stream for kind, stream in streams if kind == "gathered parameter"} == {""}


def test_gradients_of_one_unit_share_memory_and_say_so() -> None:
    run = run_of(memory_of("nn.Transformer", {"dp": 2}))
    names = {each.name for each in run.allocations if each.kind == "gradient" and each.stream == "reduce_scatter"}
    assert "encoder.layers.0.self_attn.in_proj_weight and 11 more" in names


def test_a_run_ends_as_it_began() -> None:
    plan = gp.trace(Two).shard({"dp": 2})
    run = run_of(plan.memory(gp.Training("sgd", inputs=(torch.ones(3, 7),)), tier="T1"))
    alive: dict[int, None] = {}
    for moment in run.moments:
        alive.pop(moment.allocation) if not moment.born else alive.setdefault(moment.allocation)
    assert {run.allocations[index].kind for index in alive if run.allocations[index].nbytes} <= {"parameter", "input", "buffer"}


def test_offloaded_shards_are_in_host_memory_and_copied() -> None:
    plan = gp.trace(Two).to("cuda").shard({"dp": 2}, offload=True)
    run = run_of(plan.memory(gp.Training(inputs=(torch.ones(3, 7),)), tier="T1"))
    on = {(each.kind, each.device) for each in run.allocations if each.nbytes}
    assert {device for kind, device in on if kind in ("parameter", "optimizer state")} == {"cpu"}
    assert {device for kind, device in on if kind in ("gathered parameter", "activation", "input")} == {"cuda:0"}
    assert {device for kind, device in on if kind == "gradient"} == {"cpu", "cuda:0"}  # this rank's parts, and whole ones
    part = 4 * 7 * 4
    copies = [each for each in run.allocations if each.op == "clone" and each.nbytes == part]
    assert {(each.kind, each.device) for each in copies} == {("communication buffer", "cuda:0"), ("gradient", "cpu")}
    assert run.peaks[OPTIMIZER]["cuda:0"] == 3 * 7 * 4


# -- ranks --------------------------------------------------------------------------------------------------------------


def test_ranks_with_like_parts_share_a_run_and_others_have_their_own() -> None:
    memory = two({"dp": 4})
    assert memory.ranks == 4 and memory.tier == "T1" and memory.communicators == 1
    first, second, last = (memory.rank(rank) for rank in (1, 2, 3))
    assert memory.run is first.run is second.run and last.run is not memory.run
    assert last is not memory and memory.rank(3).run is last.run
    # of seven rows the first three have two each and the last has one, padded to two once it has run
    assert memory.phases["construct"] == 2 * 2 * 7 * 4 and last.phases["construct"] == 2 * 7 * 4
    assert memory.phases["optimizer"] > last.phases["optimizer"]
    assert last.closed_form is not None and last.closed_form == last.closed_form.rank(3)
    with pytest.raises(gp.GroundplanError, match="ranks 0 to 3"):
        memory.rank(4)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_a_class_is_what_torch_chunks_alike(rows: int, more: int, size: int) -> None:
    plan = gp.trace(lambda: nn.Sequential(nn.Linear(2, rows, bias=False), nn.Linear(rows, more, bias=False)))
    sharding = plan.shard({"dp": size}).decisions.sharding
    assert sharding is not None
    parts = [torch.empty(each).chunk(size) for each in (rows, more)]
    held = [tuple(len(part[rank]) if rank < len(part) else 0 for part in parts) for rank in range(size)]
    classes = [rank_class(plan.graph, sharding, rank) for rank in range(size)]
    assert [tuple(shape[0] for shape in each) for each in classes] == held


def test_the_closed_form_stands_beside() -> None:
    memory = memory_of("Llama", {"dp": 2})
    assert memory.closed_form is not None and memory.closed_form.tier == "T0" and memory.closed_form.ranks == 2
    assert memory.phases["load"] == memory.closed_form.phases["load"]
    assert "cpu, T0" in str(memory) and "one rank of 2 (dp=2)" in str(memory)
    found = memory.to_json()
    assert json.loads(json.dumps(found)) == found and found["tier"] == "T1"
    plan = gp.trace(MODELS["Llama"].build).to("cuda").shard({"dp": 2})
    cuda = plan.memory(gp.Training(inputs=TEXT), tier="T1")
    assert cuda.left_out and cuda.fits("2xH100-80GB+64GB-cpu").verdict == "fits", "where what is reserved counts"


def test_ddp_holds_every_gradient_once_more_in_buckets_of_their_own_sizes() -> None:
    class Wide(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Linear(1024, 1024, bias=False) for _ in range(8)))

    plan, training = gp.trace(Wide), gp.Training("sgd", batch_size=1)
    run = run_of(plan.shard({"ddp": 2}).memory(training, tier="T1"))
    alone = run_of(plan.memory(training, tier="T1"))
    for phase in (FIRST_OPTIMIZER, STEP, OPTIMIZER):
        assert run.peaks[phase]["cpu"] == alone.peaks[phase]["cpu"] + 8 * 2**22
    assert run.peaks[START] == alone.peaks[START]
    sizes = [each.nbytes // 2**20 for each in run.allocations if each.op == "DDP's bucket"]
    assert sizes == [32, 4, 28]  # one at first; then one that 1 MiB fills, and one for the next 25 MiB, which 28 fill


# -- what nearly went wrong ---------------------------------------------------------------------------------------------


def test_the_wholes_that_dtensor_tries_shapes_on_are_not_counted() -> None:
    class Large(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(nn.Linear(512, 512, bias=False) for _ in range(2)))

    memory = gp.trace(Large).shard({"dp": 16}).memory(gp.Training("adamw", batch_size=1), tier="T1")
    part = 512 * 512 * 4 // 16
    largest = max(each.nbytes for each in run_of(memory).allocations if each.kind == "optimizer state")
    assert largest == part
    assert memory.phases["optimizer"] < 2 * (1 + 1 + 2 + 2) * part


def test_a_plan_for_cuda_runs_where_there_is_none() -> None:
    plan = gp.trace(MODELS["ViT"].build).to("cuda").shard({"dp": 8}, **MIXED)
    memory = plan.memory(gp.Training(inputs=MODELS["ViT"].inputs), tier="T1")
    assert memory.binding.device == "cuda:0" and not torch.cuda.is_initialized()


def test_both_kinds_of_sharding_are_applied_before_anything_is_fake() -> None:
    memory = memory_of("Llama", {"dp": 2, "tp": 2}, tensor=RULES["Llama"])
    names = {each.name for each in run_of(memory).allocations if each.kind == "gathered parameter"}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert memory.ranks == 4 and memory.communicators == 3


class Quantized(nn.Module):
    """A parameter that is made of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 256)

    def forward(self, value: torch.Tensor) -> Any:
        return self.linear(value)


def test_state_made_of_several_tensors_is_counted_whole() -> None:
    pytest.importorskip("torchao")
    plan, training = gp.trace(Quantized), gp.Training("adamw-8bit", batch_size=1)
    run = run_of(plan.shard({"dp": 2}).memory(training, tier="T1"))
    of_weight = sum(each.nbytes for each in run.allocations if each.kind == "optimizer state" and each.name == "linear.weight")
    numel = 256 * 256 // 2
    assert 2 * numel < of_weight < 2.5 * numel


# -- the process afterwards ---------------------------------------------------------------------------------------------


def patched() -> list[Any]:
    """All that a run puts something else in the place of."""
    modules = ("fsdp._fully_shard._fsdp_param_group", "foreach_reduce"), ("tensor._sharding_prop", "detect_fake_mode")
    functions = [vars(sys.modules[f"torch.distributed.{module}"])[name] for module, name in modules]
    methods = [vars(owner).get(name) for owner, name in ((FSDPParamGroup, "unshard"), (FSDPParam, "reset_sharded_param"))]
    resize: Any = vars(torch.UntypedStorage).get("resize_")
    return [*methods, *functions, torch.get_rng_state, sys.excepthook, resize, dist.distributed_c10d._world]


class Failing(Two):
    def forward(self, value: torch.Tensor) -> Any:
        raise RuntimeError("my own")


def test_the_process_is_as_it_was_also_after_an_error() -> None:
    before, state = patched(), torch.get_rng_state()
    two({"dp": 2})
    with pytest.raises(RuntimeError, match="my own"):
        gp.trace(Failing).shard({"dp": 2}).memory(gp.Training(inputs=(torch.ones(3, 7),)), tier="T1")
    assert patched() == before and not dist.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_process_group_stays_behind() -> None:
    with fake_world(4, 1):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
        names = [dist.distributed_c10d._get_default_group().group_name, *(mesh.get_group(axis).group_name for axis in range(2))]
        for name in names:
            assert _resolve_process_group(name).group_name == name
    for name in names:
        with pytest.raises(RuntimeError, match="Could not resolve the process group"):
            _resolve_process_group(name)


@pytest.fixture
def own_group() -> Iterator[Any]:
    """The user's own process group, of one process, with a mesh and a DTensor."""
    store = vars(dist)["HashStore"]()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
    finally:
        dist.destroy_process_group()


def test_the_users_process_group_goes_on(own_group: Any) -> None:
    group = dist.group.WORLD
    kept: Any = distribute_tensor(torch.ones(4), own_group, [Shard(0)])
    assert float(kept.sum().full_tensor()) == 4  # the cache knows this mesh
    names = [own_group.get_group().group_name]
    memory = two({"dp": 4})
    assert memory.ranks == 4 and memory == two({"dp": 4})
    assert dist.group.WORLD is group and dist.get_world_size() == 1 and dist.get_backend() == "gloo"
    assert [own_group.get_group().group_name] == names
    assert float(kept.sum().full_tensor()) == 4
    value = torch.ones(2)
    dist.all_reduce(value)
    assert value.tolist() == [1, 1]
    made = init_device_mesh("cpu", (1,), mesh_dim_names=("later",))
    assert isinstance(distribute_tensor(torch.ones(2), made, [Shard(0)]), DTensor)


def test_meshes_of_a_fake_world_are_not_taken_for_the_users(own_group: Any) -> None:
    ours: Any = distribute_tensor(torch.ones(4), own_group, [Shard(0)])
    assert float((ours * 2).sum().full_tensor()) == 8
    with fake_world(1, 0):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("dp",))
        assert mesh == own_group
        found: Any = distribute_tensor(torch.ones(4), mesh, [Shard(0)]) * 2
        assert found.device_mesh is mesh
    assert (ours * 2).device_mesh is own_group


# -- refused ------------------------------------------------------------------------------------------------------------


def test_plans_that_place_or_quantize_have_the_closed_form_only() -> None:
    plan = gp.trace(Two).place({"*": "cpu"})
    with pytest.raises(gp.GroundplanError, match="places tensors on several devices"):
        plan.memory(gp.Training(inputs=(torch.ones(3, 7),)), tier="T1")


def test_an_implementation_that_torch_refuses_is_refused() -> None:
    with pytest.raises(gp.GroundplanError, match='say implementation="for-loop"'):
        memory_of("Llama", {"tp": 2}, {"implementation": "foreach"}, tensor=RULES["Llama"])
    with pytest.raises(gp.GroundplanError, match="Adafactor does not step"):
        memory_of("Llama", {"dp": 2}, {"optimizer": "adafactor"})
    plan = gp.trace(MODELS["Llama"].build).to("cuda").shard({"tp": 2}, tensor=RULES["Llama"])
    run = run_of(plan.memory(gp.Training(inputs=TEXT), tier="T1"))
    assert not any(each.op.startswith("_foreach") for each in run.allocations)
