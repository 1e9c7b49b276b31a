"""Twelve small models, and what a real training step of each allocates, by `torch.profiler`: what fake runs are compared with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn
from torch.profiler import profile

import groundplan as gp
from groundplan.planner.allocations import START, Timeline
from groundplan.runtime.example_inputs import example_inputs
from groundplan.runtime.memory_events import memory_events as events_of
from groundplan.runtime.memory_events import memory_profile
from groundplan.runtime.meta import forget
from groundplan.runtime.training_step import run_training

_MARK = 2**30  # bytes; memory of such sizes, which nobody touches, stands between the phases
_WORDS = 96


@dataclass(frozen=True)
class Case:
    """A model and the inputs of its step."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


# -- what really happens ------------------------------------------------------------------------------------------------


@contextmanager
def plain_kernels() -> Iterator[None]:
    """One thread, and torch's own kernels: what oneDNN's take depends on the machine's instruction set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def measured_peaks(plan: gp.Plan, training: gp.Training, **options: Any) -> dict[str, int]:
    """The bytes of each phase of a real run of `training`: the running sum of the profiler's memory events.

    `options` are for `materialize`.
    """
    phases = [START]
    gc.collect()  # of earlier runs, which would go during this one

    def phase(name: str) -> None:
        phases.append(name)
        torch.empty(_MARK + len(phases) - 1, dtype=torch.uint8)

    with memory_profile() as profiler:
        module = plan.materialize(seed=0, progress=False, **options)
        forget(module)  # where it remembers the plan, it keeps states of generators
        inputs = example_inputs(module, training)
        gc.collect()
        run_training(module, inputs, replace(training, implementation=training.implementation or "for-loop"), phase)
    return _peaks(memory_events(profiler), phases)


def memory_events(profiler: profile) -> list[int]:
    """The bytes that came, or went as a negative number, in order."""
    return [each.nbytes for each in events_of(profiler)]


def _peaks(events: list[int], phases: list[str]) -> dict[str, int]:
    now, current = 0, START
    peaks = {START: 0}
    for nbytes in events:
        if nbytes > _MARK:
            current = phases[nbytes - _MARK]
            peaks[current] = now
        elif nbytes > -_MARK:
            now += nbytes
            peaks[current] = now if current == START else max(peaks[current], now)
    return peaks


def table_share(run: Timeline, phase: str) -> float:
    """The share of the bytes at a phase's peak that comes from the table of corrections (groundplan/runtime/scratch.py)."""
    entries = sum(each.nbytes for each in run.at_peak(phase, "cpu") if each.op.endswith(("'s scratch", "'s number")))
    return entries / run.peaks[phase]["cpu"]


# -- the models ---------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Two LSTM layers, each with a residual connection."""

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.lstm = nn.LSTM(width, width, batch_first=True)

        def forward(self, value: torch.Tensor) -> Any:
            return value + self.lstm(value)[0]

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, 24)
        self.layers = nn.ModuleList(Recurrent.Layer(24) for _ in range(2))
        self.head = nn.Linear(24, _WORDS)

    def forward(self, tokens: torch.Tensor) -> Any:
        value = self.embed(tokens)
        for layer in self.layers:
            value = layer(value)
        return self.head(value)


def _transformers(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return build


def _tokens() -> torch.Tensor:
    return torch.arange(1, 33).reshape(2, 16)


def _text() -> dict[str, torch.Tensor]:
    return {"input_ids": _tokens(), "labels": _tokens()}


def _image(size: int, channels: int = 3) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {"pixel_values": torch.ones(2, channels, size, size)}


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

MODELS: dict[str, Case] = {
    "Llama": Case(_transformers("LlamaForCausalLM", "LlamaConfig", vocab_size=_WORDS, num_key_value_heads=2, **_SMALL), _text),
    "GPT-2": Case(
        _transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=_WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64), _text
    ),
    "BERT": Case(_transformers("BertForMaskedLM", "BertConfig", vocab_size=_WORDS, **_SMALL), _text),
    "T5": Case(
        _transformers(
            "T5ForConditionalGeneration",
            "T5Config",
            vocab_size=_WORDS,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            pad_token_id=0,
        ),
        _text,
    ),
    "ViT": Case(_transformers("ViTForImageClassification", "ViTConfig", image_size=64, patch_size=8, **_SMALL), _image(64)),
    "ConvNeXt": Case(
        _transformers(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 4, 2], image_size=64
        ),
        _image(64),
    ),
    "Swin": Case(
        _transformers(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        _image(32),
    ),
    "Whisper": Case(
        _transformers(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            vocab_size=_WORDS,
            num_mel_bins=16,
            d_model=32,
            max_source_positions=32,
            max_target_positions=32,
            **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
            **{f"{side}_ffn_dim": 64 for side in ("encoder", "decoder")},
            **_SPECIAL,
        ),
        lambda: {"input_features": torch.ones(2, 16, 64), "labels": _tokens()},
    ),
    "Wav2Vec2": Case(
        _transformers(
            "Wav2Vec2ForSequenceClassification",
            "Wav2Vec2Config",
            conv_dim=(16, 16),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
            classifier_proj_size=32,
            layerdrop=0.0,
            apply_spec_augment=False,
            **_SMALL,
        ),
        lambda: {"input_values": torch.ones(2, 640)},
    ),
    "nn.Transformer": Case(
        lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), lambda: (torch.ones(2, 10, 32), torch.ones(2, 12, 32))
    ),
    "LSTM": Case(Recurrent, lambda: (_tokens(),)),
    "ResNet": Case(
        _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 4, 2],
        ),
        _image(32, channels=1),
    ),
}

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"autocast": torch.bfloat16},
    "checkpointing": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
}
