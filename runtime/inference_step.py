"""Reading a prompt and decoding tokens after it, as transformers' `generate` calls a model, on whatever tensors a module has.

`fake_inference` runs it on fake tensors to see what it allocates; run on a real module it is what a fake run is compared with.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..planner.allocations import BETWEEN, FIRST_STEP, STEP, Kind
from ..planner.inference import Inference
from ..tracer.errors import DecisionError

CACHES = ("cache", "past_key_values", "cache_params")
"""What forward calls its cache: transformers' name since 5.24, the one before it, and the one before of models with a state."""

Kept = Callable[[Kind, Any], None]
"""Told what stays from one forward to the next: what it is, and the object."""


def run_inference(
    module: nn.Module,
    inputs: Any,
    inference: Inference,
    phase: Callable[[str], None],
    kept: Kept = lambda kind, value: None,
    every: bool = True,
    on_cuda: bool = False,
) -> None:
    """Read the prompt and decode `inference.new_tokens` after it; `phase` is called with the name of each phase as it begins.

    Where `every` is not set, only the first and the last token are decoded by themselves; those between them go through at once,
    in a phase of their own, and leave a cache of the same size. A module that gives no cache runs forward once more instead.
    `on_cuda` has it decode as `generate` does there.
    """
    module.eval()
    model = _Model(module)
    with torch.no_grad(), nullcontext() if inference.autocast is None else torch.autocast("cpu", inference.autocast):
        phase(FIRST_STEP)
        arguments = model.first(inputs, inference, kept)
        output = model.run(arguments)
        cache = model.cache_of(output)
        if cache is None:
            del output
            phase(STEP)
            model.run(arguments)
            return
        kept("KV cache", cache)
        with _experts_by_batch(module) if on_cuda else nullcontext():
            for name, count in _forwards(inference.new_tokens, every):
                token = _next_token(output).expand(-1, count)
                del output  # its logits may be large
                phase(name)
                arguments = model.further(arguments, cache, token)
                output = model.run(arguments)
                cache = model.cache_of(output)
                kept("KV cache", cache)


@contextmanager
def _experts_by_batch(module: Any) -> Iterator[None]:
    """Have experts copy the weights that each token needs, as transformers' `_optimize_model_for_decode` does off the CPU."""
    before = module.get_experts_implementation() if hasattr(module, "get_experts_implementation") else {}
    if "grouped_mm" not in before.values():
        yield
        return
    module.set_experts_implementation({key: "batched_mm" if value == "grouped_mm" else value for key, value in before.items()})
    try:
        yield
    finally:
        module.set_experts_implementation(before)


def _forwards(new: int, every: bool) -> Iterator[tuple[str, int]]:
    """The forwards after the first, as the phase and the number of tokens.

    The one before the last is by itself as well: a window of the cache stays a view of all that went through at once.
    """
    if every or new <= 3:
        yield from [(STEP, 1)] * new
    else:
        yield from ((STEP, 1), (BETWEEN, new - 3), (BETWEEN, 1), (STEP, 1))


def _next_token(output: Any) -> torch.Tensor:
    """The likeliest next token of each prompt, picked in float32 as `generate` does; of a model without logits, the first."""
    logits = getattr(output, "logits", None)
    if logits is None:
        return torch.zeros((len(output[0]), 1), dtype=torch.int64, device=output[0].device)
    likeliest: torch.Tensor = logits[:, -1].to(copy=True, dtype=torch.float32).argmax(dim=-1, keepdim=True)
    return likeliest


class _Model:
    """A module, and what its forward calls its arguments."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._takes = inspect.signature(module.forward).parameters
        named = [name for name in CACHES if name in self._takes and "use_cache" in self._takes]
        self._cache = named[0] if named else None
        self._has_encoder = self._cache is not None and bool(getattr(module.config, "is_encoder_decoder", False))
        self._tokens, self._mask = ("input_ids", "attention_mask")
        if self._has_encoder:
            self._tokens, self._mask = ("decoder_input_ids", "decoder_attention_mask")

    def run(self, arguments: Any) -> Any:
        return self._module(**arguments) if isinstance(arguments, Mapping) else self._module(*arguments)

    def cache_of(self, output: Any) -> Any:
        """The cache that forward gave; None where it has none."""
        return None if self._cache is None else getattr(output, self._cache, None)

    def first(self, inputs: Any, inference: Inference, kept: Kept) -> Any:
        """The arguments of the first forward; an encoder runs before it."""
        if self._cache is None:
            _check_no_static(self._module, inference)
            return inputs
        given = dict(inputs) if isinstance(inputs, Mapping) else dict(zip(self._takes, inputs, strict=False))
        given |= self._options()
        if self._has_encoder:
            _check_no_static(self._module, inference)
            return self._encoded(given, kept)
        if inference.cache == "static":
            given[self._cache] = _static_cache(self._module, given[self._tokens].shape[1] + inference.new_tokens)
        return given

    def further(self, before: Mapping[str, Any], cache: Any, token: torch.Tensor) -> dict[str, Any]:
        """The arguments of a later forward: the new token, the cache, and a mask that is as much longer."""
        given = {name: before[name] for name in ("encoder_outputs", "attention_mask", self._mask) if name in before}
        if given.get(self._mask) is not None:
            given[self._mask] = torch.cat([given[self._mask], given[self._mask].new_ones(token.shape)], dim=-1)
        return given | {self._tokens: token, str(self._cache): cache} | self._options()

    def _options(self) -> dict[str, Any]:
        """With a cache, and the logits of the last token alone where that can be said."""
        return {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in self._takes else {})

    def _encoded(self, given: Mapping[str, Any], kept: Kept) -> dict[str, Any]:
        """The decoder's arguments, with what the encoder makes of its own."""
        encoder = self._module.get_encoder()
        takes = inspect.signature(encoder.forward).parameters
        own = {name: value for name, value in given.items() if name in takes and name not in ("use_cache", *CACHES)}
        encoded = encoder(**own)
        kept("activation", encoded)
        rest = {name: value for name, value in given.items() if name not in own or name == "attention_mask"}
        return rest | {"encoder_outputs": encoded}


def _static_cache(module: Any, length: int) -> Any:
    """transformers' cache of a fixed length, which takes its memory when its first layer is filled."""
    transformers = importlib.import_module("transformers")
    return transformers.StaticCache(config=module.config, max_cache_len=length)


def _check_no_static(module: nn.Module, inference: Inference) -> None:
    if inference.cache == "static":
        raise DecisionError(
            f'cache="static" is for decoders that take a cache, and {type(module).__name__} is none; say cache="dynamic"'
        )
