"""Serving as a workload: prompts that are read at once, and tokens that are decoded after them with a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from ..tracer.errors import DecisionError
from .workload import check_choice, check_count

Cache = Literal["dynamic", "static"]


@dataclass(frozen=True, slots=True)
class Inference:
    """Serving: `batch_size` prompts of `seq_len` tokens are read at once, then `new_tokens` decoded one at a time.

    In the end the cache of keys and values holds `seq_len + new_tokens` tokens. Of an encoder and decoder, `seq_len` counts the
    encoder's tokens, and the decoder begins with one; where the encoder takes no tokens, the decoder begins with `seq_len`. A
    module without a cache, such as one for images, just runs forward.

    `cache` is transformers' `dynamic` one, which grows with every token by copying what is there, or the `static` one, which has
    its final size from the start. `inputs` are what the first forward gets: a mapping or a tuple of tensors, real or meta, or a
    callable that gives one; None makes them from the module's signature. `autocast` is a dtype.

    Raises `DecisionError` for values that cannot be.

    >>> Inference(batch_size=4, seq_len=8192).cache
    'dynamic'
    """

    batch_size: int = 1
    seq_len: int | None = None
    new_tokens: int = 1
    inputs: Any = None
    autocast: torch.dtype | None = None
    cache: Cache = "dynamic"

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size)
        check_count("new_tokens", self.new_tokens)
        if self.seq_len is not None:
            check_count("seq_len", self.seq_len)
        check_choice("cache", self.cache, get_args(Cache))
        if self.autocast is not None and self.autocast not in (torch.bfloat16, torch.float16):
            raise DecisionError(f"autocast is {self.autocast!r}; torch.autocast takes torch.bfloat16 or torch.float16")
