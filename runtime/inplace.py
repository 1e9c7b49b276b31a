"""The second door of the third stage: fill a meta module in place, after the user has sharded it.

The steps of `materialize_module`:

1. the meta tensors of the module are found, and what of each this rank holds
2. the ranks agree on what they are about to build
3. the recipes are run, each for the part that is held here
4. when every rank is done, the new tensors take the places of the meta tensors; on any failure before, nothing has changed
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..planner.check import check_decisions
from ..planner.decisions import Decisions, Move, final_device
from ..planner.records import device_name
from ..tracer.ambient import host_random_from, one_at_a_time
from ..tracer.errors import CheckpointError, MaterializeError
from ..tracer.graph import ParamGraph, StreamPosition, TensorNode
from ..tracer.liveness import slice_indices
from ..tracer.replay import Spot
from ..tracer.streams import generator_states, generators_kept, restore_generators
from .agreement import agreement
from .boxes import Box, whole_box
from .build import Build
from .check import check_device, check_devices, check_rng, check_uninitialized
from .entries import Entry
from .keyed import KeyedReplay, Keys, drawn_seed
from .loading import Load, Loading, Read, all_members, members_of, opened, read_all
from .materialize import restored_on_failure
from .meta import Blueprint, check_not_quantized, meta_module
from .parallel import apply_sharding, check_mesh, group_of, mesh_of
from .parts import PartialReplay, Wanted
from .placing import check_hooks, place, renew_weak_references, wrapped
from .ranks import Ranks, together
from .regions import Indices, assembled, boxes_of, local_of, placed_boxes, region_of
from .shared import Shared, Watched
from .targets import Target, find_targets
from .workers import Workers


def materialize_module(
    module: nn.Module,
    seed: int | None = None,
    rng: str = "eager",
    uninitialized: str = "error",
    device: str | torch.device | None = None,
    threads: int | None = None,
    group: Any = "world",
    timeout: float | None = None,
    load: Load | None = None,
    *,
    own: Own | None = None,
) -> nn.Module:
    """Give every meta tensor of `module`, which comes from `meta_module`, its values; returns the module.

    With `own`, only the tensors that it holds itself, not those of its submodules, and the generators are left alone.

    Every rank of `group` makes the same call. Raises `MaterializeError`, `UninitializedError`, and `RanksError` where the ranks
    do not agree or one of them fails; the module and the generators are then as they were.
    """
    check_not_quantized(module)
    with together(group, timeout) as ranks:
        return fill_module(module, ranks, seed, rng, uninitialized, device, threads, load, own=own)


@dataclass
class Own:
    """Says to fill what a module holds itself only; handed from call to call, it keeps what they find out.

    It is for one meta module, one checkpoint and one state of the generators.
    """

    build: Build | None = None
    """The constructor, traced for that state."""
    ends: dict[int, Spot] = field(default_factory=dict)
    """Where draws end: what comes before them need not be gone through once more."""
    loading: Loading | None = None
    """The checkpoint, open for as long as this object is there."""
    draws: bool | None = None
    """Whether anything is drawn."""
    until: ExitStack = field(default_factory=ExitStack)


class Whereto:
    """Where each tensor goes, where they do not all go to one device."""

    def device(self, target: Target) -> torch.device:
        """The device of a tensor; the meta device for one whose value is only handed over."""
        raise NotImplementedError

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """Take the value of a tensor that stays on the meta device."""
        raise NotImplementedError


def fill_module(
    module: nn.Module,
    ranks: Ranks,
    seed: int | None,
    rng: str,
    uninitialized: str,
    device: str | torch.device | Whereto | None,
    threads: int | None,
    load: Load | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    own: Own | None = None,
) -> nn.Module:
    """The same, for ranks that know of each other; `progress(done, total)` is called with bytes."""
    blueprint, targets = find_targets(module, own is not None)
    with ExitStack() as stack:
        if own is not None:
            stack.enter_context(generators_kept())
        stack.enter_context(one_at_a_time)
        stack.enter_context(restored_on_failure())
        loading = _opened(load, blueprint, module, stack, own)
        workers = stack.enter_context(Workers(threads))  # they end first: nobody reads from files that are closed
        job = _Job.of(blueprint.build, blueprint.decisions, targets, rng, uninitialized, device, loading, progress)
        ranks.agree(job.says(seed) if ranks.count > 1 else {})
        if loading is not None and targets and (own is None or own.build is None):
            loading.matched.log_missing(alone=ranks.count == 1 and own is None)
        held = _filled(job, seed, ranks, workers, own)
        made = [wrapped(target.tensor, local) for target, local in zip(targets, held, strict=True)]
        ranks.finish()
        for target, tensor in zip(targets, made, strict=True):
            place(target, tensor)
        renew_weak_references(module.modules() if own is None else [module])
        if loading is not None:
            loading.finish(module)
    return module


def materialize_sharded(
    build: Build,
    decisions: Decisions,
    seed: int | None = None,
    rng: str = "eager",
    uninitialized: str = "error",
    threads: int | None = None,
    mesh: DeviceMesh | None = None,
    timeout: float | None = None,
    load: Load | None = None,
) -> nn.Module:
    """The module that the plan says, divided on its mesh, this rank's part filled; every rank of the mesh makes the same call."""
    sharding = decisions.sharding
    assert sharding is not None
    check_decisions(decisions, build.graph)
    check_devices(build.graph, decisions)
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    device = torch.device(moves[-1] if moves else build.graph.ambient.default_device)
    check_mesh(sharding, mesh)
    with together("world" if mesh is None else group_of(mesh), timeout) as ranks:
        if ranks.count > 1:  # before the mesh is made: whoever made it alone would wait for the others
            ranks.agree(agreement(build, decisions, seed))
        module = apply_sharding(meta_module(build, decisions), sharding, build.graph, mesh_of(sharding, device.type, mesh))
        return fill_module(module, ranks, seed, rng, uninitialized, "cpu" if sharding.offload else device, threads, load)


