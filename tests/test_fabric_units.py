"""Lightning Fabric's FSDPStrategy and DeepSpeedStrategy with a meta module.

`torchrun --nproc-per-node N -m tests.test_fabric_units FOLDER STRATEGY ACCELERATOR` is a job; each rank writes what it found to
`FOLDER/RANK.json`. Fabric has neither strategy on the CPU: its refusal is worked around there, and all the rest is the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import fsdp

import groundplan as gp

from . import jobs, layouts

pytest.importorskip("transformers")
strategies: Any = pytest.importorskip("lightning_fabric.strategies")
fabric_of: Any = pytest.importorskip("lightning_fabric").Fabric

SEED = 3
LLAMA = layouts.MODELS["Llama"]


def optimizer_of(module: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def loss_of(module: Any, device: torch.device) -> torch.Tensor:
    words = torch.arange(16, device=device).reshape(2, 8)
    loss: torch.Tensor = module(input_ids=words, labels=words, use_cache=False).loss
    return loss


def expected() -> tuple[layouts.Tensors, list[float]]:
    """A single device's tensors, and losses around a step."""
    torch.manual_seed(SEED)
    single = LLAMA.build()
    initial = {name: tensor.detach().clone() for name, tensor in layouts.members(single).items()}
    optimizer, cpu = optimizer_of(single), torch.device("cpu")
    before = loss_of(single, cpu)
    before.backward()
    optimizer.step()
    return initial, [float(before.detach()), float(loss_of(single, cpu).detach())]


def launched(strategy: Any, accelerator: str) -> Any:
    fabric = fabric_of(accelerator=accelerator, devices=int(os.environ["WORLD_SIZE"]), strategy=strategy)
    fabric.launch()
    return fabric


def with_fsdp(accelerator: str) -> dict[str, Any]:
    """What a user of Fabric writes."""
    if accelerator == "cpu":
        fsdp.FullyShardedDataParallel = OnCpu  # type: ignore[misc]
    layers = {type(LLAMA.build().get_submodule("model.layers.0"))}
    kind = strategies.FSDPStrategy if accelerator == "cuda" else type("Anywhere", (strategies.FSDPStrategy,), {})
    strategy = kind(auto_wrap_policy=layers, param_init_fn=gp.param_init_fn(SEED))
    fabric = launched(strategy, accelerator)
    model = fabric.setup(gp.trace(LLAMA.build).meta_module())
    optimizer = fabric.setup_optimizers(optimizer_of(model))
    with fsdp.FullyShardedDataParallel.summon_full_params(model._forward_module):
        held = copied(model._forward_module)
    return judged(held, fabric, model, optimizer)


def with_deepspeed(accelerator: str) -> dict[str, Any]:
    """The same with ZeRO-3."""
    import deepspeed

    kind = strategies.DeepSpeedStrategy if accelerator == "cuda" else anywhere()
    strategy = kind(stage=3, config=None)
    strategy.config |= {"zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    fabric = launched(strategy, accelerator)
    filled = gp.deepspeed_zero3(gp.trace(LLAMA.build).meta_module(), strategy.config, SEED)
    model, optimizer = fabric.setup(filled, optimizer_of(filled))
    with deepspeed.zero.GatheredParameters(list(filled.parameters())):
        held = copied(filled)
    return judged(held, fabric, model, optimizer)


def copied(module: Any) -> layouts.Tensors:
    found = layouts.members(module)
    return {name.replace("_fsdp_wrapped_module.", ""): tensor.detach().cpu().clone() for name, tensor in found.items()}


def judged(held: layouts.Tensors, fabric: Any, model: Any, optimizer: Any) -> dict[str, Any]:
    initial, losses = expected()
    before = loss_of(model, fabric.device)
    fabric.backward(before)
    optimizer.step()
    found = [float(before.detach()), float(loss_of(model, fabric.device).detach())]
    return {"differing": layouts.differing(initial, held), "losses": found, "expected": losses}


# -- around what is refused on the CPU ----------------------------------------------------------------------------------


class OnCpu(fsdp.FullyShardedDataParallel):
    """FSDP1 that is told to stay on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"device_id": torch.device("cpu")}))


def anywhere() -> Any:
    """A DeepSpeedStrategy that does not insist on CUDA."""

    class Anywhere(strategies.DeepSpeedStrategy):  # type: ignore[misc]
        @property
        def root_device(self) -> torch.device:
            return torch.device("cpu", 0)

        def setup_environment(self) -> None:
            self.accelerator.setup_device(self.root_device)
            self._set_world_ranks()
            importlib.import_module("deepspeed").init_distributed("gloo")
            self._format_config()
            self._config_initialized = True

    return Anywhere


JOBS = {"FSDP": with_fsdp, "DeepSpeed": with_deepspeed}


def main(folder: str, name: str, accelerator: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = JOBS[name](accelerator)
    jobs.finish(folder, found)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed")
STRATEGIES = ["FSDP", pytest.param("DeepSpeed", marks=needs_deepspeed)]


def check(ranks: list[dict[str, Any]], tolerance: float) -> None:
    for rank in ranks:
        assert rank["differing"] == []
        assert rank["losses"] == pytest.approx(rank["expected"], abs=tolerance)
        assert abs(rank["losses"][0] - rank["losses"][1]) > 0.1, "the step does too little to be compared"


@pytest.mark.parametrize("name", STRATEGIES)
def test_on_the_cpu(tmp_path: Path, name: str) -> None:
    check(jobs.launch("tests.test_fabric_units", tmp_path, name, "cpu", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""), 1e-4)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", STRATEGIES)
def test_on_gpus(tmp_path: Path, name: str) -> None:
    world = min(2, torch.cuda.device_count())
    check(jobs.launch("tests.test_fabric_units", tmp_path, name, "cuda", world=world), 1e-3)


if __name__ == "__main__":
    main(*sys.argv[1:])
