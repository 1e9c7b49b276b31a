"""Predicted and measured bytes: `plan.memory()` next to what torch's allocator hands out, and to resident memory.

Rows of one kind, `construct`, build a model with and without a cast. `allocated` counts memory that the allocator has handed
out and nobody has written yet; `resident` does not. The other rows train a model on the CPU with an optimizer of torch.optim:
`step` compares parameters, buffers, gradients and optimizer state after the first step, `optimizer` the most inside the second
`optimizer.step()`. Activations are no part of either. Sizes are in 10^6 bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import torch
from common import (
    MODELS,
    Build,
    Result,
    allocated_peak,
    measured,
    megabytes,
    members,
    print_table,
    run_child,
    tensor_bytes,
    warm_up,
)
from torch import nn

BUILT = ("Llama-3.2-1B, 4 layers", "ViT-base", "BERT-base", "GPT-2", "nn.Transformer")
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


# -- building -----------------------------------------------------------------------------------------------------------


def construct(how: str, model: str, cast: str) -> Result:
    """Build one model; `how` says whether the allocator or the resident memory is watched."""
    import groundplan as gp

    plan = gp.trace(warm_up(model))
    plan = plan.cast(torch.bfloat16) if cast == "cast" else plan
    predicted = plan.memory().phases["construct"]
    result: Result = {}
    if how == "allocated":
        result["allocated"], _ = allocated_peak(lambda: plan.materialize(seed=0))
    else:
        with measured(result):
            plan.materialize(seed=0)
    return result | {"predicted": predicted}


def construct_row(model: str, cast: str) -> Result:
    allocated, resident = run_child("allocated", model, cast), run_child("resident", model, cast)
    predicted = allocated["predicted"]
    return {
        "model": model + (", bfloat16" if cast == "cast" else ""),
        "phase": "construct",
        "predicted": megabytes(predicted),
        "allocated": megabytes(allocated["allocated"]),
        "resident": megabytes(resident["peak_growth"]),
        "allocated/predicted": round(allocated["allocated"] / predicted, 4),
    }


# -- training -----------------------------------------------------------------------------------------------------------


def trained(model: str) -> tuple[Build, Any]:
    """A model with its loss, small enough to train here."""
    if model == "GPT-2, 4 layers":
        tokens = torch.arange(32).reshape(2, 16)
        return MODELS["GPT-2"](num_hidden_layers=4), lambda module: module(input_ids=tokens, labels=tokens).loss
    return lambda: nn.Transformer(256, 4, 2, 2, 1024), lambda module: module(torch.ones(5, 2, 256), torch.ones(5, 2, 256)).sum()


def train(optimizer: str, model: str) -> Result:
    """Two steps of training: the bytes that stay, and the most inside the second `optimizer.step()`."""
    import groundplan as gp

    build, loss = trained(model)
    plan = gp.trace(build)
    phases = plan.memory(gp.Training(optimizer=optimizer)).phases
    module = plan.materialize(seed=0)
    stepper = OPTIMIZERS[optimizer](module.parameters())
    loss(module).backward()
    stepper.step()
    stepper.zero_grad()
    loss(module).backward()
    kept = resting(module, stepper)
    temporary, _ = allocated_peak(stepper.step)
    return {"step": [phases["step"], kept], "optimizer": [phases["optimizer"], kept + temporary]}


def resting(module: nn.Module, stepper: torch.optim.Optimizer) -> int:
    """Bytes of the weights, gradients and optimizer state."""
    gradients = [each.grad for each in module.parameters() if each.grad is not None]
    state = [value for entry in stepper.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return tensor_bytes([*members(module).values(), *gradients, *state])


def train_rows(model: str, optimizer: str) -> list[Result]:
    found = run_child("train", model, optimizer)
    return [
        {
            "model": f"{model}, {optimizer}",
            "phase": phase,
            "predicted": megabytes(predicted),
            "allocated": megabytes(actual),
            "resident": "",
            "allocated/predicted": round(actual / predicted, 4),
        }
        for phase, (predicted, actual) in found.items()
    ]


# -- the script ---------------------------------------------------------------------------------------------------------


def child(how: str, model: str, what: str) -> Result:
    return train(what, model) if how == "train" else construct(how, model, what)


def rows(models: Sequence[str]) -> list[Result]:
    built = [construct_row(model, cast) for model in models for cast in ("", "cast")]
    return built + [
        row for model in ("GPT-2, 4 layers", "nn.Transformer, 2 layers") for name in OPTIMIZERS for row in train_rows(model, name)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=BUILT, choices=MODELS, metavar="MODEL")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(*options.child)))
        return
    found = rows(options.models)
    print_table(found)
    print(json.dumps({"benchmark": "memory_accuracy", "torch": torch.__version__, "rows": found}))


if __name__ == "__main__":
    main()