@dataclass(frozen=True)
class _Job:
    """What one call fills: the targets, what this rank holds of each (None: an ordinary tensor), and where it goes."""

    build: Build
    decisions: Decisions
    targets: Sequence[Target]
    regions: Sequence[list[Indices] | None]
    devices: Sequence[torch.device]
    whereto: Whereto | None
    rng: str
    uninitialized: str
    sharing: frozenset[int]
    loading: Loading | None
    watch: _Watch

    @classmethod
    def of(
        cls,
        build: Build,
        decisions: Decisions,
        targets: Sequence[Target],
        rng: str,
        uninitialized: str,
        device: str | torch.device | Whereto | None,
        loading: Loading | None,
        progress: Callable[[int, int], None] | None,
    ) -> _Job:
        """Everything is checked that can be before the other ranks are asked."""
        check_rng(rng, build.graph)
        check_devices(build.graph, decisions)
        devices = _devices(targets, decisions, build.graph, device)
        for target in targets:
            check_hooks(target)
        for each in dict.fromkeys(devices):
            check_device(each)
        whereto = device if isinstance(device, Whereto) else None
        watch = _Watch(sum(local_of(target.tensor).nbytes for target in targets), progress)
        sharing = _sharing(targets)
        regions = [_region(target, number in sharing) for number, target in enumerate(targets)]
        return cls(build, decisions, targets, regions, devices, whereto, rng, uninitialized, sharing, loading, watch)

    def says(self, seed: int | None) -> dict[str, str]:
        """What the ranks have to agree on."""
        options = {"rng": self.rng, "uninitialized": self.uninitialized, "mesh": _meshes(self.targets)}
        if self.loading is not None:
            options["checkpoint"] = self.loading.says()
        return agreement(self.build, self.decisions, seed) | options

    @cached_property
    def entries(self) -> dict[int, Entry]:
        """What the targets are read from, by their numbers; one that the checkpoint does not have is not among them."""
        return {number: entry for number, entry in self._entries.items() if number not in self.sharing}

    @cached_property
    def entries_over(self) -> dict[int, Entry]:
        """The same for targets that share memory with others: it is made whole before anything is read into it."""
        return {number: entry for number, entry in self._entries.items() if number in self.sharing}

    @cached_property
    def _entries(self) -> dict[int, Entry]:
        if self.loading is None:
            return {}
        found = ((number, self.loading.entry(target.node)) for number, target in enumerate(self.targets))
        return {number: entry for number, entry in found if entry is not None}

    def made_here(self, number: int) -> bool:
        """Whether a target is made from its recipe: there is no entry for it."""
        return number not in self.entries

    def draws(self) -> bool:
        """Whether anything that the checkpoint does not have depends on random numbers; the same on every rank."""
        if self.loading is None or self.build.graph.seed_dependent:
            return True
        graph = self.build.graph
        made = {tensor.view.storage for tensor in graph.tensors if self.loading.entry(tensor) is None}
        sizes = {storage.index: storage.nbytes for storage in graph.storages}
        writers = {storage: [op.index for op in ops] for storage, ops in graph.writers.items()}
        return any(graph.ops[index].random for index in slice_indices(graph.ops, sizes, writers, made))

    def boxes(self) -> list[tuple[int, Box]]:
        """The boxes that what is made here consists of, with the numbers of their targets."""
        regions = ((number, region) for number, region in enumerate(self.regions) if self.made_here(number))
        return [(number, box) for number, region in regions if region is not None for box in boxes_of(region)]

    def staying(self, nodes: Sequence[TensorNode]) -> frozenset[int]:
        """The storages whose elements are not converted or moved once they are made: drawn early, they take no more memory."""
        return frozenset(
            node.view.storage
            for target, node, device in zip(self.targets, nodes, self.devices, strict=True)
            if device.type == "cpu" and target.tensor.dtype == node.dtype
        )

    def nodes(self, graph: ParamGraph) -> list[TensorNode]:
        """The targets' nodes in `graph`, which may be the constructor's under another seed."""
        if graph is self.build.graph:
            return [target.node for target in self.targets]
        return [_same_node(target, graph) for target in self.targets]


