"""A function, or a layer's forward, that runs again in the backward: torch.utils.checkpoint, by one of two levels."""

from __future__ import annotations

import copy
import functools
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..planner.workload import Checkpointing
from ..tracer.errors import DecisionError

aten = torch.ops.aten

KEPT = {
    aten.mm.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    aten.abs.default,
    aten.max.default,
}
"""The ops whose results selective checkpointing keeps, of `mm` every other one, the first included.

torchtitan at the end of 2024 (torchtitan/parallelisms/parallelize_llama.py `_save_list`), with the CPU's attention beside CUDA's.
Products with a bias are `addmm`, which is not on torchtitan's list, and run again.
"""


def options_of(level: Checkpointing) -> dict[str, Any]:
    """What `torch.utils.checkpoint.checkpoint` is told for a level."""
    return {"use_reentrant": False, **({"context_fn": selective_contexts} if level == "selective" else {})}


@dataclass(frozen=True)
class RunAgain:
    """`RunAgain(level)(function, *args)` gives what `function(*args)` does, made again in the backward."""

    level: Checkpointing

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(function, **kwargs), *args, **options_of(self.level))


def run_once(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args)`: what a model hands its layers to that has a function for checkpointing, where they do it themselves."""
    return function(*args, **kwargs)


class ForwardAgain:
    """In the place of a layer's `forward`: the same, made again in the backward. Hooks stay outside, and run once.

    It holds its layer weakly, so that the layer's memory goes when the last one who has it lets it go; a copy holds the copy's.
    """

    def __init__(self, layer: nn.Module, level: Checkpointing) -> None:
        self.level = level
        self._own: Callable[..., Any] | None = layer.__dict__.get("forward")
        self._layer = weakref.ref(layer)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The layer's own, as it is without this one."""
        layer = self._layer()
        if layer is None:
            raise ReferenceError("the layer that this forward is of is no more: hold the layer, and call that")
        return MethodType(type(layer).forward, layer) if self._own is None else self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        _check_no_cache(type(self._layer()).__name__, (*args, *kwargs.values()))
        return RunAgain(self.level)(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> ForwardAgain:
        """Of the copied layer: copying a module takes down the new one before it copies what it has."""
        layer, found = self._layer(), _empty()
        found.__setstate__({"level": self.level, "own": copy.deepcopy(self._own, memo), "layer": memo.get(id(layer), layer)})
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty, (), {"level": self.level, "own": self._own, "layer": self._layer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.level, self._own, self._layer = state["level"], state["own"], weakref.ref(state["layer"])


def _empty() -> ForwardAgain:
    return ForwardAgain.__new__(ForwardAgain)


def _check_no_cache(name: str, given: tuple[Any, ...]) -> None:
    """transformers' caches are written to: by a layer that runs twice, twice."""
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    if cache is not None and any(isinstance(each, cache) for each in given):
        raise DecisionError(
            f"{name} is given a cache of keys and values, which running it again in the backward would write to twice; call the "
            "model with use_cache=False"
        )


# -- by op --------------------------------------------------------------------------------------------------------------


def selective_contexts() -> Any:
    """The two contexts of one layer's forward, and of its second one: `context_fn` of `torch.utils.checkpoint.checkpoint`.

    Products are counted anew in each layer, and apart in each of the two, as torchtitan does.
    """
    products: dict[bool, int] = defaultdict(int)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op is aten.mm.default:
            products[context.is_recompute] += 1
        kept = op in KEPT and not (op is aten.mm.default and products[context.is_recompute] % 2 == 0)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
