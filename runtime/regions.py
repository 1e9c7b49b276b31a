"""Regions: which elements of a tensor this rank holds, by torch's own placements on a mesh.

Along each dim a rank holds a list of indices, which is one stretch except under a `_StridedShard`, whose pieces may lie apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from .boxes import Box

Indices = list[range]
"""Ascending stretches, one behind the other."""


class Unplaced(ValueError):
    """A placement that says nothing about which elements a rank holds."""


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: a DTensor's local part, or the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def region_of(shape: Sequence[int], mesh: DeviceMesh, placements: Sequence[Any]) -> list[Indices]:
    """The indices along each dim that this rank holds of a tensor of this shape; the mesh's axes divide it one after the other.

    As `torch.distributed.tensor._utils.compute_local_shape_and_global_offset`, which names the first index only.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return [[] for _ in shape]
    return region_at(shape, [int(size) for size in mesh.shape], list(coordinate), placements)


def region_at(shape: Sequence[int], sizes: Sequence[int], coordinate: Sequence[Any], placements: Sequence[Any]) -> list[Indices]:
    """The same for the rank at `coordinate` of a mesh with axes of these sizes."""
    region: list[Indices] = [[range(size)] if size else [] for size in shape]
    for size, place, placement in zip(sizes, coordinate, placements, strict=True):
        if isinstance(placement, Shard | _StridedShard):
            dim = placement.dim % len(shape)
            split = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
            region[dim] = _share(region[dim], size, place, split)
        elif not isinstance(placement, Replicate):
            raise Unplaced(f"{placement} does not say which elements a rank holds")
    return region


def _share(indices: Indices, ranks: int, rank: int, split: int) -> Indices:
    """One rank's share: each of `split` pieces is divided between the ranks, as `torch.chunk` divides."""
    total = _count(indices)
    found: Indices = []
    for number in range(split):
        found += _taken(indices, _chunk(_chunk(range(total), split, number), ranks, rank))
    return _joined(found)


def _chunk(whole: range, count: int, number: int) -> range:
    """As `torch.chunk`: pieces of one size, a smaller last one, and maybe none for the numbers after that."""
    step = -(-len(whole) // count)
    return whole[number * step : (number + 1) * step]


def _taken(indices: Indices, part: range) -> Indices:
    """The indices number `part` of a list of stretches."""
    found, passed = [], 0
    for stretch in indices:
        piece = stretch[max(part.start - passed, 0) : max(part.stop - passed, 0)]
        if piece:
            found.append(piece)
        passed += len(stretch)
    return found


def _joined(indices: Indices) -> Indices:
    found: Indices = []
    for stretch in indices:
        if found and found[-1].stop == stretch.start:
            found[-1] = range(found[-1].start, stretch.stop)
        else:
            found.append(stretch)
    return found


def _count(indices: Indices) -> int:
    return sum(map(len, indices))


def shape_of(region: Sequence[Indices]) -> tuple[int, ...]:
    """The shape of the tensor that holds a region."""
    return tuple(map(_count, region))


def boxes_of(region: Sequence[Indices]) -> list[Box]:
    """The boxes that a region is made of, the last dim's going fastest; one empty box for an empty region."""
    if any(not indices for indices in region):
        return [tuple(range(_count(indices)) for indices in region)]
    return list(itertools.product(*region))


def placed_boxes(region: Sequence[Indices]) -> list[tuple[Box, Box]]:
    """The boxes that a region is made of, each with the positions of its elements in the tensor that holds the region."""
    positions: list[Indices] = []
    for indices in region:
        starts = itertools.accumulate(map(len, indices), initial=0)
        positions.append([range(start, start + len(part)) for start, part in zip(starts, indices, strict=False)])
    return list(zip(itertools.product(*region), itertools.product(*positions), strict=True))


def assembled(region: Sequence[Indices], pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that holds a region, from the tensors of its boxes."""

    def joined(dim: int, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if len(parts) == 1:
            return parts[0]
        share = len(parts) // len(region[dim])
        along: list[torch.Tensor] = [joined(dim + 1, parts[start : start + share]) for start in range(0, len(parts), share)]
        return torch.cat(along, dim) if len(along) > 1 else along[0]

    return joined(0, pieces)
