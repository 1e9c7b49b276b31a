"""The second door of the third stage: fill a meta module in place, after the user has sharded it.

The steps of `materialize_module`:

1. the meta tensors of the module are found, and what of each this rank holds
2. the ranks agree on what they are about to build
3. the recipes are run, each for the part that is held here
4. when every rank is done, the new tensors take the places of the meta tensors; on any failure before, nothing has changed
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..planner.check import check_decisions
from ..planner.decisions import Decisions, Move, final_device
from ..planner.records import device_name
from ..tracer.ambient import host_random_from, one_at_a_time
from ..tracer.errors import MaterializeError
from ..tracer.graph import ParamGraph, StreamPosition, TensorNode
from ..tracer.streams import generator_states, generators_kept, restore_generators
from .agreement import agreement
from .boxes import Box
from .build import Build
from .check import check_device, check_devices, check_rng, check_uninitialized
from .keyed import KeyedReplay, Keys, drawn_seed
from .materialize import restored_on_failure
from .meta import check_not_quantized, meta_module
from .parallel import apply_sharding, check_mesh, group_of, mesh_of
from .parts import PartialReplay, Wanted
from .placing import check_hooks, place, renew_weak_references, wrapped
from .ranks import Ranks, together
from .regions import Indices, assembled, boxes_of, local_of
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
) -> nn.Module:
    """Give every meta tensor of `module`, which comes from `meta_module`, its values; returns the module.

    Every rank of `group` makes the same call. Raises `MaterializeError`, `UninitializedError`, and `RanksError` where the ranks
    do not agree or one of them fails; the module and the generators are then as they were.
    """
    check_not_quantized(module)
    with together(group, timeout) as ranks:
        return fill_module(module, ranks, seed, rng, uninitialized, device, threads)


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
) -> nn.Module:
    """The same, for ranks that know of each other."""
    blueprint, targets = find_targets(module)
    job = _Job.of(blueprint.build, blueprint.decisions, targets, rng, uninitialized, device)
    with one_at_a_time, restored_on_failure(), Workers(threads) as workers:
        ranks.agree(job.says(seed) if ranks.count > 1 else {})
        held = _filled(job, seed, ranks, workers)
        made = [wrapped(target.tensor, local) for target, local in zip(targets, held, strict=True)]
        ranks.finish()
        for target, tensor in zip(targets, made, strict=True):
            place(target, tensor)
        renew_weak_references(module)
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
        return fill_module(module, ranks, seed, rng, uninitialized, "cpu" if sharding.offload else device, threads)


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

    @classmethod
    def of(
        cls,
        build: Build,
        decisions: Decisions,
        targets: Sequence[Target],
        rng: str,
        uninitialized: str,
        device: str | torch.device | Whereto | None,
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
        return cls(build, decisions, targets, _regions(targets), devices, whereto, rng, uninitialized)

    def says(self, seed: int | None) -> dict[str, str]:
        """What the ranks have to agree on."""
        options = {"rng": self.rng, "uninitialized": self.uninitialized, "mesh": _meshes(self.targets)}
        return agreement(self.build, self.decisions, seed) | options

    def boxes(self) -> list[tuple[int, Box]]:
        """The boxes that what is held here is made of, with the numbers of their targets."""
        return [(number, box) for number, region in enumerate(self.regions) if region is not None for box in boxes_of(region)]

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


def _filled(job: _Job, seed: int | None, ranks: Ranks, workers: Workers) -> list[torch.Tensor]:
    """What this rank holds of every target; the generators are left as the constructor leaves them."""
    if job.rng == "keyed" and seed is None:
        seed = drawn_seed()
    elif job.rng == "eager" and seed is not None:
        torch.manual_seed(seed)
    with host_random_from(job.build.origin.host), generators_kept():
        build = job.build.under_current_state()
        graph, nodes = build.graph, job.nodes(build.graph)
        check_uninitialized(graph, job.uninitialized, {node.name for node in nodes})
        options = (graph.ops, graph.storages, generator_states(), job.uninitialized == "zero")
        ends = [end for end in graph.ends if end.device == "cpu" or torch.cuda.is_available()] if job.rng == "eager" else []
        states = {}
        watched = Watched(workers, ranks)
        keys = Keys.of(seed or 0, graph) if job.rng == "keyed" else None
        replay = PartialReplay(*options, watched) if keys is None else KeyedReplay(keys, *options, watched)
        boxes = job.boxes()
        wanted = [(nodes[number].view, box) for number, box in boxes]
        if ends and ranks.count > 1:
            replay.prepare(wanted)
            lengths = PartialReplay(*options, Shared(workers, ranks, replay, job.staying(nodes)))
            states, ends = lengths.run((), ends), []
            replay.follow(lengths)
        found, reached = _replayed(job, nodes, replay, boxes, wanted, ends)
    restore_generators(states | reached)
    return found


def _replayed(
    job: _Job,
    nodes: Sequence[TensorNode],
    replay: PartialReplay,
    boxes: Sequence[tuple[int, Box]],
    wanted: Wanted,
    ends: Sequence[StreamPosition],
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that share memory first; then the others, or what is held here of them."""
    found: dict[int, torch.Tensor] = {}
    ordinary = [number for number, region in enumerate(job.regions) if region is None]
    for number, whole in zip(ordinary, replay.run_whole([nodes[number].view for number in ordinary]), strict=True):
        found[number] = _settled(whole, job, number)
    pieces, reached = replay.run_parts(wanted, ends, lambda entry, piece: _moved(piece, job, boxes[entry][0]))
    parts = iter(pieces)
    for number, region in enumerate(job.regions):
        if region is not None:
            found[number] = _settled(assembled(region, [next(parts) for _ in boxes_of(region)]), job, number)
    return [found[number] for number in range(len(nodes))], reached


def _moved(piece: torch.Tensor, job: _Job, number: int) -> torch.Tensor:
    target, device = job.targets[number], job.devices[number]
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


def _regions(targets: Sequence[Target]) -> list[list[Indices] | None]:
    """What this rank holds of each target; None for an ordinary tensor that shares memory with another, which is made with it."""
    sharing = Counter(target.node.view.storage for target in targets if target.spec is None)
    return [_region(target, sharing[target.node.view.storage] > 1) for target in targets]


def _region(target: Target, shares: bool) -> list[Indices] | None:
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
