"""Modules that bring no tensor parallel plan, and traps in which dividing what looks like a pair would be wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .titan import Llama, Sizes

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WIDTH, HIDDEN, HEADS, WORDS = 32, 64, 4, 96
SHAPE = (2, 8, WIDTH)


# -- modules that can be divided ----------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A gated MLP, its layers called by numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        normed = self.norm(value)
        out: torch.Tensor = value + self.c(F.gelu(self.a(normed)) * self.b(normed).tanh())
        return out


class GatedBlocks(nn.Module):
    """So many that most are alike and skipped."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Gated() for _ in range(count))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        value = self.first(value)
        for block in self.blocks:
            value = block(value)
        return value


class Attention(nn.Module):
    """Attention by hand, with rotary angles and a causal mask; `heads` are what `view` is told."""

    def __init__(self, heads: int = -1, size: int = WIDTH // HEADS, turns: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.heads, self.size = heads, size
        self.turn = nn.Buffer(torch.randn(8, WIDTH // HEADS)) if turns else None

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        batch, length, _ = value.shape
        q, k, v = (each(value).view(batch, length, self.heads, self.size).transpose(1, 2) for each in (self.q, self.k, self.v))
        if self.turn is not None:
            q, k = q * self.turn, k * self.turn
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        mask = torch.full((length, length), float("-inf")).triu(1)
        merged = (scores + mask).softmax(-1) @ v
        out: torch.Tensor = self.o(merged.transpose(1, 2).reshape(batch, length, -1))
        return out


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, dropout=0.0, batch_first=True)


def titan() -> nn.Module:
    return Llama(Sizes(width=WIDTH, layers=2, heads=4, kv_heads=2, hidden=HIDDEN, words=WORDS, length=16))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=False))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**_SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**{**_SIZES, "vocab_size": 96}, image_size=16, patch_size=4))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "d_model": WIDTH,
        "num_layers": 2,
        "num_heads": HEADS,
        "d_kv": 8,
        "d_ff": HIDDEN,
        "vocab_size": WORDS,
    }
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": HEADS,
        "vocab_size": WORDS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": WORDS,
}

DIVIDED: dict[str, Callable[[], nn.Module]] = {
    "gated": GatedBlocks,
    "attention": Attention,
    "encoder": encoder_layer,
    "titan": titan,
    "llama": llama,
    "bert": bert,
    "vit": vit,
    "t5": t5,
    "gpt2": gpt2,
}


MORE = (
    *("AlbertForMaskedLM", "BloomForCausalLM", "CohereForCausalLM", "DistilBertForMaskedLM", "ElectraForMaskedLM"),
    *("FalconForCausalLM", "GPTNeoXForCausalLM", "GemmaForCausalLM", "MistralForCausalLM"),
    *("ModernBertForMaskedLM", "OPTForCausalLM", "Olmo2ForCausalLM", "Phi3ForCausalLM", "PhiForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM", "StableLmForCausalLM"),
)
"""Further models of transformers."""


def small(name: str) -> nn.Module:
    """A small model of transformers, of two layers and without dropout."""
    import transformers

    cls = getattr(transformers, name)
    config = cls.config_class()
    sizes = _SIZES | {
        "num_key_value_heads": 2,
        "head_dim": WIDTH // HEADS,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    for key in [key for key in vars(config) if "drop" in key and isinstance(getattr(config, key), float)]:
        setattr(config, key, 0.0)
    for key, value in sizes.items():
        if hasattr(config, key) and not isinstance(getattr(type(config), key, None), property):
            setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    made: nn.Module = cls(config)
    return made


def inputs_of(name: str) -> dict[str, Any] | tuple[Any, ...]:
    """Inputs for a module of `DIVIDED`: the same on every rank."""
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, WORDS, (2, 8), generator=random)
    if name == "titan":
        return (tokens,)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=random), "labels": torch.tensor([0, 1])}
    if name in ("llama", "bert", "t5", "gpt2", *MORE):
        return {"input_ids": tokens, "labels": tokens}
    return (torch.randn(SHAPE, generator=random),)


