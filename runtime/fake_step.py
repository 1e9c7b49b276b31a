"""A training step on fake tensors: what forward, backward and optimizer allocate, without allocating it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.nn import functional
from torch.utils._pytree import tree_flatten_with_path

from ..planner.allocations import FIRST_OPTIMIZER, OPTIMIZER, Timeline
from ..planner.decisions import Decisions, Move
from ..planner.optimizer import Trained
from ..planner.optimizers import OPTIMIZERS
from ..planner.workload import Training
from ..tracer.ambient import host_random_from, host_random_now
from ..tracer.errors import DecisionError, MemoryRunError
from .allocations import Allocations
from .build import Build
from .cuda_kernels import cuda_kernels
from .example_inputs import example_inputs
from .fake_tensors import fake_inputs, make_fake, tensors_of
from .meta import forget, meta_module
from .optimizers import on_fake_tensors
from .training_step import run_training

_HOST = "cpu"


@torch.inference_mode(False)  # grad mode is on, whatever it is around the question
def fake_step(build: Build, decisions: Decisions, training: Training) -> Timeline:
    """The timeline of two training steps of the plan's module, in bytes on the plan's device.

    The module's own code, autograd and the optimizer of torch.optim run, on fake tensors; random generators stay as they are.
    Raises `DecisionError` for a plan that is not of one device, and for inputs that cannot be made; `MemoryRunError` where the
    step looks at values, which fake tensors do not have.
    """
    check_one_device(decisions)
    device = device_of(build, decisions)
    module = step_module(build, decisions)
    inputs = example_inputs(module, training)
    return run_fake(module, inputs, with_implementation(training, device), device)


def step_module(build: Build, decisions: Decisions) -> nn.Module:
    """The plan's module, of meta tensors that remember nothing."""
    module = meta_module(build, decisions)
    if not isinstance(module, nn.Module):
        raise DecisionError(f"the constructor returns a {type(module).__name__}, and a run of it needs one nn.Module")
    forget(module)
    return module