def _opened(load: Load | None, blueprint: Blueprint, module: nn.Module, until: ExitStack, own: Own | None) -> Loading | None:
    """The checkpoint, open until the stack is left, or for as long as there are modules to fill one by one."""
    if own is not None and own.loading is not None:
        return own.loading
    uncast = blueprint.decisions.model_copy(update={"steps": ()})  # the blueprint's constructor casts already
    graph, kept = blueprint.build.graph, until if own is None else own.until
    members = members_of(module) if own is None else all_members(graph)
    found = kept.enter_context(opened(load, graph, members, lambda: meta_module(blueprint.build, uncast)))
    if own is not None:
        own.loading = found
    return found


def _filled(job: _Job, seed: int | None, ranks: Ranks, workers: Workers, own: Own | None) -> list[torch.Tensor]:
    """What this rank holds of every target.

    The generators are left as the constructor leaves them; as they are, where nothing is drawn because a checkpoint has it all.
    """
    draws = job.draws() if own is None or own.draws is None else own.draws
    if own is not None:
        own.draws = draws
    if draws and job.rng == "keyed" and seed is None:
        seed = drawn_seed()
    elif draws and job.rng == "eager" and seed is not None:
        torch.manual_seed(seed)
    with host_random_from(job.build.origin.host), generators_kept():
        build = (own and own.build) or job.build.under_current_state()
        graph, nodes = build.graph, job.nodes(build.graph)
        made = [node for number, node in enumerate(nodes) if job.made_here(number) and number not in job.entries_over]
        check_uninitialized(graph, job.uninitialized, {node.name for node in made})
        options = (graph.ops, graph.storages, generator_states(), job.uninitialized == "zero")
        goes_on = draws and job.rng == "eager" and own is None
        ends = [end for end in graph.ends if end.device == "cpu" or torch.cuda.is_available()] if goes_on else []
        states = {}
        watched = Watched(workers, ranks)
        keys = Keys.of(seed or 0, graph) if job.rng == "keyed" else None
        replay = PartialReplay(*options, watched) if keys is None else KeyedReplay(keys, *options, watched)
        replay.staying = job.staying(nodes)
        if own is not None:
            own.build = build
            replay.start_from(own.ends)
        boxes = job.boxes()
        wanted = [(nodes[number].view, box) for number, box in boxes]
        if ends and ranks.count > 1:
            replay.prepare(wanted)
            lengths = PartialReplay(*options, Shared(workers, ranks, replay, replay.staying))
            states, ends = lengths.run((), ends), []
            replay.follow(lengths)
        loaded = _loaded(job, workers)
        found, reached = _replayed(job, nodes, replay, boxes, wanted, ends)
        if job.loading is not None:
            for number, entry in job.entries_over.items():  # one by one, in load_state_dict's order: the last one counts
                read_all(_reads(job, number, entry, found[number]), job.loading.checkpoint, workers)
        if own is not None:
            own.ends |= replay.ends()
    restore_generators(states | reached)
    return [(found | loaded)[number] for number in range(len(nodes))]


