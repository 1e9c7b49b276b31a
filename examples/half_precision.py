"""Half precision, two ways that give different values, and what each does to memory while the model is built."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import groundplan as gp

CONFIG = ViTConfig(**json.loads((Path(__file__).parent / "configs" / "vit-base-patch16-224.json").read_text()))


def normalized(dtype: torch.dtype = torch.float32) -> nn.Module:
    module: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(500, 300, dtype=dtype))
    return module


def main() -> None:
    plan = gp.trace(ViTForImageClassification, CONFIG)

    # 1. Cast: what `ViTForImageClassification(config).to(torch.bfloat16)` gives, without holding the float32 model.
    cast = plan.cast(torch.bfloat16)
    print(f"float32:  {plan.memory().phases}\nbfloat16: {cast.memory().phases}")

    # 2. A dtype per pattern of names, the first match first.
    mixed = plan.cast({"*layernorm*": torch.float32, "*": torch.bfloat16})
    model = mixed.materialize(seed=0)
    print(model.vit.layernorm.weight.dtype, model.classifier.weight.dtype)

    torch.manual_seed(0)
    eager = ViTForImageClassification(CONFIG).bfloat16()
    found = cast.materialize(seed=0).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in eager.state_dict().items())
    print("the cast equals eager's, bit for bit")

    # 3. Constructed in bfloat16 from the start: whatever the constructor computes, it computes in bfloat16.
    cast = gp.trace(normalized).cast(torch.bfloat16).materialize(seed=0).state_dict()
    native = gp.trace(normalized, torch.bfloat16).materialize(seed=0).state_dict()
    for name, value in cast.items():
        print(f"{name:34} {(value == native[name]).float().mean().item():6.1%} of the elements in common")


if __name__ == "__main__":
    main()
