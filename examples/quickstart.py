"""The main job: trace, plan, materialize, on real models.

Llama-3.1-405B is traced from its published configuration, which takes no memory to speak of, and its report printed. Then
Llama-3.2-1B, with 4 of its 16 layers, is built in bfloat16, and compared with what eager gives for the same seed.
"""

import json
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

CONFIGS = Path(__file__).parent / "configs"


def config(name: str, **changes: int) -> LlamaConfig:
    return LlamaConfig(**json.loads((CONFIGS / f"{name}.json").read_text()) | changes)


def main() -> None:
    gp.trace(LlamaForCausalLM, LlamaConfig(num_hidden_layers=1))  # transformers imports half of itself at first use
    started = time.perf_counter()
    plan = gp.trace(LlamaForCausalLM, config("llama-3.1-405b"))
    print(f"Llama-3.1-405B traced in {time.perf_counter() - started:.2f} s\n")
    print(plan.report())

    small = config("llama-3.2-1b", num_hidden_layers=4)
    plan = gp.trace(LlamaForCausalLM, small).cast(torch.bfloat16)
    print(f"\nLlama-3.2-1B with 4 layers, in bfloat16:\n{plan.memory()}\n")
    started = time.perf_counter()
    model = plan.materialize(seed=0)
    print(f"materialized in {time.perf_counter() - started:.1f} s: {sum(p.nbytes for p in model.parameters()) / 1e9:.2f} GB")

    torch.manual_seed(0)
    eager = LlamaForCausalLM(small).bfloat16()
    expected = eager.state_dict()
    different = [name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])]
    print(f"tensors that differ from LlamaForCausalLM(config).to(torch.bfloat16): {len(different)} of {len(expected)}")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