def _replayed(
    job: _Job,
    nodes: Sequence[TensorNode],
    replay: PartialReplay,
    boxes: Sequence[tuple[int, Box]],
    wanted: Wanted,
    ends: Sequence[StreamPosition],
) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that share memory first; then the others, or what is held here of them."""
    found: dict[int, torch.Tensor] = {}
    made = [(number, region) for number, region in enumerate(job.regions) if job.made_here(number)]
    ordinary = [number for number, region in made if region is None]
    for number, whole in zip(ordinary, replay.run_whole([nodes[number].view for number in ordinary]), strict=True):
        found[number] = _settled(whole, job, number)
    pieces, reached = replay.run_parts(wanted, ends, lambda entry, piece: _moved(piece, job, boxes[entry][0]))
    parts = iter(pieces)
    for number, region in made:
        if region is not None:
            found[number] = _settled(assembled(region, [next(parts) for _ in boxes_of(region)]), job, number)
    return found, reached


def _loaded(job: _Job, workers: Workers) -> dict[int, torch.Tensor]:
    """What the checkpoint has, read into new memory; what is only handed over (to the disk) one tensor at a time."""
    if job.loading is None:
        return {}
    found, at_once = {}, []
    for number, entry in job.entries.items():
        like, device = local_of(job.targets[number].tensor), job.devices[number]
        handed_over = device.type == "meta" and job.whereto is not None
        out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu" if handed_over else device)
        reads = _reads(job, number, entry, out)
        if handed_over:
            read_all(reads, job.loading.checkpoint, workers, job.watch.add)
            out = _moved(out, job, number)
        else:
            at_once += reads
        found[number] = out
    read_all(at_once, job.loading.checkpoint, workers, job.watch.add)
    return found


def _reads(job: _Job, number: int, entry: Entry, out: torch.Tensor) -> list[Read]:
    """The boxes of an entry that make up what this rank holds of a target; a single element is a scalar too, as in torch 0.3."""
    target, region = job.targets[number], job.regions[number]
    if target.node.opaque and target.spec is not None:  # the constructor made a DTensor, whose whole the checkpoint has
        shape = tuple(target.tensor.shape)
        if entry.shape != shape:
            raise CheckpointError(
                f"{target.path} has the shape {list(entry.shape)} in {entry.where} and {list(shape)} in the module"
            )
        region = region_of(shape, target.spec.mesh, target.spec.placements)
    if region is None or target.spec is None or not out.dim():
        return [Read(entry, whole_box(entry.shape), out if out.shape == entry.shape else out.view(entry.shape))]
    return [Read(entry, box, out[tuple(slice(part.start, part.stop) for part in place)]) for box, place in placed_boxes(region)]


def _moved(piece: torch.Tensor, job: _Job, number: int) -> torch.Tensor:
    target, device = job.targets[number], job.devices[number]
    job.watch.add(piece.nbytes)
    if device.type == "meta" and job.whereto is not None and not piece.is_meta:
        job.whereto.leave(target, piece.to(target.tensor.dtype))
    return piece.to(device=device, dtype=target.tensor.dtype)


def _settled(tensor: torch.Tensor, job: _Job, number: int) -> torch.Tensor:
    """The tensor on its device, with dtype and strides of the meta tensor that it is for."""
    like = local_of(job.targets[number].tensor)
    moved = _moved(tensor, job, number).detach()
    if moved.shape != like.shape:
        moved = moved.view(like.shape)  # a rank outside the mesh, or without elements
    if moved.stride() == like.stride() or not moved.numel() or moved.is_meta:
        return moved
    return torch.empty_strided(like.shape, like.stride(), dtype=moved.dtype, device=moved.device).copy_(moved)


class _Watch:
    """Adds up the bytes that are there, for whoever wants to watch."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total, self._done, self._progress = total, 0, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        """So many more bytes are done."""
        if self._progress is not None and nbytes:
            with self._lock:
                self._done = min(self._done + nbytes, self._total)
                self._progress(self._done, self._total)


# -- where it goes ------------------------------------------------------------------------------------------------------


def _devices(
    targets: Sequence[Target], decisions: Decisions, graph: ParamGraph, device: str | torch.device | Whereto | None
) -> list[torch.device]:
    """The user's device, else the plan's, else the mesh's; else the one that the constructor asked for."""
    if isinstance(device, Whereto):
        return [device.device(target) for target in targets]
    storages = {storage.index: storage for storage in graph.storages}
    meshes = [target.spec.mesh.device_type for target in targets if target.spec is not None]
    if device is None and meshes and not any(isinstance(step, Move) for step in decisions.steps):
        device = meshes[0]
    if device is not None:
        return [torch.device(device_name(device))] * len(targets)
    return [torch.device(final_device(target.node, storages[target.node.view.storage], decisions)) for target in targets]


