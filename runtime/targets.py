"""Targets: the meta tensors of a module that are to be filled, wherever the user's sharding has put them.

A submodule of a meta module remembers its own name there, so a tensor's name in the plan is that name and its own: wrappers,
other names and missing neighbors make no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parameter import is_lazy

from ..tracer.errors import MaterializeError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .meta import Blueprint, remembered
from .regions import Indices, Unplaced, local_of, region_at, region_of, shape_of

_SHOWN = 8
_DEPTH = 4  # of lists and dicts that an attribute is searched through, as for the graph
Put = Callable[[torch.Tensor], None]


@dataclass(eq=False)
class Target:
    """A meta tensor, the node of the graph that says what it holds, and how another tensor is put in each of its places."""

    tensor: torch.Tensor
    node: TensorNode
    path: str
    places: list[Put] = field(default_factory=list)

    @property
    def spec(self) -> Any:
        """How a DTensor is placed on its mesh; None for an ordinary tensor."""
        return self.tensor._spec if isinstance(self.tensor, DTensor) else None

    def region(self) -> list[Indices] | None:
        """What this rank holds of the tensor; None for all of it, as an ordinary tensor."""
        if self.spec is None:
            return None
        shape, held = self.node.shape, tuple(local_of(self.tensor).shape)
        try:
            if self.node.opaque:
                return _of_local(shape, held, self.spec)
            region = region_of(shape, self.spec.mesh, self.spec.placements)
        except Unplaced as error:
            raise MaterializeError(f"{self.path} cannot be filled: {error}") from None
        if shape_of(region) != held and any(held):
            raise MaterializeError(
                f"{self.path} holds {list(held)} of {list(shape)} on this rank, where {self.spec.placements} on a mesh of "
                f"{tuple(self.spec.mesh.shape)} give {list(shape_of(region))}: shard it as torch.distributed.tensor does"
            )
        return region


def _of_local(shape: tuple[int, ...], held: tuple[int, ...], spec: Any) -> list[Indices]:
    """The part of a DTensor that the constructor made: its recipe is that of the local tensor, of this shape.

    What the user shards on top comes before the constructor's own axes in the mesh, and divides the local tensor.
    """
    mesh, coordinate = spec.mesh, spec.mesh.get_coordinate() or [0] * spec.mesh.ndim
    for axes in range(mesh.ndim):
        on_top = [Shard(each.dim) if isinstance(each, Shard | _StridedShard) else each for each in spec.placements[:axes]]
        region = region_at(shape, tuple(mesh.shape)[:axes], coordinate[:axes], on_top)
        if shape_of(region) == held:
            return region
    raise Unplaced(f"the constructor makes {list(shape)} of it on this rank, and {list(held)} of that are held now")


def find_targets(module: nn.Module, own: bool = False) -> tuple[Blueprint, list[Target]]:
    """The meta tensors of a module, and the blueprint that they are filled by; with `own`, not those of its submodules.

    Raises `MaterializeError` for a meta tensor that no plan knows, and where several plans do, or none does.
    """
    found: dict[int, Target] = {}
    blueprints: dict[int, Blueprint] = {}
    strays: dict[str, str] = {}
    attributes: list[tuple[str, Blueprint, str, torch.Tensor, Put]] = []
    modules: Iterable[tuple[str, nn.Module]] = [("", module)] if own else module.named_modules()
    for path, each in modules:
        memory = remembered(each)
        for key, tensor, put in _members(each):
            if memory is None:
                strays[_joined(path, key)] = _unknown(each)
                continue
            _note(found, strays, memory.blueprint.build.graph, _joined(memory.name, key), _joined(path, key), tensor, put)
        if memory is not None:
            blueprints[id(memory.blueprint)] = memory.blueprint
            held = _attributes(each)
            attributes += [(path, memory.blueprint, _joined(memory.name, key), tensor, put) for key, tensor, put in held]
    by_node = {id(target.node): target for target in found.values()}
    for path, blueprint, name, tensor, put in attributes:
        node = blueprint.build.graph.by_name.get(name)
        if id(tensor) in found:
            found[id(tensor)].places.append(put)
        elif id(node) in by_node:
            by_node[id(node)].places.append(put)  # the user's sharding has replaced the parameter, and not this reference to it
        elif node is not None and node.kind == "attribute" and tuple(tensor.shape) == node.shape:
            found[id(tensor)] = Target(tensor, node, path, [put])
    if strays:
        raise MaterializeError(_message(strays))
    if not blueprints:
        raise MaterializeError(
            f"this {type(module).__name__} is no part of a meta module, so nothing says what it holds: make it with "
            "gp.trace(...).meta_module(), shard it, then say gp.materialize(module)"
        )
    if len(blueprints) > 1:
        raise MaterializeError(
            f"the module holds parts of {len(blueprints)} meta modules, and each has a random stream of its own: "
            "fill them one by one, with gp.materialize(part)"
        )
    return next(iter(blueprints.values())), list(found.values())


def _note(
    found: dict[int, Target], strays: dict[str, str], graph: ParamGraph, name: str, path: str, tensor: torch.Tensor, put: Put
) -> None:
    node = graph.by_name.get(name)
    if node is None:
        strays[path] = f"the plan has no tensor {name}{nearest(name, graph.by_name)}"
    elif graph.storages[node.view.storage].device == "meta":
        return  # the constructor asked for the meta device itself
    elif not node.opaque and tuple(tensor.shape) != node.shape:
        strays[path] = f"it has the shape {list(tensor.shape)}, and {name} of the plan {list(node.shape)}"
    else:
        found.setdefault(id(tensor), Target(tensor, node, path)).places.append(put)


# -- the places of a module that hold a meta tensor ---------------------------------------------------------------------


def _members(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, Put]]:
    for members in (module._parameters, module._buffers):
        for key, tensor in members.items():
            if tensor is not None and not is_lazy(tensor) and local_of(tensor).is_meta:
                yield key, tensor, _entry(members, key)


_HOLDERS = (torch.Tensor, list, tuple, dict)


def _attributes(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, Put]]:
    for key, value in module.__dict__.items():
        if isinstance(value, _HOLDERS) and key not in ("_parameters", "_buffers", "_modules"):
            yield from _inside(key, value, _entry(module.__dict__, key), 0)


def _inside(path: str, value: Any, put: Callable[[Any], None], depth: int) -> Iterator[tuple[str, torch.Tensor, Put]]:
    if isinstance(value, torch.Tensor):
        if local_of(value).is_meta:
            yield path, value, put
    elif depth < _DEPTH and isinstance(value, list | tuple):
        members = list(value) if isinstance(value, tuple) else value
        for index, each in enumerate(value):
            place = _entry(members, index)
            if isinstance(value, tuple):
                place = _remade(place, members, value, put)
            yield from _inside(f"{path}[{index}]", each, place, depth + 1)
    elif depth < _DEPTH and isinstance(value, dict):
        for key, each in value.items():
            yield from _inside(f"{path}[{key!r}]", each, _entry(value, key), depth + 1)


def _entry(members: Any, key: Any) -> Put:
    def put(tensor: torch.Tensor) -> None:
        members[key] = tensor

    return put


def _remade(place: Put, members: list[Any], value: Any, put: Callable[[Any], None]) -> Put:
    """A place in a tuple: the tuple is made anew of its `members`."""

    def replace(tensor: torch.Tensor) -> None:
        place(tensor)
        put(type(value)(*members) if hasattr(value, "_fields") else type(value)(members))

    return replace


def _unknown(module: nn.Module) -> str:
    if any(type(each).__name__ == "FlatParameter" for each in module._parameters.values()):
        return (
            "FSDP1 has flattened it; have it filled meanwhile, by FSDP(module, param_init_fn=gp.param_init_fn(seed), ...), or "
            "use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    return "its module is no part of a plan.meta_module()"


def _message(strays: Mapping[str, str]) -> str:
    shown = "".join(f"\n  {path}: {why}" for path, why in list(strays.items())[:_SHOWN])
    more = f"\n  … and {len(strays) - _SHOWN} more" if len(strays) > _SHOWN else ""
    return (
        f"{len(strays)} meta tensor{'s' * (len(strays) != 1)} cannot be filled:{shown}{more}\n"
        "Fill what you have added yourself first (module.to_empty and your own initialization), or build it inside the "
        "constructor that is traced"
    )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
