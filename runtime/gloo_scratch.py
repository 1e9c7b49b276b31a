"""What gloo's collectives take beside their results while they run, on the CPU: the counterpart of `scratch` for process groups.

Each entry gives the bytes of one call, with its source in torch/csrc/distributed/c10d; `tests/test_fake_ranks.py` holds them
against `torch.profiler` in real processes. Measured with torch 2.13. What NCCL takes beside tensors is a constant of a
communicator (`planner/overheads.py`), not of a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .scratch import Entry

c10d, functional = torch.ops.c10d, torch.ops._c10d_functional


def gloo_scratch_bytes(func: Any, args: tuple[Any, ...], out: Any) -> int:
    """The bytes that one collective takes beside its results, for as long as it runs."""
    entry = GLOO.get(func)
    return 0 if entry is None else entry(args, out)


def _gathering_base(args: Any, out: Any) -> int:
    """A flat copy of all that is gathered: ProcessGroupGloo.cpp `_allgather_base`, Utils.hpp `newLikeFlat`."""
    return int(args[0].nbytes)


def _gathering(args: Any, out: Any) -> int:
    """The same: `allgather_into_tensor_coalesced`."""
    return int(out.nbytes)


def _scattering_base(args: Any, out: Any) -> int:
    """A copy of what goes in, which is reduced as a whole: ProcessGroupGloo.cpp `reduce_scatter_tensor_coalesced`."""
    return int(args[1].nbytes) + _average(args[3], args[1])


def _scattering(args: Any, out: Any) -> int:
    return int(args[0].nbytes) + _average(args[1], args[0])


def _reducing_base(args: Any, out: Any) -> int:
    return _average(args[2], args[0][0])


def _reducing(args: Any, out: Any) -> int:
    return _average(args[1], args[0])


def _average(op: Any, tensor: torch.Tensor) -> int:
    """A sum is divided in place by a number, which becomes a tensor: ProcessGroupGlooDetail.hpp `AsyncAllreduceWork::run`."""
    averages = op == "avg" if isinstance(op, str) else op.op() == int(dist.ReduceOp.AVG.value)
    return 8 + int(tensor.dtype.itemsize) if averages else 0


GLOO: Mapping[Any, Entry] = {
    c10d._allgather_base_.default: _gathering_base,
    c10d._reduce_scatter_base_.default: _scattering_base,
    c10d.allreduce_.default: _reducing_base,
    functional.all_gather_into_tensor.default: _gathering,
    functional.reduce_scatter_tensor.default: _scattering,
    functional.all_reduce.default: _reducing,
}