def _sharing(targets: Sequence[Target]) -> frozenset[int]:
    """The numbers of the ordinary tensors that share memory with another, and are made with it."""
    sharing = Counter(target.node.view.storage for target in targets if target.spec is None)
    return frozenset(
        number for number, target in enumerate(targets) if target.spec is None and sharing[target.node.view.storage] > 1
    )


def _region(target: Target, shares: bool) -> list[Indices] | None:
    """What this rank holds of a target; None for an ordinary tensor that is made whole."""
    region = target.region()
    if region is not None or shares or target.node.opaque or not target.node.view.is_contiguous:
        return region
    return [[range(size)] if size else [] for size in target.node.shape]


def _meshes(targets: Sequence[Target]) -> str:
    found = {_mesh_text(target.spec.mesh) for target in targets if target.spec is not None}
    return ", ".join(sorted(found)) or "none"


def _mesh_text(mesh: Any) -> str:
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    return " x ".join(f"{name}={size}" if name else str(size) for name, size in zip(names, mesh.shape, strict=True))


def _same_node(target: Target, graph: ParamGraph) -> TensorNode:
    node = graph.by_name.get(target.node.name)
    if node is None or node.shape != target.node.shape:
        now = f"has the shape {list(node.shape)}" if node else "is not there"
        raise MaterializeError(
            f"the constructor looks at the random values it draws, and under this seed {target.node.name} {now}, where the meta "
            f"module has {list(target.node.shape)}; trace under the seed that you fill with, after torch.manual_seed(seed)"
        )
    return node
