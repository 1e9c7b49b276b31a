"""Follows every storage that ops create, from its birth to its end, and names where each comes from.

A dispatch mode sees the ops of forward, backward and optimizer. What it does not see is written down in `scratch`: memory that a
kernel takes and gives back while it runs, and numbers that become tensors of their own.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from ..planner.allocations import START, Allocation, Kind, Moment, Timeline
from ..tracer.graph import Frame
from .cuda_scratch import cuda_scratch_bytes
from .fake_ops import called
from .scratch import corrected, kept_number, scratch_bytes

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_STANDING_IN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "cuda_")  # files that call ops in the module's place
_AGAIN = -1  # stands for all nodes of a forward that runs again within the backward
_WAIT = torch.ops._c10d_functional.wait_tensor.default
ACCUMULATE = 2**64 - 1
"""The sequence number of autograd's AccumulateGrad nodes."""
_UNSETTLED = ("temporary", "activation", "communication buffer")  # FSDP's gradients are views of what is reduced


@dataclass(slots=True, eq=False)
class _Piece:
    """An allocation while its kind is not settled."""

    nbytes: int
    op: str
    module: str
    source: Frame | None
    kind: Kind = "temporary"
    name: str = ""
    on_host: bool = False
    stream: str = ""
    others: set[str] | None = None  # the names of what shares it: FSDP's gradients of one unit

    def named(self) -> str:
        return f"{self.name} and {len(self.others)} more" if self.others else self.name


@dataclass(frozen=True, slots=True)
class Origin:
    """What is allocated while some code runs: its kind, whose it is, and from the pool of which CUDA stream (by its stand-in)."""

    kind: Kind
    name: str = ""
    module: str = ""
    on_host: bool = False
    streams: Mapping[int, str] = field(default_factory=dict)


