"""One rank of four: sequence and loss parallelism as `parallelize_module` does them, and FSDP in a real pipeline."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.profiler import ProfilerActivity, profile

from groundplan.planner.exchanges import fsdp_in_pipeline, tensor_parallel_saved

from .jobs import finish
from .measured_steps import memory_events, plain_kernels
from .pipeline_ranks import measured_parts

SAMPLES, LENGTH, WIDTH, WORDS = 2, 64, 32, 128
_REPEATS = 6


# -- sequence and loss parallel -----------------------------------------------------------------------------------------


class Feed(nn.Module):
    """The part of a layer that the tensor axis divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(torch.tanh(self.up(value)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(WIDTH), Feed()

    def forward(self, value: torch.Tensor) -> Any:
        return value + self.feed(self.norm(value))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: torch.Tensor) -> Any:
        value = self.embed(tokens)
        for layer in self.layers:
            value = layer(value)
        return self.head(self.norm(value))


def divided(mesh: DeviceMesh, sequence: bool, loss: bool) -> nn.Module:
    """The model by torchtitan's rules for Llama (`apply_non_moe_tp`), with or without sequence and loss parallelism."""
    stream = Shard(1) if sequence else Replicate()
    out: dict[str, Any] = {"output_layouts": Shard(-1) if loss else Replicate(), "use_local_output": not loss}
    rules: dict[str, Any] = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "layers.*.feed.up": ColwiseParallel(),
        "layers.*.feed.down": RowwiseParallel(output_layouts=stream),
        "head": ColwiseParallel(input_layouts=stream, **out),
    }
    if sequence:
        gathered = PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))
        rules |= {"norm": SequenceParallel(), "layers.*.norm": SequenceParallel(), "layers.*.feed": gathered}
    return parallelize_module(Model(), mesh, rules)


def saved(module: nn.Module, loss: bool) -> int:
    """The bytes that forward and loss leave for backward: the least of several, as gloo keeps memory of others for a while."""
    tokens = torch.randint(0, WORDS, (SAMPLES, LENGTH))

    def step() -> Iterator[None]:
        output = module(tokens)
        found = nn.functional.cross_entropy(output.flatten(0, 1), tokens.flatten())
        del output
        yield
        found.backward()
        yield

    with loss_parallel() if loss else nullcontext():
        parts = measured_parts(*[step] * _REPEATS)
    return min(end - begin for begin, _, end in parts[3::3])


def kinds_of_saved() -> dict[str, int]:
    """What the whole model saves on one rank, told apart by shape and by which modules it goes into."""
    module, gathered, found = Model(), set[int](), dict.fromkeys(("inside", "gathered", "outside", "logits"), 0)
    own = {each.untyped_storage().data_ptr() for each in module.parameters()}
    seen: set[int] = set()

    def remember(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        gathered.add(inputs[0].untyped_storage().data_ptr())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen | own:
            seen.add(storage.data_ptr())
            width = tensor.shape[-1] if tensor.dim() > 1 else 0
            shaped = "inside" if width == 4 * WIDTH and tensor.dim() == 3 else "logits" if width == WORDS else "outside"
            found["gathered" if storage.data_ptr() in gathered else shaped] += storage.nbytes()
        return tensor

    for each in (*(layer.feed.up for layer in module.layers), module.head):  # type: ignore[union-attr]
        each.register_forward_pre_hook(remember)  # type: ignore[union-attr]
    tokens = torch.randint(0, WORDS, (SAMPLES, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = module(tokens)
        nn.functional.cross_entropy(output.flatten(0, 1), tokens.flatten())
    return found


def tensor_cases() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    kinds, found = kinds_of_saved(), {}
    for sequence, loss in ((False, False), (True, False), (True, True)):
        reckoned = tensor_parallel_saved(**kinds, ranks=mesh.size(), sequence=sequence, loss=loss)
        found[f"sequence={sequence}, loss={loss}"] = (saved(divided(mesh, sequence, loss), loss), reckoned)
    return found | {"kinds": kinds, "whole": saved(Model(), False)}


# -- FSDP in a pipeline -------------------------------------------------------------------------------------------------


def pipeline_case(dtype: torch.dtype | None) -> tuple[int, int]:
    """The least peak of several steps, and what is reckoned."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage, width = mesh.get_local_rank("pp"), 128
    module = nn.Sequential(*(nn.Linear(*sizes) for _ in range(4) for sizes in ((width, 4 * width), (4 * width, width))))
    units = [sum(each.numel() for each in layer.parameters()) for layer in module]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for each in (*module, module):
        fully_shard(each, mesh=mesh["dp"], mp_policy=policy)
    made = PipelineStage(module, stage, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    schedule = Schedule1F1B(made, 4, loss_fn=lambda output, _: output.float().sum())
    batch = torch.ones(4, 1, width, dtype=dtype or torch.float32)
    peaks = []
    for _ in range(_REPEATS):
        module.zero_grad(set_to_none=True)
        gc.collect()
        inputs, target = ((), batch) if stage else ((batch,), None)
        with plain_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            schedule.step(*inputs, return_outputs=False, target=target)
        peaks.append(_peak(memory_events(profiler)))
    return min(peaks), fsdp_in_pipeline(units, 2 if dtype else 4, 4)


def _peak(events: list[int]) -> int:
    now = peak = 0
    for nbytes in events:
        now += nbytes
        peak = max(peak, now)
    return peak


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    found = tensor_cases()
    finish(folder, {"tensor": found, "pipeline": [pipeline_case(None), pipeline_case(torch.bfloat16)]})


if __name__ == "__main__":
    main(*sys.argv[1:])
