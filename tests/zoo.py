"""Real constructors that the law is tested on: torch.nn's own, awkward ones, and small versions of published architectures."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

Constructor = Callable[[], Any]


def builtins() -> dict[str, Constructor]:
    """Every module class of torch.nn that holds parameters or buffers, with small arguments, and the containers."""
    calls: dict[str, tuple[Any, ...]] = {
        "Linear": (5, 7),
        "Bilinear": (3, 4, 5),
        "LazyLinear": (5,),
        "Conv1d": (4, 6, 3),
        "Conv2d": (4, 6, 3),
        "Conv3d": (4, 6, 3),
        "ConvTranspose1d": (4, 6, 3),
        "ConvTranspose2d": (4, 6, 3),
        "ConvTranspose3d": (4, 6, 3),
        "LazyConv1d": (6, 3),
        "LazyConv2d": (6, 3),
        "LazyConv3d": (6, 3),
        "LazyConvTranspose1d": (6, 3),
        "LazyConvTranspose2d": (6, 3),
        "LazyConvTranspose3d": (6, 3),
        "BatchNorm1d": (6,),
        "BatchNorm2d": (6,),
        "BatchNorm3d": (6,),
        "SyncBatchNorm": (6,),
        "LazyBatchNorm1d": (),
        "LazyBatchNorm2d": (),
        "LazyBatchNorm3d": (),
        "LazyInstanceNorm1d": (),
        "GroupNorm": (2, 6),
        "LayerNorm": (6,),
        "RMSNorm": (6,),
        "Embedding": (11, 4),
        "EmbeddingBag": (11, 4),
        "RNNBase": ("GRU", 4, 5),
        "RNNCellBase": (4, 5, True, 3),
        "RNN": (4, 5, 2),
        "GRU": (4, 5, 2),
        "LSTM": (4, 5, 2),
        "RNNCell": (4, 5),
        "GRUCell": (4, 5),
        "LSTMCell": (4, 5),
        "MultiheadAttention": (8, 2),
        "TransformerEncoderLayer": (8, 2, 16),
        "TransformerDecoderLayer": (8, 2, 16),
        "Transformer": (8, 2, 1, 1, 16),
        "PReLU": (3,),
        "AdaptiveLogSoftmaxWithLoss": (8, 20, [5, 10]),
    }
    found: dict[str, Constructor] = {f"nn.{name}": _call(getattr(nn, name), *args) for name, args in calls.items()}
    return found | {
        "nn.InstanceNorm2d affine": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        "nn.FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(3, 4, _random_samples=torch.rand(1, 2, 2)),
        "nn.FractionalMaxPool3d": lambda: nn.FractionalMaxPool3d(3, 4, _random_samples=torch.rand(1, 2, 3)),
        "nn.Embedding padding_idx": lambda: nn.Embedding(11, 4, padding_idx=3),
        "nn.LSTM bidirectional proj": lambda: nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3),
        "nn.MultiheadAttention kdim": lambda: nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True),
        "nn.CrossEntropyLoss weight": lambda: nn.CrossEntropyLoss(weight=torch.rand(5)),
        "nn.BCEWithLogitsLoss": lambda: nn.BCEWithLogitsLoss(weight=torch.ones(3), pos_weight=torch.tensor([1.0, 2.0, 3.0])),
        "nn.ParameterList": lambda: nn.ParameterList([torch.randn(3), nn.Parameter(torch.ones(2)), torch.zeros(4)]),
        "nn.ParameterDict": lambda: nn.ParameterDict({"a": nn.Parameter(torch.randn(3)), "b": torch.rand(2)}),
        "nn.ModuleDict": lambda: nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.ModuleList([nn.Conv1d(1, 2, 3)])}),
        "nn.Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Dropout(), nn.PReLU()),
        "nn.Transformer norm_first": lambda: nn.Transformer(16, 4, 2, 2, 32, batch_first=True, norm_first=True),
        "nn.Linear half": lambda: nn.Linear(5, 7, dtype=torch.bfloat16),
        "nn.Linear double": lambda: nn.Linear(33, 17, dtype=torch.float64),
        "nn.Linear complex": lambda: nn.Linear(5, 7, dtype=torch.complex64),
        "tuple of modules": lambda: (nn.Linear(2, 2), nn.Linear(3, 3)),
        "dict of modules": lambda: {"actor": nn.Linear(2, 2), "critic": nn.Linear(3, 3)},
    }


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Constructor:
    return lambda: function(*args, **kwargs)


# -- awkward ones -------------------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """A buffer that views another one, non-persistent buffers, plain tensors in attributes, lists and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("row", self.get_buffer("table")[1])
        self.register_buffer("columns", self.get_buffer("table").t()[1:3], persistent=False)
        self.steps = torch.linspace(0, 1, 5)
        self.cache = {"k": torch.zeros(2, 3), "v": [torch.ones(2), (torch.randn(3), 4)]}
        self.rates = [x.item() for x in torch.linspace(0, 0.3, 4)]
        self.scaled = nn.Parameter(torch.randn(4)) * 2  # carries a grad_fn


class Tied(nn.Module):
    """Ties by object, by storage, and by a view of a storage; frozen parameters; Python attributes on parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embed.weight
        self.flat = nn.Parameter(torch.randn(24))
        self.part = nn.Parameter(self.flat.data[4:16].view(3, 4))
        self.alias = nn.Parameter(self.flat.data)
        self.embed.weight._no_weight_decay = True  # type: ignore[attr-defined]
        self.part.tags = {"group": [1, 2]}  # type: ignore[attr-defined]
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)
        self.shared = nn.Linear(3, 3)
        self.again = self.shared
        self.members = [self.flat, self.frozen]


class Closures(nn.Module):
    """Weak references and closures over parameters, and hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        weight = self.linear.weight
        hidden = torch.randn(5)
        self.reference = weakref.ref(weight)
        self.total = lambda: float(weight.sum() + hidden.sum())
        self.linear.register_forward_hook(lambda module, args, output: output + hidden[:4])


