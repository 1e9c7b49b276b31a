"""The profile of a plan's module for a workload: made once, and kept for as long as the plan's trace is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten_with_path

from ..planner.apart import not_told, told_apart
from ..planner.decisions import Decisions
from ..planner.exchanges import attention_output
from ..planner.kept import kept_with
from ..planner.profile import NoProfile, Profile
from ..planner.records import dtype_named
from ..planner.sharding import Sharding
from ..planner.workload import Training
from ..tracer.errors import GroundplanError
from .allocations import Allocations
from .build import Build
from .example_inputs import example_inputs
from .expert_axis import Exchanges
from .fake_step import device_of, step_module
from .microbatches import first_of, not_profiled, staged_modules, watch_first_layer
from .profiling import Traced, profile

_KEPT = 64


def profile_of(build: Build, decisions: Decisions, training: Training) -> Profile | NoProfile:
    """What forward and backward of the plan's module allocate, or why that cannot be known.

    Plans that differ only in how many ranks share the parameters, in when FSDP gathers them (as long as the same units do as the
    same others), in the reduction's dtype, or in the optimizer, have one profile.
    """
    if decisions.placing is not None or decisions.quantizing:
        return NoProfile(f"the plan {'places tensors on several devices' if decisions.placing else 'quantizes'}")
    if decisions.sharding is not None and (reason := not_profiled(decisions.sharding, training)) is not None:
        return NoProfile(reason)
    if (reason := not_told(decisions, build.graph)) is not None:
        return NoProfile(reason)
    known = kept_with(build)
    key = _key(build, decisions, training)
    if key not in known:
        if len(known) >= _KEPT:
            known.pop(next(iter(known)))
        known[key] = _made(build, decisions, training), (training.inputs, training.loss)  # so that their ids stay theirs
    found: Profile | NoProfile = known[key][0]
    return found


def _key(build: Build, decisions: Decisions, training: Training) -> Any:
    sharding = decisions.sharding
    device = "cpu" if device_of(build, decisions) == "cpu" else "cuda"
    workload = (training.batch_size, training.seq_len, training.autocast, training.checkpointing, training.accumulate > 1)
    apart = tuple(told_apart(decisions, build.graph).items())
    divided = _divided(sharding), apart
    return decisions.casts, device, _settings(), divided, workload, _look(training.inputs), id(training.loss)


def _settings() -> Any:
    """Torch's own settings that kernels, and the dtypes that the module's code does not say, are chosen by."""
    attention = torch.backends.cuda
    return (
        (torch.get_num_threads(), torch.backends.mkldnn.enabled, torch.are_deterministic_algorithms_enabled()),
        (attention.flash_sdp_enabled(), attention.mem_efficient_sdp_enabled(), attention.math_sdp_enabled()),
        (attention.cudnn_sdp_enabled(), *torch._C._get_sdp_priority_order()),
        (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    )


def _divided(sharding: Sharding | None) -> Any:
    """What of a sharding changes what the module's own code does."""
    if sharding is None:
        return None
    between = (sharding.sequence_parallel, sharding.loss_parallel)
    tensor = (sharding.axis("tensor"), sharding.tensor, sharding.engine, between) if sharding.size("tensor") > 1 else None
    return (
        tensor,
        (sharding.axis("expert"), sharding.experts) if sharding.size("expert") > 1 else None,
        sharding.pipeline,
        sharding.size("context"),
        (sharding.shards, sharding.units, sharding.compute_dtype) if _is_watched(sharding) else None,
    )


def _is_watched(sharding: Sharding) -> bool:
    """Whether a profile says when units and stages begin and end, and is computed in their dtype."""
    return sharding.shards or sharding.pipeline is not None


def _look(inputs: Any) -> Any:
    """What of given inputs matters: shapes and dtypes of tensors, and which are one; other things themselves."""
    if inputs is None or callable(inputs):
        return id(inputs)
    leaves = tree_flatten_with_path(inputs)[0]
    first: dict[int, int] = {}
    return tuple((str(path), first.setdefault(id(each), place), _leaf(each)) for place, (path, each) in enumerate(leaves))


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype, value.requires_grad
    return (type(value), value) if isinstance(value, bool | int | float | str) else id(value)


