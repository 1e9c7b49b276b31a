"""The peak of building a model and converting it: `plan.cast(torch.bfloat16).materialize()` next to `build().to(torch.bfloat16)`.

Sizes are in 10^6 bytes; peaks are the growth of resident memory over a process that has everything imported. `predicted` is
what `plan.memory()` says for its construct phase, tensors only. `holds` is whether every peak was within 1.05 times the final
bytes and 200 MB. A speed-up is the other side's time divided by groundplan's, of trace, build and cast together. Both sides must
give the same values and generator state.

Lightning Fabric's `init_module` with `precision="bf16-true"` is measured where it is installed (`pip install lightning-fabric`).
It computes in bfloat16, which gives other values. `bf16` is groundplan doing that: the constructor traced with bfloat16 for
torch's default dtype, whose values must be Fabric's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from common import (
    BUILT,
    Build,
    Result,
    alternating,
    digest,
    fetch_memory,
    measured,
    megabytes,
    members,
    middle,
    ratio,
    script,
    tensor_bytes,
    warm_up,
)
from torch import nn

FABRIC = next((name for name in ("lightning", "lightning_fabric") if find_spec(name)), None)
MISSING = "not installed"


# -- the sides ----------------------------------------------------------------------------------------------------------


def measure(side: str, model: str) -> Result:
    """Build one model in bfloat16, once."""
    build = warm_up(model)
    fetch_memory(build)
    built, result = SIDES[side](build)
    return result | {"final": tensor_bytes(list(members(built).values())), "digest": digest(built)}


def cast(build: Build) -> tuple[nn.Module, Result]:
    import groundplan as gp

    result: Result = {}
    with measured(result):
        plan = gp.trace(build).cast(torch.bfloat16)
        built = plan.materialize(seed=0)
    return built, result | {"predicted": plan.memory().phases["construct"]}


def eager(build: Build) -> tuple[nn.Module, Result]:
    result: Result = {}
    with measured(result):
        torch.manual_seed(0)
        built = build().to(torch.bfloat16)
    return built, result


def in_bfloat16(build: Build) -> tuple[nn.Module, Result]:
    import groundplan as gp

    result: Result = {}
    with measured(result):
        with bfloat16_by_default():
            plan = gp.trace(build)
        built = plan.materialize(seed=0)
    return built, result


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def in_fabric(build: Build) -> tuple[nn.Module, Result]:
    fabric = fabric_class()(accelerator="cpu", devices=1, precision="bf16-true")
    with fabric.init_module():
        nn.Linear(2, 2)
    result: Result = {}
    with measured(result):
        torch.manual_seed(0)
        with fabric.init_module():
            built = build()
    return built, result


def fabric_class() -> Any:
    """`Fabric`, of whichever of its two packages is installed."""
    return import_module("lightning.fabric" if FABRIC == "lightning" else "lightning_fabric").Fabric


SIDES: dict[str, Callable[[Build], tuple[nn.Module, Result]]] = {
    "groundplan": cast,
    "eager": eager,
    "bf16": in_bfloat16,
    "Fabric": in_fabric,
}


# -- the table ----------------------------------------------------------------------------------------------------------


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model."""
    sides = [side for side in SIDES if FABRIC or side != "Fabric"]
    return [row(model, alternating(model, sides, repeats)) for model in models]


def row(model: str, rounds: list[dict[str, Result]]) -> Result:
    final = middle(rounds, "groundplan", "final")
    return {
        "model": model,
        "final MB": megabytes(final),
        "peak MB": megabytes(middle(rounds, "groundplan", "peak_growth")),
        "predicted MB": megabytes(middle(rounds, "groundplan", "predicted")),
        "eager MB": megabytes(middle(rounds, "eager", "peak_growth")),
        "peak/final": relative_peak(rounds, "groundplan"),
        "eager/final": relative_peak(rounds, "eager"),
        "holds": max(each["groundplan"]["peak_growth"] for each in rounds) <= 1.05 * final + 200e6,
        "speed-up": round(ratio(rounds, "eager", "groundplan", "seconds"), 2),
        "CPU x eager": round(ratio(rounds, "groundplan", "eager", "cpu_seconds"), 3),
        "same values": same(rounds, "groundplan", "eager"),
        "bf16/final": relative_peak(rounds, "bf16"),
    } | against_fabric(rounds)


def against_fabric(rounds: list[dict[str, Result]]) -> Result:
    if FABRIC is None:
        return dict.fromkeys(("Fabric/final", "speed-up on Fabric", "bf16 speed-up on Fabric", "bf16 same as Fabric"), MISSING)
    return {
        "Fabric/final": relative_peak(rounds, "Fabric"),
        "speed-up on Fabric": round(ratio(rounds, "Fabric", "groundplan", "seconds"), 2),
        "bf16 speed-up on Fabric": round(ratio(rounds, "Fabric", "bf16", "seconds"), 2),
        "bf16 same as Fabric": same(rounds, "bf16", "Fabric"),
    }


def relative_peak(rounds: list[dict[str, Result]], side: str) -> float:
    return round(middle(rounds, side, "peak_growth") / middle(rounds, side, "final"), 3)


def same(rounds: list[dict[str, Result]], *sides: str) -> bool:
    return len({each[side]["digest"] for each in rounds for side in sides}) == 1


if __name__ == "__main__":
    script(measure, compare, BUILT)
