"""Hand-built parameter graphs, for tests that need no constructor."""

from __future__ import annotations

import math
from typing import Any

import torch

from groundplan.tracer.graph import Frame, Kind, Op, ParamGraph, Site, Storage, TensorNode, View

OWN = -1


def tensor(
    *names: str,
    size: tuple[int, ...] = (2, 3),
    dtype: torch.dtype = torch.float32,
    kind: Kind = "parameter",
    storage: int = OWN,
    **fields: Any,
) -> TensorNode:
    """A contiguous tensor under its names; `storage` numbers one that it shares with others."""
    stride = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    fields.setdefault("requires_grad", kind == "parameter" and dtype.is_floating_point)
    return TensorNode(names, kind, View(storage, dtype, size, stride), **fields)


def graph_of(*tensors: TensorNode, devices: dict[str, str] | None = None, **fields: Any) -> ParamGraph:
    """The graph that holds `tensors`, a storage for each but where they share one; `devices` by name, else all on the CPU."""
    devices = devices or {}
    shared = {each.view.storage for each in tensors} - {OWN}
    fresh = iter(range(max(shared, default=-1) + 1, 10**9))
    nodes = tuple(_placed(each, next(fresh) if each.view.storage == OWN else each.view.storage) for each in tensors)
    storages: dict[int, Storage] = {}
    for node in nodes:
        before = storages.get(node.view.storage)
        nbytes = max(node.nbytes, before.nbytes if before else 0)
        storages[node.view.storage] = Storage(node.view.storage, nbytes, devices.get(node.name, "cpu"))
    fields.setdefault("storages", tuple(storages[index] for index in sorted(storages)))
    return ParamGraph(modules=fields.pop("modules", ()), tensors=nodes, ops=fields.pop("ops", ()), **fields)


def _placed(node: TensorNode, storage: int) -> TensorNode:
    view = node.view._replace(storage=storage)
    return TensorNode(node.names, node.kind, view, node.requires_grad, node.persistent, node.grad_fn, node.type)


def fingerprinted(graph: ParamGraph, digest: str = "ab" * 32) -> ParamGraph:
    """The same graph with a given fingerprint (a cached property, so it may be set ahead)."""
    graph.__dict__["fingerprint"] = digest
    return graph


def fill(index: int, view: View, init: str | None = "normal_", init_args: dict[str, Any] | None = None, **fields: Any) -> Op:
    """Op number `index`: an init function overwrites `view`, called from a constructor's line of that number."""
    packages = "/lib/site-packages"
    frames = (Frame(f"{packages}/torch/nn/init.py", 1, init or "f"), Frame(f"{packages}/zoo/net.py", index, "__init__"))
    defaults: dict[str, Any] = {
        "name": f"aten.{init or 'normal_'}.default",
        "args": (view,),
        "kwargs": (),
        "reads": (),
        "writes": (view,),
        "outputs": (),
        "overwrites": True,
        "site": Site(frames, init, tuple((init_args or {}).items())),
    }
    return Op(index=index, **defaults | fields)
