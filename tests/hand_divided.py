"""Models divided by hand with torch's styles of sequence and loss parallelism, on fake ranks: what the closed form is held to.

`CONFIGURATIONS` are drawn from a seed, and so are always the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import groundplan as gp
from groundplan.runtime.checkpointing import checkpoint_layers
from groundplan.runtime.example_inputs import example_inputs
from groundplan.runtime.fake_ranks import followed_rank
from groundplan.runtime.fake_step import device_of, run_fake, step_module, with_implementation
from groundplan.runtime.fake_world import fake_world

from . import titan
from .closed_form import BF16, F32, PHASES, _made

SEED, WORDS = 25, 96
WHOLE, ALONG, WORDWISE = Replicate(), Shard(1), Shard(-1)
Styles = dict[str, ParallelStyle]

# -- models, and torchtitan's way to divide them ------------------------------------------------------------------------


class Feed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(nn.functional.gelu(self.up(value)))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.feed, self.dropout, self.norm = Feed(width), nn.Dropout(0.1), nn.LayerNorm(width)

    def forward(self, value: torch.Tensor) -> Any:
        return self.norm(value + self.dropout(self.feed(value)))


class Feeds(nn.Module):
    """Norms behind the sums, dropout, biases, and no attention."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, width), nn.Embedding(64, width)
        self.norm, self.layers = nn.LayerNorm(width), nn.ModuleList(Layer(width) for _ in range(6))
        self.head = nn.Linear(width, WORDS)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> Any:
        value = self.norm(self.embed(tokens) + self.places(places))
        for layer in self.layers:
            value = layer(value)
        return nn.functional.cross_entropy(self.head(value).flatten(0, 1).float(), labels.flatten())


def llama_of_titan() -> nn.Module:
    return titan.Trained(titan.Llama(titan.Sizes(width=64, layers=6, heads=8, kv_heads=4, hidden=160, words=WORDS, length=64)))


_LLAMA = _made(
    "LlamaForCausalLM",
    "LlamaConfig",
    vocab_size=WORDS,
    hidden_size=64,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=160,
    num_hidden_layers=6,
    tie_word_embeddings=False,
)


def _inputs(model: str, batch: int, length: int) -> Any:
    tokens = torch.ones(batch, length, dtype=torch.int64, device="meta")
    places = torch.arange(length, device="meta").expand(batch, length)
    if model == "Llama":
        return {"input_ids": tokens, "labels": tokens, "position_ids": places, "use_cache": False}
    return (tokens, tokens) if model == "titan" else (tokens, tokens, places)


@dataclass(frozen=True)
class Model:
    """A constructor, the rules of a plan, and how the same is done by hand: what stands around the layers that are divided.

    `embeds` and `norms` are names of modules, `blocks` those that gather for the layers by columns in them, by keyword or not.
    """

    build: Callable[[], nn.Module]
    layers: str
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    embed: str
    head: str
    norms: tuple[str, ...]
    blocks: Mapping[str, Any]
    more: tuple[str, ...] = ()

    def rules(self) -> dict[str, str]:
        found = dict.fromkeys(self.columns, "colwise") | dict.fromkeys(self.rows, "rowwise")
        found |= dict.fromkeys((self.embed, *self.more), "embedding_rowwise")
        return found | {self.head: "colwise_gather_output"}

    def styles(self, sequence: bool, loss: bool) -> Styles:
        """torchtitan's `apply_tp` (torchtitan/parallelisms/parallelize_llama.py)."""
        stream = ALONG if sequence else WHOLE
        found: Styles = {name: ColwiseParallel() for name in self.columns}
        found |= {name: RowwiseParallel(output_layouts=stream) for name in self.rows}
        found |= {name: RowwiseParallel(input_layouts=WHOLE, output_layouts=stream) for name in (self.embed, *self.more)}
        out: dict[str, Any] = {"output_layouts": WORDWISE if loss else WHOLE, "use_local_output": not loss}
        found[self.head] = ColwiseParallel(input_layouts=stream, **out)
        if sequence:
            found |= {name: SequenceParallel(use_local_output=True) for name in self.norms}
            found |= {name: PrepareModuleInput(**given) for name, given in self.blocks.items()}
        return found


_ONE: dict[str, Any] = {"input_layouts": (ALONG,), "desired_input_layouts": (WHOLE,)}
_TWO: dict[str, Any] = {"input_layouts": (ALONG, None), "desired_input_layouts": (WHOLE, None)}
_NAMED: dict[str, Any] = {
    "input_kwarg_layouts": {"hidden_states": ALONG},
    "desired_input_kwarg_layouts": {"hidden_states": WHOLE},
}
_AT, _IN = "model.layers.*", "model.layers.*"
MODELS = {
    "Llama": Model(
        _LLAMA,
        "model.layers.*",
        (*(f"{_AT}.self_attn.{each}_proj" for each in "qkv"), f"{_AT}.mlp.gate_proj", f"{_AT}.mlp.up_proj"),
        (f"{_AT}.self_attn.o_proj", f"{_AT}.mlp.down_proj"),
        "model.embed_tokens",
        "lm_head",
        ("model.norm", f"{_AT}.input_layernorm", f"{_AT}.post_attention_layernorm"),
        {f"{_AT}.self_attn": _NAMED, f"{_AT}.mlp": _ONE},
    ),
    "titan": Model(
        llama_of_titan,
        "model.layers.*",
        (*(f"{_IN}.attention.w{each}" for each in "qkv"), f"{_IN}.feed_forward.w1", f"{_IN}.feed_forward.w3"),
        (f"{_IN}.attention.wo", f"{_IN}.feed_forward.w2"),
        "model.tok_embeddings",
        "model.output",
        ("model.norm", f"{_IN}.attention_norm", f"{_IN}.ffn_norm"),
        {f"{_IN}.attention": _TWO, f"{_IN}.feed_forward": _ONE},
    ),
    "feeds": Model(
        Feeds,
        "layers.*",
        ("layers.*.feed.up",),
        ("layers.*.feed.down",),
        "embed",
        "head",
        ("norm", "layers.*.norm"),
        {"layers.*.feed": _ONE},
        more=("places",),
    ),
}

