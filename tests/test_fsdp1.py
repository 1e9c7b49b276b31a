"""torch's first FSDP on two real processes: `gp.param_init_fn` fills a meta module unit by unit with eager's values.

`torchrun --nproc-per-node 2 -m tests.test_fsdp1 FOLDER` is the job; each rank writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

import groundplan as gp

from . import jobs, layouts, zoo

SEED = 3
MODELS = ("Llama", "nn.Transformer", "conv net", "tagger", "rough")
STEPPED = ("Llama", "nn.Transformer", "conv net")  # FSDP1 itself does not train an LSTM in a unit, or weight norm's hooks
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def wrapped(module: nn.Module, units: list[nn.Module], **options: Any) -> FullyShardedDataParallel:
    policy = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda each: any(each is unit for unit in units))
    defaults: dict[str, Any] = {"param_init_fn": gp.param_init_fn(SEED), "device_id": torch.device("cpu")}
    return FullyShardedDataParallel(module, auto_wrap_policy=policy, **(defaults | options))


def cleaned(tensors: Any) -> layouts.Tensors:
    return {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().clone() for name, tensor in tensors}


def gathered(module: FullyShardedDataParallel) -> layouts.Tensors:
    """Everything that the module holds, non-persistent buffers and tied names included."""
    with FullyShardedDataParallel.summon_full_params(module):
        return cleaned(module.state_dict().items()) | cleaned(module.named_buffers(remove_duplicate=False))


def losses(module: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> list[float]:
    """The loss before and after a step."""
    module.eval()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = loss(module)
    before.backward()
    optimizer.step()
    return [float(before.detach()), float(loss(module).detach())]


def checked(name: str, use_orig_params: bool, cast: torch.dtype | None = None) -> dict[str, Any]:
    model = layouts.MODELS[name]
    torch.manual_seed(SEED)
    single = model.build().to(cast)
    expected = layouts.members(single)
    plan = gp.trace(model.build)
    meta = (plan.cast(cast) if cast else plan).meta_module()
    state = torch.get_rng_state()
    module = wrapped(meta, [meta.get_submodule(each) for each in model.blocks_of(meta)], use_orig_params=use_orig_params)
    found = {"differing": layouts.differing(expected, gathered(module)), "tensors": len(expected)}
    found["generator kept"] = torch.equal(state, torch.get_rng_state())
    if name in STEPPED and cast is None:
        found |= {"losses": losses(module, model.loss), "expected": losses(single, model.loss)}
    return found


# -- particular cases ---------------------------------------------------------------------------------------------------


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(7, 5), nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


def ignoring() -> dict[str, Any]:
    """A module that FSDP1 is to ignore stays on the meta device, until it is filled."""
    torch.manual_seed(SEED)
    single = Halves()
    after = torch.get_rng_state()
    meta = gp.trace(Halves).meta_module()
    module = wrapped(meta, [meta.one], ignored_modules=[meta.other])
    is_left = all(tensor.is_meta for tensor in (*meta.other.parameters(), *meta.other.buffers()))
    gp.materialize(module, seed=SEED)
    differing = layouts.differing(layouts.members(single), gathered(module))
    return {"is left": is_left, "differing": differing, "generator": torch.equal(after, torch.get_rng_state())}


def without_seed() -> dict[str, Any]:
    torch.manual_seed(SEED)
    init = gp.param_init_fn()
    torch.manual_seed(dist.get_rank())  # what happens afterwards makes no difference
    meta = gp.trace(Halves).meta_module()
    module = wrapped(meta, [meta.one], param_init_fn=init)
    torch.manual_seed(SEED)
    return {"differing": layouts.differing(layouts.members(Halves()), gathered(module))}


def disagreeing(seed: int | None) -> str:
    torch.manual_seed(dist.get_rank())
    meta = gp.trace(Halves).meta_module()
    try:
        wrapped(meta, [meta.one], param_init_fn=gp.param_init_fn(seed))
    except gp.RanksError as error:
        return str(error)
    return "nothing was raised"


def peak() -> dict[str, int]:
    wrapped(gp.trace(nn.Linear, 4, 4).meta_module(), [])  # what is loaded once
    meta = gp.trace(jobs.Deep).meta_module()
    with jobs.watched() as found:
        module = wrapped(meta, list(meta.blocks))
    assert all(not each.is_meta for each in module.parameters())
    return found


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, Any] = {f"{name} {use}": checked(name, use) for name in MODELS for use in (True, False)}
    found["Llama bf16"] = checked("Llama", True, torch.bfloat16)
    found |= {"ignoring": ignoring(), "without seed": without_seed()}
    found["disagreeing"] = [disagreeing(dist.get_rank()), disagreeing(None)]
    found["peak"] = peak() if jobs.can_watch else {}
    jobs.finish(folder, found)


# -- what the job has found ---------------------------------------------------------------------------------------------

Ranks = list[dict[str, Any]]
CASES = [f"{name} {use}" for name in MODELS for use in (True, False)] + ["Llama bf16"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    pytest.importorskip("transformers")
    return jobs.launch("tests.test_fsdp1", tmp_path_factory.mktemp("fsdp1"))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_eagers_values(ranks: Ranks, case: str) -> None:
    for rank in ranks:
        assert rank[case]["differing"] == [] and rank[case]["tensors"] > 3
        assert rank[case]["generator kept"]


@pytest.mark.parametrize("case", [f"{name} {use}" for name in STEPPED for use in (True, False)])
def test_a_step_does_what_it_does_on_a_single_device(ranks: Ranks, case: str) -> None:
    for rank in ranks:
        found = rank[case]
        assert found["losses"] == pytest.approx(found["expected"], abs=1e-4)
        assert abs(found["losses"][0] - found["losses"][1]) > 1e-3, "the step does too little to be compared"


def test_ignored_modules_are_left_for_later(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["ignoring"] == {"is left": True, "differing": [], "generator": True}


def test_without_a_seed_the_state_counts_that_was_there(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["without seed"]["differing"] == []


def test_ranks_that_disagree_raise(ranks: Ranks) -> None:
    for rank in ranks:
        assert "rank 1: seed 1, where rank 0 has 0" in rank["disagreeing"][0]
        assert "generator state" in rank["disagreeing"][1]


@pytest.mark.skipif(not jobs.can_watch, reason="resident memory cannot be watched")
def test_no_rank_holds_more_than_its_part_and_a_unit(ranks: Ranks) -> None:
    """FSDP1 copies a unit into a flat tensor, so that it is there twice for a moment."""
    part, unit = jobs.Deep.layers * jobs.Deep.unit // 2, jobs.Deep.unit
    for rank in ranks:
        assert rank["peak"]["end"] > 0.9 * part
        assert rank["peak"]["peak"] < part + 2 * unit + 8 * jobs.MIB


# -- on one process -----------------------------------------------------------------------------------------------------


class TwoLSTMs(nn.Module):
    """A weight tied between two recurrent layers, which keep weak references to it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.LSTM(3, 5), nn.LSTM(3, 5)
        self.other.weight_hh_l0 = self.one.weight_hh_l0
        self.scale = torch.rand(3)  # a plain attribute


