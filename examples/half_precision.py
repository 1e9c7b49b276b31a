"""Half precision, two ways that give different values, and what the first one does to memory while the model is built."""

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
    half = plan.cast(torch.bfloat16)
    # 2. A dtype per pattern of names, the first match first.
    mixed = plan.cast({"*layernorm*": torch.float32, "*": torch.bfloat16})
    for title, each in (("float32", plan), ("bfloat16", half), ("bfloat16, layernorm float32", mixed)):
        phases = each.memory().phases
        print(f"{title:28} {phases['construct'] / 1e6:6.1f} MB to construct, {phases['checkpoint'] / 1e6:6.1f} MB in the end")

    model = mixed.materialize(seed=0)
    print(f"vit.layernorm.weight is {model.vit.layernorm.weight.dtype}, classifier.weight {model.classifier.weight.dtype}")

    found = half.materialize(seed=0).state_dict()
    torch.manual_seed(0)
    eager = ViTForImageClassification(CONFIG).bfloat16().state_dict()
    assert all(torch.equal(value, found[name]) for name, value in eager.items())
    print("the cast equals eager's, bit for bit")

    # 3. Constructed in bfloat16 from the start: whatever the constructor computes, it computes in bfloat16.
    cast = gp.trace(normalized).cast(torch.bfloat16).materialize(seed=0).state_dict()
    native = gp.trace(normalized, torch.bfloat16).materialize(seed=0).state_dict()
    print("weight_norm, cast to bfloat16 beside constructed in it:")
    for name, value in cast.items():
        print(f"  {name:34} {(value == native[name]).float().mean().item():6.1%} of the elements are equal")


if __name__ == "__main__":
    main()
