"""How many bytes each phase takes on each device, in closed form, before anything is built.

A phase is a list of `Change`s: allocations and releases in the order in which they happen. Its peak on a device is the highest
running sum, and the tensors that make the peak are those resident at that moment. All sizes are bytes of tensor storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..tracer.errors import GroundplanError
from ..tracer.graph import ParamGraph
from .activity import trained
from .allocations import FIRST_OPTIMIZER, OPTIMIZER, Allocation, Timeline
from .changes import HOST, Change
from .cluster import Cluster, cluster_of
from .construct import Walk, memory_device
from .decisions import Decisions, final_device, final_dtype
from .optimizers import OPTIMIZERS, Trained
from .profile import NoProfile, Profile
from .quantizing import Quantizing
from .rank_memory import LOAD_NOTE, computing_device, is_ddp, rank_timelines, staged
from .training_memory import Stepped, hidden_names
from .verdict import MARGIN, Verdict, verdict
from .workload import Training

_SHOWN_TENSORS = 10


class RankError(GroundplanError, IndexError):
    """A rank that the plan does not have."""


# -- what is returned ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Binding:
    """What makes the peak: the phase, the device, its bytes, and the largest tensors there as (name, bytes), largest first.

    A tensor's bytes include what the phase holds because of it: its gradient, its optimizer state, the copy being converted. In
    tier T1 these have entries of their own, and an activation is named by its module, op and source line.
    """

    phase: str
    device: str
    bytes: int
    tensors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Memory:
    """The bytes that a plan takes, by phase and device.

    * `construct`: building the module, the steps included;
    * `load`: reading a checkpoint into it instead;
    * `first_step`: forward and backward of the first training step, before there is optimizer state;
    * `step`: forward and backward of every later one;
    * `optimizer`: inside `optimizer.step()`;
    * `checkpoint`: saving.

    The three in the middle are there with a `Training` workload only. Of a sharded plan with `ranks` ranks this is the memory of
    the worst one, rank 0; `rank(i)` gives that of any. `left_out` is what takes memory in some phase and is not counted;
    `communicators` is how many groups of ranks talk to each other.

    `tier` says where the three in the middle come from: `T0` is the closed form, with activations where they could be traced (see
    `left_out`); `T1` is a run of the step on fake tensors, with all that it allocates. Then `run` has every allocation, and
    `closed_form` is what T0 says. In T1, `optimizer` includes the clipping of gradients, and the first `optimizer.step()` as well as later ones.
    """

    by_device: Mapping[str, Mapping[str, int]]
    binding: Binding
    notes: tuple[str, ...]
    ranks: int = 1
    of_rank: Callable[[int], Memory] | None = field(default=None, repr=False, compare=False)
    left_out: tuple[str, ...] = ()
    communicators: int = 0
    tier: str = "T0"
    closed_form: Memory | None = field(default=None, repr=False)
    run: Timeline | None = field(default=None, repr=False)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes of each phase on its worst device."""
        return {phase: max(devices.values()) for phase, devices in self.by_device.items()}

    @property
    def peak(self) -> int:
        """Bytes over all phases, on the worst device."""
        return self.binding.bytes

    def rank(self, index: int) -> Memory:
        """The memory of one rank; raises `RankError` for one that the plan does not have."""
        check_rank(index, self.ranks)
        return self if self.of_rank is None else self.of_rank(index)

    def fits(self, cluster: Cluster | str, margin: float | None = None) -> Verdict:
        """Whether this fits a cluster, a `gp.Cluster` or a string such as `"8xH100-80GB"`: "fits", "tight" or "does not fit".

        Besides the tensors there are the CUDA context, workspaces and communicators, which the verdict names, and `margin`, a
        share of all that (0.2 if None). "fits" leaves the margin free; "tight" has room for what is needed, but not for the
        margin, or the prediction leaves something out. As a condition, the verdict is true for "fits" only. Raises
        `DecisionError` where the cluster cannot be, or has fewer devices than the plan uses.

        >>> memory = Memory({"load": {"cuda:0": 16 * 10**9}}, Binding("load", "cuda:0", 16 * 10**9, ()), ())
        >>> memory.fits("24GB").verdict, memory.fits("20GB").verdict, memory.fits("16GB").verdict
        ('fits', 'tight', 'does not fit')
        """
        return verdict(self, cluster_of(cluster), MARGIN if margin is None else margin)

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data; all sizes in bytes."""
        binding = self.binding
        found = {
            "tier": self.tier,
            "phases": self.phases,
            "by_device": {phase: dict(devices) for phase, devices in self.by_device.items()},
            "peak": self.peak,
            "binding": {
                "phase": binding.phase,
                "device": binding.device,
                "bytes": binding.bytes,
                "tensors": [{"name": name, "bytes": nbytes} for name, nbytes in binding.tensors],
            },
            "left_out": list(self.left_out),
            "notes": list(self.notes),
        }
        if self.closed_form is not None:
            found["closed_form"] = self.closed_form.to_json()
        if self.run is not None and binding.phase in self.run.peaks:
            found["at_peak"] = [each.to_json() for each in self.run.at_peak(_run_phase(self), binding.device)]
        return found

    def __str__(self) -> str:
        columns = [(device, device, self) for device in sorted({each for found in self.by_device.values() for each in found})]
        if self.closed_form is not None:
            columns += [(f"{device}, {self.closed_form.tier}", device, self.closed_form) for _, device, _ in columns]
        rows = [["phase", *(title for title, _, _ in columns)]]
        for phase in self.by_device:
            rows.append([phase, *(human_bytes(of.by_device[phase].get(device, 0)) for _, device, of in columns)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [_aligned(row, widths) for row in rows]
        binding = self.binding
        largest = ", ".join(f"{name} ({human_bytes(nbytes)})" for name, nbytes in binding.tensors[:3])
        peak = f"peak: {human_bytes(binding.bytes)} in {binding.phase} on {binding.device}; largest: {largest or 'nothing'}"
        return "\n".join([*table, peak, *(f"note: {note}" for note in self.notes)])


def check_rank(index: int, ranks: int) -> None:
    """Raises `RankError` for a rank that a plan for so many ranks does not have."""
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < ranks:
        has = "is for one process" if ranks == 1 else f"has ranks 0 to {ranks - 1}"
        raise RankError(f"the plan {has}, so there is no rank {index!r}; ask for rank 0")


def human_bytes(nbytes: int) -> str:
    """Bytes in decimal units: GB is 10^9.

    >>> human_bytes(16_060_522_496), human_bytes(4_194_304), human_bytes(12)
    ('16.06 GB', '4.19 MB', '12 B')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])


