"""What an expert axis makes of a layer's experts in a trace: a rank has a part of them, and rows of tokens go to them and back.

Tokens are taken to be spread evenly. Then the experts of a rank work on as many rows as its own tokens make, from all ranks
instead of from one, so that the trace runs all experts on a rank's own tokens, and

1. what has the shape of a stack of experts' weights (their gradients, and what is made of them) counts for the rank's part of it
2. before and after the experts, in the forward and in the backward, there are the buffers of an exchange (`expert_exchange`)
3. along a tensor axis, whose ranks the expert axis takes, each rank sends a part of the tokens that all of them have
   (torchtitan's `ReordererSequenceParallel`)

Gradients of experts in a list, which are whole on one rank each, are those of the rank's own (`planner/expert_profile.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planner.exchanges import expert_exchange
from ..planner.experts import expert_modules, experts_of
from ..planner.sharding import Sharding
from ..tracer.graph import ParamGraph
from .allocations import Allocations, Origin

_Shape = tuple[int, ...]


class Exchanges:
    """The experts of a module that is traced, while what it allocates is followed."""

    def __init__(self, sharding: Sharding, graph: ParamGraph) -> None:
        experts = experts_of(sharding.experts, graph)
        self._ranks, self._modules = sharding.size("expert"), expert_modules(sharding.experts, graph)
        self._totals = {name.rpartition(".")[0]: each.total for name, each in experts.items() if each.number is not None}
        self._stacks: dict[str, set[_Shape]] = {}
        for name, each in experts.items():
            if each.number is None:
                self._stacks.setdefault(name.rpartition(".")[0], set()).add(_sorted(graph.by_name[name].shape))
        self._found: Allocations | None = None

    def watch(self, module: nn.Module, mesh: DeviceMesh | None) -> None:
        """Have the experts of `module` exchange what they are given and give, along a tensor axis a part of it on each rank."""
        for name in self._modules:
            experts = module.get_submodule(name)
            if mesh is not None:
                _take_parts(experts, mesh)
            _Exchanging(self, name).register(experts)

    @contextmanager
    def followed(self, found: Allocations) -> Iterator[None]:
        """While `found` follows a run."""
        self._found, found.shared_between = found, self._shared_between
        try:
            yield
        finally:
            self._found = None

    def _shared_between(self, tensor: torch.Tensor, module: str) -> int:
        """Between how many ranks what an op has made is shared: that of the expert axis, if it is made of stacked weights."""
        if tensor.dim() < 2:
            return 1
        shape = _sorted(tensor.shape)
        here = (module, *_around(module)) if module else self._stacks
        return self._ranks if any(shape in self._stacks.get(name, ()) for name in here) else 1

    def total(self, name: str) -> int:
        """How many experts of a list there are, each of which is given a part of the rows; 1 for stacked ones."""
        return next((total for owner, total in self._totals.items() if owner == name or owner.startswith(f"{name}.")), 1)

    def take(self, nbytes: int, name: str) -> None:
        """The buffers of one exchange come and go."""
        if self._found is not None:
            with self._found.within(Origin("communication buffer", module=name)):
                self._found.taken(nbytes, "exchange of tokens")


def _sorted(shape: Iterable[int]) -> _Shape:
    return tuple(sorted(shape))


def _around(module: str) -> Iterator[str]:
    while module:
        module = module.rpartition(".")[0]
        yield module


class _Exchanging:
    """Hooks of one module of experts."""

    def __init__(self, exchanges: Exchanges, name: str) -> None:
        self._exchanges, self._name = exchanges, name
        self._nbytes = 0

    def register(self, experts: nn.Module) -> None:
        experts.register_forward_pre_hook(self._dispatch, with_kwargs=True)
        experts.register_forward_hook(self._combine)

    def _dispatch(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        tokens = _tokens_of((args, kwargs))
        if tokens is None:
            return None
        count = _top_k(tokens, (args, kwargs)) * self._exchanges.total(self._name)
        self._nbytes = expert_exchange(tokens.nbytes, count)
        passed = self._passed(tokens)
        return tree_map_only(torch.Tensor, lambda each: passed if each is tokens else each, (args, kwargs))

    def _combine(self, _: nn.Module, __: Any, output: Any) -> Any:
        first = _tokens_of(output)
        if first is None:
            return None
        passed = self._passed(first)
        return tree_map_only(torch.Tensor, lambda each: passed if each is first else each, output)

    def _passed(self, tensor: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _Passed.apply(tensor, self._exchanges, self._nbytes, self._name)  # type: ignore[no-untyped-call]
        return found


class _Passed(torch.autograd.Function):
    """A tensor that is exchanged, and its gradient that is exchanged back: for what that takes."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, exchanges: Exchanges, nbytes: int, name: str) -> torch.Tensor:
        ctx.take = lambda: exchanges.take(nbytes, name)
        ctx.take()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        ctx.take()
        return gradients[0], None, None, None


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
