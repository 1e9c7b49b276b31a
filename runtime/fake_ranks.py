"""A training step of one rank of a sharded plan on fake tensors, under torch's own FSDP2 and tensor parallelism.

1. this process is taken for the rank, in a process group that talks to nobody (`fake_world`)
2. the meta module is divided as `materialize` divides it, outside the fake mode: meshes and `fully_shard` look at values
3. the step runs on what the rank holds; FSDP2 and DTensor are followed to what they allocate (`fsdp_memory`)

Under data parallelism without sharding (`replicate`), DistributedDataParallel's reducer, which is compiled and reads memory, does
not run: the step is that of one device, and the reducer's buckets are added (`ddp_buckets`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

from torch import nn
from torch.distributed.tensor import DTensor, _random, _sharding_prop

from ..planner.allocations import Timeline
from ..planner.decisions import Decisions
from ..planner.workload import Training
from ..tracer.errors import DecisionError
from .allocations import Allocations
from .build import Build
from .checkpointing import checkpoint_layers
from .ddp_buckets import trained, with_buckets
from .example_inputs import example_inputs
from .fake_step import device_of, run_fake, step_module, with_implementation
from .fake_world import fake_world
from .fsdp_memory import fsdp_followed
from .gloo_scratch import gloo_scratch_bytes
from .parallel import apply_sharding, mesh_of

_HOST = "cpu"


def fake_rank_step(build: Build, decisions: Decisions, training: Training, rank: int) -> Timeline:
    """The timeline of two training steps of one rank of the plan, in bytes on the plan's device, with its offload in host memory.

    The user's process groups and random generators stay as they are. Raises as `fake_step` does.
    """
    sharding = decisions.sharding
    assert sharding is not None
    device = device_of(build, decisions)
    copied = sharding.offload and device != _HOST
    module = step_module(build, decisions)
    inputs = example_inputs(module, training)
    chosen = with_implementation(training, _HOST if sharding.offload else device)

    @contextmanager
    def around(found: Allocations) -> Iterator[None]:
        found.collective_scratch = gloo_scratch_bytes
        with propagation_apart(), fsdp_followed(found, module, copied):
            yield

    if sharding.axis("shard") is None and sharding.axis("tensor") is None:
        parameters = trained(module)
        return with_buckets(run_fake(module, inputs, chosen, device), parameters, device)
    with fake_world(sharding.ranks, rank):
        if training.checkpointing != "none":
            checkpoint_layers(module, training.checkpointing)
        apply_sharding(module, sharding, build.graph, mesh_of(sharding, _HOST))
        if _is_mixed(module):
            chosen = _one_by_one(training)
        return run_fake(module, inputs, replace(chosen, checkpointing="none"), device, copied, around)


def _is_mixed(module: nn.Module) -> bool:
    """Whether some of the parameters are DTensors and others whole, as tensor parallelism alone leaves them."""
    return len({isinstance(each, DTensor) for each in module.parameters() if each.requires_grad}) > 1


def _one_by_one(training: Training) -> Training:
    """The only implementation in which torch steps both: the others put all into one op, which refuses."""
    if training.implementation not in (None, "for-loop"):
        raise DecisionError(
            f"implementation={training.implementation!r} steps all parameters in one op, and torch refuses one of DTensors and "
            'whole tensors, which tensor parallelism leaves side by side; say implementation="for-loop"'
        )
    return replace(training, implementation="for-loop")


@contextmanager
def propagation_apart() -> Iterator[None]:
    """DTensor finds out the shape of a result on tensors of the whole's shape, in a mode of their own: they are nobody's memory.

    Nor are generators kept for each device, as the CPU has none; torch would warn of that at every random op.
    """
    with mock.patch.object(_sharding_prop, "detect_fake_mode", lambda *_: None), mock.patch.object(_random, "_rng_tracker", None):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
            yield
