"""Configurations that the closed form (T0) is held against fake runs (T1) in: models whose layers repeat, plans and workloads.

`CONFIGURATIONS` are drawn from a seed, and so are always the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

import groundplan as gp

from .measured_steps import MODELS as SHALLOW
from .measured_steps import Recurrent

BF16, F32 = torch.bfloat16, torch.float32
SEED = 18
PHASES = ("first_step", "step", "optimizer")
_WORDS = 96


def _made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        found: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return found

    return build


class DeepRecurrent(Recurrent):
    """Six LSTM layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Recurrent.Layer(24) for _ in range(6))


_WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_LAYERS = _WIDTHS | {"num_hidden_layers": 7}
_PATTERN = ["sliding_attention", "sliding_attention", "full_attention"]
_HEADS = {"num_key_value_heads": 2}

DEEP: dict[str, Callable[[], nn.Module]] = {
    "Llama": _made("LlamaForCausalLM", "LlamaConfig", vocab_size=_WORDS, **_LAYERS, **_HEADS),
    "GPT-2": _made("GPT2LMHeadModel", "GPT2Config", vocab_size=_WORDS, n_embd=32, n_layer=7, n_head=4, n_positions=64),
    "BERT": _made("BertForMaskedLM", "BertConfig", vocab_size=_WORDS, **_LAYERS),
    "T5": _made(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=_WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=6,
        num_heads=4,
        decoder_start_token_id=0,
        pad_token_id=0,
    ),
    "ViT": _made("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **_LAYERS),
    "Mixtral": _made(
        "MixtralForCausalLM",
        "MixtralConfig",
        vocab_size=_WORDS,
        num_local_experts=4,
        experts_implementation="batched_mm",
        **_LAYERS,
        **_HEADS,
    ),
    "Gemma 3": _made(  # layers of two kinds, every third one different
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        vocab_size=_WORDS,
        head_dim=8,
        sliding_window=8,
        num_hidden_layers=17,
        layer_types=[*_PATTERN * 5, *_PATTERN[:2]],
        **_WIDTHS,
        **_HEADS,
    ),
    "nn.Transformer": lambda: nn.Transformer(32, 4, 6, 5, 64, batch_first=True),
    "LSTM": DeepRecurrent,
    "ResNet": SHALLOW["ResNet"].build,
}


def inputs_of(model: str, batch: int, length: int) -> Any:
    """The inputs of one micro-batch."""
    tokens = torch.ones(batch, length, dtype=torch.int64)
    if model in ("ViT", "ResNet"):
        return {"pixel_values": torch.ones(batch, 3 if model == "ViT" else 1, 32, 32)}
    if model == "nn.Transformer":
        return torch.ones(batch, length, 32), torch.ones(batch, length + 2, 32)
    return (tokens,) if model == "LSTM" else {"input_ids": tokens, "labels": tokens}


# -- configurations -----------------------------------------------------------------------------------------------------

_LLAMA_RULES = {
    "model.layers.*.self_attn.[qkv]_proj": "colwise",
    "model.layers.*.self_attn.o_proj": "rowwise",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
_RULES = {
    "Llama": _LLAMA_RULES,
    "nn.Transformer": {"*coder.layers.*.linear1": "colwise", "*coder.layers.*.linear2": "rowwise"},
}
_AXES: tuple[dict[str, int], ...] = (
    {"dp": 2},
    {"dp": 4},
    {"dp": 8},
    {"dp_replicate": 2, "dp_shard": 2},
    {"ddp": 2},
    {"tp": 2},
    {"dp": 2, "tp": 2},
)
_PRECISIONS: tuple[dict[str, Any], ...] = (
    {},
    {"compute_dtype": BF16},
    {"compute_dtype": BF16, "reduce_dtype": F32},
    {"reduce_dtype": BF16},
)


@dataclass(frozen=True)
class Configuration:
    """A model, how it is divided (not at all, if `axes` is None), and how it is trained, on a device."""

    model: str
    device: str
    axes: Mapping[str, int] | None
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    batch: int
    length: int

    def plan(self) -> gp.Plan:
        plan = gp.trace(DEEP[self.model]).to(self.device)
        return plan if self.axes is None else plan.shard(self.axes, **self.options)

    def workload(self) -> gp.Training:
        return gp.Training(inputs=inputs_of(self.model, self.batch, self.length), **self.training)

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in (self.axes or {}).items()) or "one device"
        settings = [f"{key}={value}" for key, value in (*self.options.items(), *self.training.items()) if key != "tensor"]
        return " ".join([self.model, self.device, mesh, f"{self.batch}x{self.length}", *settings]).replace("torch.", "")


def drawn(count: int, seed: int = SEED) -> list[Configuration]:
    """So many configurations, about half of them sharded."""
    source = random.Random(seed)
    return [_drawn(source) for _ in range(count)]


def _drawn(source: random.Random) -> Configuration:
    model = source.choice(list(DEEP))
    axes = source.choice([None, source.choice(_AXES)])
    if axes is not None and "tp" in axes and model not in _RULES:
        axes = {"dp": 4}
    options: dict[str, Any] = {}
    if axes is not None and not set(axes) & {"ddp"}:
        options = {"tensor": _RULES[model]} if "tp" in axes else {}
        if set(axes) != {"tp"}:
            options |= source.choice(_PRECISIONS) | {"reshard": _reshard(source, axes), "offload": source.random() < 0.15}
    optimizers = ["sgd", "sgd-momentum", "adamw", "adam"]
    training: dict[str, Any] = {
        "optimizer": source.choice(optimizers if axes is not None else [*optimizers, "adafactor"]),  # which refuses DTensors
        "autocast": source.choice([None, None, BF16]) if axes is None or set(axes) & {"ddp"} else None,
        "checkpointing": source.choice(["none", "none", "full", "selective"]),
        "accumulate": source.choice([1, 1, 1, 2]),
    }
    device = source.choice(["cpu", "cuda"])
    batch = source.choice([1, 2, 4])
    batch = 2 if model == "ResNet" else batch  # a batch norm takes no single value in a channel
    return Configuration(model, device, axes, options, training, batch, source.choice([8, 16, 32]))


def _reshard(source: random.Random, axes: Mapping[str, int]) -> bool | int:
    choices: list[bool | int] = [True, True, False]
    return source.choice([*choices, 2] if axes.get("dp", 0) >= 4 and "tp" not in axes else choices)


CONFIGURATIONS = drawn(200)


# -- errors -------------------------------------------------------------------------------------------------------------


def errors(closed: gp.Memory, run: gp.Memory) -> dict[str, float]:
    """By how much of a phase the closed form differs from the run."""
    return {phase: closed.phases[phase] / run.phases[phase] - 1 for phase in PHASES}