class Data(nn.Module):
    """`.data` read and assigned, partial writes, in-place arithmetic, dead initializations."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.a.weight.data.normal_(0, 0.5)
        self.a.bias.data = torch.full((6,), 0.25)
        self.b = nn.Parameter(torch.empty(6, 8))
        with torch.no_grad():
            self.b[:3].uniform_(-1, 1)
            self.b[3:] = torch.eye(3, 8)
            self.b[:, 2].mul_(3).add_(self.a.bias)
        self.c = nn.Conv2d(3, 4, 3)
        nn.init.trunc_normal_(self.c.weight, std=0.5, a=-0.6, b=0.7)
        nn.init.orthogonal_(self.a.weight)
        nn.init.dirac_(self.c.weight)
        self.d = nn.Parameter(torch.empty(7, 5))
        nn.init.sparse_(self.d, 0.3)
        self.e = nn.Parameter(torch.Tensor(3, 4))
        nn.init.trunc_normal_(self.e)


class Decides(nn.Module):
    """Control flow that depends on tensor values, drawn ones among them, and reseeding inside."""

    def __init__(self) -> None:
        super().__init__()
        depth = int(torch.randint(1, 4, ()).item())
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.mask = torch.rand(6) > 0.5
        if bool(self.mask.any()):
            self.extra = nn.Linear(2, 2)
        generator = torch.Generator().manual_seed(3)
        self.noise = torch.randn(20, generator=generator)
        self.order = torch.randperm(7).tolist()


class FromOutside(nn.Module):
    """A module and tensors that are passed in, numpy, and Python's random module."""

    def __init__(self, inner: nn.Module, table: torch.Tensor) -> None:
        import random

        import numpy as np

        super().__init__()
        self.inner = inner
        self.register_buffer("table", table)
        self.doubled = nn.Parameter(table * 2)
        self.noise = nn.Parameter(torch.from_numpy(np.random.rand(4).astype("float32")))
        self.rate = random.random()
        self.own = nn.Linear(3, 3)


def awkward() -> dict[str, Constructor]:
    """Constructors that break when tensors are not quite ordinary."""
    inner, table = nn.Linear(3, 3), torch.arange(4.0)
    return {
        "buffers": Buffers,
        "tied": Tied,
        "closures": Closures,
        "data": Data,
        "decides": Decides,
        "from outside": lambda: FromOutside(inner, table),
        "old weight_norm": lambda: nn.utils.weight_norm(nn.Linear(6, 5)),
        "old spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 5)),
        "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
        "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
        "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 5)),
        "scripted submodule": lambda: nn.Sequential(nn.Linear(3, 3), torch.jit.script(nn.Linear(3, 4))),
        "skip_init then filled": _skip_init_filled,
        "moved to half": lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)).half(),
        "half within": lambda: nn.Sequential(nn.Linear(5, 5).to(torch.bfloat16), nn.Linear(5, 5).double()),
    }


def _skip_init_filled() -> nn.Module:
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, 4, 4)
    with torch.no_grad():
        linear.weight.normal_()
        linear.bias.zero_()
    return linear


# -- published architectures --------------------------------------------------------------------------------------------


def transformers_types() -> dict[str, Constructor]:
    """Twelve architectures of the transformers library, from small configurations."""
    import transformers as tf

    text: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    no_kv = {key: value for key, value in text.items() if key != "num_key_value_heads"}
    configs: dict[str, tuple[Any, Any]] = {
        "Llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**text, tie_word_embeddings=True)),
        "Mistral": (tf.MistralForCausalLM, tf.MistralConfig(**text)),
        "Qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**text, head_dim=8)),
        "DeepSeek-V3": (
            tf.DeepseekV3ForCausalLM,
            tf.DeepseekV3Config(
                **(text | {"num_key_value_heads": 4}),
                moe_intermediate_size=16,
                n_routed_experts=4,
                n_group=2,
                topk_group=1,
                num_experts_per_tok=2,
                first_k_dense_replace=1,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            ),
        ),
        "Mixtral": (tf.MixtralForCausalLM, tf.MixtralConfig(**text, num_local_experts=3)),
        "GPT-2": (tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
        "BERT": (tf.BertForMaskedLM, tf.BertConfig(**no_kv)),
        "T5": (tf.T5ForConditionalGeneration, tf.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)),
        "ViT": (
            tf.ViTForImageClassification,
            tf.ViTConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
            ),
        ),
        "Swin": (
            tf.SwinForImageClassification,
            tf.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        ),
        "Wav2Vec2": (
            tf.Wav2Vec2ForCTC,
            tf.Wav2Vec2Config(
                vocab_size=32,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                conv_dim=(16, 16),
                conv_kernel=(10, 3),
                conv_stride=(5, 2),
                num_conv_pos_embeddings=16,
                num_conv_pos_embedding_groups=4,
            ),
        ),
        "Mamba": (tf.MambaForCausalLM, tf.MambaConfig(vocab_size=96, hidden_size=32, state_size=8, num_hidden_layers=2)),
    }
    return {name: _call(cls, config) for name, (cls, config) in configs.items()}
