"""DeepSpeed on two real processes: ZeRO-3 of a meta module that is filled and divided step by step, ZeRO-1 and ZeRO-2.

`torchrun --nproc-per-node 2 -m tests.test_deepspeed FOLDER` is the job; each rank writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import groundplan as gp

from . import jobs, layouts

SEED = 3
MODELS = ("Llama", "nn.Transformer", "conv net", "rough")
STEPPED = ("Llama", "nn.Transformer")
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs DeepSpeed")


def config_of(stage: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed clips to 1.0 otherwise
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def gathered(module: nn.Module) -> layouts.Tensors:
    """Everything that the module holds, under every name."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in layouts.members(module).items()}


def engine_of(module: nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return deepspeed.initialize(model=module, config=config, optimizer=optimizer)[0]


def losses(module: nn.Module, config: dict[str, Any], loss: Callable[[Any], torch.Tensor]) -> list[float]:
    """The loss before and after a step of DeepSpeed's."""
    engine = engine_of(module.eval(), config)
    before = loss(engine)
    engine.backward(before)
    engine.step()
    return [float(before.detach()), float(loss(engine).detach())]


def single_losses(module: nn.Module, loss: Callable[[nn.Module], torch.Tensor]) -> list[float]:
    optimizer = torch.optim.SGD(module.eval().parameters(), lr=0.1)
    before = loss(module)
    before.backward()
    optimizer.step()
    return [float(before.detach()), float(loss(module).detach())]


def checked(name: str, stage: int, cast: torch.dtype | None = None) -> dict[str, Any]:
    """What this rank finds of one model."""
    model, config = layouts.MODELS[name], config_of(stage, cast)
    torch.manual_seed(SEED)
    single = model.build().to(cast)
    after, expected = torch.get_rng_state(), layouts.members(single)
    plan = gp.trace(model.build)
    plan = plan.cast(cast) if cast else plan
    module = gp.deepspeed_zero3(plan.meta_module(), config, SEED) if stage == 3 else plan.materialize(SEED)
    same_generator = torch.equal(after, torch.get_rng_state())
    whole = [key for key, each in module.named_parameters() if stage == 3 and each.numel()]
    found = {"whole": whole, "generator": same_generator}
    found |= {"differing": layouts.differing(expected, gathered(module)), "tensors": len(expected)}
    found["ties"] = layouts.ties_of(layouts.members(module)) == layouts.ties_of(expected)
    if name in STEPPED and cast is None:
        found |= {"losses": losses(module, config, model.loss), "expected": single_losses(single, model.loss)}
    return found


def without_seed() -> dict[str, Any]:
    torch.manual_seed(SEED)
    module = gp.deepspeed_zero3(gp.trace(layouts.ConvNet).meta_module(), config_of(3))
    after = torch.get_rng_state()
    torch.manual_seed(SEED)
    differing = layouts.differing(layouts.members(layouts.ConvNet()), gathered(module))
    return {"differing": differing, "generator": torch.equal(after, torch.get_rng_state())}


def raised(make: Callable[[], object]) -> str:
    try:
        make()
    except gp.GroundplanError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def failing() -> dict[str, str]:
    """What is raised where ranks disagree, where one fails, and for a configuration that does not fit."""
    rank = dist.get_rank()
    meta = gp.trace(nn.Linear, 4, 4).meta_module
    torch.manual_seed(SEED)
    state = torch.get_rng_state()
    found = {
        "seeds": raised(lambda: gp.deepspeed_zero3(meta(), config_of(3), rank)),
        "one": raised(lambda: gp.deepspeed_zero3(meta() if rank else gp.trace(Empty).meta_module(), config_of(3), SEED)),
        "stray": raised(
            lambda: gp.deepspeed_zero3(nn.Sequential(meta(), nn.Identity() if rank else NotOurs()), config_of(3), SEED)
        ),
        "dtype": raised(lambda: gp.deepspeed_zero3(meta(), config_of(3, torch.bfloat16), SEED)),
        "stage": raised(lambda: gp.deepspeed_zero3(meta(), config_of(2), SEED)),
    }
    return found | {"generator": "kept" if torch.equal(state, torch.get_rng_state()) else "moved"}


class Empty(nn.Module):
    """Leaves a parameter without a value."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4))


class NotOurs(nn.Linear):
    """Meta tensors that no plan knows."""

    def __init__(self) -> None:
        super().__init__(3, 3, device="meta")


def peak() -> dict[str, int]:
    gp.deepspeed_zero3(gp.trace(nn.Linear, 4, 4).meta_module(), config_of(3), SEED)  # what is loaded once
    meta = gp.trace(jobs.Deep).meta_module()
    with jobs.watched() as found:
        gp.deepspeed_zero3(meta, config_of(3), SEED)
    return found


def main(folder: str) -> None:
    import deepspeed

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {f"{name} 3": checked(name, 3) for name in MODELS}
    found |= {f"Llama {stage}": checked("Llama", stage) for stage in (1, 2)}
    found |= {f"Llama bf16 {stage}": checked("Llama", stage, torch.bfloat16) for stage in (2, 3)}
    found |= {"without seed": without_seed(), "failing": failing()}
    found["peak"] = peak() if jobs.can_watch else {}
    jobs.finish(folder, found)


# -- what the job has found ---------------------------------------------------------------------------------------------

Ranks = list[dict[str, Any]]
CASES = [*(f"{name} 3" for name in MODELS), "Llama 1", "Llama 2", "Llama bf16 2", "Llama bf16 3"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    pytest.importorskip("transformers")
    return jobs.launch("tests.test_deepspeed", tmp_path_factory.mktemp("deepspeed"), DS_ACCELERATOR="cpu")


@needs_deepspeed
@pytest.mark.parametrize("case", CASES)
def test_every_rank_has_eagers_values(ranks: Ranks, case: str) -> None:
    for rank in ranks:
        found = rank[case]
        assert found["differing"] == [] and found["tensors"] > 3
        assert found["whole"] == [] and found["ties"] and found["generator"]


@needs_deepspeed
@pytest.mark.parametrize("case", [*(f"{name} 3" for name in STEPPED), "Llama 1", "Llama 2"])
def test_a_step_does_what_it_does_on_a_single_device(ranks: Ranks, case: str) -> None:
    for rank in ranks:
        found = rank[case]
        assert found["losses"] == pytest.approx(found["expected"], abs=1e-4)
        assert abs(found["losses"][0] - found["losses"][1]) > 1e-3, "the step does too little to be compared"


@needs_deepspeed
def test_without_a_seed_the_generators_state_counts(ranks: Ranks) -> None:
    for rank in ranks:
        assert rank["without seed"] == {"differing": [], "generator": True}


@needs_deepspeed
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("seeds", "RanksError: .*rank 1: seed 1, where rank 0 has 0"),
        ("one", "RanksError: .*rank 1: constructor torch.nn.modules.linear.Linear"),
        ("stray", "is no part of a plan.meta_module|RanksError: rank 0 failed"),
        ("dtype", r"computes in torch.bfloat16, and 2 parameters(.|\n)*say plan.cast\(torch.bfloat16\)"),
        ("stage", "for ZeRO stage 2"),
        ("generator", "kept"),
    ],
)
def test_what_goes_wrong_is_said_on_every_rank(ranks: Ranks, case: str, message: str) -> None:
    for rank in ranks:
        assert re.search(message, rank["failing"][case], re.DOTALL), rank["failing"][case]


@needs_deepspeed
@pytest.mark.skipif(not jobs.can_watch, reason="resident memory cannot be watched")
def test_no_rank_holds_more_than_its_part_and_a_unit(ranks: Ranks) -> None:
    part, unit = jobs.Deep.layers * jobs.Deep.unit // 2, jobs.Deep.unit
    for rank in ranks:
        assert rank["peak"]["end"] > 0.9 * part
        assert rank["peak"]["peak"] < part + unit + 8 * jobs.MIB


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.config", None)
    with pytest.raises(gp.MaterializeError, match="pip install deepspeed"):
        gp.deepspeed_zero3(gp.trace(nn.Linear, 3, 4).meta_module(), config_of(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
