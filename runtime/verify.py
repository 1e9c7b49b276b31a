"""Builds a plan for real, trains it for a few steps, and holds what each phase took against what was predicted.

1. the module is built, or loaded, as `plan.materialize` does it
2. it takes the workload's steps, as a training script does, with nothing in between
3. it is saved to a temporary folder, where there is room
4. it takes two steps more, looked at op by op, which says what the memory of a peak is for
5. each phase becomes a `Check`; the ranks of a sharded plan tell each other theirs
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from ..planner.verification import RankChecks
from ..planner.workload import Training
from ..tracer.ambient import host_random_now, restore_host_random
from ..tracer.errors import DecisionError
from ..tracer.streams import generators_kept
from .example_inputs import example_inputs
from .phase_checks import PhaseChecks, Predicted
from .ranks import Ranks, together
from .recording import HOST, Recording
from .training_step import run_training
from .watched import Watched

SAVED_AT_MOST = 4 * 10**9
"""Bytes of weights above which a checkpoint is written only when asked for: it goes to a disk, and comes back to nobody."""

_SAVING = "checkpoint"


@dataclass(frozen=True)
class Job:
    """What is done for real: `build` gives the module, `save` writes one to a path."""

    build: Callable[[], Any]
    save: Callable[[nn.Module, Path], None]
    training: Training | None
    steps: int
    loads: bool
    saving: bool | None
    sharded: bool
    devices: tuple[str, ...]


def verify(job: Job, predicted: Callable[[int], Predicted], timeout: float | None = None) -> tuple[list[RankChecks], Any]:
    """What every rank measured, and this one's module as the steps left it; `predicted` is asked for by rank.

    Every rank of a sharded plan makes the same call. It draws: `states_kept` is for the caller. CUDA's peak counters and the
    process's own record of resident memory start anew. Raises what building or a step raises, and `RanksError` where another rank
    fails to build. One that fails inside a step leaves the others in its collectives, which raise when its process ends, or when
    the process group's timeout is over.
    """
    where = _where(job)
    with together("world" if job.sharded else None, timeout) as ranks:
        mine, module = _of_this_rank(job, predicted(ranks.rank), ranks, where)
        return _of_all(mine, ranks), module


@contextmanager
def states_kept() -> Iterator[None]:
    """Random generators, torch's and the host's, are as they were afterwards."""
    host = host_random_now()
    with generators_kept():
        try:
            yield
        finally:
            restore_host_random(host)


def _of_all(mine: RankChecks, ranks: Ranks) -> list[RankChecks]:
    ranks.finish()
    if ranks.count == 1:
        return [mine]
    found: list[Any] = [None] * ranks.count
    dist.all_gather_object(found, mine)
    return found


def _of_this_rank(job: Job, predicted: Predicted, ranks: Ranks, where: Mapping[str, str]) -> tuple[RankChecks, Any]:
    devices = tuple(where.values())
    recording, watch = Recording(devices), Watched()
    notes: list[str] = []
    with _works_given_back(devices, ranks), recording.recorded():
        recording.span("load" if job.loads else "construct")
        module = job.build()
        recording.span("")
        finished = recording.spans[-1].start
        weights = predicted.closed_form.phases["load"]
        if job.training is not None:
            _train(job, module, weights, devices, recording, watch, ranks, notes)
        elif _is_saved(job, module, weights, ranks, notes):
            _save(job, module, recording, ranks)
    found = PhaseChecks(recording, watch, module, finished, predicted, where)
    return RankChecks(ranks.rank, _machine(devices), tuple(found), tuple(notes)), module


def _works_given_back(devices: Sequence[str], ranks: Ranks) -> AbstractContextManager[None]:
    if ranks.count == 1 or tuple(devices) != (HOST,):
        return nullcontext()
    from .gloo_works import works_given_back

    return works_given_back()


def _where(job: Job) -> dict[str, str]:
    """The device here for each that the prediction names: every rank has its own, which the prediction calls the first."""
    if all(device == HOST for device in job.devices):
        return dict.fromkeys(job.devices, HOST)
    if not torch.cuda.is_available():
        raise DecisionError(
            f"the plan puts tensors on {', '.join(job.devices)}, and torch finds no CUDA device here; verify it on one"
        )
    if job.sharded and not torch.cuda.is_initialized() and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # as init_device_mesh does, but before anything is measured
    torch.cuda.init()
    own = f"cuda:{torch.cuda.current_device()}"
    return {device: own if job.sharded and device != HOST else device for device in job.devices}


def _machine(devices: Sequence[str]) -> str:
    cuda = [device for device in devices if device.startswith("cuda")]
    return torch.cuda.get_device_name(cuda[0]) if cuda else HOST


# -- the run ------------------------------------------------------------------------------------------------------------


def _train(
    job: Job,
    module: Any,
    weights: int,
    devices: Sequence[str],
    recording: Recording,
    watch: Watched,
    ranks: Ranks,
    notes: list[str],
) -> None:
    assert job.training is not None
    if not isinstance(module, nn.Module):
        raise DecisionError(f"the constructor returns a {type(module).__name__}, and a training step needs one nn.Module")
    device = next((each for each in devices if each.startswith("cuda")), HOST)
    inputs = real_inputs(module, job.training, device)
    kind = device.partition(":")[0]
    optimizers: list[torch.optim.Optimizer] = []
    run_training(module, inputs, job.training, recording.span, optimizers.append, steps=job.steps, device=kind)
    recording.span("")
    if _is_saved(job, module, weights, ranks, notes):
        _save(job, module, recording, ranks)
    watch.label_all(module, inputs)
    watch.label_state(module, optimizers)
    optimizers.clear()
    # layers are checkpointed already, and the memory of the second run is that of the first
    _look(module, inputs, replace(job.training, checkpointing="none"), recording, watch, kind, job.sharded)


def _look(
    module: nn.Module, inputs: Any, training: Training, recording: Recording, watch: Watched, kind: str, sharded: bool
) -> None:
    """Two steps more, watched."""
    optimizers: list[torch.optim.Optimizer] = []

    def phase(name: str) -> None:
        watch.label_gradients(module)
        watch.phase(name)
        recording.span(name, watched=True)

    handles = watch.follow(module)
    followed = _fsdp_followed(watch, module) if sharded else nullcontext()
    try:
        with followed, watch:
            run_training(module, inputs, training, phase, optimizers.append, device=kind)
    finally:
        for handle in handles:
            handle.remove()
    watch.label_state(module, optimizers)
    recording.span("")


def _fsdp_followed(watch: Watched, module: nn.Module) -> AbstractContextManager[None]:
    from .fsdp_memory import fsdp_followed  # torch's FSDP2, which it imports, takes a second

    return fsdp_followed(watch, module)


def real_inputs(module: nn.Module, training: Training, device: str) -> Any:
    """The inputs of a step with values, on `device`: meta tensors are filled with numbers that are valid tokens."""
    most = _tokens_known(module)
    generator = torch.Generator().manual_seed(0)

    def real(value: torch.Tensor) -> torch.Tensor:
        if not value.is_meta:
            return value.detach().to(device, copy=True)  # so that it is counted, whoever holds the user's own
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(device, value.dtype)
        return torch.randint(0, most, value.shape, generator=generator).to(device, value.dtype)

    return tree_map_only(torch.Tensor, real, example_inputs(module, training))


def _tokens_known(module: nn.Module) -> int:
    """How many tokens there are: by the configuration, or the first embedding."""
    named = getattr(getattr(module, "config", None), "vocab_size", None)
    first = next((each for each in module.modules() if isinstance(each, nn.Embedding)), None)
    return named if isinstance(named, int) else first.num_embeddings if first is not None else 2


# -- saving -------------------------------------------------------------------------------------------------------------


def _is_saved(job: Job, module: Any, weights: int, ranks: Ranks, notes: list[str]) -> bool:
    """Whether a checkpoint is to be written, where every rank has `weights` bytes at most; where it is not, a note says so.

    Rank 0, whose folder it goes to, decides for all: saving is done together, and ranks hold unequal parts.
    """
    if job.saving is not None or not isinstance(module, nn.Module):
        return bool(job.saving) and isinstance(module, nn.Module)
    nbytes = [weights * ranks.count, shutil.disk_usage(tempfile.gettempdir()).free]
    if ranks.count > 1:
        dist.broadcast_object_list(nbytes, src=0)
    whole, free = nbytes
    if whole > SAVED_AT_MOST or 2 * whole > free:
        notes.append(f"no checkpoint was written: it takes up to {whole:,} bytes of disk; say saving=True to have it written")
        return False
    return True


def _save(job: Job, module: nn.Module, recording: Recording, ranks: Ranks) -> None:
    with ExitStack() as stack:
        folder = [stack.enter_context(tempfile.TemporaryDirectory()) if ranks.rank == 0 else ""]
        if ranks.count > 1:
            dist.broadcast_object_list(folder, src=0)
        recording.span(_SAVING)
        job.save(module, Path(folder[0], "checkpoint"))
        recording.span("")
        if ranks.count > 1:
            dist.barrier()  # the folder goes with the first rank
