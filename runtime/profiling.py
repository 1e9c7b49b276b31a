"""The profile of a module: one forward and backward on fake tensors, in which each kind of layer is run a few times only.

1. the layers of long runs are taken over (`skipped_layers.py`), and the modules whose turns matter get hooks
2. forward, loss and backward are followed, op by op (`Followed`)
3. what was found is cut into blocks: the rounds of each run, forward and backward, and what is between them
4. the block of the round that stands for others gets their number, and the sums are checked to come out even

Where layers cannot be skipped, all of this happens once more with every layer run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..planner.allocations import Allocation
from ..planner.profile import Profile
from ..planner.workload import Training
from .allocations import Allocations
from .checkpointing import checkpoint_layers
from .fake_step import imagined, label_gradients
from .followed import Followed
from .profile_blocks import cut
from .skipped_layers import CannotSkip, Run, Skipping, runs_of
from .training_step import forward_and_backward

_RUN = "run"


@dataclass(frozen=True, slots=True)
class Traced:
    """What a plan's sharding changes for a trace: the device, the modules whose turns are marked, and the dtype they work in.

    The trace goes on within what `around` gives. Layers that differ in what `apart` says of their modules are not alike.
    """

    device: str
    units: tuple[str, ...] = ()
    compute_dtype: torch.dtype | None = None
    around: Callable[[Allocations], AbstractContextManager[None]] = lambda _: nullcontext()
    apart: Mapping[str, Any] = field(default_factory=dict)


def profile(
    made: Callable[[], nn.Module], inputs: Callable[[nn.Module], Any], training: Training, traced: Traced = Traced("cpu")
) -> Profile:
    """The profile of a module of meta tensors, which `made()` gives a new one of at each call, for the inputs made for it.

    Raises what a run of the step raises.
    """
    module = made()
    given, runs = inputs(module), runs_of(module, traced.apart)
    if runs:
        try:
            return _run(module, given, training, traced, runs)
        except CannotSkip:
            module = made()
            given = inputs(module)
    return _run(module, given, training, traced, [])


def _run(module: nn.Module, inputs: Any, training: Training, traced: Traced, runs: Sequence[Run]) -> Profile:
    module.train()
    if training.checkpointing != "none":
        checkpoint_layers(module, training.checkpointing)
    if traced.compute_dtype is not None:
        _compute_in(module, traced.compute_dtype, traced.units)
    with _its_own(runs):
        for run in runs:
            Skipping(module, run)
    found = Followed(on_cpu=traced.device == "cpu")
    layers = [run.layers[position] for run in runs for position in _run_positions(run)]
    skipped = set(_skipped(module, runs))
    with imagined(found, module, inputs, traced.device, around=traced.around(found), left=skipped) as faked:
        handles = found.turns(module, [*traced.units, *layers])
        with found:
            found.phase(_RUN)
            with _its_own(runs):
                forward_and_backward(module, faked, training)
            label_gradients(found, module)
            found.phase(_RUN)
        for handle in handles:
            handle.remove()
    return cut(found.stream(), tuple(_on_device(found, traced.device)), runs, frozenset(found.early))


def _skipped(module: nn.Module, runs: Sequence[Run]) -> Iterator[nn.Module]:
    """The modules that are in skipped layers alone: they stay on meta, and code elsewhere that looks at their tensors raises."""
    layers = {layer for run in runs for position, layer in enumerate(run.layers) if run.round_of(position) is None}
    places: dict[nn.Module, list[str]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        places.setdefault(each, []).append(name)
    for each, names in places.items():
        if all(not layers.isdisjoint(accumulate(name.split("."), "{}.{}".format)) for name in names):
            yield each


@contextmanager
def _its_own(runs: Sequence[Run]) -> Iterator[None]:
    """Whatever the module's own code raises, it may raise for the layers that are skipped: with every layer run it counts."""
    try:
        yield
    except Exception as error:
        if not runs:
            raise
        raise CannotSkip(f"{type(error).__name__}: {error}") from error


def _on_device(found: Followed, device: str) -> Iterator[Allocation]:
    """What was found, where what is in host memory, as generators' states are on CUDA, takes nothing of the device."""
    for each in found.timeline(device, "cpu").allocations:
        yield each if each.device == device else replace(each, nbytes=0)


def _run_positions(run: Run) -> Iterator[int]:
    return (position for position in range(len(run.layers)) if run.round_of(position) is not None)


def _compute_in(module: nn.Module, dtype: torch.dtype, units: Sequence[str]) -> None:
    """What FSDP's mixed precision does: parameters and the units' floating-point arguments have another dtype.

    torch/distributed/fsdp/_fully_shard/_fsdp_state.py `_cast_forward_inputs`; buffers stay as they are.
    """
    known: dict[int, nn.Parameter] = {}
    for each in module.modules():
        for name, value in each._parameters.items():
            if value is not None and value.is_floating_point():
                if id(value) not in known:
                    known[id(value)] = nn.Parameter(value.detach().to(dtype), value.requires_grad)
                each._parameters[name] = known[id(value)]

    def cast(value: torch.Tensor) -> torch.Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    for name in units:
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs: tree_map_only(torch.Tensor, cast, (args, kwargs)), prepend=True, with_kwargs=True
        )
