"""What one call fills in place: the targets, what this rank holds of each, where each comes from, and where it goes."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..planner.decisions import Decisions, Move, final_device
from ..planner.records import device_name
from ..tracer.errors import MaterializeError
from ..tracer.graph import ParamGraph, TensorNode
from ..tracer.liveness import slice_indices
from .agreement import agreement
from .boxes import Box
from .build import Build
from .check import check_device, check_devices, check_rng
from .entries import Entry
from .loading import Loading
from .options import Options
from .placing import check_hooks
from .regions import Indices, boxes_of, local_of
from .targets import Target

Progress = Callable[[int, int], None]


class Whereto:
    """Where each tensor goes, where they do not all go to one device."""

    def device(self, target: Target) -> torch.device:
        """The device of a tensor; the meta device for one whose value is only handed over."""
        raise NotImplementedError

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """Take the value of a tensor that stays on the meta device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Job:
    """What one call fills: the targets, what this rank holds of each (None: an ordinary tensor), and where it goes."""

    build: Build
    decisions: Decisions
    targets: Sequence[Target]
    regions: Sequence[list[Indices] | None]
    devices: Sequence[torch.device]
    whereto: Whereto | None
    options: Options
    sharing: frozenset[int]
    loading: Loading | None
    watch: Watch

    @classmethod
    def of(
        cls,
        build: Build,
        decisions: Decisions,
        targets: Sequence[Target],
        options: Options,
        device: str | torch.device | Whereto | None,
        loading: Loading | None,
        progress: Callable[[int, int], None] | None,
    ) -> Job:
        """Everything is checked that can be before the other ranks are asked."""
        check_rng(options.rng, build.graph)
        check_devices(build.graph, decisions)
        devices = _devices(targets, decisions, build.graph, device)
        for target in targets:
            check_hooks(target)
        for each in dict.fromkeys(devices):
            check_device(each)
        whereto = device if isinstance(device, Whereto) else None
        watch = Watch(sum(local_of(target.tensor).nbytes for target in targets), progress)
        sharing = _sharing(targets)
        regions = [_region(target, number in sharing) for number, target in enumerate(targets)]
        return cls(build, decisions, targets, regions, devices, whereto, options, sharing, loading, watch)

    def says(self) -> dict[str, str]:
        """What the ranks have to agree on."""
        said = {"rng": self.options.rng, "uninitialized": self.options.uninitialized, "mesh": _meshes(self.targets)}
        if self.loading is not None:
            said["checkpoint"] = self.loading.says()
        return agreement(self.build, self.decisions, self.options.seed) | said

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


class Watch:
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
