"""The main job: trace, plan, materialize, on real models.

Llama-3.1-405B is traced from its published configuration, which takes no memory to speak of, and its report printed. Then
ViT-base, all of it, is built in bfloat16, and compared with what the eager constructor gives for the same seed.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import groundplan as gp

CONFIGS = Path(__file__).parent / "configs"


def main() -> None:
    llama = LlamaConfig(**json.loads((CONFIGS / "llama-3.1-405b.json").read_text()))
    vit = ViTConfig(**json.loads((CONFIGS / "vit-base-patch16-224.json").read_text()))
    gp.trace(LlamaForCausalLM, LlamaConfig(num_hidden_layers=1))  # transformers imports half of itself at first use

    started = time.perf_counter()
    plan = gp.trace(LlamaForCausalLM, llama)
    print(f"Llama-3.1-405B traced in {time.perf_counter() - started:.2f} s\n\n{plan.report()}\n")

    plan = gp.trace(ViTForImageClassification, vit).cast(torch.bfloat16)
    print(f"ViT-base in bfloat16: {plan.memory().peak / 1e6:.1f} MB at most while it is built")
    started = time.perf_counter()
    model = plan.materialize(seed=0)
    seconds = time.perf_counter() - started
    print(f"materialized in {seconds:.2f} s: {sum(p.nbytes for p in model.parameters()) / 1e6:.1f} MB")

    started = time.perf_counter()
    torch.manual_seed(0)
    eager = ViTForImageClassification(vit).bfloat16()
    print(f"the eager constructor and .bfloat16() took {time.perf_counter() - started:.2f} s")
    expected = eager.state_dict()
    different = [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])]
    print(f"tensors that differ from eager's: {len(different)} of {len(expected)}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
