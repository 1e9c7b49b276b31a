"""The graph's fingerprint: equal wherever the same constructor ran with the same arguments, different otherwise."""

from __future__ import annotations

import hashlib
from typing import Any

from .graph import ParamGraph, Storage

_FORMAT = "groundplan graph 1"


def fingerprint(graph: ParamGraph) -> str:
    """SHA-256 over all that is recorded, except where on disk the code lies and what depends on the machine.

    Values that came from Python's or numpy's random module take no part, only their shapes and dtypes.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for part in (graph.ambient, graph.reference, bool(graph.seed_dependent), graph.host_random):
        _feed(digest, part)
    for module in graph.modules:
        _feed(digest, (module.names, module.type, module.training))
    for tensor in graph.tensors:
        flags = (tensor.kind, tensor.requires_grad, tensor.persistent, tensor.grad_fn, tensor.type)
        _feed(digest, (tensor.names, tuple(tensor.view), flags))
    for storage in graph.storages:
        _feed(digest, _storage_key(storage, graph.host_random))
    for op in graph.ops:
        _feed(digest, (op.name, op.args, op.kwargs, op.position))
    return digest.hexdigest()


def _storage_key(storage: Storage, host_random: bool) -> tuple[Any, ...]:
    constant = storage.constant
    content = (constant.size, constant.dtype, None if host_random else constant.digest) if constant else None
    return storage.index, storage.nbytes, storage.device, content


def _feed(digest: Any, value: Any) -> None:
    digest.update(repr(value).encode())
    digest.update(b"\n")
