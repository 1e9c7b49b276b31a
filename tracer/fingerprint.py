"""The graph's fingerprint: equal wherever the same constructor ran with the same arguments, different otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from .graph import Op, ParamGraph, Storage, TensorNode, View

_FORMAT = "groundplan graph 2"


def fingerprint(graph: ParamGraph) -> str:
    """SHA-256 over all that is recorded, except where on disk the code lies and what depends on the machine.

    Values that came from Python's or numpy's random module take no part, only their shapes and dtypes.
    """
    digest, spelled = hashlib.sha256(_FORMAT.encode()), _Views()
    _feed(digest, [(graph.ambient, graph.reference, bool(graph.seed_dependent), graph.host_random)])
    _feed(digest, ((module.names, module.type, module.training) for module in graph.modules))
    _feed(digest, (_tensor_key(tensor, spelled) for tensor in graph.tensors))
    _feed(digest, (_storage_key(storage, graph.host_random) for storage in graph.storages))
    _feed(digest, (_op_key(op, spelled) for op in graph.ops))
    return digest.hexdigest()


class _Views(dict[tuple[Any, ...], str]):
    """Spells views; a model has few different geometries, and to spell one takes long."""

    def __missing__(self, geometry: tuple[Any, ...]) -> str:
        text = self[geometry] = repr(geometry)
        return text

    def __call__(self, view: View) -> str:
        return f"{view[0]} {self[view[1:]]}"


def _tensor_key(tensor: TensorNode, spelled: _Views) -> tuple[Any, ...]:
    flags = (tensor.kind, tensor.requires_grad, tensor.persistent, tensor.grad_fn, tensor.type)
    return tensor.names, spelled(tensor.view), flags


def _op_key(op: Op, spelled: _Views) -> tuple[Any, ...]:
    args = [spelled(value) if type(value) is View else value for value in op.args]
    return op.name, args, op.kwargs, op.position and tuple(op.position)


def _storage_key(storage: Storage, host_random: bool) -> tuple[Any, ...]:
    constant = storage.constant
    content = (constant.size, constant.dtype, None if host_random else constant.digest) if constant else None
    return storage.index, storage.nbytes, storage.device, content


def _feed(digest: Any, values: Iterable[Any]) -> None:
    digest.update("\n".join([repr(value) for value in values]).encode())
    digest.update(b"\n\n")
