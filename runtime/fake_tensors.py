"""A module of meta tensors turned into one of fake CPU tensors: shapes and storages without memory, and CPU's kernels chosen.

Meta itself would not do: `scaled_dot_product_attention` on meta takes the math path, which saves several times as much. Fake CUDA
tensors would not either: with autograd they abort the process where torch has no CUDA. So the run is one on the CPU, and the
plan's device is kept aside.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..planner.allocations import Kind
from .placing import wrapped
from .regions import local_of

CPU = torch.device("cpu")


def fake(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake CPU tensor of the same shape, strides and dtype, on a meta storage: a meta tensor's own, so views stay."""
    made = value.detach() if value.is_meta else _empty_like(value)
    return FakeTensor(mode, made, CPU).requires_grad_(value.requires_grad)


def fake_local(mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A DTensor of meta with what this rank holds in fake memory of its own: it may be a view of the whole, or padded."""
    return wrapped(value, fake(mode, _empty_like(local_of(value)))).requires_grad_(value.requires_grad)


def _empty_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def fake_inputs(mode: FakeTensorMode, inputs: Any) -> Any:
    """The same with fake tensors in place of tensors, one for each: attention asks whether its keys are its queries."""
    found = {id(value): fake(mode, value) for value in tree_leaves(inputs) if isinstance(value, torch.Tensor)}
    return tree_map_only(torch.Tensor, lambda value: found[id(value)], inputs)


def make_fake(module: nn.Module, mode: FakeTensorMode, left: Container[nn.Module] = ()) -> None:
    """Put fake tensors in the places of all tensors of `module`: parameters, buffers, plain attributes; ties and views stay.

    Modules that never run may be `left` as they are.
    """
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def changed(value: torch.Tensor) -> torch.Tensor:
        if id(value) not in known:  # the original is kept beside, so that its id is not given to another
            is_dtensor = local_of(value) is not value
            known[id(value)] = (value, fake_local(mode, value) if is_dtensor else _parameter_like(value, fake(mode, value)))
        return known[id(value)][1]

    for each in (each for each in module.modules() if each not in left):
        places: tuple[dict[str, Any], ...] = (each._parameters, each._buffers)
        for place in places:
            for name, value in place.items():
                if value is not None:
                    place[name] = changed(value)
        for name, value in list(vars(each).items()):
            if name not in ("_parameters", "_buffers", "_modules"):
                vars(each)[name] = _within(value, changed)


def _parameter_like(value: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    made = nn.Parameter(made.detach(), value.requires_grad) if isinstance(value, nn.Parameter) else made
    made.__dict__.update({name: each for name, each in vars(value).items() if not hasattr(made, name)})
    return made


def _within(value: Any, changed: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with its tensors changed, in plain lists, tuples and dicts too; the same object where there are none."""
    if isinstance(value, torch.Tensor):
        return changed(value)
    if type(value) in (list, tuple):
        made = [_within(each, changed) for each in value]
        return value if all(new is old for new, old in zip(made, value, strict=True)) else type(value)(made)
    if type(value) is dict:
        found = {key: _within(each, changed) for key, each in value.items()}
        return value if all(found[key] is each for key, each in value.items()) else found
    return value


def tensors_of(module: nn.Module) -> Iterator[tuple[Kind, str, torch.Tensor]]:
    """Every tensor of a module as (kind, name, tensor); plain attributes count as buffers."""
    for name, parameter in module.named_parameters():
        yield "parameter", name, parameter
    for name, buffer in module.named_buffers():
        yield "buffer", name, buffer
    for path, each in module.named_modules():
        for name, value in vars(each).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from (("buffer", f"{path}.{name}".lstrip("."), found) for found in _tensors(value))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Mapping) and type(value) is dict:
        for each in value.values():
            yield from _tensors(each)