# -- the verb -----------------------------------------------------------------------------------------------------------


def memory(
    graph: ParamGraph, decisions: Decisions, workload: Training | None = None, profile: Profile | NoProfile | None = None
) -> Memory:
    """The bytes of each phase for building `graph` by `decisions` and, with a `workload`, for training it.

    A `profile` of the module for that workload says what forward and backward take; without one that is left out.

    Devices are named as PyTorch reports them, so `cuda` without an index counts as `cuda:0`. Weights count each storage once.
    Raises `DecisionError` where a cast gives one tied tensor two dtypes.
    """
    if _is_of_a_rank(decisions):
        return _of_rank(graph, decisions, workload, profile, 0)
    timelines = timelines_of(graph, decisions, workload, profile=profile)
    by_device = {phase: _peaks(changes) or {HOST: 0} for phase, changes in timelines.items()}
    left_out = _left_out(by_device, workload, profile, ("activations",))
    notes = tuple(_notes(decisions, workload, profile))
    return Memory(by_device, _binding(by_device, timelines), notes, left_out=left_out)


def timelines_of(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training | None,
    rank: int = 0,
    profile: Profile | NoProfile | None = None,
) -> dict[str, list[Change]]:
    """What `memory` adds up: the allocations and releases of each phase, on one rank of a sharded plan."""
    known = profile if isinstance(profile, Profile) else None
    if _is_of_a_rank(decisions):
        return rank_timelines(graph, decisions, workload, rank, known)
    walk = Walk(graph)
    for step in decisions.steps:
        walk.take(step)
    walk.finish()
    return _timelines(graph, decisions, workload, walk, known)


def _is_of_a_rank(decisions: Decisions) -> bool:
    return decisions.sharding is not None or decisions.placing is not None or bool(decisions.quantizing)


def _of_rank(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None, rank: int
) -> Memory:
    """The same for one rank of a sharded plan, or the one process of a plan that places tensors or quantizes."""
    timelines = timelines_of(graph, decisions, workload, rank, profile)
    by_device = {phase: _peaks(changes) or {HOST: 0} for phase, changes in timelines.items()}
    return Memory(
        by_device,
        _binding(by_device, timelines),
        tuple(_rank_notes(decisions, workload, profile)),
        1 if decisions.sharding is None else decisions.sharding.ranks,
        lambda index: _of_rank(graph, decisions, workload, profile, index),
        _left_out(by_device, workload, profile, ("activations", "gathered units", "communication buffers")),
        _communicators(decisions),
    )


def _communicators(decisions: Decisions) -> int:
    """One for each axis along which there are several ranks, and one for all ranks together where that is another group."""
    axes = [] if decisions.sharding is None else [axis for axis in decisions.sharding.axes if axis.size > 1]
    return len(axes) + (len(axes) > 1)


