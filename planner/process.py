"""What a process holds in host memory beside its tensors: Python, torch, and the libraries that a plan brings in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..tracer.graph import ParamGraph
from .decisions import Decisions
from .overheads import OVERHEADS


def process_bytes(graph: ParamGraph, decisions: Decisions) -> dict[str, int]:
    """The bytes by name, each the lower end of its entry in the table of overheads: what importing takes with this torch.

    What a program imports besides comes on top.
    """
    return {name: OVERHEADS[name].low for name in _names(graph, decisions)}


def _names(graph: ParamGraph, decisions: Decisions) -> Iterator[str]:
    of_transformers = any(op.site.line is not None and op.site.line.file.startswith("transformers/") for op in graph.ops)
    yield "host process"
    if torch.version.cuda is not None:
        yield "host process, torch for cuda"
    if decisions.sharding is not None or of_transformers:
        yield "host process, torch.distributed"
    if of_transformers:
        yield "host process, transformers"
