"""What each rank holds of every tensor: nothing, all of it, or a part, by the sharding's axes.

A rank holds what is on its pipeline stages. Of that, the expert axis divides experts, and the tensor axis single layers by rule.
FSDP divides what is left, along dim 0, between all ranks of the shard and context axes; experts between the ranks that hold the
same ones, along dim 1 where there are more ranks than experts (torchtitan/distributed/fsdp.py, `apply_fsdp_to_decoder`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..tracer.graph import ParamGraph, TensorNode
from .experts import Expert, experts_of
from .sharding import Cut, Sharding
from .stages import stages_by_name


def coordinate_of(sharding: Sharding, rank: int) -> dict[str, int]:
    """Where a rank stands on each axis, by its role: the last axis goes fastest.

    Along the expert axis it is the place among the ranks of the shard, context and tensor axes, modulo the axis' size
    (torchtitan's mesh `["pp", "dp_replicate", "efsdp", "ep"]`).
    """
    found: dict[str, int] = {}
    for axis in reversed(sharding.dense_axes):
        rank, found[axis.role] = divmod(rank, axis.size)
    if sharding.axis("expert") is not None:
        found["expert"] = _inner(sharding, found) % sharding.size("expert")
    return found


def _inner(sharding: Sharding, place: Mapping[str, int]) -> int:
    """The place among the ranks that have the same stage and the same copy."""
    return _fsdp(sharding, place) * sharding.size("tensor") + place.get("tensor", 0)


def _fsdp(sharding: Sharding, place: Mapping[str, int]) -> int:
    """The place among the ranks that FSDP divides a parameter between, the shard axis outside (mesh `["fsdp", "tp"]`)."""
    return place.get("shard", 0) * sharding.size("context") + place.get("context", 0)


def local_shape(
    shape: Sequence[int], cut: Cut | None, sharded: bool, sharding: Sharding, place: Mapping[str, int]
) -> tuple[int, ...]:
    """The shape of what the rank at `place` holds of a tensor that is no expert's."""
    local = list(shape)
    if cut is not None:
        pieces = [chunk(local[cut.dim], cut.split, piece) for piece in range(cut.split)]
        local[cut.dim] = sum(chunk(piece, sharding.size("tensor"), place["tensor"]) for piece in pieces)
    if sharded and local:
        local[0] = chunk(local[0], sharding.shard_ranks, _fsdp(sharding, place))
    return tuple(local)


def expert_shape(
    shape: Sequence[int], expert: Expert, sharded: bool, sharding: Sharding, place: Mapping[str, int], first: bool = False
) -> tuple[int, ...] | None:
    """The shape of what the rank at `place` holds of experts; None where it has others.

    `first` asks for the first of the ranks that FSDP divides it between.
    """
    size, ranks = sharding.size("expert"), sharding.expert_shard_ranks
    local = list(shape)
    if expert.number is None:
        local[0] //= size
    elif expert.number // (expert.total // size) != place["expert"]:
        return None
    if sharded:
        dim = shard_dim(expert, sharding)
        local[dim] = chunk(local[dim], ranks, 0 if first else _inner(sharding, place) // size)
    return tuple(local)


def shard_dim(expert: Expert, sharding: Sharding) -> int:
    """The dim along which FSDP divides experts: the second of stacked ones, where there are more ranks than experts."""
    return int(expert.number is None and sharding.expert_shard_ranks * sharding.size("expert") > expert.total)


def chunk(total: int, parts: int, part: int) -> int:
    """The size of a part, as `torch.chunk` divides."""
    step = -(-total // parts)
    return max(0, min(step, total - part * step))


@dataclass(frozen=True)
class LocalParts:
    """What the rank at `place` holds of the tensors of `graph`."""

    sharding: Sharding
    graph: ParamGraph
    place: Mapping[str, int]
    _shapes: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of_rank(cls, sharding: Sharding, graph: ParamGraph, rank: int) -> LocalParts:
        return cls(sharding, graph, coordinate_of(sharding, rank))

    @cached_property
    def _cuts(self) -> Mapping[str, Cut]:
        return self.sharding.cuts(self.graph)

    @cached_property
    def _experts(self) -> Mapping[str, Expert]:
        return {} if self.sharding.axis("expert") is None else experts_of(self.sharding.experts, self.graph)

    def cut(self, tensor: TensorNode) -> Cut | None:
        """How the tensor axis divides it; experts it leaves to the expert axis, which takes the same ranks."""
        if not self._cuts or self.expert(tensor) is not None:
            return None
        return next((self._cuts[name] for name in tensor.names if name in self._cuts), None)

    def expert(self, tensor: TensorNode) -> Expert | None:
        """Which expert's it is, where the expert axis divides it."""
        return next((self._experts[name] for name in tensor.names if name in self._experts), None) if self._experts else None

    def is_sharded(self, tensor: TensorNode) -> bool:
        """Whether FSDP divides it."""
        return self._shards and tensor.kind == "parameter"

    @cached_property
    def _shards(self) -> bool:
        return self.sharding.shards

    def is_divided(self, tensor: TensorNode) -> bool:
        """Whether it is a DTensor on its ranks: FSDP, the tensor or the expert axis divides it, or what lies between is divided.

        `SequenceParallel` makes DTensors of parameters that every rank has whole.
        """
        expert = self.expert(tensor)
        if self.sharding.sequence_parallel and tensor.kind == "parameter":
            return True
        return self.is_sharded(tensor) or self.cut(tensor) is not None or (expert is not None and expert.number is None)

    def stages(self) -> tuple[int, ...]:
        """The pipeline stages that this rank has."""
        pipeline = self.sharding.pipeline
        return (
            () if pipeline is None else tuple(range(self.place["pipeline"], len(pipeline.stages), self.sharding.size("pipeline")))
        )

    def shape(self, tensor: TensorNode, first: bool = False) -> tuple[int, ...] | None:
        """The shape of what this rank holds of it, None for nothing; with `first`, of what the first of FSDP's ranks holds."""
        pipeline = self.sharding.pipeline
        if pipeline is not None and not set(stages_by_name(self.graph, pipeline.stages)[tensor.name]) & set(self.stages()):
            return None
        sharded, expert = self.is_sharded(tensor), self.expert(tensor)
        if expert is not None:
            return expert_shape(tensor.shape, expert, sharded, self.sharding, self.place, first)
        key = (tensor.shape, cut := self.cut(tensor), sharded, first)  # layers that repeat have the same
        if key not in self._shapes:
            place = {**self.place, "shard": 0, "context": 0} if first else self.place
            self._shapes[key] = local_shape(tensor.shape, cut, sharded, self.sharding, place)
        return self._shapes[key]


def distinct_ranks(sharding: Sharding | None) -> tuple[int, ...]:
    """The ranks that hold most, one for each part of a pipeline: every other rank holds no more than one of them."""
    if sharding is None:
        return (0,)
    ranks = sharding.size("pipeline")
    return tuple(range(0, sharding.ranks, sharding.ranks // ranks))