def _timelines(
    graph: ParamGraph, decisions: Decisions, workload: Training | None, walk: Walk, profile: Profile | None
) -> dict[str, list[Change]]:
    weights = walk.resident()
    found = {"construct": walk.changes, "load": [*weights, *staged(weights)]}
    state: list[Change] = []
    if workload is not None:
        stepped = list(_stepped(graph, decisions, workload))
        phases, state = trained(graph, weights, stepped, workload, profile, computing_device(graph, decisions))
        found.update(phases)
    saved = [*weights, *state]
    found["checkpoint"] = [*saved, *_largest((each for each in saved if each.device != HOST), HOST)]
    return found


def _largest(changes: Iterable[Change], device: str) -> list[Change]:
    """A copy on `device` of the largest one."""
    largest = max(changes, key=lambda change: change.nbytes, default=None)
    return [] if largest is None else [largest._replace(device=device)]


def _stepped(graph: ParamGraph, decisions: Decisions, workload: Training) -> Iterator[Stepped]:
    storages = {storage.index: storage for storage in graph.storages}
    hidden = hidden_names(graph) if workload.optimizer == "muon" else set()
    for tensor in graph.parameters:
        device = memory_device(final_device(tensor, storages[tensor.view.storage], decisions))
        if tensor.requires_grad and device != "meta":
            trained = Trained(device, tensor.shape, final_dtype(tensor, decisions), tensor.name in hidden)
            yield Stepped(trained, Change(device, tensor.name, trained.nbytes))


# -- tier T1 ------------------------------------------------------------------------------------------------------------


def memory_of_run(
    graph: ParamGraph,
    decisions: Decisions,
    workload: Training,
    run: Timeline,
    profile: Profile | NoProfile | None = None,
    rank: int = 0,
    of_rank: Callable[[int], Memory] | None = None,
) -> Memory:
    """The memory of training on one rank, with the phases of a step from a run of it, the others in closed form.

    `of_rank` gives that of any rank. Raises what `memory` raises.
    """
    weights, closed = memory(graph, decisions).rank(rank), memory(graph, decisions, workload, profile).rank(rank)
    by_device = {phase: run.peaks.get(phase, devices) for phase, devices in closed.by_device.items()}
    by_device["optimizer"] = _worse(run.peaks[FIRST_OPTIMIZER], run.peaks[OPTIMIZER])
    places = [(phase, device) for phase, devices in by_device.items() for device in devices]
    phase, device = max(places, key=lambda place: by_device[place[0]][place[1]])
    notes = tuple(_run_notes(decisions, device, workload))
    found = replace(closed, by_device=by_device, binding=Binding(phase, device, by_device[phase][device], ()), notes=notes)
    tensors = weights.binding.tensors
    if phase in run.peaks:
        tensors = _largest_of(run.at_peak(_run_phase(found, run), device))
    left_out = _unknown_kernels(by_device)
    binding = replace(found.binding, tensors=tensors)
    return replace(found, binding=binding, tier="T1", closed_form=closed, run=run, left_out=left_out, of_rank=of_rank)


def _left_out(
    by_device: Mapping[str, Mapping[str, int]],
    workload: Training | None,
    profile: Profile | NoProfile | None,
    without: tuple[str, ...],
) -> tuple[str, ...]:
    """What is not counted; `without` a profile more than with one."""
    if workload is None:
        return ()
    return _unknown_kernels(by_device) if isinstance(profile, Profile) else without


