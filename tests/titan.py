"""The Llama that torchtitan trained at the end of 2024, and how its `train.py` prepares it: what its published figures are of.

Equivalent in structure to torchtitan at commit 9dec370 (26 December 2024): `torchtitan/models/llama/model.py`,
`torchtitan/models/norms.py` (`RMSNorm`) and `torchtitan/parallelisms/parallelize_llama.py`. Every op that allocates is there, in
its order; initialization, which allocates nothing that stays, is torch's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten = torch.ops.aten


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model; `hidden` is that of the feed-forward part."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    words: int = 128_256
    length: int = 8192


LLAMA_8B = Sizes(width=4096, layers=32, heads=32, kv_heads=8, hidden=14_336)
LLAMA_70B = Sizes(width=8192, layers=80, heads=64, kv_heads=8, hidden=28_672)
LLAMA_405B = Sizes(width=16_384, layers=126, heads=128, kv_heads=8, hidden=53_248)


class Norm(nn.Module):
    """RMSNorm op by op: in float32, and back before the weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self._normed(value.float()).type_as(value) * self.weight

    @staticmethod
    def _normed(value: torch.Tensor) -> torch.Tensor:
        return value * torch.rsqrt(value.pow(2).mean(-1, keepdim=True) + 1e-5)


def repeated(value: torch.Tensor, times: int) -> torch.Tensor:
    """Each head of keys or values as often as there are queries for it."""
    batch, length, heads, size = value.shape
    if times == 1:
        return value
    return value.unsqueeze(3).expand(batch, length, heads, times, size).reshape(batch, length, heads * times, size)


class Attention(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.size, self.times = sizes.width // sizes.heads, sizes.heads // sizes.kv_heads
        self.wq = nn.Linear(sizes.width, sizes.heads * self.size, bias=False)
        self.wk = nn.Linear(sizes.width, sizes.kv_heads * self.size, bias=False)
        self.wv = nn.Linear(sizes.width, sizes.kv_heads * self.size, bias=False)
        self.wo = nn.Linear(sizes.heads * self.size, sizes.width, bias=False)

    def forward(self, value: torch.Tensor, angles: torch.Tensor) -> Any:
        batch, length, _ = value.shape
        xq, xk, xv = self.wq(value), self.wk(value), self.wv(value)
        xq, xk, xv = (each.view(batch, length, -1, self.size) for each in (xq, xk, xv))
        xq, xk = _both_turned(xq, xk, angles)
        keys, values = repeated(xk, self.times), repeated(xv, self.times)
        xq, xk, xv = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        output = F.scaled_dot_product_attention(xq, xk, xv, is_causal=True)
        output = output.transpose(1, 2).contiguous()
        return self.wo(output.view(batch, length, -1))


def _both_turned(xq: torch.Tensor, xk: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary embedding of both, [batch, length, heads, size], by complex numbers of [length, size / 2]."""
    pairs_q = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    pairs_k = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    angles = angles[: xq.shape[1]].view(1, xq.shape[1], 1, pairs_q.shape[-1])
    out_q = torch.view_as_real(pairs_q * angles).flatten(3)
    out_k = torch.view_as_real(pairs_k * angles).flatten(3)
    return out_q.type_as(xq), out_k.type_as(xk)


class FeedForward(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.w1 = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.w2 = nn.Linear(sizes.hidden, sizes.width, bias=False)
        self.w3 = nn.Linear(sizes.width, sizes.hidden, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        return self.w2(F.silu(self.w1(value)) * self.w3(value))


class Block(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(sizes), FeedForward(sizes)
        self.attention_norm, self.ffn_norm = Norm(sizes.width), Norm(sizes.width)

    def forward(self, value: torch.Tensor, angles: torch.Tensor) -> Any:
        value = value + self.attention(self.attention_norm(value), angles)
        return value + self.feed_forward(self.ffn_norm(value))


class Llama(nn.Module):
    """Logits [batch, length, words] of tokens [batch, length]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(sizes.words, sizes.width)
        self.freqs_cis = nn.Buffer(_angles(sizes))
        self.layers = nn.ModuleDict({str(index): Block(sizes) for index in range(sizes.layers)})
        self.norm = Norm(sizes.width)
        self.output = nn.Linear(sizes.width, sizes.words, bias=False)

    def forward(self, tokens: torch.Tensor) -> Any:
        value = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            value = layer(value, self.freqs_cis)
        return self.output(self.norm(value))


def _angles(sizes: Sizes) -> torch.Tensor:
    size = sizes.width // sizes.heads
    speeds = 1.0 / (500_000 ** (torch.arange(0, size, 2).float() / size))
    turns = torch.outer(torch.arange(sizes.length), speeds).float()
    return torch.polar(torch.ones_like(turns), turns)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss of `train.py`: in float32, as one row of logits for each token."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))


class Trained(nn.Module):
    """The loss of tokens and labels; the logits go as soon as there is one (`del pred`)."""

    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.model(tokens), labels)


# -- how it is prepared -------------------------------------------------------------------------------------------------


def prepared(module: Llama, mesh: DeviceMesh, checkpointing: str) -> Llama:
    """`parallelize_llama` for data parallelism alone: every block checkpointed, then FSDP2 around each, and around all.

    The last block is not resharded after its forward. The root never was at that time, whatever was asked for
    (`FSDPState._lazy_init` set `post_forward_mesh_info` to None); torch does as it is told since, so it is told.
    """
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = module.layers
    for name in blocks:
        blocks[name] = checkpointed(blocks[name], checkpointing)
        fully_shard(blocks[name], mesh=mesh, mp_policy=precision, reshard_after_forward=int(name) < len(blocks) - 1)
    fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    return module


def checkpointed(block: nn.Module, checkpointing: str) -> nn.Module:
    """`_apply_ac_to_transformer_block`: `full`, or `selective` by op."""
    if checkpointing == "full":
        return checkpoint_wrapper(block, preserve_rng_state=False)
    return checkpoint_wrapper(block, context_fn=_kept_by_op, preserve_rng_state=False)


KEPT = frozenset(
    {
        aten.mm.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_flash_attention.default,
        torch.ops._c10d_functional.reduce_scatter_tensor.default,
        aten.abs.default,
        aten.max.default,
    }
)
"""The ops whose results are kept (`_save_list`); of the products of matrices every other one."""


def _kept_by_op() -> Any:
    return create_selective_checkpoint_contexts(_policy(defaultdict(int)))


def _policy(products: dict[bool, int]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if func is aten.mm.default:
            products[context.is_recompute] += 1
        second = func is aten.mm.default and products[context.is_recompute] % 2 == 0
        return CheckpointPolicy.MUST_SAVE if func in KEPT and not second else CheckpointPolicy.PREFER_RECOMPUTE

    return policy
