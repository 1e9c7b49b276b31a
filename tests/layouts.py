"""Models, the ways torch shards them over several processes, and what must hold on every rank.

`torchrun --nproc-per-node N -m tests.layouts FOLDER` is one job: each rank checks every layout for N processes on each of its
models and writes what it found to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

import groundplan as gp
from groundplan.runtime import gathered

from . import jobs, zoo
from .law import content, named_tensors

ROOT = Path(__file__).parents[1]
SEED = 7
Tensors = dict[str, torch.Tensor]
Plan = dict[str, ParallelStyle]
Found = dict[str, Any]

# -- models of torch.nn -------------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A recurrent tagger with odd sizes, whose output layer is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(37, 13)
        self.lstm = nn.LSTM(13, 11, 2, batch_first=True, bidirectional=True)
        self.down = nn.Linear(22, 13)
        self.head = nn.Linear(13, 37, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.down(self.lstm(self.embed(words))[0]))
        return scores


class ConvNet(nn.Module):
    """Convolutions with batch norm, whose buffers hold values too."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU()) for a, b in ((3, 7), (7, 10))]
        self.stages = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.stages(images).flatten(1))
        return scores


class RoughBlock(nn.Module):
    """Truncated normals that reject many draws, between ordinary ones; weight norm, new and old; fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.rand(1, 160))
        self.up, self.down = nn.Linear(160, 130), nn.Linear(130, 160)
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=1.0, a=-1.5, b=1.5)
        self.new = parametrizations.weight_norm(nn.Linear(160, 3))
        self.old = nn.utils.weight_norm(nn.Linear(3, 160))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.gate * self.down(torch.relu(self.up(x))) / 160
        normed: torch.Tensor = x + self.old(self.new(x))
        return normed


class Rough(nn.Module):
    """What is awkward to draw in parts or to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RoughBlock() for _ in range(2))
        self.shift = nn.Parameter(torch.randn(1))
        self.head = nn.Linear(160, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        scores: torch.Tensor = self.head(x) + self.shift
        return scores


def transformer() -> nn.Module:
    return nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)


# -- batches and losses -------------------------------------------------------------------------------------------------


