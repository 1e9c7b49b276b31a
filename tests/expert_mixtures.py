"""A small mixture of experts, and the same divided along an expert axis by hand: tokens go to their experts' ranks and back.

The routing is fixed and even: each expert is given as many tokens as the others. `CONFIGURATIONS` are drawn from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import groundplan as gp
from groundplan.runtime.checkpointing import checkpoint_layers
from groundplan.runtime.fake_ranks import followed_rank
from groundplan.runtime.fake_step import device_of, run_fake, with_implementation
from groundplan.runtime.fake_world import fake_world

from .closed_form import BF16, F32, PHASES

SEED, WORDS, WIDTH, HIDDEN, EXPERTS, LAYERS = 26, 96, 32, 48, 8, 6
Exchange = Callable[[torch.Tensor], torch.Tensor]


def alone(rows: torch.Tensor) -> torch.Tensor:
    return rows


class Stacked(nn.Module):
    """`count` experts as stacks of matrices, which are given rows that lie in the order of the experts."""

    def __init__(self, count: int = EXPERTS) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(count, WIDTH, HIDDEN))
        self.down = nn.Parameter(torch.randn(count, HIDDEN, WIDTH))
        self.there, self.back = alone, alone

    def forward(self, tokens: torch.Tensor, index: torch.Tensor) -> Any:
        order = index.flatten().argsort(stable=True)
        rows = self.there(tokens[order // index.shape[-1]])
        rows = torch.bmm(torch.relu(torch.bmm(rows.view(len(self.up), -1, WIDTH), self.up)), self.down)
        return torch.zeros_like(tokens).index_add(0, order // index.shape[-1], self.back(rows.flatten(0, 1)))


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, rows: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(rows)))


class Mixture(nn.Module):
    """A router and its experts, stacked or in a list; each token goes to two of them, in turn."""

    def __init__(self, listed: bool, count: int = EXPERTS) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts: Any = nn.ModuleList(Expert() for _ in range(count)) if listed else Stacked(count)
        self.there, self.back = alone, alone

    def forward(self, value: torch.Tensor) -> Any:
        tokens = value.flatten(0, -2)
        index = (torch.arange(2 * len(tokens), device=tokens.device) % EXPERTS).view(-1, 2)
        weights = self.router(tokens).softmax(-1).gather(1, index).sum(-1, keepdim=True)
        made = self._listed(tokens, index) if isinstance(self.experts, nn.ModuleList) else self.experts(tokens, index)
        return (made * weights).view_as(value)

    def _listed(self, tokens: torch.Tensor, index: torch.Tensor) -> Any:
        order = index.flatten().argsort(stable=True)
        rows = self.there(tokens[order // 2])
        parts = [expert(part) for expert, part in zip(self.experts, rows.chunk(len(self.experts)), strict=True)]
        return torch.zeros_like(tokens).index_add(0, order // 2, self.back(torch.cat(parts)))


class Layer(nn.Module):
    def __init__(self, listed: bool, count: int) -> None:
        super().__init__()
        self.norm, self.mixture = nn.LayerNorm(WIDTH), Mixture(listed, count)
        self.dense = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, value: torch.Tensor) -> Any:
        value = value + self.dense(value)
        return value + self.mixture(self.norm(value))


class Model(nn.Module):
    """The loss of tokens and labels."""

    def __init__(self, listed: bool = False, count: int = EXPERTS) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Layer(listed, count) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> Any:
        value = self.embed(tokens)
        for layer in self.layers:
            value = layer(value)
        return nn.functional.cross_entropy(self.head(value).flatten(0, 1).float(), labels.flatten())


# -- by hand ------------------------------------------------------------------------------------------------------------


def exchange(group: Any, count: int) -> tuple[Exchange, Exchange]:
    """What sends rows to the ranks of their experts and back: torchtitan's `AllToAllTokenDispatcher`; `count` are a rank's."""
    ranks = dist.get_world_size(group)

    def places(rows: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(rows), device=rows.device).view(ranks, count, -1).transpose(0, 1).flatten()

    def sent(rows: torch.Tensor) -> torch.Tensor:
        each = [len(rows) // ranks] * ranks
        return all_to_all_single_autograd(rows, each, each, group)

    def there(rows: torch.Tensor) -> torch.Tensor:
        rows = sent(rows)
        return rows[places(rows)]

    def back(rows: torch.Tensor) -> torch.Tensor:
        return sent(rows[places(rows).argsort()])

    return there, back


def divided_by_hand(case: Experts, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Experts between the ranks of `efsdp`, everything else between all; `mesh` has the axes `efsdp` and `ep`."""
    dense = init_device_mesh("cpu", (mesh.size(),), mesh_dim_names=("dp",))
    there, back = exchange(mesh.get_group("ep"), EXPERTS // case.experts)
    policy = MixedPrecisionPolicy(case.options.get("compute_dtype"), case.options.get("reduce_dtype"))
    options: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": case.options["reshard"]}
    layers: Any = module.get_submodule("layers")
    for layer in layers:
        home = layer.mixture if case.listed else layer.mixture.experts
        home.there, home.back = there, back
        for experts in layer.mixture.experts if case.listed else [layer.mixture.experts]:
            fully_shard(experts, mesh=mesh["efsdp"], **options)
        fully_shard(layer, mesh=dense, **options)
    fully_shard(module, mesh=dense, **options)
    return module


@dataclass(frozen=True)
class Experts:
    """How many ranks there are, between how many of them experts are divided, and how it is trained."""

    listed: bool
    device: str
    ranks: int
    experts: int
    options: Mapping[str, Any]
    training: Mapping[str, Any]
    batch: int
    length: int

    def plan(self) -> gp.Plan:
        plan = gp.trace(Model, self.listed).to(self.device)
        return plan.shard({"dp": self.ranks, "ep": self.experts}, **self.options)

    def workload(self) -> gp.Training:
        tokens = torch.ones(self.batch, self.length, dtype=torch.int64)
        return gp.Training(inputs=(tokens, tokens), **self.training)

    def mesh(self) -> DeviceMesh:
        return init_device_mesh("cpu", (self.ranks // self.experts, self.experts), mesh_dim_names=("efsdp", "ep"))

    def module(self) -> nn.Module:
        return Model(self.listed, EXPERTS // self.experts)

    def __str__(self) -> str:
        settings = [f"{key}={value}" for key, value in (*self.options.items(), *self.training.items())]
        shape = (
            f"{'listed' if self.listed else 'stacked'} {self.device} dp{self.ranks} ep{self.experts} {self.batch}x{self.length}"
        )
        return " ".join([shape, *settings]).replace("torch.", "")


def peaks_by_hand(case: Experts, rank: int = 0) -> dict[str, int]:
    """The bytes of each phase of training on one fake rank."""
    plan, training = case.plan(), case.workload()
    device, chosen = device_of(plan._bound, plan.decisions), with_implementation(training, case.device)
    with torch.device("meta"):
        module = case.module()
    tokens = torch.ones(case.batch, case.length, dtype=torch.int64, device="meta")
    with fake_world(case.ranks, rank):
        if training.checkpointing != "none":
            checkpoint_layers(module, training.checkpointing)
        divided_by_hand(case, module, case.mesh())
        chosen = replace(chosen, checkpointing="none")
        run = run_fake(module, (tokens, tokens), chosen, device, False, followed_rank(module, False))
    worse = {"optimizer": max(run.peaks["optimizer"][device], run.peaks["first_optimizer"][device])}
    return {phase: run.peaks[phase][device] for phase in PHASES} | worse


# -- configurations -----------------------------------------------------------------------------------------------------

_PRECISIONS: tuple[dict[str, Any], ...] = ({}, {"compute_dtype": BF16}, {"compute_dtype": BF16, "reduce_dtype": F32})


def drawn(count: int, seed: int = SEED) -> list[Experts]:
    source = random.Random(seed)
    return [_drawn(source) for _ in range(count)]


def _drawn(source: random.Random) -> Experts:
    ranks = source.choice([2, 4, 8])
    training: dict[str, Any] = {
        "optimizer": source.choice(["sgd", "sgd-momentum", "adamw"]),
        "checkpointing": source.choice(["none", "none", "full"]),
        "accumulate": source.choice([1, 1, 2]),
    }
    return Experts(
        source.random() < 0.4,
        source.choice(["cpu", "cuda"]),
        ranks,
        source.choice([each for each in (2, 4, 8) if each <= ranks]),
        source.choice(_PRECISIONS) | {"reshard": source.random() < 0.7},
        training,
        source.choice([1, 2, 4]),
        source.choice([16, 32, 64]),
    )


CONFIGURATIONS = drawn(60)