class Allocations(TorchDispatchMode):
    """While it is active, writes down what ops allocate and when it goes.

    `label` names tensors that it knows, `phase` opens a phase, and `timeline` gives all that was found.
    """

    collective_scratch: Callable[[Any, Any, Any], int] | None = None
    """The bytes that a collective takes on the CPU beside its results; None where there is only one process."""

    skips_waiting = True
    """Whether there is nothing to wait for after a collective, as in a run on fake tensors."""

    def __init__(self, on_cpu: bool = True, host_phases: Iterable[str] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_cpu = on_cpu  # whether the plan's device is the CPU, whose kernels' scratch is known
        self._host_phases = frozenset(host_phases)  # those that compute in host memory, where the plan's device is another
        self._on_host = False
        self._counts = True
        self._in_attention = False
        self._phase = START
        self._pieces: list[_Piece] = []
        self._moments: list[Moment] = []
        self._living: dict[int, int] = {}  # a storage's address to its piece's index
        self._places: dict[int, tuple[str, Frame | None]] = {}  # of a forward op, by its autograd node's sequence number
        self._numbers: dict[int, list[int]] = {}  # pieces that an autograd node keeps, by its sequence number
        self._in_forward = False
        self._origins: list[Origin] = []
        self._ran = ACCUMULATE
        self._modules: list[str] = [""]

    def __enter__(self) -> Allocations:
        self._fake_mode = active_fake_mode()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    # -- what the run tells it ------------------------------------------------------------------------------------------

    def phase(self, name: str) -> None:
        """From here on it is another phase."""
        self._release_numbers(None)
        self._phase, self._on_host = name, name in self._host_phases

    def label(self, tensor: torch.Tensor, kind: Kind, name: str, on_host: bool = False) -> None:
        """Say what a tensor is; one that no op made is born now. Of a DTensor it is what this rank holds."""
        for part in parts_of(tensor):
            storage = part.untyped_storage()
            index = self._living.get(storage._cdata)
            if index is None:
                index = self._born(storage, "", "", None)
            piece = self._pieces[index]
            if piece.kind in _UNSETTLED:
                piece.kind, piece.name, piece.on_host = kind, name, on_host
            elif piece.kind == kind and piece.name != name:
                piece.others = (piece.others or set()) | {name}

    @contextmanager
    def within(self, origin: Origin) -> Iterator[None]:
        """What is born in the body has this origin."""
        self._origins.append(origin)
        try:
            yield
        finally:
            self._origins.pop()

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size than before: what it was has gone, and something else has come."""
        index = self._living.get(storage._cdata)
        if index is None:
            return  # nobody's that is followed
        self._gone(index)
        before = self._pieces[index]
        self._living[storage._cdata] = self._add(self._piece(storage.nbytes(), before.op, before.module, before.source))

    def made_outside(self, tensor: torch.Tensor, op: str) -> torch.Tensor:
        """A tensor in host memory that came about without an op and is kept for the backward."""
        piece = self._pieces[self._born(tensor.untyped_storage(), op, *self._place(None))]
        piece.kind, piece.on_host = "activation", not self._on_cpu
        return tensor

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Ops in here are as if they were not there."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before

    @contextmanager
    def attention(self) -> Iterator[None]:
        """Ops in here are those of `scaled_dot_product_attention`."""
        before, self._in_attention = self._in_attention, True
        try:
            yield
        finally:
            self._in_attention = before

    def taken(self, nbytes: int, op: str) -> None:
        """What a kernel that no dispatch mode sees takes while it runs."""
        self._gone(self._add(self._piece(nbytes, op, *self._place(None))))

    def follow(self, module: nn.Module) -> list[Any]:
        """Know which submodule runs; gives the hooks' handles."""
        handles: list[Any] = []

        def left(*_: Any) -> None:  # what a forward hook returns would take the output's place
            self._modules.pop()

        for name, each in module.named_modules():
            handles.append(each.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            handles.append(each.register_forward_hook(left, always_call=True))
        return handles

    def timeline(self, device: str, host: str) -> Timeline:
        """All that was found, on `device`, but what was labeled as `on_host`."""
        pieces = (
            Allocation(
                each.kind,
                each.nbytes,
                host if each.on_host else device,
                each.named(),
                each.module,
                each.op,
                each.source,
                each.stream,
            )
            for each in self._pieces
        )
        return Timeline(tuple(pieces), tuple(self._moments))

    # -- what ops tell it -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(each) for each in types):
            return NotImplemented  # a DTensor makes of it the ops on what this rank holds, which come here again
        if not self._counts or func.namespace in ("prim", "profiler") or active_fake_mode() is not self._fake_mode:
            return func(*args, **(kwargs or {}))  # of another mode is what DTensor tries to learn the whole's shape
        if func is _WAIT and self.skips_waiting:
            return args[0]  # which the fake op makes a copy of
        node = torch._C._current_autograd_node()
        self._release_numbers(node)
        self._settle(node)
        masked = self._adds_mask(func, args)
        func = torch.ops.aten.add_.Tensor if masked else func
        out = corrected(func, args, called(func, args, kwargs or {}), self._on_cpu)
        out = torch.ops.aten.alias.default(out) if masked else out  # autograd expects another tensor
        place = self._place(node)
        for each in _tensors(out):
            storage = each.untyped_storage()
            if storage._cdata not in self._living:
                self._born(storage, str(func.overloadpacket).removeprefix("aten."), *place)
        if self._on_cpu or self._on_host:
            self._take_scratch(func, args, kwargs or {}, out, node, place)
        else:
            self._take(cuda_scratch_bytes(func, args, out), func, place)
        return out

    def _adds_mask(self, func: Any, args: Any) -> bool:
        """Whether attention adds its mask to the scores: it does so in place, unless a tensor is of a subclass, as fake ones are.

        aten/src/ATen/native/transformers/attention.cpp `_scaled_dot_product_attention_math`.
        """
        if not self._in_attention or func is not torch.ops.aten.add.Tensor or not isinstance(args[0], torch.Tensor):
            return False
        index = self._living.get(args[0].untyped_storage()._cdata)
        return index is not None and self._pieces[index].op == "bmm"

    def _settle(self, node: Any) -> None:
        """What is there when a backward begins, or goes on after a checkpoint's second forward, was kept for it.

        Hooks for saved tensors would say so at once, but what they are given refers to the node that keeps it: a graph that no
        backward runs through would never go.
        """
        if torch.is_grad_enabled():
            self._in_forward = True
        elif node is not None and self._in_forward:
            self._in_forward = False
            for index in self._living.values():
                if self._pieces[index].kind == "temporary":
                    self._pieces[index].kind = "activation"

    def _take_scratch(self, func: Any, args: Any, kwargs: Any, out: Any, node: Any, place: tuple[str, Frame | None]) -> None:
        op, beside = str(func.overloadpacket).removeprefix("aten."), self.collective_scratch
        kept = kept_number(func, args)
        if kept:
            number = _AGAIN if node is not None else torch._C._autograd._get_sequence_nr() - 1
            self._numbers.setdefault(number, []).append(self._add(_Piece(kept, f"{op}'s number", *place, "activation")))
        self._take(scratch_bytes(func, args, out) - kept + (0 if beside is None else beside(func, args, out)), func, place)

    def _take(self, nbytes: int, func: Any, place: tuple[str, Frame | None]) -> None:
        """Memory that a kernel takes and gives back."""
        if nbytes > 0:
            op = str(func.overloadpacket).removeprefix("aten.")
            self._gone(self._add(self._piece(nbytes, f"{op}'s scratch", *place)))

    def _born(self, storage: torch.UntypedStorage, op: str, module: str, source: Frame | None) -> int:
        index = self._add(self._piece(storage.nbytes(), op, module, source))
        self._living[storage._cdata] = index
        weakref.finalize(storage, self._ended, storage._cdata).atexit = False
        return index

    def _piece(self, nbytes: int, op: str, module: str, source: Frame | None) -> _Piece:
        if not self._origins:
            return _Piece(nbytes, op, module, source, on_host=self._on_host)
        origin = self._origins[-1]
        stream = origin.streams.get(id(torch.cpu.current_stream()), "")
        return _Piece(nbytes, op, origin.module or module, source, origin.kind, origin.name, origin.on_host, stream)

    def _add(self, piece: _Piece) -> int:
        self._pieces.append(piece)
        self._moments.append(Moment(self._phase, len(self._pieces) - 1, True))
        return len(self._pieces) - 1

    def _ended(self, key: int) -> None:
        self._gone(self._living.pop(key))

    def _gone(self, index: int) -> None:
        self._moments.append(Moment(self._phase, index, False))

    def _release_numbers(self, node: Any) -> None:
        """A node lets go of what it keeps as soon as it has run."""
        current = ACCUMULATE if node is None else node._sequence_nr()
        if not torch.is_grad_enabled():  # a checkpoint's second forward is over: its graph is not needed any more
            for index in self._numbers.pop(_AGAIN, ()):
                self._gone(index)
        if current != self._ran:
            for index in self._numbers.pop(self._ran, ()):
                self._gone(index)
            self._ran = current

    # -- where ----------------------------------------------------------------------------------------------------------

    def _place(self, node: Any) -> tuple[str, Frame | None]:
        """The module and the line of an op; of a backward op, those of the forward op whose node runs."""
        if node is not None and (known := self._places.get(node._sequence_nr())) is not None:
            return known
        place = (self._modules[-1], _line(sys._getframe(2)))
        if node is None:
            self._places.setdefault(torch._C._autograd._get_sequence_nr() - 1, place)
        return place


def _line(frame: Any) -> Frame | None:
    """The innermost line that is not torch's; None where there is none below the step itself."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and not file.startswith(_STANDING_IN):
            return None
        if not file.startswith((_TORCH, _OURS, "<")):
            return Frame(os.path.basename(file), frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None


def parts_of(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """The ordinary tensors that a tensor is made of: a DTensor's local part, a quantized one's values and scales."""
    if not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [part for each in inner if isinstance(each, torch.Tensor) for part in parts_of(each)]


def _tensors(out: Any) -> Iterable[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return (out,)
    return [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)] if isinstance(out, tuple | list | dict) else ()
