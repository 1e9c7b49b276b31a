"""Sequence and loss parallelism, as a trace of a step runs them: torch's own styles, chosen by a plan's rules alone.

A plan says which layers are divided by columns and by rows. What lies between them follows from where tensors go, so that no
other rule is needed:

1. what a layer by rows puts out stays a DTensor divided along the sequence (it is reduce-scattered), and so does what an
   embedding puts out; norms, dropout and residual sums work on it by DTensor's own propagation, as `SequenceParallel` has it
2. where it comes to a layer by columns it is gathered, once for all such layers of a module (`PrepareModuleInput`)
3. outside the layers that repeat, a matrix that no rule divides is given the whole sequence; so are attention that none
   divides, and modules that send tokens to experts
4. with `loss_parallel`, logits stay divided along the vocabulary, and the loss is torch's `loss_parallel()`

A plain tensor that meets a DTensor is taken to be the same on all ranks (`_Together`). This is for reckoning: `parallel.py` does
not carry it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, loss_parallel, parallelize_module
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planner.experts import expert_modules, found_experts, homes_of_experts
from ..planner.sharding import Sharding, matches, repeated_layers
from ..tracer.errors import DecisionError
from ..tracer.graph import ParamGraph
from .parallel import apply_sharding, tie_again

WHOLE = Replicate()


def is_divided_between(sharding: Sharding) -> bool:
    """Whether what lies between the divided layers is divided too."""
    return sharding.size("tensor") > 1 and (sharding.sequence_parallel or sharding.loss_parallel)


def divide_layers(module: nn.Module, sharding: Sharding, graph: ParamGraph, mesh: DeviceMesh) -> None:
    """Divide a meta module along the tensor axis, the only one of `sharding`, as it is to be traced."""
    if not is_divided_between(sharding):
        apply_sharding(module, sharding, graph, mesh)
        return
    _divide_between(module, sharding, graph, mesh)
    tie_again(module, graph)


def _divide_between(module: nn.Module, sharding: Sharding, graph: ParamGraph, mesh: DeviceMesh) -> None:
    """Divide single layers by the plan's rules, and what lies between; raises `DecisionError` for what torch has no style."""
    modules, experts = dict(module.named_modules()), _experts(sharding, graph)
    styles = {name: style for name, style in sharding.styles(graph).items() if name in modules and name not in experts}
    heads = heads_of(styles, graph)
    if sharding.loss_parallel and not heads:
        raise DecisionError(
            "loss_parallel=True leaves logits divided along the vocabulary, and no rule divides a layer outside those that "
            'repeat by columns: add one, as {"lm_head": "colwise_gather_output"}'
        )
    chosen = {name: _style(name, style, sharding, name in heads) for name, style in styles.items()}
    _gather_once(module, _by_columns(styles))
    if sharding.sequence_parallel:
        _divide_sequences(module, sharding, styles, graph, mesh)
    parallelize_module(module, mesh, chosen)


def _experts(sharding: Sharding, graph: ParamGraph) -> set[str]:
    """Modules that hold experts which the expert axis divides, so that the tensor axis does not."""
    return set(expert_modules(sharding.experts, graph)) if sharding.experts else set()


@contextmanager
def between_layers(sharding: Sharding, mesh: DeviceMesh) -> Iterator[None]:
    """The surroundings that such a module runs in."""
    if not is_divided_between(sharding):
        yield
        return
    with _Together(mesh), loss_parallel() if sharding.loss_parallel else nullcontext():
        yield


# -- styles -------------------------------------------------------------------------------------------------------------


_ALIKE = {"colwise_rep": "colwise_gather_output", "rowwise_rep": "rowwise"}
"""Other names that transformers has had for the same styles."""


def _by_columns(styles: Mapping[str, str]) -> list[str]:
    return [name for name, style in styles.items() if style in ("colwise", "colwise_gather_output", "colwise_rep")]


