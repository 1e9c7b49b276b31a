"""The graph's fingerprint: equal wherever the same constructor ran with the same arguments, different otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from .graph import ParamGraph, Storage, TensorNode, View

_FORMAT = "groundplan graph 2"


def fingerprint(graph: ParamGraph) -> str:
    """SHA-256 over all that is recorded, except where on disk the code lies and what depends on the machine.

    Values that came from Python's or numpy's random module take no part, only their shapes and dtypes.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    _feed(digest, [(graph.ambient, graph.reference, bool(graph.seed_dependent), graph.host_random)])
    _feed(digest, ((module.names, module.type, module.training) for module in graph.modules))
    _feed(digest, (_tensor_key(tensor) for tensor in graph.tensors))
    _feed(digest, (_storage_key(storage, graph.host_random) for storage in graph.storages))
    _feed(digest, ((op.name, _plain(op.args), op.kwargs, op.position and tuple(op.position)) for op in graph.ops))
    return digest.hexdigest()


def _tensor_key(tensor: TensorNode) -> tuple[Any, ...]:
    flags = (tensor.kind, tensor.requires_grad, tensor.persistent, tensor.grad_fn, tensor.type)
    return tensor.names, tuple(tensor.view), flags


def _storage_key(storage: Storage, host_random: bool) -> tuple[Any, ...]:
    constant = storage.constant
    content = (constant.size, constant.dtype, None if host_random else constant.digest) if constant else None
    return storage.index, storage.nbytes, storage.device, content


def _plain(args: tuple[Any, ...]) -> list[Any]:
    """Views as plain tuples: they take a third of the time to write out."""
    return [tuple(value) if type(value) is View else value for value in args]


def _feed(digest: Any, values: Iterable[Any]) -> None:
    digest.update("\n".join([repr(value) for value in values]).encode())
    digest.update(b"\n\n")