def words(vocabulary: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def numbers(model: nn.Module, *shape: int) -> torch.Tensor:
    """Input of the model's dtype."""
    found = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return found.to(next(model.parameters()).dtype)


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """The loss of scores over classes, for targets that are always the same."""
    flat = scores.flatten(0, -2).float()
    return F.cross_entropy(flat, words(scores.shape[-1], flat.shape[0]))


def causal_loss(model: nn.Module) -> torch.Tensor:
    places = torch.arange(8).expand(2, 8)  # said here, as the model sees a part of the sequence only where that is sharded
    return entropy(model(input_ids=words(96, 2, 8), position_ids=places, use_cache=False).logits)


def masked_loss(model: nn.Module) -> torch.Tensor:
    return entropy(model(input_ids=words(96, 2, 8)).logits)


def translation_loss(model: nn.Module) -> torch.Tensor:
    return entropy(model(input_ids=words(96, 2, 8), decoder_input_ids=words(96, 2, 5), use_cache=False).logits)


def image_loss(model: nn.Module) -> torch.Tensor:
    return entropy(model(pixel_values=numbers(model, 3, 3, 32, 32)).logits)


def transformer_loss(model: nn.Module) -> torch.Tensor:
    found, target = model(numbers(model, 2, 8, 32), numbers(model, 2, 5, 32)), numbers(model, 2, 5, 32)
    return F.mse_loss(found.float(), target.float())


def tagger_loss(model: nn.Module) -> torch.Tensor:
    return entropy(model(words(37, 3, 7)))


def classes_loss(*shape: int) -> Callable[[nn.Module], torch.Tensor]:
    return lambda model: entropy(model(numbers(model, *shape)))


# -- tensor parallel plans ----------------------------------------------------------------------------------------------


class ColumnsOfConv1D(ColwiseParallel):
    """`ColwiseParallel` for GPT-2's own linear layer, whose weight is transposed."""

    weight: Placement = Shard(1)
    bias: Placement = Shard(0)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        before = partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts)
        after = partial(self._prepare_output_fn, self.output_layouts, self.use_local_output)
        return distribute_module(module, device_mesh, self._place, before, after)

    def _place(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(module.named_parameters()):
            module.register_parameter(key, nn.Parameter(distribute_tensor(parameter, mesh, [getattr(self, key)])))


class RowsOfConv1D(ColumnsOfConv1D):
    """`RowwiseParallel` for it."""

    weight: Placement = Shard(0)
    bias: Placement = Replicate()

    def __init__(self) -> None:
        super().__init__(input_layouts=Shard(-1), output_layouts=Replicate())
        self.desired_input_layouts: Any = self.input_layouts


def split(columns: str, rows: str) -> Plan:
    """Linear layers that are divided by columns, and those behind them by rows, each given by names in one string."""
    return {name: ColwiseParallel() for name in columns.split()} | {name: RowwiseParallel() for name in rows.split()}


def vocabulary(embed: str, head: str) -> Plan:
    """Embedding and output layer, both divided by words."""
    return {embed: RowwiseParallel(input_layouts=Replicate()), head: ColwiseParallel(output_layouts=Replicate())}


def under(prefix: str, plan: Mapping[str, ParallelStyle]) -> Plan:
    return {f"{prefix}{name}": style for name, style in plan.items()}


_LAYER = "model.layers.*."
ATTENTION = under(f"{_LAYER}self_attn.", split("q_proj k_proj v_proj", "o_proj")) | vocabulary("model.embed_tokens", "lm_head")
LLAMA = ATTENTION | under(f"{_LAYER}mlp.", split("gate_proj up_proj", "down_proj"))
GPT2 = under("transformer.h.*.mlp.", {"c_fc": ColumnsOfConv1D(), "c_proj": RowsOfConv1D()})  # the attention is one matrix
GPT2 |= vocabulary("transformer.wte", "lm_head")
BERT = under("bert.encoder.layer.*.attention.", split("self.query self.key self.value", "output.dense"))
BERT |= under("bert.encoder.layer.*.", split("intermediate.dense", "output.dense"))
VIT = under("vit.layers.*.attention.", split("q_proj k_proj v_proj", "o_proj"))
VIT |= under("vit.layers.*.mlp.", split("fc1", "fc2"))
T5 = under("encoder.block.*.layer.1.DenseReluDense.", split("wi", "wo"))  # the attention counts on all heads
T5 |= under("decoder.block.*.layer.2.DenseReluDense.", split("wi", "wo"))
TRANSFORMER = under("*coder.layers.*.", split("linear1", "linear2"))  # nn.MultiheadAttention is not made for it


def sequence_plan() -> Plan:
    """`LLAMA` with the sequence divided between the layers, and the words' scores left divided for the loss."""
    whole, norm = Replicate(), SequenceParallel()
    into_attention = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": whole}
    )
    return LLAMA | {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=Shard(1)),
        f"{_LAYER}input_layernorm": norm,
        f"{_LAYER}post_attention_layernorm": norm,
        "model.norm": norm,
        f"{_LAYER}self_attn": into_attention,
        f"{_LAYER}mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=whole),
        f"{_LAYER}self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        f"{_LAYER}mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    }


