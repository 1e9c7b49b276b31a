"""What a trace costs: `gp.trace` next to plain construction on the meta device, which skips every initialization.

`x meta` is the median of ratios of neighboring runs in one process, the garbage collector as Python leaves it; `seconds` are
those of a trace in a process of its own. `fake` is construction under torch's FakeTensorMode; it is left out where it raises.
Peak growth is that of resident memory, in 10^6 bytes, over a process that has everything imported and has traced a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import (
    MODELS,
    Build,
    Result,
    alternating,
    measured,
    median_of_ratios,
    megabytes,
    middle,
    ratio,
    run_child,
    script,
    warm_up,
)

SIDES = ("groundplan", "meta", "fake")
TOGETHER = 5


def measure(side: str, model: str) -> Result:
    """Construct one model without memory, once; or, for `together`, both ways by turns."""
    build = warm_up(model)
    return {"groundplan": traced, "meta": on_meta, "fake": faked, "together": together}[side](build)


def together(build: Build) -> Result:
    import groundplan as gp

    def plain() -> None:
        with torch.device("meta"):
            build()

    return {"ratio": median_of_ratios(lambda: gp.trace(build), plain, TOGETHER)}


def traced(build: Build) -> Result:
    import groundplan as gp

    result: Result = {}
    with measured(result):
        plan = gp.trace(build)
    ops, tensors = plan.graph.ops, plan.graph.tensors
    return result | {
        "ops": len(ops),
        "dead": sum(not op.live for op in ops),
        "tensors": len(tensors),
        "parameters": sum(each.numel for each in tensors if each.kind == "parameter"),
    }


def on_meta(build: Build) -> Result:
    result: Result = {}
    with measured(result), torch.device("meta"):
        model = build()
    return result | {"tensors": sum(1 for _ in model.parameters())}


def faked(build: Build) -> Result:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        torch.nn.Linear(2, 2)
    result: Result = {}
    try:
        with measured(result), FakeTensorMode():
            model = build()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return result | {"tensors": sum(1 for _ in model.parameters())}


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model."""
    rows = []
    for model in models:
        rounds = alternating(model, SIDES, repeats)
        first = rounds[0]["groundplan"]
        rows.append(
            {
                "model": model,
                "parameters": first["parameters"],
                "ops": first["ops"],
                "dead": first["dead"],
                "seconds": round(middle(rounds, "groundplan", "seconds"), 3),
                "worst s": round(max(each["groundplan"]["seconds"] for each in rounds), 3),
                "x meta": round(run_child("together", model)["ratio"], 2),
                "x fake": error_or_ratio(rounds),
                "growth MB": megabytes(middle(rounds, "groundplan", "peak_growth")),
                "meta MB": megabytes(middle(rounds, "meta", "peak_growth")),
            }
        )
    return rows


def error_or_ratio(rounds: list[dict[str, Result]]) -> object:
    error = rounds[0]["fake"].get("error")
    return error.split(":")[0] if error else round(ratio(rounds, "groundplan", "fake", "seconds"), 2)


if __name__ == "__main__":
    left_out = ("Llama-3.2-1B, 4 layers", "BERT-base", "GPT-2", "nn.Transformer")
    script(measure, compare, [name for name in MODELS if name not in left_out])
