"""Follow what linear layers give through a forward on fake tensors, op by op: where its parts go, and which ops come on the way.

1. every linear layer and embedding that torch's styles can divide is watched; its own ops are left out
2. what a linear layer gives is taken for divided along its last dim; each op after it keeps the division, or does not
   (`divided_ops.py`)
3. where it reaches a linear layer, or leaves the module, that is written down (`Paths`)

The ops are kept as well, with the shapes that their results have: a module that is really divided must run the same ops on
parts of these shapes (`tensor_check.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..planner.sharding import Cut
from ..planner.tensor_groups import Paths
from ..planner.workload import Training
from .divided_ops import NotKept, arguments, cut_after
from .training_step import forward_and_backward

aten = torch.ops.aten

Names = frozenset[str]


@dataclass(frozen=True, slots=True)
class Result:
    """A tensor that an op gives: its shape, and how it is divided if `sources` are."""

    shape: tuple[int, ...]
    cut: Cut | None = None
    sources: Names = frozenset()


@dataclass(frozen=True, slots=True)
class Step:
    """An op of the forward outside the layers that are watched, and where it stands."""

    op: str
    settings: tuple[Any, ...]
    results: tuple[Result, ...]
    sources: Names
    place: str

    def describe(self) -> str:
        """The op and its module, in words."""
        return f"{self.op}{_in(self.place)}"


@dataclass(slots=True)
class Flow:
    """What a forward has shown."""

    paths: Paths = field(default_factory=Paths)
    steps: list[Step] = field(default_factory=list)
    embedded: set[str] = field(default_factory=set)  # embeddings that read what the module is given
    read: set[str] = field(default_factory=set)  # layers whose weight or bias other code reads
    outputs: list[tuple[int, ...]] = field(default_factory=list)
    gradients: dict[str, tuple[int, ...]] = field(default_factory=dict)


def watched_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that torch's styles can divide: those whose forward is `nn.Linear`'s or `nn.Embedding`'s own."""
    return {name: each for name, each in module.named_modules() if is_linear(each) or is_embedding(each)}


def is_linear(module: nn.Module) -> bool:
    """Whether it is an `nn.Linear` that computes as one, of a matrix of its own."""
    own = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return own and isinstance(module._parameters.get("weight"), nn.Parameter)


def is_embedding(module: nn.Module) -> bool:
    """The same for an `nn.Embedding`."""
    own = isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward
    return own and isinstance(module._parameters.get("weight"), nn.Parameter)


def run(module: nn.Module, inputs: Any, training: Training) -> None:
    """Forward, loss and backward; forward alone where nothing is trained."""
    if any(each.requires_grad for each in module.parameters()):
        forward_and_backward(module, inputs, training)
    elif isinstance(inputs, Mapping):
        module(**inputs)
    else:
        module(*inputs)


def gradients_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of all gradients, by their parameters' names."""
    return {name: tuple(each.grad.shape) for name, each in module.named_parameters() if each.grad is not None}


class Ops(TorchDispatchMode):
    """Tells `seen` of every op that the forward of a module runs outside its watched layers."""

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inside: list[tuple[str, bool]] = []  # the modules at work, and whether each is a watched layer
        self._over = False
        self._layers = {id(each): name for name, each in layers.items()}
        self._handles: list[Any] = []
        for name, each in module.named_modules():
            self._handles.append(each.register_forward_pre_hook(self._enters(name), prepend=True, with_kwargs=True))
            self._handles.append(each.register_forward_hook(self._leaves(name)))

    @property
    def place(self) -> str:
        """The module that is at work."""
        return self._inside[-1][0] if self._inside else ""

    # What is told; all of it during the first forward of the module as a whole.

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An op has run."""

    def called(self, name: str, given: list[torch.Tensor]) -> None:
        """A watched layer is called with these tensors."""

    def gave(self, name: str, out: Any) -> None:
        """A watched layer has given `out`."""

    def ended(self, out: Any) -> None:
        """The module as a whole has given `out`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._inside and not self._over and not self._in_layer():
            self.seen(func, args, kwargs or {}, out)
        return out

    def remove(self) -> None:
        """Take the hooks away."""
        for each in self._handles:
            each.remove()

    def _in_layer(self) -> bool:
        return any(layer for _, layer in self._inside)

    def _enters(self, name: str) -> Callable[..., None]:
        def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._over:
                return
            layer = self._layers.get(id(module))
            if layer is not None and not self._in_layer():
                self.called(layer, tensors_in((args, kwargs)))
            self._inside.append((name, layer is not None))

        return enters

    def _leaves(self, name: str) -> Callable[..., None]:
        def leaves(module: nn.Module, args: Any, out: Any) -> None:
            if self._over:
                return
            while self._inside.pop()[0] != name:  # modules whose errors were caught have not left
                pass
            layer = self._layers.get(id(module))
            if layer is not None and not self._in_layer():
                self.gave(layer, out)
            if not self._inside:
                self._over = True
                self.ended(out)

        return leaves


@contextmanager
def watching(ops: Ops) -> Iterator[None]:
    """Have `ops` see what runs in the body."""
    try:
        with ops:
            yield
    finally:
        ops.remove()


