"""Serving on fake tensors: what reading a prompt and decoding after it allocate, without allocating it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..planner.allocations import Kind, Timeline
from ..planner.decisions import Decisions
from ..planner.inference import Inference
from .allocations import Allocations
from .build import Build
from .cuda_kernels import cuda_kernels
from .example_inputs import example_inputs
from .fake_step import _generators_kept, _named, _sequences_not_packed, _values_looked_at, device_of, step_module
from .fake_tensors import fake_inputs, make_fake, tensors_of
from .inference_step import run_inference


def fake_inference(build: Build, decisions: Decisions, inference: Inference) -> Timeline:
    """The timeline of serving the plan's module on one device, whole and not quantized, in bytes.

    The module's own code runs on fake tensors, on the device that the plan moves it to. Raises `DecisionError` for inputs that
    cannot be made, and `MemoryRunError` where forward looks at values, which fake tensors do not have.
    """
    module = step_module(build, decisions)
    return run_fake_inference(module, example_inputs(module, inference), inference, device_of(build, decisions))


def run_fake_inference(module: nn.Module, inputs: Any, inference: Inference, device: str) -> Timeline:
    """The same for a module of meta tensors, which it puts fake tensors into, and given inputs."""
    found = Allocations(on_cpu=device == "cpu")
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def kept(kind: Kind, value: Any) -> None:
        for name, tensor in _tensors_within(value):
            found.label(tensor, kind, name)

    chosen = cuda_kernels() if device.startswith("cuda") else nullcontext()
    with _values_looked_at(), _generators_kept(found), _sequences_not_packed(), chosen, mode:
        make_fake(module, mode)
        faked = fake_inputs(mode, inputs)
        for kind, name, tensor in tensors_of(module):
            found.label(tensor, kind, name)
        for name, tensor in _named(faked):
            found.label(tensor, "input", name)
        handles = found.follow(module)
        try:
            with found:
                run_inference(module, faked, inference, found.phase, kept, every=False)
        finally:
            for handle in handles:
                handle.remove()
    return found.timeline(device, "cpu")


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
