"""The peak of building a model and quantizing it: `plan.quantize(config).materialize()` next to torchao's `quantize_(build())`.

Sizes are in 10^6 bytes; peaks are the growth of resident memory over a process that has everything imported. `two layers` are
twice the largest linear layer before it is quantized. `predicted` is what `plan.memory()` says for its construct phase, tensors
only. `holds` is whether every peak was within the quantized bytes, two layers and 300 MB. A speed-up is eager's time divided by
groundplan's, of trace, build and quantizing together. Both sides must give the same values and generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from common import Build, Result, alternating, fetch_memory, measured, megabytes, members, middle, ratio, script, warm_up
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

CONFIGS = ("int8", "float8", "int4")
DTYPE = torch.bfloat16


def config_of(name: str) -> Any:
    """Weights only: one scale a row; for int4 one per 32 elements, the numbers unpacked, as torchao does on the CPU."""
    from torchao import quantization

    if name == "int8":
        return quantization.Int8WeightOnlyConfig()
    if name == "float8":
        return quantization.Float8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


# -- the sides ----------------------------------------------------------------------------------------------------------


def measure(side: str, model: str) -> Result:
    """Build one model, quantized, once; a side is groundplan's or eager's, of one config."""
    from torchao.quantization import quantize_

    who, _, config = side.partition(" ")
    build = warm_up(model)
    quantize_(nn.Sequential(nn.Linear(64, 64)).to(DTYPE), config_of(config))
    fetch_memory(build)
    built, result = SIDES[who](build, config)
    with torch.device("meta"):
        layers = [2 * each.weight.numel() for each in build().modules() if isinstance(each, nn.Linear)]
    return result | {"final": held_bytes(built), "layer": max(layers), "digest": digest(built)}


def quantized(build: Build, config: str) -> tuple[nn.Module, Result]:
    import groundplan as gp

    result: Result = {}
    with measured(result):
        plan = gp.trace(build).cast(DTYPE).quantize(config_of(config))
        built = plan.materialize(seed=0)
    return built, result | {"predicted": plan.memory().phases["construct"]}


def eager(build: Build, config: str) -> tuple[nn.Module, Result]:
    from torchao.quantization import quantize_

    result: Result = {}
    with measured(result):
        torch.manual_seed(0)
        built = build().to(DTYPE)
        quantize_(built, config_of(config))
    return built, result


SIDES: dict[str, Callable[[Build, str], tuple[nn.Module, Result]]] = {"groundplan": quantized, "eager": eager}


# -- what was built -----------------------------------------------------------------------------------------------------


def parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a tensor of torchao's is made of."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from parts(getattr(tensor, name))
    else:
        yield tensor


def held_bytes(model: nn.Module) -> int:
    """The bytes of all storages, each counted once."""
    found = {each.untyped_storage()._cdata: each.nbytes for tensor in members(model).values() for each in parts(tensor)}
    return sum(found.values())


def digest(model: nn.Module) -> str:
    """A digest of names, classes, geometry and values, and of the generator's state afterwards."""
    found = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for name, tensor in members(model).items():
        found.update(repr((name, type(tensor).__name__, tensor.requires_grad)).encode())
        for each in parts(tensor):
            found.update(repr((each.dtype, each.shape, each.stride())).encode())
            found.update(each.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -- the table ----------------------------------------------------------------------------------------------------------


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model and config."""
    return [row(model, config, repeats) for model in models for config in CONFIGS]


def row(model: str, config: str, repeats: int) -> Result:
    mine, eagers = f"groundplan {config}", f"eager {config}"
    rounds = alternating(model, (mine, eagers), repeats)
    final, layer = middle(rounds, mine, "final"), middle(rounds, mine, "layer")
    bound = final + 2 * layer + 300e6
    return {
        "model": f"{model}, {config}",
        "quantized MB": megabytes(final),
        "two layers MB": megabytes(2 * layer),
        "bound MB": megabytes(bound),
        "peak MB": megabytes(middle(rounds, mine, "peak_growth")),
        "predicted MB": megabytes(middle(rounds, mine, "predicted")),
        "eager MB": megabytes(middle(rounds, eagers, "peak_growth")),
        "holds": max(each[mine]["peak_growth"] for each in rounds) <= bound,
        "speed-up": round(ratio(rounds, eagers, mine, "seconds"), 2),
        "same values": len({each[side]["digest"] for each in rounds for side in (mine, eagers)}) == 1,
    }


if __name__ == "__main__":
    script(measure, compare, ("Llama-3.2-1B", "Llama-3.2-1B, untied"))