def run_fake(
    module: nn.Module,
    inputs: Any,
    training: Training,
    device: str = _HOST,
    offload: bool = False,
    around: Callable[[Allocations], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> Timeline:
    """The same for a module of meta tensors, which it puts fake tensors into, and given inputs.

    With `offload`, parameters, gradients and the optimizer are in host memory. The run goes on within what `around` gives.
    """
    found = Allocations(device == _HOST, (FIRST_OPTIMIZER, OPTIMIZER) if offload else ())
    optimizers: list[torch.optim.Optimizer] = []

    def phase(name: str) -> None:
        label_gradients(found, module, offload)
        found.phase(name)

    with imagined(found, module, inputs, device, offload, around(found)) as faked:
        with found:
            stepping = functools.partial(on_fake_tensors, training, device != _HOST, found.uncounted, found.taken)
            run_training(module, faked, training, phase, optimizers.append, stepping)
        for optimizer in optimizers:
            _label_state(found, module, optimizer, offload, training.implementation == "fused")
    return found.timeline(device, _HOST)


@contextmanager
def imagined(
    found: Allocations,
    module: nn.Module,
    inputs: Any,
    device: str,
    offload: bool = False,
    around: AbstractContextManager[None] | None = None,
    left: Container[nn.Module] = (),
) -> Iterator[Any]:
    """The surroundings of a run: fake tensors are in `module`, whose tensors and inputs `found` knows; gives the fake inputs.

    Modules that never run may be `left` as they are.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    chosen = cuda_kernels() if device.startswith("cuda") else nullcontext()
    kept = (_values_looked_at(), _generators_kept(found), _sequences_not_packed(), _attention_known(found))
    with ExitStack() as stack:
        for each in (*kept, chosen, around or nullcontext(), mode):
            stack.enter_context(each)
        make_fake(module, mode, left)
        faked = fake_inputs(mode, inputs)
        for kind, name, tensor in tensors_of(module):
            found.label(tensor, kind, name, on_host=offload and kind == "parameter")
        for name, tensor in _named(faked):
            found.label(tensor, "input", name)
        handles = found.follow(module)
        try:
            yield faked
        finally:
            for handle in handles:
                handle.remove()


def check_one_device(decisions: Decisions) -> None:
    """Raise `DecisionError` for a plan whose module runs on several devices of a process, or not as it is traced."""
    for name, done in (("placing", "places tensors on several devices"), ("quantizing", "quantizes")):
        if getattr(decisions, name):
            raise DecisionError(f'the plan {done}, and tier="T1" runs the step of one device; ask for tier="T0"')


def device_of(build: Build, decisions: Decisions) -> str:
    """The device that the plan moves its tensors to."""
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    device = moves[-1] if moves else build.graph.ambient.default_device
    return "cuda:0" if device == "cuda" else device


def with_implementation(training: Training, device: str) -> Training:
    """What torch takes on the plan's device, said in so many words, as the run is on the CPU."""
    if training.implementation is not None:
        return training
    return replace(training, implementation=OPTIMIZERS[training.optimizer].default([Trained(device, (), torch.float32)]))


# -- what tensors are ---------------------------------------------------------------------------------------------------


def _named(inputs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among the inputs, as `input_ids` or `0`."""
    for path, value in tree_flatten_with_path(inputs)[0]:
        if isinstance(value, torch.Tensor):
            yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), value


def label_gradients(found: Allocations, module: nn.Module, offload: bool = False) -> None:
    """Say which tensors are gradients."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            found.label(parameter.grad, "gradient", name, on_host=offload)


def _label_state(found: Allocations, module: nn.Module, optimizer: torch.optim.Optimizer, offload: bool, fused: bool) -> None:
    """In host memory are step counts, unless kernels are fused (torch/optim/adam.py `_init_group`), and learning rates."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                found.label(value, "optimizer state", names[id(parameter)], on_host=offload or (key == "step" and not fused))
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            found.label(group["lr"], "optimizer state", "the learning rate", on_host=True)


# -- the surroundings of a run ------------------------------------------------------------------------------------------


@contextmanager
def _values_looked_at() -> Iterator[None]:
    """Say which op looks at values, or cannot run without them, and the way out."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise _needs_values(f"looks at values ({error.func})") from error
    except UnsupportedOperatorException as error:
        raise _needs_values(f"calls {error.func}, which says nothing about the shapes of its results (torch.library)") from error
    except RuntimeError as error:
        if not str(error).startswith(_NUMPY):
            raise  # the module's own
        raise _needs_values("looks at values (Tensor.numpy)") from error


_NUMPY = ".numpy() is not supported for tensor subclasses"


def _needs_values(what: str) -> MemoryRunError:
    return MemoryRunError(
        f"the module {what}, and a run without memory has none; give inputs and settings with which it does not, or ask for "
        'plan.memory(..., tier="T0"), which then leaves out what a run would say'
    )


@contextmanager
def _generators_kept(found: Allocations) -> Iterator[None]:
    """Generators, Python's and numpy's too, are as they were afterwards.

    States that checkpoints keep are seen, as no op makes them.
    """
    get = torch.get_rng_state

    def seen() -> torch.Tensor:
        return found.made_outside(get(), "get_rng_state")

    state = get()
    try:
        with mock.patch.object(torch, "get_rng_state", seen), host_random_from(host_random_now()):
            yield
    finally:
        torch.set_rng_state(state)


@contextmanager
def _attention_known(found: Allocations) -> Iterator[None]:
    """Say when attention runs, whose own ops are no function's on a stack."""
    attend = functional.scaled_dot_product_attention

    def known(*args: Any, **kwargs: Any) -> torch.Tensor:
        with found.attention():
            return attend(*args, **kwargs)

    with mock.patch.object(functional, "scaled_dot_product_attention", known):
        yield


@contextmanager
def _sequences_not_packed() -> Iterator[None]:
    """Have transformers take each row for one sequence, which it looks at positions for, and otherwise cannot know.

    `transformers.masking_utils.find_packed_sequence_indices` gives None for rows that are one sequence each, but a mask under a
    trace, for which attention takes another kernel.
    """
    masking = sys.modules.get("transformers.masking_utils")
    find = getattr(masking, "find_packed_sequence_indices", None)
    if find is None:
        yield
        return

    def not_packed(position_ids: torch.Tensor) -> None:
        find(position_ids)

    with mock.patch.object(masking, "find_packed_sequence_indices", not_packed):
        yield
