"""The noun of the first stage: `ParamGraph`, what a constructor creates and how every value comes about.

A graph is four tuples of frozen records. Two of them say what there is, two how it came about:

* `ModuleNode`: a submodule, by its qualified names;
* `TensorNode`: a parameter, a buffer or a plain tensor attribute, as a view of a storage;
* `Storage`: what holds values. Ties and views are statements about storages;
* `Op`: one recorded call that creates or changes values, in constructor order (the *tape*).

`ParamGraph.digraph` shows the same as a `networkx.DiGraph`. A storage that is written several times appears there once per
write (`Version`), so the graph is acyclic and a tensor's *recipe* is the ops among its ancestors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import networkx as nx
import torch

from .errors import UnknownNameError, nearest

Kind = Literal["parameter", "buffer", "attribute"]


class View(NamedTuple):
    """A tensor as the tape sees it: a storage's index and a geometry over it.

    `size` and `stride` are in elements, `offset` in elements from the storage's start. `conj` and `neg` are torch's lazy bits.
    """

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    conj: bool = False
    neg: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie side by side in index order."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of the elements in view (an expanded element counts as often as it is seen)."""
        return self.numel * self.dtype.itemsize

    def over(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """A real tensor of this geometry over `storage`, with a version counter of its own."""
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        if self.conj:
            tensor = tensor.conj()
        return tensor._neg_view() if self.neg else tensor


class Frame(NamedTuple):
    """One line of Python on the way to an op."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class Site:
    """Where an op was called: the `torch.nn.init` function if one was, and the lines that led to it, innermost first.

    The last frame is the first one outside torch: the line of the user's constructor.
    """

    frames: tuple[Frame, ...] = ()
    init: str | None = None
    init_args: tuple[tuple[str, Any], ...] = ()

    @property
    def line(self) -> Frame | None:
        """The constructor's line: the innermost frame outside torch."""
        return self.frames[-1] if self.frames else None


class StreamPosition(NamedTuple):
    """Where in a random stream an op starts.

    `origin` names the state it follows: `"ambient"` (the generator as the constructor found it), `"after"` (as op number
    `op` left it) or `"explicit"` (a state set by the constructor itself: `state` holds the generator's bytes, `seed` the seed).
    """

    origin: Literal["ambient", "after", "explicit"]
    op: int | None = None
    seed: int | None = None
    state: bytes | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Constant:
    """Contents that come from outside the tape: shape, dtype and a digest are noted; `value` keeps the tensor itself."""

    size: tuple[int, ...]
    dtype: torch.dtype
    digest: str
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """What holds values: `nbytes` bytes on the device that eager would report.

    `constant` is set where the contents came from outside the tape (a Python list, a file, a tensor passed in).
    `exposed` is set where the constructor looked at the memory behind torch's dispatcher (`.numpy()`, `.data_ptr()`).
    `held` is set where something besides the module's own tensors still refers to it after the constructor (a closure).
    """

    index: int
    nbytes: int
    device: str = "cpu"
    constant: Constant | None = None
    exposed: bool = False
    held: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Op:
    """One recorded call that creates or changes tensor values.

    `args` and `kwargs` are the call's own, with a `View` in place of every tensor. `reads` are the views whose values it
    depends on, `writes` those it changes in place, `outputs` those it creates (`None` for an output that is no tensor).

    `live` is False when no tensor that outlives the constructor depends on it. `unread` is the stronger statement that the
    runtime acts on: what this op writes is overwritten or dropped before anything at all reads it. `default_dtype` is torch's at
    the time of the call, on which the result of a call without a dtype depends.
    """

    index: int
    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    reads: tuple[View, ...]
    writes: tuple[View, ...]
    outputs: tuple[View | None, ...]
    overwrites: bool
    site: Site
    position: StreamPosition | None = None
    live: bool = True
    unread: bool = False
    func: Any = field(default=None, repr=False)
    default_dtype: torch.dtype = torch.float32

    @property
    def random(self) -> bool:
        """Whether it draws from a random stream."""
        return self.position is not None

    @property
    def targets(self) -> tuple[View, ...]:
        """Every view whose values it makes: written in place, or created."""
        if not self.outputs:
            return self.writes
        return self.writes + tuple([view for view in self.outputs if view is not None])

    def describe(self) -> str:
        """The call in the field's own words: the init function if one was called, else the operator.

        `kaiming_uniform_(a=2.236)`, `normal_(mean=0.0, std=0.02)`, `zero_()`.
        """
        from .describe import describe_op

        return describe_op(self)


@dataclass(frozen=True, slots=True, eq=False)
class TensorNode:
    """A tensor of the finished module, under all of its names.

    `names[0]` is the name that `named_parameters` / `named_buffers` gives; the others are its ties. An `attribute` is a tensor
    that is neither parameter nor buffer: `layer.table`, `layer.tables[0]`, `layer.cache['k']`. An `opaque` one is sparse,
    quantized or nested: `type` says what it is, `view` shows no more than its bytes.
    """

    names: tuple[str, ...]
    kind: Kind
    view: View
    requires_grad: bool = False
    persistent: bool = True
    grad_fn: str | None = None
    type: str = "Tensor"
    opaque: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def lazy(self) -> bool:
        """Whether it is a lazy module's, whose shape nobody knows yet."""
        return self.type.startswith("Uninitialized")

    @property
    def numel(self) -> int:
        return self.view.numel

    @property
    def nbytes(self) -> int:
        return self.view.nbytes

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.size


@dataclass(frozen=True, slots=True, eq=False)
class ModuleNode:
    """A submodule under all of its names (several when it is shared); the root's name is the empty string."""

    names: tuple[str, ...]
    type: str
    training: bool = True

    @property
    def name(self) -> str:
        return self.names[0]


class Version(NamedTuple):
    """A storage after its `number`-th write; number 0 is its contents at creation (nothing, or a constant)."""

    storage: int
    number: int


@dataclass(frozen=True, slots=True)
class Ambient:
    """The torch settings that the constructor ran under, and runs under again when it is built."""

    default_dtype: torch.dtype = torch.float32
    default_device: str = "cpu"
    grad_enabled: bool = True
    inference_mode: bool = False


@dataclass(frozen=True, eq=False)
class ParamGraph:
    """What one constructor creates: modules, tensors, storages, and the ops that give them their values.

    `seed_dependent` lists the lines at which the constructor looked at random values (`.item()` of a drawn tensor): its ops then
    hold for one generator state only. `host_random` is set when it drew from Python's or numpy's random module. `ends` says where
    every default generator in use stands afterwards.
    """

    modules: tuple[ModuleNode, ...]
    tensors: tuple[TensorNode, ...]
    storages: tuple[Storage, ...]
    ops: tuple[Op, ...]
    ambient: Ambient = Ambient()
    reference: str = "cpu"
    seed_dependent: tuple[Frame, ...] = ()
    host_random: bool = False
    notes: tuple[str, ...] = ()
    ends: tuple[StreamPosition, ...] = ()

    # -- looking things up ------------------------------------------------------------------------------------------

    @cached_property
    def by_name(self) -> Mapping[str, TensorNode]:
        """Every name of every tensor."""
        return {name: tensor for tensor in self.tensors for name in tensor.names}

    def tensor(self, name: str) -> TensorNode:
        """The tensor called `name`; raises `UnknownNameError` with the nearest names."""
        try:
            return self.by_name[name]
        except KeyError:
            raise UnknownNameError(f"the graph has no tensor called {name!r}{nearest(name, self.by_name)}") from None

    @cached_property
    def parameters(self) -> tuple[TensorNode, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.kind == "parameter")

    @cached_property
    def buffers(self) -> tuple[TensorNode, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.kind == "buffer")

    @cached_property
    def state(self) -> tuple[TensorNode, ...]:
        """What a state dict has, each tensor once: parameters and persistent buffers, but none on the meta device itself."""
        kept = [node for node in self.tensors if node.kind == "parameter" or (node.kind == "buffer" and node.persistent)]
        devices = {storage.index: storage.device for storage in self.storages}
        return tuple(node for node in kept if devices[node.view.storage] != "meta")

    @property
    def ties(self) -> tuple[TensorNode, ...]:
        """The tensors that go by more than one name."""
        return tuple(tensor for tensor in self.tensors if len(tensor.names) > 1)

    @cached_property
    def held_storages(self) -> tuple[Storage, ...]:
        """The storages that the finished module keeps alive, in order of creation: what takes up memory."""
        named = {tensor.view.storage for tensor in self.tensors}
        return tuple(storage for storage in self.storages if storage.index in named or storage.held)

    @cached_property
    def dead_ops(self) -> tuple[Op, ...]:
        return tuple(op for op in self.ops if not op.live)

    @cached_property
    def writers(self) -> Mapping[int, tuple[Op, ...]]:
        """For every storage, the ops that write it, in order."""
        found: dict[int, list[Op]] = {}
        for op in self.ops:
            for view in op.targets:
                ops = found.setdefault(view.storage, [])
                if not ops or ops[-1] is not op:
                    ops.append(op)
        return {storage: tuple(ops) for storage, ops in found.items()}

    def recipe(self, name: str) -> tuple[Op, ...]:
        """The slice of the tape that the values of the tensor called `name` depend on, in constructor order."""
        from .liveness import slice_indices

        indices = slice_indices(self.ops, self._sizes, self._writer_indices, [self.tensor(name).view.storage])
        return tuple(self.ops[index] for index in indices)

    @cached_property
    def _sizes(self) -> Mapping[int, int]:
        return {storage.index: storage.nbytes for storage in self.storages}

    @cached_property
    def _writer_indices(self) -> Mapping[int, list[int]]:
        return {storage: [op.index for op in ops] for storage, ops in self.writers.items()}

    @cached_property
    def uninitialized(self) -> tuple[TensorNode, ...]:
        """The tensors with at least one element that the constructor never gives a value."""
        from .coverage import uninitialized_tensors

        return uninitialized_tensors(self)

    # -- other forms ------------------------------------------------------------------------------------------------

    @cached_property
    def digraph(self) -> nx.DiGraph[Any]:
        """The graph as `networkx` sees it.

        Nodes are the frozen records and `Version`s. Edges follow the data, and say so in their `kind`: `reads` from a version to
        an op, `writes` from an op to a version, `views` from a version to a tensor, `owns` from a module to what it holds.
        """
        from .digraph import build_digraph

        return build_digraph(self)

    @cached_property
    def fingerprint(self) -> str:
        """A digest that is equal wherever the same constructor ran with the same arguments, and differs otherwise."""
        from .fingerprint import fingerprint

        return fingerprint(self)

    def check(self) -> None:
        """Raise `GraphError` where the graph contradicts itself."""
        from .check import check_graph

        check_graph(self)

    def to_text(self) -> str:
        """The graph as text: one line a tensor, under it the ops of its recipe."""
        from .describe import graph_text

        return graph_text(self)

    def to_json(self) -> dict[str, Any]:
        """The graph as plain JSON data: what it holds, without the constants' contents."""
        from .describe import graph_json

        return graph_json(self)

    def __str__(self) -> str:
        return self.to_text()

    def __iter__(self) -> Iterator[TensorNode]:
        return iter(self.tensors)