def test_modules_are_filled_by_themselves_in_any_order() -> None:
    torch.manual_seed(SEED)
    single = TwoLSTMs()
    module = gp.trace(TwoLSTMs).meta_module()
    init = gp.param_init_fn(SEED, group=None)
    for each in (module.other, module, module.one):
        init(each)
    assert layouts.differing(layouts.members(single), layouts.members(module)) == []
    assert torch.equal(single.scale, module.scale)
    assert module.other.weight_hh_l0 is module.one.weight_hh_l0
    assert torch.equal(module.one(torch.ones(1, 3))[0], single.one(torch.ones(1, 3))[0])


def test_a_call_fills_no_submodule() -> None:
    module = gp.trace(Halves).meta_module()
    gp.param_init_fn(SEED)(module.other)
    assert all(each.is_meta for each in module.parameters())


def test_what_no_plan_knows_is_named() -> None:
    with pytest.raises(gp.MaterializeError, match="weight: its module is no part of a plan"):
        gp.param_init_fn(SEED)(nn.Linear(3, 4, device="meta"))


def test_keyed_values() -> None:
    expected = gp.trace(Halves).materialize(SEED, rng="keyed")
    module = gp.trace(Halves).meta_module()
    init = gp.param_init_fn(SEED, rng="keyed")
    for each in module.modules():
        init(each)
    assert layouts.differing(layouts.members(expected), layouts.members(module)) == []


class Peeking(nn.Module):
    """Looks at what it draws, so that the plan depends on the seed."""

    def __init__(self) -> None:
        super().__init__()
        width = 3 + int(torch.randint(2, ()).item())
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.width = width


def test_a_constructor_that_looks_at_its_numbers() -> None:
    module = gp.trace(Peeking).meta_module()
    init = gp.param_init_fn(SEED)
    for each in module.modules():
        init(each)
    torch.manual_seed(SEED)
    assert layouts.differing(layouts.members(Peeking()), layouts.members(module)) == []


if __name__ == "__main__":
    main(*sys.argv[1:])


def test_a_checkpoint_unit_by_unit() -> None:
    """What FSDP1 does with the function, without FSDP1: what is there is read, and what is missing drawn."""
    build = zoo.transformers_types()["Llama"]
    torch.manual_seed(3)
    eager = build().state_dict()
    torch.manual_seed(4)
    given = {name: tensor for number, (name, tensor) in enumerate(build().state_dict().items()) if number % 2}
    module = gp.trace(build).meta_module()
    fill = gp.param_init_fn(seed=3, checkpoint=given)
    for each in module.modules():
        fill(each)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, given.get(name, eager[name])), name
