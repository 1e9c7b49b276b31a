"""What an expert axis makes of a layer's experts in a trace: a rank has a part of them, and rows of tokens go to them and back.

Tokens are taken to be spread evenly. Then the experts of a rank work on as many rows as its own tokens make, from all ranks
instead of from one, so that they are traced on a rank's own tokens, and

1. stacked experts are as many as a rank has
2. before and after the experts, in the forward and in the backward, there are the buffers of an exchange (`expert_exchange`)
3. along a tensor axis, whose ranks the expert axis takes, each rank sends a part of the tokens that all of them have
   (torchtitan's `ReordererSequenceParallel`)

Gradients of experts in a list, which are whole on one rank each, are those of the rank's own (`planner/expert_profile.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planner.exchanges import expert_exchange
from ..planner.experts import expert_modules, experts_of
from ..planner.placing import owners
from ..planner.sharding import Sharding
from ..tracer.graph import ParamGraph
from .allocations import Allocations, Origin


class Exchanges:
    """The experts of a module that is traced, while what it allocates is followed."""

    def __init__(self, sharding: Sharding, graph: ParamGraph) -> None:
        experts = experts_of(sharding.experts, graph)
        self._ranks, self._modules = sharding.size("expert"), set(expert_modules(sharding.experts, graph))
        self._listed: dict[str, int] = {}
        for name, each in experts.items():
            if each.number is not None:
                self._listed[next(owner for owner in owners(name) if owner in self._modules)] = each.total
        self._stacked = {name: each.total for name, each in experts.items() if each.number is None}
        self._found: Allocations | None = None
        self._kept: dict[str, torch.Tensor] = {}

    def watch(self, module: nn.Module, mesh: DeviceMesh | None) -> None:
        """Have the experts of `module` exchange what they are given and give, along a tensor axis a part of it on each rank."""
        for name, total in self._stacked.items():
            owner, _, key = name.rpartition(".")
            _narrow(module.get_submodule(owner), key, total, self._ranks)
        for name in self._modules:
            experts = module.get_submodule(name)
            if mesh is not None:
                _take_parts(experts, mesh)
            _Exchanging(self, name).register(experts)
        for home in dict.fromkeys(map(_calling, self._listed)):
            module.get_submodule(home).register_forward_hook(lambda *_, home=home: self._let_go(home), always_call=True)

    @contextmanager
    def followed(self, found: Allocations) -> Iterator[None]:
        """While `found` follows a run."""
        self._found = found
        try:
            yield
        finally:
            self._found = None

    def total(self, name: str) -> int:
        """How many experts of a list there are, each of which is given a part of the rows; 1 for stacked ones."""
        return self._listed.get(name, 1)

    def keep(self, name: str, nbytes: int) -> None:
        """The buffers of experts in a list, which are called one by one: there until what calls them is done."""
        if name in self._listed and self._found is not None:
            home = _calling(name)
            with self._found.within(Origin("communication buffer", module=home)):
                self._kept.setdefault(home, torch.empty(nbytes, dtype=torch.uint8))

    def _let_go(self, home: str) -> None:
        self._kept.pop(home, None)

    def take(self, nbytes: int, name: str) -> None:
        """The buffers of one exchange come and go."""
        if self._found is not None:
            with self._found.within(Origin("communication buffer", module=name)):
                self._found.taken(nbytes, "exchange of tokens")


def _calling(expert: str) -> str:
    """The module that calls an expert in a list."""
    return expert.rpartition(".")[0].rpartition(".")[0]


def _narrow(owner: nn.Module, key: str, total: int, ranks: int) -> None:
    """Leave `owner` a rank's part of a stack of experts, and of the numbers that its code counts them by."""
    stack = owner._parameters.get(key)
    if stack is None or stack.shape[0] != total:
        return  # another of its names came first
    owner._parameters[key] = nn.Parameter(stack.detach()[: total // ranks].clone(), stack.requires_grad)
    sizes = {size for each in owner.parameters(recurse=False) for size in each.shape[1:]}
    for name, value in list(vars(owner).items()):
        if type(value) is int and value == total and (total not in sizes or "expert" in name):
            setattr(owner, name, total // ranks)


class _Exchanging:
    """Hooks of one module of experts."""

    def __init__(self, exchanges: Exchanges, name: str) -> None:
        self._exchanges, self._name = exchanges, name
        self._nbytes = self._rows = 0

    def register(self, experts: nn.Module) -> None:
        experts.register_forward_pre_hook(self._dispatch, with_kwargs=True)
        experts.register_forward_hook(self._combine)

    def _dispatch(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = _tokens_of((args, kwargs))
        if tokens is None:
            return None
        count = _top_k(tokens, (args, kwargs)) * self._exchanges.total(self._name)
        self._nbytes = expert_exchange(tokens.nbytes, count)
        self._rows = tokens.shape[:-1].numel() * _top_k(tokens, (args, kwargs))
        self._exchanges.keep(self._name, self._nbytes)
        passed = self._passed(tokens)
        return tree_map_only(torch.Tensor, lambda each: passed if each is tokens else each, (args, kwargs))

    def _combine(self, _: nn.Module, __: Any, output: Any) -> Any:
        first = _tokens_of(output)
        if first is None:
            return None
        passed = self._passed(first)
        return tree_map_only(torch.Tensor, lambda each: passed if each is first else each, output)

    def _passed(self, tensor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Passed.apply(tensor, self._exchanges, self._nbytes, self._rows, self._name)  # type: ignore[no-untyped-call]
        return found


class _Passed(torch.autograd.Function):
    """A tensor that is exchanged, and its gradient that is exchanged back: for what that takes.

    The order that rows are put into is kept for the backward.
    """

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, exchanges: Exchanges, nbytes: int, rows: int, name: str) -> torch.Tensor:
        ctx.take = lambda: exchanges.take(nbytes, name)
        ctx.take()
        ctx.save_for_backward(torch.empty(rows, dtype=torch.int64, device=tensor.device))
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.take()
        return gradients[0], None, None, None, None


def _tokens_of(value: Any) -> torch.Tensor | None:
    found = (each for each in tree_leaves(value) if isinstance(each, torch.Tensor) and each.is_floating_point())
    return next((each for each in found if each.dim() >= 2), None)


def _top_k(tokens: torch.Tensor, given: Any) -> int:
    """To how many experts each token goes: as many numbers of experts are beside it; 1 where rows are given that are in order."""
    rows = tokens.shape[:-1].numel()
    integers = (each for each in tree_leaves(given) if isinstance(each, torch.Tensor) and not each.is_floating_point())
    return next((each.shape[-1] for each in integers if each.dim() >= 2 and each.shape[:-1].numel() == rows), 1)


# -- along a tensor axis ------------------------------------------------------------------------------------------------


def _take_parts(experts: nn.Module, mesh: DeviceMesh) -> None:
    """Give the experts a part of the tokens on each rank, and put together what they make of them."""
    dims: list[int] = []

    def divided(_: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = _tokens_of((args, kwargs))
        if tokens is None:
            return None
        dim = tokens.dim() - 2
        dims[:] = [dim]
        count = tokens.shape[dim]

        def part(each: torch.Tensor) -> torch.Tensor:
            has = each.dim() > dim and each.shape[dim] == count
            return _moved(each, mesh, Replicate(), Shard(dim)) if has else each

        return tree_map_only(torch.Tensor, part, (args, kwargs))

    def whole(_: nn.Module, __: Any, output: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda each: _moved(each, mesh, Shard(dims[0]), Replicate()), output)

    experts.register_forward_pre_hook(divided, with_kwargs=True)
    experts.register_forward_hook(whole)


def _moved(tensor: torch.Tensor, mesh: DeviceMesh, source: Any, target: Any) -> torch.Tensor:
    return DTensor.from_local(tensor, mesh, (source,), run_check=False).redistribute(placements=(target,)).to_local()
