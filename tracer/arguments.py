"""The arguments of an ATen call: finding the tensors in them, and putting others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from .imagined import current_device
from .schema import mutated_arguments
from .traced import META, Traced


def tensors_in(args: Any, kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Every tensor among the arguments, those in lists included."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value, {})


def generator_in(args: Any, kwargs: Mapping[str, Any]) -> torch.Generator | None:
    """The generator that the call was given, if it was given one."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)), None)


def mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """`value`, a tensor or a list or tuple with tensors in it, with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        changed = [mapped(each, change) for each in value]
        return changed if isinstance(value, list) else tuple(changed)
    return value


def mapped_kwargs(kwargs: Mapping[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """The keyword arguments with every tensor changed."""
    return {name: mapped(value, change) for name, value in kwargs.items()}


def frozen(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """As the tape keeps it: every tensor changed, lists as tuples, None for a generator (the op's position stands for it)."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return tuple([frozen(each, change) for each in value])
    return None if isinstance(value, torch.Generator) else value


def frozen_kwargs(kwargs: Mapping[str, Any], change: Callable[[torch.Tensor], Any]) -> tuple[tuple[str, Any], ...]:
    """The keyword arguments as the tape keeps them."""
    if not kwargs:
        return ()
    return tuple((name, frozen(value, change)) for name, value in kwargs.items())


def without_generator(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with every generator replaced by None, the default one."""
    rest = tuple(None if isinstance(value, torch.Generator) else value for value in args)
    return rest, {name: None if isinstance(value, torch.Generator) else value for name, value in kwargs.items()}


def on_meta(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments as a meta kernel takes them."""
    _, changed = without_generator((), kwargs)
    if changed.get("device") is not None:
        changed["device"] = META
    if changed.get("pin_memory"):
        changed["pin_memory"] = None
    return changed


def written(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that the call writes in place."""
    found: list[torch.Tensor] = []
    for position, name in mutated_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        found.extend(tensors_in((value,), {}))
    return found


def operands(func: Any, args: Any, kwargs: Mapping[str, Any], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the call's `tensors` that it merely reads: all but those it writes in place."""
    mutated = mutated_arguments(func)
    if not mutated:
        return tensors
    positions, names = {position for position, _ in mutated}, {name for _, name in mutated}
    rest = [value for position, value in enumerate(args) if position not in positions]
    return list(tensors_in(rest, {name: value for name, value in kwargs.items() if name not in names}))


def is_plain_meta(tensor: torch.Tensor) -> bool:
    """Whether it is a meta tensor that the constructor asked for: such a one stays what it is."""
    return not isinstance(tensor, Traced) and tensor.is_meta


def result_device(tensors: Iterable[torch.Tensor], kwargs: Mapping[str, Any]) -> torch.device:
    """The device on which eager puts the result: the one asked for, or the operands' (scalars on the CPU adapt to them)."""
    asked = kwargs.get("device")
    if asked is not None:
        return _with_index(asked if isinstance(asked, torch.device) else torch.device(asked))
    devices = [(each.device, each.dim()) for each in tensors]
    if not devices:
        return torch.device("cpu")
    return next((device for device, dim in devices if dim and device.type != "cpu"), devices[0][0])


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as eager's tensors report it: with the current device's number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", current_device())