# -- the models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A constructor, the pattern of its repeated blocks' names, a loss on a batch, and how to divide it by tensors.

    `tie` names two weights that one tensor is, where the plan divides both: torch divides each by itself, and the user ties anew.
    """

    build: Callable[[], nn.Module]
    blocks: str
    loss: Callable[[nn.Module], torch.Tensor]
    plan: Plan
    tie: tuple[str, str] | None = None

    def blocks_of(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.named_modules() if re.fullmatch(self.blocks, name)]


def published(name: str) -> Callable[[], nn.Module]:
    """A constructor of the zoo; transformers is imported when it is first called."""
    return lambda: _published()[name]()


_published = cache(zoo.transformers_types)
_DECODER = r"model\.layers\.\d+"
MODELS = {
    "Llama": Model(published("Llama"), _DECODER, causal_loss, LLAMA, ("lm_head.weight", "model.embed_tokens.weight")),
    "Mistral": Model(published("Mistral"), _DECODER, causal_loss, LLAMA),
    "Qwen3": Model(published("Qwen3"), _DECODER, causal_loss, LLAMA),
    "Mixtral": Model(published("Mixtral"), _DECODER, causal_loss, ATTENTION),
    "GPT-2": Model(published("GPT-2"), r"transformer\.h\.\d+", causal_loss, GPT2, ("lm_head.weight", "transformer.wte.weight")),
    "BERT": Model(published("BERT"), r"bert\.encoder\.layer\.\d+", masked_loss, BERT),
    "T5": Model(published("T5"), r"(en|de)coder\.block\.\d+", translation_loss, T5),
    "ViT": Model(published("ViT"), r"vit\.layers\.\d+", image_loss, VIT),
    "nn.Transformer": Model(transformer, r"(en|de)coder\.layers\.\d+", transformer_loss, TRANSFORMER),
    "tagger": Model(Tagger, "lstm", tagger_loss, vocabulary("embed", "head"), ("head.weight", "embed.weight")),
    "conv net": Model(ConvNet, r"stages\.\d+", classes_loss(4, 3, 6, 6), split("head.0", "head.2")),
    "rough": Model(Rough, r"blocks\.\d+", classes_loss(4, 160), under("blocks.*.", split("up", "down"))),
}


# -- the layouts --------------------------------------------------------------------------------------------------------


@cache
def mesh_of(**axes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))


def line() -> DeviceMesh:
    """All processes in a row."""
    return mesh_of(data=dist.get_world_size())


def fsdp(module: nn.Module, model: Model, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    for name in model.blocks_of(module):
        fully_shard(module.get_submodule(name), mesh=mesh or line(), **options)
    fully_shard(module, mesh=mesh or line(), **options)
    return module


def by_columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % 2 == 0 else None


def embedding_apart(module: Any, model: Model) -> nn.Module:
    """One of two tied tensors in a unit of its own: torch then shards each by itself, and they are no longer one."""
    fully_shard(module.get_input_embeddings(), mesh=line())
    return fsdp(module, model)


def hsdp(module: nn.Module, model: Model) -> nn.Module:
    return fsdp(module, model, mesh_of(copies=2, data=2))


def compiled(module: nn.Module, model: Model) -> nn.Module:
    wrapper: Any = torch.compile(fsdp(module, model))
    assert isinstance(wrapper, nn.Module)
    return wrapper


def compiled_in_place(module: nn.Module, model: Model) -> nn.Module:
    for name in model.blocks_of(module):
        module.get_submodule(name).compile()
    fsdp(module, model).compile()
    return module


def checkpointed(module: nn.Module, model: Model) -> nn.Module:
    names = model.blocks_of(module)
    for name in names:
        module.set_submodule(name, checkpoint_wrapper(module.get_submodule(name)))
        fully_shard(module.get_submodule(name), mesh=line())
    fully_shard(module, mesh=line())
    return module


def tensor_parallel(module: nn.Module, model: Model, mesh: DeviceMesh | None = None, plan: Plan | None = None) -> nn.Module:
    parallelize_module(module, mesh or line(), plan or model.plan)
    if model.tie:
        one, other = model.tie
        owner, _, key = one.rpartition(".")
        setattr(module.get_submodule(owner), key, module.get_parameter(other))
    return module


def sequence_parallel(module: nn.Module, model: Model) -> nn.Module:
    return tensor_parallel(module, model, plan=sequence_plan())


def both(module: nn.Module, model: Model) -> nn.Module:
    mesh = mesh_of(data=2, tensor=2)
    return fsdp(tensor_parallel(module, model, mesh["tensor"]), model, mesh["data"])


def experts(module: nn.Module, model: Model) -> nn.Module:
    for each in module.modules():
        for key, parameter in list(each.named_parameters(recurse=False)):
            if parameter.dim() == 3:
                each.register_parameter(key, nn.Parameter(distribute_tensor(parameter, line(), [Shard(0)], src_data_rank=None)))
    return module


def replicated(module: nn.Module, model: Model) -> nn.Module:
    found: nn.Module = replicate(module)
    return found


def unchanged(module: nn.Module, model: Model) -> nn.Module:
    return module


def without_last_layer(module: Any) -> None:
    del module.model.layers[-1]


@dataclass(frozen=True)
class Layout:
    """What the user's code does with a meta module, for so many processes and for these models.

    `edit` is done to the module before, and to the one on a single device; `after` wraps what has been filled. `unties` says that
    torch keeps no ties, `no_step` why no step of training is compared.
    """

    worlds: tuple[int, ...]
    shard: Callable[[nn.Module, Model], nn.Module]
    models: tuple[str, ...] = tuple(MODELS)
    edit: Callable[[nn.Module], None] | None = None
    after: Callable[[nn.Module], nn.Module] | None = None
    cast: torch.dtype | None = None
    seed: int | None = SEED
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    tolerance: float = 1e-4
    unties: bool = False
    no_step: str | None = None


_BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
_OFFLOAD = CPUOffloadPolicy(pin_memory=False)
_COMPILED = "compiling takes long, and the values do not depend on it"
_APART = "two tensors that were one are trained apart"
_EXPERTS = "the experts of transformers do not compute with DTensors"
LAYOUTS = {
    "FSDP": Layout((1, 2, 3, 4), fsdp),
    "FSDP, not resharding": Layout((2,), partial(fsdp, reshard_after_forward=False), ("Qwen3", "nn.Transformer")),
    "FSDP, mixed precision": Layout((2,), partial(fsdp, mp_policy=_BF16), ("Llama", "T5"), tolerance=0.005),
    "FSDP, offloaded": Layout((2,), partial(fsdp, offload_policy=_OFFLOAD), ("Mistral", "conv net")),
    "FSDP by columns": Layout((2,), partial(fsdp, shard_placement_fn=by_columns), ("BERT", "rough")),
    "FSDP, embedding apart": Layout((2,), embedding_apart, ("Llama", "GPT-2"), unties=True, no_step=_APART),
    "FSDP, last layer deleted": Layout((2,), fsdp, ("Llama",), edit=without_last_layer),
    "FSDP, cast": Layout((3,), fsdp, ("Llama", "BERT", "tagger", "rough"), cast=torch.bfloat16, tolerance=0.005),
    "FSDP, no seed": Layout((3,), fsdp, ("Llama", "rough"), seed=None),
    "FSDP over checkpoints": Layout((2,), checkpointed),
    "FSDP, compiled": Layout((2,), compiled, ("Llama", "BERT", "tagger"), no_step=_COMPILED),
    "FSDP, compiled in place": Layout((2,), compiled_in_place, ("Llama", "BERT", "tagger"), no_step=_COMPILED),
    "HSDP": Layout((4,), hsdp),
    "TP": Layout((2,), tensor_parallel),
    "TP of sequence and loss": Layout((2,), sequence_parallel, ("Llama",), context=loss_parallel),
    "TP, cast": Layout((2,), tensor_parallel, ("Llama", "rough"), cast=torch.bfloat16, tolerance=0.005),
    "TP, no seed": Layout((2,), tensor_parallel, ("GPT-2", "rough"), seed=None),
    "FSDP x TP": Layout((4,), both),
    "experts": Layout((2, 4), experts, ("Mixtral",), no_step=_EXPERTS),
    "DDP": Layout((2,), unchanged, after=DistributedDataParallel),
    "replicate": Layout((2,), replicated),
}


def cases(world: int) -> list[tuple[str, str]]:
    """The layouts for so many processes, each with its models."""
    return [(name, model) for name, layout in LAYOUTS.items() if world in layout.worlds for model in layout.models]


# -- on a single device -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Single:
    """What there is on a single device: the plan, eager's values, ties and generator, keyed values, losses around a step."""

    plan: gp.Plan
    values: Tensors
    ties: list[list[str]]
    generator: torch.Tensor
    keyed: Tensors
    keyed_generator: torch.Tensor
    losses: list[float]


