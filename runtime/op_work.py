"""What one op does, from its arguments and its result: operations by torch's own formulas, bytes read and written, collectives.

Operations are those of `torch.utils.flop_counter`; attention's are counted by its functions too, for the CPU's kernel, which its
table leaves out, as well, and with as many heads of keys as of queries, which is what kernels for grouped heads compute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from ..planner.records import dtype_name
from ..planner.work import Bound, Collective, Exchange, Op

aten = torch.ops.aten

TF32 = "tf32"
"""The name of float32's products where torch may compute them on tensor cores (`torch.set_float32_matmul_precision`)."""


def noted(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, on_cpu: bool, again: bool
) -> Op | Exchange | None:
    """What an op does; None for a collective that only waits, or that nobody takes part in."""
    if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
        return _exchange(func, args, out, again)
    given = [*tensors_in(args), *tensors_in(kwargs.values())]
    results = list(tensors_in((out,)))
    flops, spared = _flops(func, args, kwargs, out)
    if not flops and _is_view(func, given, results):
        return Op("view", "", again=again)
    bound: Bound = "memory" if not flops else "attention" if _is_attention(func) else "matmul"
    return Op(bound, _dtype(given or results, bound, on_cpu), flops, _moved(func, args, given, results), spared, again)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among values, and among those of lists and tuples in them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


def _dtype(tensors: list[torch.Tensor], bound: Bound, on_cpu: bool) -> str:
    floating = [each for each in tensors if each.is_floating_point()]
    if not (floating or tensors):
        return ""
    dtype = (floating or tensors)[0].dtype
    if dtype == torch.float32 and bound != "memory" and not on_cpu and torch.get_float32_matmul_precision() != "highest":
        return TF32
    return dtype_name(dtype)


# -- operations ---------------------------------------------------------------------------------------------------------


def _flops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> tuple[int, int]:
    """Operations, and those that a causal mask spares: as good as half of attention's."""
    if func.overloadpacket in _ATTENTION:
        flops = _attention_flops(func, args)
        return flops, flops // 2 if _is_causal(func, args, kwargs) else 0
    formula = flop_registry.get(func.overloadpacket)
    return (0, 0) if formula is None else (int(formula(*args, **kwargs, out_val=out)), 0)


def _attention_flops(func: Any, args: tuple[Any, ...]) -> int:
    backward = func.overloadpacket.__name__.endswith("_backward")
    query, key, value = (list(each.shape) for each in args[backward : backward + 3])
    key[1] = value[1] = query[1]
    return int(sdpa_backward_flop_count(args[0].shape, query, key, value) if backward else sdpa_flop_count(query, key, value))


def _is_causal(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    place = _place_of_causal(func)
    return bool(kwargs["is_causal"] if "is_causal" in kwargs else place < len(args) and args[place])


@cache
def _place_of_causal(func: Any) -> int:
    return next(place for place, each in enumerate(func._schema.arguments) if each.name == "is_causal")


def _is_attention(func: Any) -> bool:
    return "attention" in func.overloadpacket.__name__


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_ATTENTION = {getattr(aten, f"_scaled_dot_product_{name}{turn}") for name in _KERNELS for turn in ("", "_backward")}


# -- bytes --------------------------------------------------------------------------------------------------------------


def _is_view(func: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Whether an op touches no memory: it gives its arguments back, looked at in another way, or memory as it comes."""
    if _gives_views(func):
        return True
    if func._schema.is_mutable:
        return False
    known = {each.untyped_storage()._cdata for each in given}
    return bool(results) and all(each.untyped_storage()._cdata in known for each in results)


@cache
def _gives_views(func: Any) -> bool:
    returned = [each.alias_info for each in func._schema.returns]
    viewing = any(each is not None and not each.is_write for each in returned)
    return viewing or func.overloadpacket in _EMPTY


_EMPTY = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}


def _moved(func: Any, args: tuple[Any, ...], given: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    entry = _PARTS.get(func.overloadpacket)
    if entry is not None:
        return entry(args, given, results)
    results = results or list(tensors_in(args[place] for place in _places_written(func) if place < len(args)))
    return sum(map(_bytes, given)) + sum(map(_bytes, results))


@cache
def _places_written(func: Any) -> tuple[int, ...]:
    """The positions of arguments that an op writes to; foreach and fused ops do not return them."""
    arguments = enumerate(func._schema.arguments)
    return tuple(place for place, each in arguments if each.alias_info is not None and each.alias_info.is_write)


def _bytes(tensor: torch.Tensor) -> int:
    """An expanded tensor is read once."""
    return min(int(tensor.nbytes), tensor.untyped_storage().nbytes())


def _rows(args: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    """Of what is looked up only the rows that are found are read."""
    return 2 * sum(map(_bytes, results)) + sum(map(_bytes, given[1:]))


def _targets(args: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    """One number of each row is read."""
    return sum(map(_bytes, results)) + 2 * sum(map(_bytes, given[1:]))


def _written(args: Any, given: list[torch.Tensor], results: list[torch.Tensor]) -> int:
    """What is written to is not read."""
    return sum(map(_bytes, given))


_PARTS: Mapping[Any, Callable[[Any, list[torch.Tensor], list[torch.Tensor]], int]] = {
    aten.embedding: _rows,
    aten.index: _rows,
    aten.index_select: _rows,
    aten.gather: _rows,
    aten.nll_loss_forward: _targets,
    aten.copy_: _written,
    aten.zero_: _written,
    aten.fill_: _written,
}
"""Ops that do not read or write all of each argument."""


# -- exchanges ----------------------------------------------------------------------------------------------------------


def _exchange(func: Any, args: tuple[Any, ...], out: Any, again: bool) -> Exchange | None:
    kind = _COLLECTIVES.get(func.overloadpacket.__name__)
    if kind is None:
        return None
    largest = max((int(each.nbytes) for each in tensors_in((*args, out))), default=0)
    return Exchange(kind, largest, _ranks(func, args), again)


def _ranks(func: Any, args: tuple[Any, ...]) -> int:
    """A functional collective has its group's name for its last argument; others are of all ranks of a profile."""
    from torch.distributed import distributed_c10d  # which takes a while

    group: Any = args[-1]
    if func.namespace == "c10d" or not isinstance(group, str):
        return distributed_c10d.get_world_size()
    return int(distributed_c10d._resolve_process_group(group).size())  # type: ignore[attr-defined, arg-type]


_COLLECTIVES: Mapping[str, Collective] = {
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
    "_reduce_scatter_base_": "reduce-scatter",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all",
    "alltoall_base_": "all-to-all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
}
