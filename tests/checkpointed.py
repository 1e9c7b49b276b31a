"""Models whose layers repeat, a loss of each, and how often their layers run: for plans that checkpoint activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from torch.distributed.tensor import DTensor


def tokens() -> torch.Tensor:
    return torch.arange(1, 33).reshape(2, 16)


def values() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 16 * 32).reshape(2, 16, 32)


@dataclass(frozen=True)
class Model:
    """What is built, its training inputs, and what of its names is a layer."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    layer: str

    def loss(self, module: Any) -> torch.Tensor:
        inputs = self.inputs()
        found: torch.Tensor = module(**inputs).loss if isinstance(inputs, dict) else module(*inputs).square().mean()
        return found


def llama(layers: int = 4, **options: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        **options,
    )
    return transformers.LlamaForCausalLM(config)


def t5(layers: int = 4) -> nn.Module:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=layers, num_heads=4, pad_token_id=0)
    config.decoder_start_token_id = 0
    return transformers.T5ForConditionalGeneration(config)


def encoder(layers: int = 4) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), layers)


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


MODELS = {
    "Llama": Model(llama, _text, "model.layers"),
    "T5": Model(t5, _text, "decoder.block"),
    "encoder": Model(encoder, lambda: (values(),), "layers"),
    "deep Llama": Model(partial(llama, 12), _text, "model.layers"),
    "deep encoder": Model(partial(encoder, 12), lambda: (values(),), "layers"),
}


class Counted:
    """How often each layer's parts run, that which runs most: a layer that runs again in the backward runs its parts again."""

    def __init__(self, module: nn.Module, layer: str) -> None:
        self._runs: dict[str, Counter[str]] = {name: Counter() for name, _ in module.get_submodule(layer).named_children()}
        for name, counts in self._runs.items():
            for part, each in module.get_submodule(f"{layer}.{name}").named_modules():
                if part:
                    each.register_forward_pre_hook(lambda *_, part=part, counts=counts: counts.update([part]))

    def runs(self) -> list[int]:
        return [max(counts.values()) for counts in self._runs.values()]


def step(module: nn.Module, model: Model, seed: int = 7) -> dict[str, Any]:
    """One forward and backward: loss, gradients, names, the random stream after it, how often layers ran, which were whole."""
    counted = Counted(module.train(), model.layer)
    torch.manual_seed(seed)
    loss = model.loss(module)
    layers = dict(module.get_submodule(model.layer).named_children())
    whole = [name for name, each in layers.items() if not any(isinstance(own, DTensor) for own in each.parameters())]
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": {name: _whole(each.grad) for name, each in module.named_parameters()},
        "names": list(module.state_dict()),
        "stream": torch.get_rng_state().tolist(),
        "runs": counted.runs(),
        "whole": whole,
    }


def different(one: dict[str, Any], other: dict[str, Any], rounding: float = 0.0) -> list[str]:
    """What of two steps is not the same: to the bit, or gradients up to so much of their largest element."""
    found = [key for key in ("loss", "names", "stream") if one[key] != other[key]]
    for name, each in one["gradients"].items():
        if (each - other["gradients"][name]).abs().max() > rounding * each.abs().max():
            found.append(name)
    return found


def _whole(gradient: Any) -> torch.Tensor:
    found: torch.Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found