@torch.inference_mode(False)  # grad mode is on, whatever it is around the question
def _made(build: Build, decisions: Decisions, training: Training) -> Profile | NoProfile:
    try:
        with quiet(), _divided_layers(build, decisions) as (made, traced):
            found = _with_passed(made, lambda module: _inputs(module, training, decisions.sharding), training, traced)
        if decisions.sharding is not None and decisions.sharding.size("context") > 1 and not attention_output(found):
            return NoProfile("ring attention takes the place of scaled_dot_product_attention, which is not called")
        return found
    except GroundplanError as error:
        return NoProfile(str(error))
    except Exception as error:  # the module's own, which training would raise as well, or a kernel that fake tensors do not have
        message = str(error).splitlines() or [""]
        return NoProfile(f"a trace of forward and backward fails: {type(error).__name__}: {message[0]}")


def _inputs(module: nn.Module, training: Training, sharding: Sharding | None) -> Any:
    """The inputs of a rank's step: one micro-batch of a pipeline, a part of the sequence along a context axis."""
    pipeline, parts = (None, 1) if sharding is None else (sharding.pipeline, sharding.size("context"))
    length = None if training.seq_len is None else training.seq_len // parts
    found = example_inputs(module, replace(training, seq_len=length))
    return found if pipeline is None else first_of(found, pipeline.microbatches)


def _with_passed(
    made: Callable[[], nn.Module], inputs: Callable[[nn.Module], Any], training: Training, traced: Traced
) -> Profile:
    """A profile, with what the first of a list of layers hands to the next."""
    passed: list[int] = []

    def watched() -> nn.Module:
        module = made()
        watch_first_layer(module, passed)
        return module

    return replace(profile(watched, inputs, training, traced), passed=max(passed, default=0))


@contextmanager
def _divided_layers(build: Build, decisions: Decisions) -> Iterator[tuple[Callable[[], nn.Module], Traced]]:
    """What makes the module, its single layers divided along the tensor axis, and how it is traced."""
    sharding = decisions.sharding
    traced, axis = _traced(build, decisions), None if sharding is None else sharding.axis("tensor")
    exchanges = None if sharding is None or sharding.size("expert") == 1 else Exchanges(sharding, build.graph)
    if sharding is None or axis is None:
        yield _exchanging(lambda: step_module(build, decisions), exchanges, None), _following(traced, exchanges)
        return
    from .fake_ranks import propagation_apart
    from .fake_world import fake_world
    from .gloo_scratch import gloo_scratch_bytes
    from .parallel import mesh_of
    from .tensor_axis import between_layers, divide_layers

    alone = sharding.model_copy(update={"axes": (axis,), "pipeline": None})

    def made() -> nn.Module:
        module = step_module(build, decisions)
        divide_layers(module, alone, build.graph, mesh_of(alone, "cpu"))
        return module

    @contextmanager
    def around(found: Allocations) -> Iterator[None]:
        found.collective_scratch = gloo_scratch_bytes
        with propagation_apart(), between_layers(alone, mesh_of(alone, "cpu")):
            yield

    with fake_world(axis.size, 0):
        mesh = mesh_of(alone, "cpu") if axis.size > 1 else None
        yield _exchanging(made, exchanges, mesh), _following(replace(traced, around=around), exchanges)


def _exchanging(made: Callable[[], nn.Module], exchanges: Exchanges | None, mesh: Any) -> Callable[[], nn.Module]:
    """The same, where experts exchange tokens."""

    def watched() -> nn.Module:
        module = made()
        if exchanges is not None:
            exchanges.watch(module, mesh)
        return module

    return watched


def _following(traced: Traced, exchanges: Exchanges | None) -> Traced:
    """The same, where what an exchange takes is written down."""
    if exchanges is None:
        return traced

    @contextmanager
    def around(found: Allocations) -> Iterator[None]:
        with traced.around(found), exchanges.followed(found):
            yield

    return replace(traced, around=around)


def _traced(build: Build, decisions: Decisions) -> Traced:
    sharding, device, apart = decisions.sharding, device_of(build, decisions), told_apart(decisions, build.graph)
    if sharding is None or not _is_watched(sharding):
        return Traced(device, apart=apart)
    dtype = None if sharding.compute_dtype is None else dtype_named(sharding.compute_dtype)
    names = dict.fromkeys([*sharding.unit_names(build.graph), *staged_modules(sharding, build.graph), ""])
    return Traced(device, tuple(names), dtype, apart=apart)


@contextmanager
def quiet() -> Iterator[None]:
    """What the module's code warns of it says when it really runs; what fake tensors log on an error is in the error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = disabled
