"""The second door of the third stage: fill a meta module in place, after the user has sharded it.

The steps of `materialize_module`:

1. the meta tensors of the module are found, and what of each this rank holds
2. the ranks agree on what they are about to build
3. what a checkpoint has is read, and the recipes of the rest are run, each for the part that is held here
4. when every rank is done, the new tensors take the places of the meta tensors; on any failure before, nothing has changed
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..planner.check import check_decisions
from ..planner.decisions import Decisions, Move
from ..tracer.ambient import host_random_from, one_at_a_time
from ..tracer.errors import CheckpointError
from ..tracer.graph import StreamPosition, TensorNode
from ..tracer.replay import Spot
from ..tracer.streams import generator_states, generators_kept, restore_generators
from .agreement import agreement
from .boxes import Box, whole_box
from .build import Build
from .check import check_devices, check_uninitialized
from .entries import Entry
from .job import Job, Progress, Whereto
from .keyed import KeyedReplay, Keys, drawn_seed
from .loading import Loading, Read, all_members, members_of, opened, read_all
from .materialize import restored_on_failure
from .meta import Blueprint, check_not_quantized, meta_likeness, meta_module
from .options import Load, Options
from .parallel import apply_sharding, check_mesh, check_runs, group_of, mesh_of
from .parts import PartialReplay, Wanted
from .placing import place, renew_weak_references, wrapped
from .ranks import Ranks, together
from .regions import assembled, boxes_of, local_of, placed_boxes, region_of
from .shared import Shared, Watched
from .targets import find_targets
from .workers import Workers


def materialize_module(
    module: nn.Module,
    options: Options,
    device: str | torch.device | None = None,
    group: Any = "world",
    timeout: float | None = None,
    own: Own | None = None,
) -> nn.Module:
    """Give every meta tensor of `module`, which comes from `meta_module`, its values; returns the module.

    With `own`, only the tensors that it holds itself, not those of its submodules, and the generators are left alone.

    Every rank of `group` makes the same call. Raises `MaterializeError`, `UninitializedError`, `CheckpointError`, and
    `RanksError` where the ranks do not agree or one of them fails; the module and the generators are then as they were.
    """
    check_not_quantized(module)
    with together(group, timeout) as ranks:
        return fill_module(module, ranks, options, device, own=own)


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


def fill_module(
    module: nn.Module,
    ranks: Ranks,
    options: Options,
    device: str | torch.device | Whereto | None,
    progress: Progress | None = None,
    own: Own | None = None,
) -> nn.Module:
    """The same, for ranks that know of each other; `progress(done, total)` is called with bytes."""
    blueprint, targets = find_targets(module, own is not None)
    with ExitStack() as stack:
        if own is not None:
            stack.enter_context(generators_kept())
        stack.enter_context(one_at_a_time)
        stack.enter_context(restored_on_failure())
        loading = _opened(options.load, blueprint, module, stack, own)
        workers = stack.enter_context(Workers(options.threads))  # they end first: nobody reads from files that are closed
        job = Job.of(blueprint.build, blueprint.decisions, targets, options, device, loading, progress)
        ranks.agree(job.says() if ranks.count > 1 else {})
        if loading is not None and targets and (own is None or own.build is None):
            loading.matched.log_missing(alone=ranks.count == 1 and own is None)
        held = _filled(job, ranks, workers, own)
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
    options: Options,
    mesh: DeviceMesh | None = None,
    timeout: float | None = None,
) -> nn.Module:
    """The module that the plan says, divided on its mesh, this rank's part filled; every rank of the mesh makes the same call."""
    sharding = decisions.sharding
    assert sharding is not None
    check_runs(sharding)
    check_decisions(decisions, build.graph)
    check_devices(build.graph, decisions)
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    device = torch.device(moves[-1] if moves else build.graph.ambient.default_device)
    check_mesh(sharding, mesh)
    with together("world" if mesh is None else group_of(mesh), timeout) as ranks:
        if ranks.count > 1:  # before the mesh is made: whoever made it alone would wait for the others
            ranks.agree(agreement(build, decisions, options.seed))
        module = apply_sharding(meta_module(build, decisions), sharding, build.graph, mesh_of(sharding, device.type, mesh))
        return fill_module(module, ranks, options, "cpu" if sharding.offload else device)


