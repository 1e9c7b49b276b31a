"""What the ops of a step have to do, besides allocating: operations, bytes that are moved, and what is exchanged between ranks.

`runtime/op_work.py` notes an `Op` or an `Exchange` of each op that a profile follows; a stretch of the profile holds them
counted, ops that are alike together. How long that takes is for `work_time.py` to say, by the speeds of a device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Bound = Literal["matmul", "attention", "memory", "view"]
"""What an op is: products of matrices, attention's kernels, others that read and write, and those that touch no memory."""

Collective = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "broadcast"]


@dataclass(frozen=True, slots=True)
class Op:
    """One op on one rank: its operations (a multiply-add counts two), the bytes of tensors that it reads and writes, its dtype.

    `flops` are counted as `torch.utils.flop_counter` does, which takes causal attention for full; `spared` is what a causal mask
    spares the kernel of that. With `again` it is part of a forward that a checkpoint runs a second time.
    """

    bound: Bound
    dtype: str
    flops: int = 0
    nbytes: int = 0
    spared: int = 0
    again: bool = False


@dataclass(frozen=True, slots=True)
class Exchange:
    """One collective of tensor parallelism: `nbytes` of the whole, gathered or before it is reduced, between `ranks`."""

    kind: Collective
    nbytes: int
    ranks: int
    again: bool = False


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Work:
    """Ops and exchanges with how often they come.

    >>> work_of([Op("matmul", "bfloat16", flops=8), Op("matmul", "bfloat16", flops=8)]).flops
    16
    """

    ops: tuple[tuple[Op, int], ...] = ()
    exchanges: tuple[tuple[Exchange, int], ...] = ()

    @property
    def flops(self) -> int:
        return sum(op.flops * count for op, count in self.ops)

    def __bool__(self) -> bool:
        return bool(self.ops or self.exchanges)


NOTHING = Work()


def work_of(noted: Iterable[Op | Exchange]) -> Work:
    """What was noted, those that are alike counted."""
    counts: Counter[Op | Exchange] = Counter(noted)
    ops = tuple((each, count) for each, count in counts.items() if isinstance(each, Op))
    return Work(ops, tuple((each, count) for each, count in counts.items() if isinstance(each, Exchange)))
