"""Builds a plan for real, trains it for a few steps, and holds what each phase took against what was predicted.

1. the module is built, or loaded, as `plan.materialize` does it
2. it takes the workload's steps, as a training script does, with nothing in between
3. it is saved to a temporary folder, where there is room
4. it takes two steps more, looked at op by op, which says what the memory of a peak is for
5. each phase becomes a `Check`; the ranks of a sharded plan tell each other theirs
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from ..planner.allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, STEP
from ..planner.changes import Change
from ..planner.memory import Memory
from ..planner.verification import KERNELS, Check, Held, Part, RankChecks, attributed, built_at, predicted_at
from ..planner.workload import Training
from ..tracer.ambient import host_random_now, restore_host_random
from ..tracer.errors import DecisionError
from ..tracer.streams import generators_kept
from .example_inputs import example_inputs
from .memory_events import lifetimes
from .ranks import Ranks, together
from .recording import HOST, Recording, Span
from .training_step import run_training
from .watched import Watched, built, held_at

SAVED_AT_MOST = 4 * 10**9
"""Bytes of weights above which a checkpoint is written only when asked for: it goes to a disk, and comes back to nobody."""

_BUILDING = ("construct", "load")
_SAVING = "checkpoint"


@dataclass(frozen=True)
class Predicted:
    """What is held against: T0's memory of this rank with its timelines, and T1's where the step could be run."""

    closed_form: Memory
    timelines: dict[str, list[Change]]
    run: Memory | None


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


def verify(job: Job, predicted: Callable[[int], Predicted], timeout: float | None = None) -> tuple[list[RankChecks], Any]:
    """What every rank measured, and this one's module as the steps left it; `predicted` is asked for by rank.

    Every rank of a sharded plan makes the same call. Random generators are as they were afterwards. CUDA's peak counters and the
    process's own record of resident memory start anew. Raises what building or a step raises, and `RanksError` where another rank
    fails.
    """
    with _states_kept(), together("world" if job.sharded else None, timeout) as ranks:
        mine, module = _of_this_rank(job, predicted(ranks.rank), ranks)
        return _of_all(mine, ranks), module


@contextmanager
def _states_kept() -> Iterator[None]:
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


def _of_this_rank(job: Job, predicted: Predicted, ranks: Ranks) -> tuple[RankChecks, Any]:
    devices = sorted({device for found in predicted.closed_form.by_device.values() for device in found})
    _check_cuda(devices)
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
        elif _is_saved(job, module, weights, notes):
            _save(job, module, recording, ranks)
    found = _Found(recording, watch, module, finished, predicted)
    return RankChecks(ranks.rank, _machine(devices), tuple(found.checks(devices)), tuple(notes)), module


def _works_given_back(devices: Sequence[str], ranks: Ranks) -> AbstractContextManager[None]:
    if ranks.count == 1 or devices != [HOST]:
        return nullcontext()
    from .gloo_works import works_given_back

    return works_given_back()


def _check_cuda(devices: Sequence[str]) -> None:
    for device in devices:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise DecisionError(
                f"the plan puts tensors on {device}, and torch finds no CUDA device here; verify it where there is"
            )


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
    if _is_saved(job, module, weights, notes):
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


def _is_saved(job: Job, module: Any, weights: int, notes: list[str]) -> bool:
    """Whether a checkpoint of so many bytes is to be written; where it is not, a note says so."""
    if job.saving is False or not isinstance(module, nn.Module):
        return False
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if job.saving is None and (weights > SAVED_AT_MOST or 2 * weights > free):
        notes.append(f"no checkpoint was written: it takes {weights:,} bytes of disk; say saving=True to have it written")
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


# -- the checks ---------------------------------------------------------------------------------------------------------


class _Found:
    """What was recorded, turned into checks."""

    def __init__(self, recording: Recording, watch: Watched, module: Any, finished: int, predicted: Predicted) -> None:
        self._recording, self._predicted = recording, predicted
        self._spans = lifetimes(recording.events)
        self._known = watch.pieces(self._spans)
        self._module, self._finished = module, finished

    def checks(self, devices: Sequence[str]) -> Iterator[Check]:
        """One for each phase that was run and each device that it is predicted to use."""
        for phase in self._predicted.closed_form.by_device:
            spans = [span for span in self._recording.spans if not span.watched and span.name in _names_of(phase)]
            for device in devices:
                if spans and self._prediction(self._predicted.closed_form, phase, device):
                    yield self._check(phase, device, spans)

    def _prediction(self, memory: Memory, phase: str, device: str) -> int:
        return memory.by_device[phase].get(device, 0)

    def _check(self, phase: str, device: str, spans: Sequence[Span]) -> Check:
        repeats = tuple(self._recording.measured(span, device) for span in spans)
        span = spans[repeats.index(max(repeats))]
        run = self._predicted.run
        closed_form = self._prediction(self._predicted.closed_form, phase, device)
        of_run = (
            None if run is None or run.run is None or span.name not in run.run.peaks else self._prediction(run, phase, device)
        )
        found = Check(phase, device, closed_form, of_run, max(repeats), repeats, (), 0, {})
        whole, beyond, taken = self._beyond(span, device, max(repeats))
        found = replace(found, parts=self._parts(found, span), whole=whole, beyond=beyond, taken=taken)
        replayed = None if run is None or of_run is None else run.reserved.get(phase, {}).get(device)
        reserved = max((each.counters[device].reserved for each in spans), default=0) if device in span.counters else None
        return replace(found, replayed=None if replayed is None else replayed.reserved, reserved=reserved)

    def _beyond(self, span: Span, device: str, measured: int) -> tuple[int, dict[str, int], int]:
        """What there is besides: of the device, or of the process since it began to build."""
        if device in span.counters:
            counters = span.counters[device]
            kept = {"allocator's cache": counters.reserved - measured, "CUDA context, libraries, other processes": counters.taken}
            return counters.reserved + counters.taken, kept, counters.taken
        grown = span.resident - self._recording.before
        return grown, {"process beyond tensors": grown - measured}, self._recording.before

    def _parts(self, check: Check, span: Span) -> tuple[Part, ...]:
        if check.phase in _BUILDING and check.device in span.peaks:
            guess = built_at(self._predicted.timelines[check.phase], check.device)
            return attributed(guess, built(span.peaks[check.device], self._module, self._spans, self._finished), check.difference)
        looked = next((each for each in self._recording.spans if each.watched and each.name == span.name), span)
        if check.device not in looked.peaks:
            return attributed([], [], check.difference)
        real = held_at(looked.peaks[check.device], self._known, KERNELS if looked.watched else "temporary")
        if check.run is None:
            real = [_counted(each, self._predicted.closed_form) for each in real]
        return attributed(self._guess(check, span), real, check.difference)

    def _guess(self, check: Check, span: Span) -> list[Held]:
        """What was predicted, by kind; the closed form says no more than how much it is of all that it counts."""
        run = self._predicted.run
        if check.run is not None and run is not None and run.run is not None:
            return predicted_at(run.run, _worse_of(run, span.name, check), check.device)
        return [Held(_COUNTED, "closed form", check.closed_form, check.closed_form)]


_COUNTED = "counted by the closed form"


def _counted(each: Held, memory: Memory) -> Held:
    """The same, with the closed form's own kind where that counts it."""
    if each.kind == KERNELS or ("activations" in memory.left_out and each.kind not in _KEPT):
        return each
    return replace(each, kind=_COUNTED, what="closed form")


_KEPT = ("parameter", "buffer", "gradient", "optimizer state")


def _worse_of(run: Memory, name: str, check: Check) -> str:
    """The phase of the run whose peak was compared: of the two in the optimizer the one that takes more."""
    if check.phase != OPTIMIZER or run.run is None:
        return name
    peaks = run.run.peaks
    return max((FIRST_OPTIMIZER, OPTIMIZER), key=lambda each: peaks[each].get(check.device, 0))


def _names_of(phase: str) -> tuple[str, ...]:
    """The spans of a phase: both the first and the later calls of the optimizer are `optimizer`."""
    return {OPTIMIZER: (FIRST_OPTIMIZER, OPTIMIZER), STEP: (STEP,), FIRST_STEP: (FIRST_STEP,)}.get(phase, (phase,))
