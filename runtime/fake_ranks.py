"""A training step of one rank of a sharded plan on fake tensors, under torch's own FSDP2 and tensor parallelism.

1. this process is taken for the rank, in a process group that talks to nobody (`fake_world`)
2. the meta module is divided as `materialize` divides it, outside the fake mode: meshes and `fully_shard` look at values
3. the step runs on what the rank holds; FSDP2 and DTensor are followed to what they allocate (`fsdp_memory`)

Under data parallelism without sharding (`replicate`), DistributedDataParallel's reducer, which is compiled and reads memory, does
not run: the step is that of one device, and the reducer's buckets are added (`ddp_buckets`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

import torch
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
from .fake_step import check_one_device, device_of, run_fake, step_module, with_implementation
from .fake_world import fake_world
from .fsdp_memory import fsdp_followed
from .gloo_scratch import gloo_scratch_bytes
from .parallel import apply_sharding, mesh_of, not_run

_HOST = "cpu"


@torch.inference_mode(False)  # grad mode is on, whatever it is around the question
def fake_rank_step(build: Build, decisions: Decisions, training: Training, rank: int) -> Timeline:
    """The timeline of two training steps of one rank of the plan, in bytes on the plan's device, with its offload in host memory.

    The user's process groups and random generators stay as they are. Raises as `fake_step` does.
    """
    sharding = decisions.sharding
    assert sharding is not None
    if given := not_run(sharding):
        raise DecisionError(f'tier="T1" runs what the runtime carries out, and not {" and ".join(given)}; ask for tier="T0"')
    check_one_device(decisions)
    device = device_of(build, decisions)
    copied = sharding.offload and device != _HOST
    module = step_module(build, decisions)
    inputs = example_inputs(module, training)
    chosen = with_implementation(training, _HOST if sharding.offload else device)

    if sharding.axis("shard") is None and sharding.axis("tensor") is None:
        parameters = trained(module)
        return with_buckets(run_fake(module, inputs, chosen, device), parameters, device)
    with fake_world(sharding.ranks, rank):
        if training.checkpointing != "none":
            checkpoint_layers(module, training.checkpointing)
        apply_sharding(module, sharding, build.graph, mesh_of(sharding, _HOST))
        if any(isinstance(each, DTensor) for each in module.parameters()):
            chosen = _stepping_dtensors(chosen, training, module)
        return run_fake(module, inputs, replace(chosen, checkpointing="none"), device, copied, followed_rank(module, copied))


def followed_rank(module: nn.Module, copied: bool) -> Callable[[Allocations], AbstractContextManager[None]]:
    """What surrounds a run of a rank's `module`, so that what FSDP2, DTensor and gloo allocate is known for what it is."""

    @contextmanager
    def around(found: Allocations) -> Iterator[None]:
        found.collective_scratch = gloo_scratch_bytes
        with propagation_apart(), fsdp_followed(found, module, copied):
            yield

    return around


def _stepping_dtensors(chosen: Training, asked: Training, module: nn.Module) -> Training:
    """The implementation in which torch steps these parameters, which are not all whole; raises where it has none.

    Tensor parallelism alone leaves DTensors and whole tensors side by side, and only the loop takes both.
    """
    if asked.optimizer == "adafactor":
        raise DecisionError(
            "torch.optim.Adafactor does not step parameters that are divided between ranks: it squares their norms in place, "
            'which DTensor refuses; take another optimizer, such as "adamw-8bit"'
        )
    if len({isinstance(each, DTensor) for each in module.parameters() if each.requires_grad}) == 1:
        return chosen
    if asked.implementation not in (None, "for-loop"):
        raise DecisionError(
            f"implementation={asked.implementation!r} steps all parameters in one op, and torch refuses one of DTensors and "
            'whole tensors, which tensor parallelism leaves side by side; say implementation="for-loop"'
        )
    return replace(chosen, implementation="for-loop")


@contextmanager
def propagation_apart() -> Iterator[None]:
    """DTensor finds out the shape of a result on tensors of the whole's shape, in a mode of their own: they are nobody's memory.

    Nor are generators kept for each device, as the CPU has none; torch would warn of that at every random op.
    """
    modes = mock.patch.object(_sharding_prop, "detect_fake_mode", lambda *_: None)
    with modes, mock.patch.object(_random, "_rng_tracker", None), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="DTensor random operators may not have complete support")
        yield
