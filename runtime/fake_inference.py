"""Serving on fake tensors: what reading a prompt and decoding after it allocate, without allocating it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..planner.allocations import Kind, Timeline
from ..planner.decisions import Decisions
from ..planner.inference import Inference
from ..planner.inference_parts import as_planned
from ..tracer.errors import DecisionError
from .allocations import Allocations
from .build import Build
from .example_inputs import example_inputs
from .fake_step import device_of, imagined, step_module
from .inference_step import run_inference

_HOST = "cpu"


def fake_inference(build: Build, decisions: Decisions, inference: Inference) -> Timeline:
    """The timeline of serving the plan's module on one device, whole and not quantized, in bytes.

    The module's own code runs on fake tensors, on the device that the plan moves it to. Raises `DecisionError` for inputs that
    cannot be made, and `MemoryRunError` where forward looks at values, which fake tensors do not have.
    """
    module = step_module(build, decisions)
    return run_fake_inference(module, example_inputs(module, inference), inference, device_of(build, decisions))


def fake_rank_inference(build: Build, decisions: Decisions, inference: Inference, rank: int) -> Timeline:
    """The same of one rank of a plan that shards, under torch's own FSDP2 and tensor parallelism, as `fake_rank_step` does it."""
    from .fake_ranks import followed_rank
    from .fake_world import fake_world
    from .parallel import apply_sharding, mesh_of, not_run

    sharding, device = decisions.sharding, device_of(build, decisions)
    if sharding is None:
        return fake_inference(build, decisions, inference)
    if given := not_run(sharding):
        raise DecisionError(f'tier="T1" runs what the runtime carries out, and not {" and ".join(given)}; ask for tier="T0"')
    if sharding.axis("shard") is None and sharding.axis("tensor") is None:  # replicas, each of which serves by itself
        return as_planned(fake_inference(build, decisions, inference), build.graph, decisions, rank)
    copied = sharding.offload and device != _HOST
    module = step_module(build, decisions)
    inputs = example_inputs(module, inference)
    with fake_world(sharding.ranks, rank):
        apply_sharding(module, sharding, build.graph, mesh_of(sharding, _HOST))
        return run_fake_inference(module, inputs, inference, device, copied, followed_rank(module, copied))


def run_fake_inference(
    module: nn.Module,
    inputs: Any,
    inference: Inference,
    device: str = _HOST,
    offload: bool = False,
    around: Callable[[Allocations], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Timeline:
    """The same for a module of meta tensors, which it puts fake tensors into, and given inputs; as `run_fake` for training."""
    found = Allocations(on_cpu=device == _HOST)

    def kept(kind: Kind, value: Any) -> None:
        for name, tensor in _tensors_within(value):
            found.label(tensor, kind, name)

    with _experts_of_any_dtype(), imagined(found, module, inputs, device, offload, around(found)) as faked, found:
        run_inference(module, faked, inference, found.phase, kept, every=False, on_cuda=device.startswith("cuda"))
    return found.timeline(device, _HOST)


@contextmanager
def _experts_of_any_dtype() -> Iterator[None]:
    """Have transformers take its own grouped product for others than bfloat16, of which torch says that only CUDA's kernel is.

    `torch._meta_registrations._meta_grouped_mm_common` refuses what torch's CPU kernel, and CUDA's fallback, take; the results
    have the same size.
    """
    experts = sys.modules.get("transformers.integrations.moe")
    can_use = getattr(experts, "_can_use_grouped_mm", None)
    if can_use is None or not hasattr(torch.ops.transformers, "grouped_mm_fallback"):
        yield
        return

    def is_known(value: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16 and bool(can_use(value, weight, offsets))

    with mock.patch.object(experts, "_can_use_grouped_mm", is_known):
        yield


def _tensors_within(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a cache, or of another record, with their paths: in attributes, mappings and sequences, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(value, torch.Tensor):
        yield name, value
    elif id(value) not in seen and not isinstance(value, str | type):
        seen.add(id(value))
        if isinstance(value, Mapping):
            parts = list(value.items())
        elif isinstance(value, list | tuple):
            parts = list(enumerate(value))
        else:
            parts = list(getattr(value, "__dict__", {}).items())
        for key, each in parts:
            yield from _tensors_within(each, f"{name}.{key}".lstrip("."), seen)