class Following(Ops):
    """Writes down the flow of a forward."""

    def __init__(self, module: nn.Module, layers: Mapping[str, nn.Module], inputs: Any) -> None:
        super().__init__(module, layers)
        self.flow = Flow()
        self._linear = {name for name, each in layers.items() if is_linear(each)}
        self._sizes = {name: each.out_features for name, each in layers.items() if isinstance(each, nn.Linear)}
        self._held = {_storage(value): name for name, each in layers.items() for value in each.parameters(recurse=False)}
        self._given = {_storage(each) for each in tensors_in(inputs)}
        self._known = WeakIdKeyDictionary()

    def called(self, name: str, given: list[torch.Tensor]) -> None:
        self._bar_own(given)
        value = given[0] if given else None
        if name not in self._linear:
            if value is not None and _storage(value) in self._given:
                self.flow.embedded.add(name)
            self._refuse_all(given, f"goes into the embedding {name}")
            return
        paths = self.flow.paths
        if name not in paths.reads:
            paths.order.append(name)
            paths.sizes[name] = self._sizes[name]
        cut, sources = self._state(value)
        if cut is not None and value is not None and cut != Cut(value.ndim - 1):
            paths.refuse(sources, f"goes into {name}, which works on its last dim whole, divided along another")
            sources = frozenset()
        paths.reads.setdefault(name, []).append(sources)
        for source in sources:
            paths.into.setdefault(source, set()).add(name)
        if len(sources) > 1:
            paths.joined.append(sources)

    def gave(self, name: str, out: Any) -> None:
        if name in self._linear and isinstance(out, torch.Tensor):
            self._known[out] = (Cut(out.ndim - 1), frozenset([name]))

    def ended(self, out: Any) -> None:
        for each in tensors_in(out):
            self.flow.outputs.append(tuple(each.shape))
            self._refuse_all([each], "leaves the module as it is")

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        operands = tensors_in((args, kwargs))
        self._bar_own(operands)
        sources = frozenset[str]().union(*(self._state(each)[1] for each in operands))
        place = self.place
        cut: Cut | None = None
        if sources and not _goes_by_looks(func):
            try:
                cut = cut_after(func, args, kwargs, out, lambda value: self._state(value)[0])
            except NotKept as reason:
                self.flow.paths.refuse(sources, f"reaches {func.overloadpacket.__name__}{_in(place)}, which {reason}")
        results = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
        found = [self._mark(each, cut, sources) for each in results]
        if cut is not None and len(sources) > 1:
            self.flow.paths.joined.append(sources)
        self.flow.steps.append(Step(name_of(func), settings_of(func, args, kwargs), tuple(found), sources, place))

    def _mark(self, value: torch.Tensor, cut: Cut | None, sources: Names) -> Result:
        shape = tuple(value.shape)
        if cut is None or cut.dim >= value.ndim:
            self._known.pop(value, None)
            return Result(shape)
        self._known[value] = (cut, sources)
        for name in sources:  # the sources' groups are divided, if at all, between ranks that come out even here
            self.flow.paths.sizes[name] = math.gcd(self.flow.paths.sizes[name], shape[cut.dim] // cut.split)
        return Result(shape, cut, sources)

    def _state(self, value: Any) -> tuple[Cut | None, Names]:
        found: tuple[Cut | None, Names] = (
            self._known.get(value, (None, frozenset())) if value is not None else (None, frozenset())
        )
        return found

    def _refuse_all(self, values: list[torch.Tensor], why: str) -> None:
        for each in values:
            self.flow.paths.refuse(self._state(each)[1], why)

    def _bar_own(self, values: list[torch.Tensor]) -> None:
        """Code besides a layer's own works with its weight or bias, which would be a part only."""
        for each in values:
            name = self._held.get(_storage(each))
            if name is not None:
                self.flow.read.add(name)
                self.flow.paths.barred.setdefault(name, f"its weight or bias is read by other code{_in(self.place)}")


_SIZES = frozenset({"size", "sizes", "shape", "normalized_shape", "split_sizes", "stride"})
"""Arguments that are shapes, which differ on a part, and are seen in the shapes of what comes out."""

_QUIET = frozenset({aten.clone, aten.detach, aten.alias, aten.lift_fresh})
"""What torch does, or leaves out, by strides."""

_SAME = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}


def _goes_by_looks(func: Any) -> bool:
    """Whether it tells of a tensor's device, strides or dtype alone, be it to choose a kernel."""
    return func.namespace == "prim" or func.overloadpacket is aten._fused_sdp_choice


def is_quiet(func: Any) -> bool:
    """Whether it does not matter if an op runs."""
    return func.overloadpacket in _QUIET or func.namespace in ("_c10d_functional", "_dtensor") or _goes_by_looks(func)


def name_of(func: Any) -> str:
    """The op's name; one for all ways to look at the same elements in another shape."""
    name = func.overloadpacket.__name__
    return "" if is_quiet(func) else _SAME.get(name, name)


def settings_of(func: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What an op is told besides tensors and shapes."""
    given = arguments(func, args, kwargs)
    return tuple(
        value
        for name, value in given.items()
        if name not in _SIZES and not any(isinstance(each, torch.Tensor) for each in tree_leaves(value))
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in tuples, lists and mappings."""
    found = [each for each in tree_leaves(value) if isinstance(each, torch.Tensor)]
    for each in tree_leaves(value):
        if isinstance(each, Mapping):  # outputs of transformers, where pytree does not know them
            found += [inner for inner in tree_leaves(dict(each)) if isinstance(inner, torch.Tensor)]
    return found


def _storage(value: torch.Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def _in(place: str) -> str:
    return f" in {place}" if place else ""