# -- traps --------------------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two linear layers with `between` between them."""

    def __init__(self, between: Callable[[torch.Tensor], Any] = F.relu) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.between = between

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(self.between(self.up(value)))


class NormBetween(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(self.norm(self.up(value)))


class BareNormBetween(Pair):
    """No parameter of the norm gives it away."""

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.layer_norm(self.up(value), (HIDDEN,)))


class ScaleBetween(Pair):
    """A learned number: each rank would see a part of its gradient only."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(value)) * self.scale)


class GateBetween(Pair):
    """The same of an activation: a gate for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 1)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(value)) * self.gate(value).sigmoid())


class ReadBetween(Pair):
    """What is between them is given out as well."""

    def forward(self, value: torch.Tensor) -> Any:
        inner = F.relu(self.up(value))
        return self.down(inner), inner


class ResidualBetween(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(value + self.up(value))


class Twice(Pair):
    """A layer that is the first and the second of a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(F.relu(self.up(value)))))


class UsedElsewhere(Pair):
    """The second layer takes in something whole besides."""

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(value))) + self.down(torch.cat([value, value], -1))


class Tied(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, HIDDEN)
        self.other.weight = self.up.weight

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(value))) + self.other(value).sum()


class WeightRead(Pair):
    """The weight is looked at outside the layer."""

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(F.relu(self.up(value))) + self.up.weight.data.abs().mean()


class SizeRead(Pair):
    """A number that is the size of what each rank has a part of."""

    def forward(self, value: torch.Tensor) -> Any:
        inner = self.up(value)
        return self.down(F.relu(inner) / inner.shape[-1])


class Halves(Pair):
    """What lies one behind the other is taken apart again: a rank would have halves of its own part."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * HIDDEN)

    def forward(self, value: torch.Tensor) -> Any:
        gate, inner = self.up(value).chunk(2, -1)
        return self.down(gate.sigmoid() * inner)


class Kept(Pair):
    """A part is written into a buffer that is whole."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Buffer(torch.zeros(2, 8, HIDDEN))

    def forward(self, value: torch.Tensor) -> Any:
        self.kept.copy_(self.up(value).detach())
        return self.down(self.kept.clone())


def softmax_between() -> nn.Module:
    return Pair(lambda value: value.softmax(-1))


def cumulative() -> nn.Module:
    return Pair(lambda value: value.cumsum(-1))


def reversed_between() -> nn.Module:
    return Pair(lambda value: value.flip(-1))


def turned() -> nn.Module:
    """Heads and what is in them change places before they are merged."""
    return Pair(lambda value: value.unflatten(-1, (8, 8)).transpose(-1, -2).flatten(-2))


def heads_by_number() -> nn.Module:
    return Attention(heads=HEADS)


def heads_by_number_alone() -> nn.Module:
    """It runs on a part as well, with heads of half the size."""
    return Attention(heads=HEADS, size=-1, turns=False)


TRAPS: dict[str, Callable[[], nn.Module]] = {
    "softmax": softmax_between,
    "norm": NormBetween,
    "bare norm": BareNormBetween,
    "learned scale": ScaleBetween,
    "gate": GateBetween,
    "read": ReadBetween,
    "residual": ResidualBetween,
    "twice": Twice,
    "elsewhere": UsedElsewhere,
    "tied": Tied,
    "weight read": WeightRead,
    "size": SizeRead,
    "halves": Halves,
    "kept": Kept,
    "cumulative": cumulative,
    "reversed": reversed_between,
    "turned": turned,
    "heads": heads_by_number,
    "heads alone": heads_by_number_alone,
}

NAIVE = {"up": "colwise", "down": "rowwise", "q": "colwise", "k": "colwise", "v": "colwise", "o": "rowwise"}
"""How the layers of a trap look as if they were divided."""
