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
GARBAGE = 0.123  # stands for whatever the memory held


def recipe() -> nn.Module:
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(GARBAGE)
    torch.manual_seed(0)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    return model


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, a tied one under each of its names."""
    return dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))


def fault(found: torch.Tensor, expected: torch.Tensor) -> str:
    if (found == GARBAGE).all():
        return f"never initialized, eager's begins with {expected.flatten()[0]:.4f}"
    return f"std {found.std():.4f}, eager's {expected.std():.4f}"


def show(title: str, model: nn.Module) -> int:
    torch.manual_seed(0)
    expected, found = tensors(LlamaForCausalLM(CONFIG)), tensors(model)
    wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
    tie = "kept" if found["lm_head.weight"] is found["model.embed_tokens.weight"] else "lost"
    nan = sum(bool(tensor.isnan().any()) for tensor in found.values())
    print(f"{title}: {len(wrong)} of {len(expected)} tensors differ from eager, {nan} have a NaN; the tie is {tie}")
    for name in wrong:
        if "layers.1." not in name:  # the same as in layer 0
            print(f"    {name:46}  {fault(found[name], expected[name])}")
    return len(wrong)


def main() -> None:
    assert show("meta device, to_empty, reset_parameters", recipe()) > 0
    assert show("groundplan", gp.trace(LlamaForCausalLM, CONFIG).materialize(seed=0)) == 0


if __name__ == "__main__":
    main()
