"""All of a DTensor, gathered from the ranks that hold its parts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """`full_tensor`, of packed columns on every torch; no DTensor: the tensor itself. Every rank of the mesh has to call."""
    if not isinstance(tensor, DTensor):
        return tensor
    try:
        return tensor.full_tensor()
    except ValueError:
        if not any(isinstance(each, _StridedShard) for each in tensor.placements):
            raise
        return _not_an_order(tensor).full_tensor()


def _not_an_order(tensor: DTensor) -> DTensor:
    """The same parts; their `_StridedShard`s say how columns are divided, and not in which order the mesh's axes divide them.

    Two projections in one weight (`packed_colwise`) are divided so without a second axis. torch 2.11 asks for the order, and
    raises `ValueError` before it communicates, as there is none; torch 2.13 sees by itself that there is none.
    """
    spec = replace(tensor._spec, use_strided_shard_as_shard_order=False)
    return DTensor(tensor._local_tensor, spec, requires_grad=tensor.requires_grad)