@cache
def single(
    name: str, cast: torch.dtype | None = None, edit: Callable[[nn.Module], None] | None = None, seed: int | None = SEED
) -> Single:
    plan = gp.trace(MODELS[name].build)
    plan = plan.cast(cast) if cast else plan
    torch.manual_seed(SEED)
    keyed = plan.materialize(seed, rng="keyed")
    keyed_generator = torch.get_rng_state()
    torch.manual_seed(SEED)
    eager = MODELS[name].build().to(cast)
    generator = torch.get_rng_state()
    if edit:
        edit(keyed)
        edit(eager)
    values = {key: tensor.detach().clone() for key, tensor in members(eager).items()}
    ties = ties_of(members(eager))
    return Single(plan, values, ties, generator, members(keyed), keyed_generator, losses(eager, MODELS[name]))


def losses(module: nn.Module, model: Model, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> list[float]:
    """The loss before a step of training, and after it."""
    module.eval()  # no dropout
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with context():
        before = model.loss(module)
        before.backward()
        optimizer.step()
        optimizer.zero_grad()
        after = model.loss(module)
    return [float(whole(loss)) for loss in (before, after)]


def members(module: nn.Module) -> Tensors:
    """Parameters and buffers under every name, without what wrappers add to it."""
    found = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {re.sub(r"_checkpoint_wrapped_module\.|_orig_mod\.|^module\.", "", name): tensor for name, tensor in found}


def ties_of(tensors: Tensors) -> list[list[str]]:
    """Names that stand for one tensor."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


# -- on one of several ranks --------------------------------------------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, gathered from every rank."""
    return gathered.whole(tensor).detach()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def differing(expected: Tensors, found: Tensors) -> list[str]:
    """The names under which not the same bits are found, or nothing. Every rank has to call, with the same names."""
    gathered = {name: whole(tensor) for name, tensor in found.items()}
    missing = sorted(expected.keys() ^ gathered.keys())
    return missing + [name for name, tensor in gathered.items() if name in expected and not _same(expected[name], tensor)]


def _same(expected: torch.Tensor, found: torch.Tensor) -> bool:
    same = (expected.dtype, expected.shape) == (found.dtype, found.shape)
    return same and content(expected) == content(found)


def left_on_meta(module: nn.Module) -> list[str]:
    """Tensors without values, plain attributes among them."""
    return [name for name, tensor in named_tensors(module).items() if local(tensor).is_meta]


class Case:
    """One layout of one model on this rank."""

    def __init__(self, layout: str, model: str) -> None:
        self.layout, self.model = LAYOUTS[layout], MODELS[model]
        self.single = single(model, self.layout.cast, self.layout.edit, self.layout.seed)
        self.module: nn.Module | None = None

    def values(self) -> Found:
        """Whether this rank has eager's values, ties and generator."""
        module = self._filled("eager")
        generator = torch.equal(torch.get_rng_state(), self.single.generator)
        tensors = members(module)
        wrong = differing(self.single.values, tensors)
        expected = [] if self.layout.unties else self.single.ties
        found = {"meta": left_on_meta(module), "generator": generator, "ties": ties_of(tensors) == expected}
        self.module = self.layout.after(module) if self.layout.after else module
        return found | {"differing": wrong, "differing, wrapped": differing(self.single.values, members(self.module))}

    def keyed(self) -> Found:
        """Whether another module, filled with keyed values, has those of a single device, and leaves the generator alone."""
        module = self._filled("keyed")
        expected = self.single.keyed_generator if self.layout.seed is None else _elsewhere().get_state()
        generator = torch.equal(torch.get_rng_state(), expected)
        return {"differing": differing(self.single.keyed, members(module)), "meta": left_on_meta(module), "generator": generator}

    def step(self) -> Found:
        """The losses around a step of training."""
        assert self.module is not None, "there is no module, see its values"
        if self.layout.no_step:
            return {}
        return {"losses": losses(self.module, self.model, self.layout.context), "expected": self.single.losses}

    def _filled(self, rng: str) -> nn.Module:
        """The meta module, sharded and filled. Before, the generator stands elsewhere on each rank, unless it says the values."""
        module = self.single.plan.meta_module()
        if self.layout.edit:
            self.layout.edit(module)
        sharded = self.layout.shard(module, self.model)
        if self.layout.seed is None:
            torch.manual_seed(SEED)
        else:
            torch.set_rng_state(_elsewhere().get_state())
        return gp.materialize(sharded, self.layout.seed, rng=rng)


def _elsewhere() -> torch.Generator:
    return torch.Generator().manual_seed(100 + dist.get_rank())


def checked(layout: str, model: str) -> Found:
    """What this rank finds, or the error that it meets, for each of a case's checks."""
    found: Found = {"layout": layout, "model": model}
    try:
        case = Case(layout, model)
    except Exception:
        return found | {check: {"error": traceback.format_exc()} for check in CHECKS}
    for check in CHECKS:
        try:
            found[check] = getattr(case, check)()
        except Exception:
            found[check] = {"error": traceback.format_exc()}
    return found


CHECKS = ("values", "keyed", "step")

# -- what is usually done instead ---------------------------------------------------------------------------------------


def recipe(model: Model) -> nn.Module:
    """The meta device, `fully_shard`, `to_empty`, then every `reset_parameters`; fresh memory holds a pattern."""
    with torch.device("meta"):
        module = model.build()
    fsdp(module, model).to_empty(device="cpu")
    for tensor in members(module).values():
        local(tensor).copy_(garbage(local(tensor)))
    torch.manual_seed(SEED)
    for each in module.modules():
        if callable(reset := getattr(each, "reset_parameters", None)):
            reset()
    return module


def garbage(tensor: torch.Tensor) -> torch.Tensor:
    """What stands for whatever fresh memory held."""
    return torch.full_like(tensor, 0.123 if tensor.is_floating_point() else 123)


def compared_with_recipe(name: str) -> Found:
    """How many tensors of one model are not eager's, by the usual recipe and by groundplan. Every rank has to call."""
    known, model = single(name), MODELS[name]
    usual = members(recipe(model))
    ties = ties_of(usual)
    filled = gp.materialize(fsdp(known.plan.meta_module(), model), SEED)
    return {
        "model": name,
        "tensors": len(known.values),
        "recipe: differ": len(differing(known.values, usual)),
        "never initialized": sum(torch.equal(whole(tensor), garbage(whole(tensor))) for tensor in usual.values()),
        "ties lost": sum(tie not in ties for tie in known.ties),
        "groundplan: differ": len(differing(known.values, members(filled))),
    }


# -- a job --------------------------------------------------------------------------------------------------------------


def launch(world: int, folder: Path, *what: str) -> list[Found]:
    """Run one job of so many processes, and return what each rank has found; raises `RuntimeError` with what a crash says."""
    return jobs.launch("tests.layouts", folder, *what, world=world, seconds=900)


def main(folder: str, *what: str) -> None:
    """One rank's work: every case for this number of processes, and the recipe; or what is named of the two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    found: Found = {}
    if "recipe" in (what or ("recipe",)) and dist.get_world_size() == 2:
        found["recipe"] = [compared_with_recipe(name) for name in MODELS]
    if "cases" in (what or ("cases",)):
        found["cases"] = [checked(*case) for case in cases(dist.get_world_size())]
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