def _opened(load: Load | None, blueprint: Blueprint, module: nn.Module, until: ExitStack, own: Own | None) -> Loading | None:
    """The checkpoint, open until the stack is left, or for as long as there are modules to fill one by one."""
    if load is None or (own is not None and own.loading is not None):
        return None if own is None else own.loading
    graph, kept = blueprint.build.graph, until if own is None else own.until
    members = members_of(module) if own is None else all_members(graph)
    found = kept.enter_context(opened(load, graph, members, lambda: meta_likeness(blueprint.build, blueprint.decisions)))
    if own is not None:
        own.loading = found
    return found


def _filled(job: Job, ranks: Ranks, workers: Workers, own: Own | None) -> list[torch.Tensor]:
    """What this rank holds of every target.

    The generators are left as the constructor leaves them; as they are, where nothing is drawn because a checkpoint has it all.
    """
    draws, seed, eager = _draws(job, own), job.options.seed, job.options.rng == "eager"
    if draws and eager and seed is not None:
        torch.manual_seed(seed)
    elif draws and not eager and seed is None:
        seed = drawn_seed()
    with host_random_from(job.build.origin.host), generators_kept():
        build = (own and own.build) or job.build.under_current_state()
        graph, nodes = build.graph, job.nodes(build.graph)
        made = [node for number, node in enumerate(nodes) if job.made_here(number) and number not in job.entries_over]
        check_uninitialized(graph, job.options.uninitialized, {node.name for node in made})
        tape = (graph.ops, graph.storages, generator_states(), job.options.uninitialized == "zero")
        goes_on = draws and eager and own is None
        ends = [end for end in graph.ends if end.device == "cpu" or torch.cuda.is_available()] if goes_on else []
        states = {}
        watched = Watched(workers, ranks)
        replay = PartialReplay(*tape, watched) if eager else KeyedReplay(Keys.of(seed or 0, graph), *tape, watched)
        replay.staying = job.staying(nodes)
        if own is not None:
            own.build = build
            replay.start_from(own.ends)
        boxes = job.boxes()
        wanted = [(nodes[number].view, box) for number, box in boxes]
        if ends and ranks.count > 1:
            replay.prepare(wanted)
            lengths = PartialReplay(*tape, Shared(workers, ranks, replay, replay.staying))
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


def _draws(job: Job, own: Own | None) -> bool:
    """Whether anything is drawn, found out once."""
    if own is None:
        return job.draws()
    if own.draws is None:
        own.draws = job.draws()
    return own.draws


def _replayed(
    job: Job,
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


def _loaded(job: Job, workers: Workers) -> dict[int, torch.Tensor]:
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


def _reads(job: Job, number: int, entry: Entry, out: torch.Tensor) -> list[Read]:
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


def _moved(piece: torch.Tensor, job: Job, number: int) -> torch.Tensor:
    target, device = job.targets[number], job.devices[number]
    job.watch.add(piece.nbytes)
    if device.type == "meta" and job.whereto is not None and not piece.is_meta:
        job.whereto.leave(target, piece.to(target.tensor.dtype))
    return piece.to(device=device, dtype=target.tensor.dtype)


def _settled(tensor: torch.Tensor, job: Job, number: int) -> torch.Tensor:
    """The tensor on its device, with dtype and strides of the meta tensor that it is for."""
    like = local_of(job.targets[number].tensor)
    moved = _moved(tensor, job, number).detach()
    if moved.shape != like.shape:
        moved = moved.view(like.shape)  # a rank outside the mesh, or without elements
    if moved.stride() == like.stride() or not moved.numel() or moved.is_meta:
        return moved
    return torch.empty_strided(like.shape, like.stride(), dtype=moved.dtype, device=moved.device).copy_(moved)