def heads_of(styles: Mapping[str, str], graph: ParamGraph) -> set[str]:
    """The layers whose output is divided along the vocabulary: those by columns outside the layers that repeat."""
    layers = repeated_layers(graph)
    return {name for name in _by_columns(styles) if not _is_inside(name, layers)}


def _style(name: str, style: str, sharding: Sharding, head: bool) -> ParallelStyle:
    style = _ALIKE.get(style, style)
    if style not in _STYLES:
        raise DecisionError(f"{name} has the style {style!r}, which torch's parallelize_module has not; give rules of your own")
    if head and sharding.loss_parallel:
        return ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    return _STYLES[style](sharding.sequence_parallel)


class _Rows(RowwiseParallel):
    """`RowwiseParallel` whose output stays divided along the sequence, the last dim but one, whatever dims it has."""

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: Any) -> Any:
        return outputs.redistribute(placements=(sequence(outputs),))


class _Columns(ColwiseParallel):
    """`ColwiseParallel` of an embedding, whose output is divided along the sequence."""

    @staticmethod
    def _prepare_output_fn(output_layouts: Any, use_local_output: bool, mod: Any, outputs: Any, device_mesh: Any) -> Any:
        return outputs.redistribute(placements=(sequence(outputs),))


_STYLES: dict[str, Callable[[bool], ParallelStyle]] = {
    "colwise": lambda _: ColwiseParallel(),
    "colwise_gather_output": lambda _: ColwiseParallel(output_layouts=WHOLE),
    "embedding_colwise": lambda between: _Columns() if between else ColwiseParallel(output_layouts=WHOLE),
    "rowwise": lambda between: _Rows() if between else RowwiseParallel(),
    "rowwise_split_input": lambda between: (_Rows if between else RowwiseParallel)(input_layouts=WHOLE),
    "embedding_rowwise": lambda between: (_Rows if between else RowwiseParallel)(input_layouts=WHOLE),
}
"""What makes each style, by whether what lies between is divided."""


def sequence(tensor: torch.Tensor) -> Shard:
    """Divided along the sequence: of [batch, length, width] or [tokens, width] the last dim but one."""
    return Shard(max(tensor.dim() - 2, 0))


# -- what lies between --------------------------------------------------------------------------------------------------


def _divide_sequences(
    module: nn.Module, sharding: Sharding, styles: Mapping[str, str], graph: ParamGraph, mesh: DeviceMesh
) -> None:
    """Embeddings that no rule divides begin what is divided; other matrices outside the layers that repeat are given it whole."""
    layers = repeated_layers(graph)
    for home in _homes_of_experts(sharding, graph):
        _take_whole(module.get_submodule(home), mesh)
    for name, each in module.named_modules():
        if name in styles:
            continue
        if isinstance(each, nn.Embedding):
            each.register_forward_hook(lambda _, __, output: divided(output, mesh))
        elif not _is_inside(name, layers) and any(own.dim() > 1 for own in each.parameters(recurse=False)):
            each.register_forward_pre_hook(lambda _, args, kwargs: whole((args, kwargs)), with_kwargs=True)


def _homes_of_experts(sharding: Sharding, graph: ParamGraph) -> list[str]:
    """The modules that send tokens to experts: their code goes by single tokens, of the whole sequence."""
    try:
        patterns = sharding.experts or found_experts(graph)
    except DecisionError:
        return []  # there are none
    return [home for home in homes_of_experts(patterns, graph) if home]


def _take_whole(home: nn.Module, mesh: DeviceMesh) -> None:
    """Give a module the whole sequence, and divide what it gives (`PrepareModuleInputOutput`)."""
    home.register_forward_pre_hook(lambda _, args, kwargs: whole((args, kwargs)), with_kwargs=True)
    again = partial(divided, mesh=mesh)
    home.register_forward_hook(lambda _, __, output: tree_map_only(torch.Tensor, again, output))


def _is_inside(name: str, layers: Iterable[str]) -> bool:
    parts = name.split(".")
    return any(matches(layer, ".".join(parts[: layer.count(".") + 1])) for layer in layers)