# -- configurations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Divided:
    """A model, how it is divided, and how it is trained, on a device."""

    model: str
    device: str
    axes: Mapping[str, int]
    sequence: bool
    loss: bool
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    batch: int
    length: int

    def plan(self) -> gp.Plan:
        known = MODELS[self.model]
        return (
            gp.trace(known.build)
            .to(self.device)
            .shard(
                self.axes,
                tensor=known.rules(),
                sequence_parallel=self.sequence,
                loss_parallel=self.loss,
                **({"units": known.layers, **self.options} if "dp" in self.axes else {}),
            )
        )

    def workload(self) -> gp.Training:
        return gp.Training(inputs=_inputs(self.model, self.batch, self.length), **self.training)

    def __str__(self) -> str:
        mesh = "x".join(f"{name}{size}" for name, size in self.axes.items())
        given = [name for name in ("sequence", "loss") if getattr(self, name)]
        settings = [f"{key}={value}" for key, value in (*self.options.items(), *self.training.items())]
        return " ".join([self.model, self.device, mesh, *given, f"{self.batch}x{self.length}", *settings]).replace("torch.", "")


_PRECISIONS: tuple[dict[str, Any], ...] = ({}, {"compute_dtype": BF16}, {"compute_dtype": BF16, "reduce_dtype": F32})


def drawn(count: int, seed: int = SEED) -> list[Divided]:
    source = random.Random(seed)
    return [_drawn(source) for _ in range(count)]


def _drawn(source: random.Random) -> Divided:
    axes: dict[str, int] = source.choice([{"tp": 2}, {"tp": 4}, {"dp": 2, "tp": 2}, {"dp": 2, "tp": 4}])
    sequence, loss = source.choice([(True, False), (True, True), (True, True), (False, True)])
    options: dict[str, Any] = source.choice(_PRECISIONS) | {"reshard": source.random() < 0.7} if "dp" in axes else {}
    training: dict[str, Any] = {
        "optimizer": source.choice(["sgd", "sgd-momentum", "adamw"]),
        "checkpointing": source.choice(["none", "none", "full", "selective"]),
        "accumulate": source.choice([1, 1, 2]),
    }
    model, device = source.choice(list(MODELS)), source.choice(["cpu", "cuda"])
    return Divided(model, device, axes, sequence, loss, options, training, source.choice([1, 2, 4]), source.choice([16, 32, 64]))


CONFIGURATIONS = drawn(120)

# -- what torch does ----------------------------------------------------------------------------------------------------


def divided_by_hand(module: nn.Module, case: Divided, mesh: DeviceMesh) -> nn.Module:
    known = MODELS[case.model]
    parallelize_module(module, mesh["tp"], known.styles(case.sequence, case.loss))
    if "dp" in case.axes:
        policy = MixedPrecisionPolicy(case.options.get("compute_dtype"), case.options.get("reduce_dtype"))
        options: dict[str, Any] = {"mesh": mesh["dp"], "mp_policy": policy, "reshard_after_forward": case.options["reshard"]}
        for each in module.get_submodule(known.layers.removesuffix(".*")).children():
            fully_shard(each, **options)
        fully_shard(module, **options)
    return module


def peaks_by_hand(case: Divided, rank: int = 0) -> dict[str, int]:
    """The bytes of each phase of training on one fake rank, under torch's own styles."""
    plan, training = case.plan(), case.workload()
    world = 1
    for size in case.axes.values():
        world *= size
    module = step_module(plan._bound, plan.decisions)
    inputs = example_inputs(module, training)
    chosen = with_implementation(training, case.device)
    device = device_of(plan._bound, plan.decisions)
    with fake_world(world, rank):
        if training.checkpointing != "none":
            checkpoint_layers(module, training.checkpointing)
        mesh = init_device_mesh("cpu", tuple(case.axes.values()), mesh_dim_names=tuple(case.axes))
        divided_by_hand(module, case, mesh)
        if len({isinstance(each, DTensor) for each in module.parameters()}) > 1:
            chosen = replace(chosen, implementation="for-loop")
        chosen = replace(chosen, checkpointing="none")
        with loss_parallel() if case.loss else nullcontext():
            run = run_fake(module, inputs, chosen, device, False, followed_rank(module, False))
    worse = {"optimizer": max(run.peaks["optimizer"][device], run.peaks["first_optimizer"][device])}
    return {phase: run.peaks[phase][device] for phase in PHASES} | worse


def errors(closed: gp.Memory, measured: Mapping[str, int]) -> dict[str, float]:
    """By how much of a phase the closed form differs from what torch takes."""
    return {phase: closed.phases[phase] / measured[phase] - 1 for phase in PHASES}
