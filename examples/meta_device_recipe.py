"""The usual recipe for large models, meta device, `to_empty`, `reset_parameters`, beside groundplan: what comes out wrong.

No step of the recipe raises, and no value is NaN. Fresh memory is filled with a pattern here, so that what nobody initializes
shows on every machine.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def recipe() -> nn.Module:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(0.123)  # stands for whatever the memory held
    torch.manual_seed(0)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return model


def eager() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG)


def show(title: str, model: nn.Module) -> int:
    expected = dict((*eager().named_parameters(), *eager().named_buffers()))
    found = dict((*model.named_parameters(), *model.named_buffers()))
    wrong = [name for name, tensor in expected.items() if name not in found or not torch.equal(found[name], tensor)]
    tied = model.get_submodule("lm_head").weight is model.get_submodule("model.embed_tokens").weight
    print(f"{title}: {len(wrong)} of {len(expected)} tensors differ from eager; the tie is {'kept' if tied else 'lost'}")
    for name in wrong[:6]:
        spread = f"std {found[name].std():.4f}, eager's {expected[name].std():.4f}" if name in found else "not there"
        print(f"    {name:45} {spread}")
    return len(wrong)


def main() -> None:
    assert show("meta device, to_empty, reset_parameters", recipe()) > 0
    assert show("groundplan", gp.trace(LlamaForCausalLM, CONFIG).materialize(seed=0)) == 0


if __name__ == "__main__":
    main()
