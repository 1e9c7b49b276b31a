"""Small models that are served, and what a real run of each allocates, by `torch.profiler`: what fake runs are compared with."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

import groundplan as gp
from groundplan.planner.allocations import START
from groundplan.runtime.example_inputs import example_inputs
from groundplan.runtime.inference_step import run_inference
from groundplan.runtime.meta import forget

from .measured_steps import _MARK, _SMALL, _WORDS, MODELS, _peaks, _transformers, memory_events


def measured_inference(plan: gp.Plan, inference: gp.Inference, **options: Any) -> dict[str, int]:
    """The bytes of each phase of really serving: the running sum of the profiler's memory events. `options`: of `materialize`."""
    phases = [START]
    gc.collect()  # of earlier runs, which would go during this one

    def phase(name: str) -> None:
        if name != phases[-1]:
            phases.append(name)
            torch.empty(_MARK + len(phases) - 1, dtype=torch.uint8)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module = plan.materialize(seed=0, progress=False, **options)
        forget(module)
        inputs = tree_map_only(torch.Tensor, _real, example_inputs(module, inference))
        gc.collect()
        run_inference(module, inputs, inference, phase)
    return _peaks(memory_events(profiler), phases)


def _real(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value


_GROUPED = {"vocab_size": _WORDS, "num_key_value_heads": 2, **_SMALL}

SERVED: dict[str, Callable[[], nn.Module]] = {
    **{name: MODELS[name].build for name in ("Llama", "GPT-2", "T5", "Whisper", "ViT", "BERT", "ConvNeXt", "Swin", "Wav2Vec2")},
    "Mamba": _transformers(
        "MambaForCausalLM", "MambaConfig", vocab_size=_WORDS, hidden_size=32, num_hidden_layers=2, state_size=4
    ),
    "Mistral, a window of 8": _transformers("MistralForCausalLM", "MistralConfig", sliding_window=8, **_GROUPED),
    "Mixtral": _transformers("MixtralForCausalLM", "MixtralConfig", num_local_experts=4, **_GROUPED),
    "Gemma 2": _transformers("Gemma2ForCausalLM", "Gemma2Config", sliding_window=8, head_dim=8, **_GROUPED),
    "Qwen 3": _transformers("Qwen3ForCausalLM", "Qwen3Config", head_dim=8, **_GROUPED),
    "DeepSeek V3": _transformers(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        **{f"{rank}_lora_rank": 16 for rank in ("kv", "q")},
        **{f"{head}_head_dim": 8 for head in ("qk_rope", "qk_nope", "v")},
        n_routed_experts=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        **{**_GROUPED, "num_key_value_heads": 4},
    ),
}
"""Decoders with caches of every kind, encoders with and without one, and models that just run forward."""

QUICK = ("Llama", "GPT-2", "T5", "Whisper", "ViT", "BERT", "Mamba", "Mistral, a window of 8", "Mixtral")
"""Those that are tried each time; the others with `-m conformance`."""

LENGTHS = {"Wav2Vec2": 640}
"""The tokens of a prompt, where 16 are too few."""