def divided(output: Any, mesh: DeviceMesh) -> Any:
    """What is the same on all ranks, as a DTensor divided along the sequence; only what has one."""
    if not isinstance(output, torch.Tensor) or isinstance(output, DTensor) or output.dim() < 3:
        return output
    return DTensor.from_local(output, mesh, (WHOLE,), run_check=False).redistribute(placements=(sequence(output),))


def whole(value: Any) -> Any:
    """The same with DTensors gathered to plain tensors."""
    return tree_map_only(DTensor, lambda each: each.redistribute(placements=(WHOLE,)).to_local(), value)


class _Gathered:
    """What has been gathered for the layers by columns of one module: the next one is given the same, while the module runs."""

    def __init__(self) -> None:
        self.source: Any = None
        self.tensor: Any = None

    def of(self, given: Any) -> Any:
        if not isinstance(given, DTensor) or given.placements == (WHOLE,):
            return given
        if self.source is not given:
            self.source, self.tensor = given, given.redistribute(placements=(WHOLE,))
        return self.tensor

    def forget(self, *_: Any) -> None:
        self.source = self.tensor = None


def _gather_once(module: nn.Module, names: Iterable[str]) -> None:
    known: dict[str, _Gathered] = {}
    for name in names:
        owner = _calling(module, name)
        if owner not in known:
            known[owner] = _Gathered()
            module.get_submodule(owner).register_forward_hook(known[owner].forget, always_call=True)
        gathered = known[owner]
        layer = module.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, gathered=gathered: tuple(map(gathered.of, args)), prepend=True)


def _calling(module: nn.Module, name: str) -> str:
    """The module whose code calls the one called `name`: the innermost around it that is no mere list."""
    owner = name.rpartition(".")[0]
    while isinstance(module.get_submodule(owner), nn.ModuleList | nn.ModuleDict):
        owner = owner.rpartition(".")[0]
    return owner


class _Together(TorchFunctionMode):
    """Plain tensors that an op is given together with DTensors are the same on all ranks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self._mesh = mesh

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.backward, torch.autograd.backward):
            return self._backward(args[0])
        if len(args) + len(kwargs) < 2 or getattr(func, "__name__", "") in _NOT_OPS:
            return func(*args, **kwargs)
        kinds = {isinstance(each, DTensor) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        if func in _ATTENTION and True in kinds:
            return _attended(func, args, kwargs)
        if len(kinds) < 2:
            return func(*args, **kwargs)
        if func is torch.cat:  # which leaves out tensors of shape [0], as caches begin with
            args = ([each for each in args[0] if each.shape != (0,)], *args[1:])
        args, kwargs = tree_map_only(torch.Tensor, self._same, (args, kwargs))
        return func(*args, **kwargs)

    def _backward(self, loss: torch.Tensor) -> None:
        """`torch.autograd.backward` of one loss, with this mode in force for what a checkpoint runs again."""
        given = (loss,), (torch.ones_like(loss, memory_format=torch.preserve_format),)
        with self:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.run_backward(*given, False, False, (), allow_unreachable=True, accumulate_grad=True)

    def _same(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, self._mesh, (WHOLE,), run_check=False)


def _attended(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Attention that no rule divides sees the whole sequence; what it puts out is divided as its queries were."""
    query = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, DTensor))
    args, kwargs = whole((args, kwargs))

    def again(output: torch.Tensor) -> torch.Tensor:
        if output.shape[: query.dim() - 1] != query.shape[:-1]:
            return output  # the weights of attention, where they are asked for
        return DTensor.from_local(output, query.device_mesh, (WHOLE,), run_check=False).redistribute(placements=query.placements)

    return tree_map_only(torch.Tensor, again, func(*args, **kwargs))


_ATTENTION = (functional.scaled_dot_product_attention, functional.multi_head_attention_forward)
_NOT_OPS = ("__get__", "__set__")
