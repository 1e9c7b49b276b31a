"""What an optimizer's step reads and writes of a rank's parameters, and computes: how often, for each optimizer.

Counted op by op where they really run (`tests/test_work.py` does so again).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .optimizer import Implementation, Trained
from .optimizers import OPTIMIZERS
from .speeds import Rate, Speeds
from .work import Op
from .work_time import op_seconds


class Passes(NamedTuple):
    """How many times a step reads or writes as many bytes as a parameter has, and how many ops it takes for each parameter."""

    accesses: float
    ops: float


PASSES: Mapping[tuple[str, Implementation], Passes] = {
    ("sgd", "foreach"): Passes(3, 0),
    ("sgd", "fused"): Passes(3, 0),
    ("sgd", "for-loop"): Passes(3, 1),
    ("sgd-momentum", "foreach"): Passes(8, 0),
    ("sgd-momentum", "fused"): Passes(5, 0),
    ("sgd-momentum", "for-loop"): Passes(8, 3),
    ("adam", "foreach"): Passes(19, 0),
    ("adam", "fused"): Passes(7, 0),
    ("adam", "for-loop"): Passes(19, 7),
    ("adamw", "foreach"): Passes(21, 0),
    ("adamw", "fused"): Passes(7, 0),
    ("adamw", "for-loop"): Passes(21, 8),
    ("adafactor", "foreach"): Passes(19, 7),
    ("adafactor", "for-loop"): Passes(17, 13),
    ("adamw-8bit", "for-loop"): Passes(4, 1),  # what the compiled step reads and writes of float32: gradient, weight, codes
    ("muon", "foreach"): Passes(32, 13),
    ("muon", "fused"): Passes(32, 13),
    ("muon", "for-loop"): Passes(32, 13),
}
"""Ops of foreach and fused steps are few, whatever the number of parameters."""

CLIPPING = Passes(3, 2)
"""The norm of each gradient, and a product with one number: torch/nn/utils/clip_grad.py."""

NEWTON_SCHULZ = 5
"""Steps of Muon's iteration: torch/optim/_muon.py `ns_steps`, in bfloat16."""


def optimizer_seconds(
    name: str, implementation: Implementation | None, parameters: Sequence[Trained], clips: bool, speeds: Speeds, on_host: bool
) -> float:
    """How long the optimizer steps what a rank holds; `on_host` where that is in host memory."""
    chosen = implementation or OPTIMIZERS[name].default(parameters)
    passes = PASSES[name, chosen]
    memory = Rate.of(speeds.host_memory) if on_host and speeds.host_memory is not None else speeds.memory
    sizes = Counter(parameter.nbytes for parameter in parameters)
    once = sum(count * nbytes / memory.at(3 * nbytes) for nbytes, count in sizes.items() if nbytes)  # an op has three operands
    device = ops = 0.0
    for each in (passes, *([CLIPPING] if clips else [])):
        device += each.accesses * once
        ops += each.ops * len(parameters) * speeds.launch
    if name == "muon":
        device += sum(_newton_schulz(parameter, speeds) for parameter in parameters if parameter.hidden)
    return max(device, ops) if speeds.ahead else device + ops


def _newton_schulz(parameter: Trained, speeds: Speeds) -> float:
    """Three products of matrices in each step; of a part of a matrix it is what torch does with the whole."""
    small, large = sorted((parameter.whole or parameter.shape)[-2:])
    flops = (2 * small * small * large, 2 * small**3, 2 * small * small * large)
    return NEWTON_SCHULZ * sum(op_seconds(Op("matmul", "bfloat16", flops=each), speeds) for each in flops)
