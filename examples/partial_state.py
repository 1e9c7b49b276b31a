"""Some tensors only: one layer of a model that is never built, with the values that the whole build would give it."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

FIELDS = json.loads((Path(__file__).parent / "configs" / "llama-3.2-1b.json").read_text())
CONFIG = LlamaConfig(**FIELDS | {"num_hidden_layers": 2, "vocab_size": 32_000})


def main() -> None:
    plan = gp.trace(LlamaForCausalLM, CONFIG)
    names = [name for name in plan.graph.by_name if name.startswith("model.layers.1.self_attn.")]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    state = plan.materialize_state(names, seed=0)
    assert torch.equal(before, torch.get_rng_state())  # your generator is left alone
    for name, value in state.items():
        print(f"{name:45} {tuple(value.shape)!s:14} std {value.std():.4f}")

    torch.manual_seed(0)
    eager = LlamaForCausalLM(CONFIG).state_dict()
    assert all(torch.equal(value, eager[name]) for name, value in state.items())
    print(f"{len(state)} tensors, {sum(value.nbytes for value in state.values()) / 1e6:.0f} MB, equal to eager's")
    print(plan.explain("model.layers.1.self_attn.q_proj.weight"))


if __name__ == "__main__":
    main()