def _unknown_kernels(by_device: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Of a step that was run, or traced, with the CPU's kernels."""
    return ("what CUDA's own kernels keep and need",) if any(map(_is_cuda, by_device["step"])) else ()


def _is_cuda(device: str) -> bool:
    return device.startswith("cuda")


def _largest_of(allocations: Iterable[Allocation]) -> tuple[tuple[str, int], ...]:
    held: dict[str, int] = {}
    for each in allocations:
        held[each.describe()] = held.get(each.describe(), 0) + each.nbytes
    return tuple(sorted(held.items(), key=lambda pair: (-pair[1], pair[0]))[:_SHOWN_TENSORS])


def _worse(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {device: max(one.get(device, 0), other.get(device, 0)) for device in {**one, **other}}


def _run_phase(memory: Memory, run: Timeline | None = None) -> str:
    """The phase of the run that makes the peak: of the two in the optimizer the one that takes more."""
    run, binding = run or memory.run, memory.binding
    first = run is not None and run.peaks[FIRST_OPTIMIZER].get(binding.device, 0) == binding.bytes
    return FIRST_OPTIMIZER if binding.phase == OPTIMIZER and first else binding.phase


# -- peaks --------------------------------------------------------------------------------------------------------------


def _peaks(changes: Iterable[Change]) -> dict[str, int]:
    now: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for device, _, nbytes in changes:
        now[device] = now.get(device, 0) + nbytes
        peaks[device] = max(peaks.get(device, 0), now[device])
    return peaks


def _binding(by_device: Mapping[str, Mapping[str, int]], timelines: Mapping[str, Sequence[Change]]) -> Binding:
    places = [(phase, device) for phase, devices in by_device.items() for device in devices]
    phase, device = max(places, key=lambda place: by_device[place[0]][place[1]])
    peak = by_device[phase][device]
    return Binding(phase, device, peak, _tensors_at_peak(timelines[phase], device, peak))


def _tensors_at_peak(changes: Iterable[Change], device: str, peak: int) -> tuple[tuple[str, int], ...]:
    held: dict[str, int] = {}
    now = 0
    for change in changes:
        if now == peak:
            break
        if change.device == device:
            now += change.nbytes
            held[change.tensor] = held.get(change.tensor, 0) + change.nbytes
    ranked = sorted(((name, nbytes) for name, nbytes in held.items() if nbytes), key=lambda pair: (-pair[1], pair[0]))
    return tuple(ranked[:_SHOWN_TENSORS])


# -- assumptions --------------------------------------------------------------------------------------------------------


def _notes(decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None) -> Iterator[str]:
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "construct leaves out what the constructor makes and drops, and temporaries inside an op, such as orthogonal_'s"
    if decisions.steps:
        yield "construct converts what is merely filled while it is drawn, other tensors one at a time, as nn.Module.to does"
        yield "construct may take more where _apply is overridden (nn.LSTM)"
    yield LOAD_NOTE
    if workload is not None:
        yield from _profile_notes(profile, workload, "activations")
        yield f"training: gradients have the parameters' dtype; {OPTIMIZERS[workload.optimizer].note}"
        yield "training: checkpoint saves the weights and the optimizer state, after the gradients are freed"


def _profile_notes(profile: Profile | NoProfile | None, workload: Training, what: str) -> Iterator[str]:
    if isinstance(profile, Profile):
        yield "training: activations are those of one forward and backward, traced with the CPU's kernels"
        if workload.loss is None:
            yield "the loss is the output's own, or else the sum of the outputs"
    else:
        yield f"training: {what} are not included{f': {profile.reason}' if profile is not None else ''}"


def _run_notes(decisions: Decisions, device: str, workload: Training) -> Iterator[str]:
    sharding = decisions.sharding
    if sharding is not None:
        yield f"of one rank of {sharding.ranks} ({sharding.describe()}), under torch's own sharding; ranks with like parts share a run"
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "first_step, step and optimizer are from a run of the step on fake tensors; the other phases are in closed form"
    if device.startswith("cuda"):
        yield "the run chose the CPU's kernels: what CUDA's keep otherwise for the backward, and their workspaces, are left out"
    else:
        yield "workspaces of oneDNN are not included" + (", copies that gloo makes are" if sharding is not None else "")
    if is_ddp(decisions):
        yield "DDP's buckets are in closed form, as its reducer does not run without memory"
    if workload.autocast is not None and device.startswith("cuda"):
        yield "autocast converts what it does on the CPU"
    if workload.loss is None:
        yield "the loss is the output's own, or else the sum of the outputs"


def _quantizing_notes(quantizing: Quantizing) -> Iterator[str]:
    unknown = [size for size in quantizing.sizes if size.nbytes is None]
    if unknown:
        shapes = ", ".join(f"{size.dtype}{list(size.shape)}" for size in unknown[:3])
        what = f"{quantizing.describe()} cannot be tried where the plan was made"
        yield f"{what}: weights of {shapes}{' and others' * (len(unknown) > 3)} count as not quantized"
    else:
        yield "construct quantizes a layer as soon as its last tensor is made; a layer is taken to have its weight last"


def _rank_notes(decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None) -> Iterator[str]:
    """The same for one rank of a sharded plan, or the one process of a plan that places tensors or quantizes."""
    sharding = decisions.sharding
    if sharding is not None:
        yield f"of one rank of {sharding.ranks} ({sharding.describe()}), the one that holds most"
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "construct makes one part after the other; what is not made element by element is there whole meanwhile"
    for quantizing in decisions.quantizing:
        yield from _quantizing_notes(quantizing)
    yield LOAD_NOTE
    if workload is not None:
        yield from _profile_notes(profile, workload, "activations, gathered units and communication buffers")
        yield f"training: gradients have the parameters' dtype; {OPTIMIZERS[workload.optimizer].note}"
        if is_ddp(decisions):
            yield "training: DDP's buckets hold every gradient once more"
