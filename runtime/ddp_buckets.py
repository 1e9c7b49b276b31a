"""The buckets that DistributedDataParallel reduces gradients in: every gradient once more, beside a run of one device's step.

torch/csrc/distributed/c10d/reducer.cpp: `initialize_buckets` makes one for each dtype before the first forward
(torch/nn/parallel/distributed.py `BucketCapacityConfig`, where all parameters are used). `rebuild_buckets` lets go of them before
the second forward, and makes one for every 25 MiB of gradients (the first for 1 MiB) in the order in which they became ready.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch._C._distributed_c10d import _compute_bucket_assignment_by_size

from ..planner.allocations import FIRST_STEP, STEP, Allocation, Moment, Timeline

_LIMITS = (2**20, 25 * 2**20)
"""Bytes of the first bucket, and of the others: `dist._DEFAULT_FIRST_BUCKET_BYTES`, `bucket_cap_mb`."""


def trained(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a meta module that are reduced, as tensors of their own that stay meta."""
    return {name: each.detach() for name, each in module.named_parameters() if each.requires_grad}


def with_buckets(run: Timeline, parameters: Mapping[str, torch.Tensor], device: str) -> Timeline:
    """The same run with the reducer's buckets."""
    first = [_bucket(group, device) for group in _grouped(list(parameters.values()), [sys.maxsize])]
    rebuilt = [_bucket(group, device) for group in _grouped(_in_order_of_gradients(run, parameters), _LIMITS)]
    start = len(run.allocations)
    made = range(start, start + len(first))
    remade = range(made.stop, made.stop + len(rebuilt))
    before = {
        FIRST_STEP: [Moment(FIRST_STEP, number, True) for number in made],
        STEP: [*(Moment(STEP, number, False) for number in made), *(Moment(STEP, number, True) for number in remade)],
    }
    moments: list[Moment] = []
    for moment in run.moments:
        moments += [*before.pop(moment.phase, ()), moment]
    return Timeline((*run.allocations, *first, *rebuilt), tuple(moments))


def _in_order_of_gradients(run: Timeline, parameters: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Parameters in the order in which the first backward gave their gradients; one without a gradient is in no bucket."""
    born = (run.allocations[moment.allocation] for moment in run.moments if moment.phase == FIRST_STEP and moment.born)
    return [parameters[name] for name in dict.fromkeys(each.name for each in born if each.kind == "gradient")]


def _grouped(parameters: Sequence[torch.Tensor], limits: Iterable[int]) -> list[list[torch.Tensor]]:
    """By torch's own function, which looks at sizes only."""
    indices, _ = _compute_bucket_assignment_by_size(list(parameters), list(limits), [False] * len(parameters))
    return [[parameters[index] for index in group] for group in indices]


def _bucket(parameters: Sequence[torch.Tensor], device: str) -> Allocation:
    return Allocation("communication buffer", sum(each.nbytes for each in parameters), device, op="DDP's bucket")
