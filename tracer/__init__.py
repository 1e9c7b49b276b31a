"""The first stage: what there is. Runs an unmodified constructor without allocating, and decides nothing.

* `trace`: the verb, `trace_constructor(build, ...) -> ParamGraph`;
* `graph`: the noun, frozen records of modules, tensors, storages and ops; `check` is its checker;
* `tape`, `traced`, `schema`, `sites`, `streams`, `patches`: how a running constructor is written down;
* `opaque`, `imagined`: tensors without plain memory, and CUDA where there is none;
* `liveness`, `coverage`, `replay`: what the tape says about values, and how to get some of them;
* `draws`, `places`, `jump`, `native`, `philox`: what each op takes from a random stream, and how to get anywhere in it;
* `describe`, `digraph`, `fingerprint`: the graph in other forms.
"""

from .errors import (
    DecisionError,
    GraphError,
    GroundplanError,
    MaterializeError,
    PlanFileError,
    SpecError,
    TraceError,
    UninitializedError,
    UnknownNameError,
)
from .graph import Op, ParamGraph, Site, Storage, TensorNode, View
from .trace import Origin, trace_constructor

__all__ = [
    "trace_constructor",
    "Origin",
    "ParamGraph",
    "Op",
    "Site",
    "Storage",
    "TensorNode",
    "View",
    "DecisionError",
    "GraphError",
    "GroundplanError",
    "MaterializeError",
    "PlanFileError",
    "SpecError",
    "TraceError",
    "UninitializedError",
    "UnknownNameError",
]
