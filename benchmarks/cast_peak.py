"""The peak of building a model and converting it: `plan.cast(torch.bfloat16).materialize()` next to `build().to(torch.bfloat16)`.

Sizes are in 10^6 bytes; peaks are the growth of resident memory over a process that has everything imported. `predicted` is
what `plan.memory()` says for its construct phase, tensors only. Both sides must give the same values and generator state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import MODELS, Result, alternating, digest, measured, megabytes, members, middle, ratio, script, tensor_bytes, warm_up

SIDES = ("groundplan", "eager")


def measure(side: str, model: str) -> Result:
    """Build one model in bfloat16, once."""
    import groundplan as gp

    build = warm_up(model)
    result: Result = {}
    with measured(result):
        if side == "groundplan":
            plan = gp.trace(build).cast(torch.bfloat16)
            built = plan.materialize(seed=0)
        else:
            torch.manual_seed(0)
            built = build().to(torch.bfloat16)
    predicted = plan.memory().phases["construct"] if side == "groundplan" else 0
    final = tensor_bytes(list(members(built).values()))
    return result | {"final": final, "predicted": predicted, "digest": digest(built)}


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model."""
    return [row(model, alternating(model, SIDES, repeats)) for model in models]


def row(model: str, rounds: list[dict[str, Result]]) -> Result:
    final, peak = middle(rounds, "groundplan", "final"), middle(rounds, "groundplan", "peak_growth")
    return {
        "model": model,
        "final MB": megabytes(final),
        "peak MB": megabytes(peak),
        "predicted MB": megabytes(middle(rounds, "groundplan", "predicted")),
        "eager MB": megabytes(middle(rounds, "eager", "peak_growth")),
        "peak/final": round(peak / final, 3),
        "eager/final": round(middle(rounds, "eager", "peak_growth") / final, 3),
        "holds": max(each["groundplan"]["peak_growth"] for each in rounds) <= 1.15 * final + 600e6,
        "time x eager": round(ratio(rounds, "groundplan", "eager", "seconds"), 3),
        "CPU x eager": round(ratio(rounds, "groundplan", "eager", "cpu_seconds"), 3),
        "same values": len({each[side]["digest"] for each in rounds for side in SIDES}) == 1,
    }


if __name__ == "__main__":
    script(measure, compare, [name for name in MODELS if name not in ("Llama-3.1-405B", "DeepSeek-V3")])
