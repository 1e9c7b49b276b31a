"""What a plan says about sharding, carried out on a meta module by torch's own engines, on the real mesh.

1. the mesh is made of the process group, or the user's is checked
2. tensor parallelism divides single layers; parameters that it untied are tied again
3. `fully_shard` takes every unit, then the module as a whole; or `replicate` the whole, where nothing is sharded
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ..planner.records import dtype_named
from ..planner.sharding import Sharding
from ..tracer.errors import MaterializeError
from ..tracer.graph import ParamGraph


def check_runs(sharding: Sharding) -> None:
    """Raise `MaterializeError` where a plan says what it can reckon with, and this runtime does not carry out."""
    given = not_run(sharding)
    if given:
        raise MaterializeError(
            f"the plan has {' and '.join(given)}, which {'is' if len(given) == 1 else 'are'} not executable yet: plan.memory and "
            "plan.report work; to build, shard plan.meta_module() with your own code and call gp.materialize(module), or shard "
            "without"
        )


def not_run(sharding: Sharding) -> list[str]:
    """What of a sharding the runtime does not carry out, in words."""
    axes = [axis for axis in sharding.axes if axis.role in _NOT_RUN]
    given = [f"{axis.name}={axis.size} (to {_NOT_RUN[axis.role]})" for axis in axes]
    return given + [f"{name}=True" for name in ("sequence_parallel", "loss_parallel") if getattr(sharding, name)]


_NOT_RUN = {"pipeline": "divide layers into stages", "context": "divide sequences", "expert": "divide experts"}


def check_mesh(sharding: Sharding, mesh: DeviceMesh | None) -> None:
    """Raise `MaterializeError` where the user's mesh, or the process group, is not one that the plan is for."""
    if mesh is not None:
        found = dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
        if found != {axis.name: axis.size for axis in sharding.axes}:
            has = " x ".join(f"{name}={size}" for name, size in found.items()) or f"{tuple(mesh.shape)} without names"
            raise MaterializeError(f"the plan is for a mesh {sharding.describe()}, and the one given is {has}")
        return
    if not dist.is_available() or not dist.is_initialized():
        raise MaterializeError(
            f"the plan is for {sharding.ranks} ranks ({sharding.describe()}), and this process is in no process group: start it "
            f"with torchrun --nproc-per-node {sharding.ranks}, and call torch.distributed.init_process_group() first"
        )
    if dist.get_world_size() != sharding.ranks:
        raise MaterializeError(
            f"the plan is for {sharding.ranks} ranks ({sharding.describe()}), and the process group has {dist.get_world_size()}; "
            "start as many, shard for as many, or pass mesh="
        )


def mesh_of(sharding: Sharding, device: str, mesh: DeviceMesh | None = None) -> DeviceMesh:
    """The user's mesh, or one made of all ranks of the process group."""
    sizes, names = tuple(axis.size for axis in sharding.axes), tuple(axis.name for axis in sharding.axes)
    return mesh or init_device_mesh(device, sizes, mesh_dim_names=names)


def group_of(mesh: DeviceMesh) -> Any:
    """The process group of all ranks of a mesh."""
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    return mesh.get_group() if mesh.ndim == 1 else mesh._flatten().get_group()


def apply_sharding(module: nn.Module, sharding: Sharding, graph: ParamGraph, mesh: DeviceMesh) -> nn.Module:
    """Divide a meta module as `sharding` says; returns the module."""
    check_runs(sharding)
    tensor, shard, copies = (sharding.axis(role) for role in ("tensor", "shard", "replicate"))
    if tensor is not None:
        _divide_layers(module, sharding, graph, mesh[tensor.name])
    if shard is not None:
        _shard_units(module, sharding, graph, mesh[(copies.name, shard.name)] if copies else mesh[shard.name])
    elif copies is not None:
        replicate(module, device_mesh=mesh[copies.name])
    return module


# -- tensor parallelism -------------------------------------------------------------------------------------------------


def _divide_layers(module: nn.Module, sharding: Sharding, graph: ParamGraph, mesh: DeviceMesh) -> None:
    styles = sharding.styles(graph)
    if sharding.engine == "transformers":
        _apply_transformers(module, styles, mesh)
    else:
        modules = dict(module.named_modules())
        parallelize_module(module, mesh, {name: _TORCH[style]() for name, style in styles.items() if name in modules})
    tie_again(module, graph)


_TORCH: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
}
"""What makes each style."""


def _apply_transformers(module: nn.Module, styles: Mapping[str, str], mesh: DeviceMesh) -> None:
    """By transformers' own engine, whose styles know more kinds of layers than torch's."""
    try:
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism
    except ImportError as error:
        raise MaterializeError(
            f"tensor='auto' needs the tensor parallelism of a newer transformers ({error}): upgrade it, or give the rules, as "
            "tensor={'layers.*.q_proj': 'colwise', ...}"
        ) from error
    places = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    once = {name for name, _ in module.named_parameters()}  # it takes a tied parameter at the first of its places
    apply_tensor_parallelism(module, mesh, {name: style for name, style in styles.items() if name in once or name not in places})


def tie_again(module: nn.Module, graph: ParamGraph) -> None:
    """Both engines divide every place of a tied parameter by itself, which leaves several parameters: make them one again."""
    modules = dict(module.named_modules(remove_duplicate=False))
    for tensor in graph.ties:
        places = [(modules.get(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in tensor.names]
        held = [(owner, key) for owner, key in places if owner is not None and owner._parameters.get(key) is not None]
        if tensor.kind == "parameter" and held:
            first = held[0][0]._parameters[held[0][1]]
            for owner, key in held[1:]:
                owner._parameters[key] = first


# -- FSDP ---------------------------------------------------------------------------------------------------------------


def _shard_units(module: nn.Module, sharding: Sharding, graph: ParamGraph, mesh: DeviceMesh) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=None if sharding.compute_dtype is None else dtype_named(sharding.compute_dtype),
        reduce_dtype=None if sharding.reduce_dtype is None else dtype_named(sharding.reduce_dtype),
    )
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if sharding.offload else OffloadPolicy()
    modules = dict(module.named_modules())
    for name in (*sharding.unit_names(graph), ""):
        unit = modules[name]
        if name == "" or any(True for _ in unit.parameters()):
            reshard = sharding.reshard_of(name)
            fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)
