"""The dispatch mode of the constructor's second, real run: it follows the tape, and takes the shortcuts that the tape allows.

Every call is compared with the tape; at the first difference the run is given up (`Diverged`) and started over without shortcuts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..tracer.arguments import is_plain_meta, tensors_in
from ..tracer.draws import is_static
from ..tracer.graph import Op, ParamGraph
from ..tracer.liveness import is_anchor
from ..tracer.opaque import is_opaque
from ..tracer.schema import Kind, aten, is_random, kind_of
from ..tracer.traced import FAKE, has_own_rules
from .pages import prefer_huge_pages
from .sources import Constant, Source
from .waiting import WaitingRoom

_UNRECORDED = (Kind.EMPTY, Kind.LIFT, Kind.METADATA, Kind.GEOMETRY)
_SOMETIMES_RECORDED = (Kind.VIEW, Kind.VALUE)


class Diverged(BaseException):
    """The constructor does something else than it did under trace; no `except Exception` of the user's is to catch this."""


class Guided(TorchDispatchMode):
    """Follows `graph`'s tape, with numbers from `source`.

    `waits` lets fills wait; `zeros` gives memory that nothing initializes the value 0.
    """

    def __init__(self, graph: ParamGraph, source: Source, waits: bool, zeros: bool, progress: Callable[[int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting = WaitingRoom(progress)
        self._source = source
        self._ops = [op for op in graph.ops if not _is_host(op)]
        self._next = 0
        self._following = True
        self._given_up = False
        self._waits = waits
        self._zeros = zeros
        self._progress = progress
        self._first_writes = _first_writes(graph)
        self._exposed = {storage.index for storage in graph.storages if storage.exposed or storage.constant}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @contextlib.contextmanager
    def constructing(self) -> Iterator[None]:
        """The constructor's run; what comes after it (casts, moves) is no longer compared with the tape."""
        with _trunc_normal_replaced(self):
            yield
        self._following = False
        if self._given_up:
            raise Diverged("the constructor caught the exception that gave up its run")
        if self._next != len(self._ops):
            raise Diverged(f"the constructor ended before {self._ops[self._next].describe()}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(FAKE) is not None:
            return func(*args, **kwargs)
        if any(has_own_rules(each) for each in types):
            return NotImplemented
        kind = kind_of(func)
        if self._following:
            if kind is Kind.FILL:
                return self._fill(func, args, kwargs)
            op = self._follow(func, kind, args, kwargs)
            if op is not None and op.unread and not (args[0].is_conj() or args[0].is_neg()):
                return torch.empty_like(*args, **kwargs)  # a clone that nothing reads: the memory without the values
            if op is not None and op.random:
                return self._call(op, args, kwargs)
        tensors = list(tensors_in(args, kwargs)) if len(self.waiting) else []
        if kind is Kind.VIEW:
            with self.waiting.geometry_only(tensors):
                return func(*args, **kwargs)
        if tensors and func is aten._to_copy.default and (converted := self._convert(*args, **kwargs)) is not None:
            return converted
        for tensor in tensors:
            self.waiting.fill(tensor)
        out = func(*args, **kwargs)
        if self._zeros and kind is Kind.EMPTY and not out.is_meta:
            out.untyped_storage().fill_(0)
        return out

    # -- following the tape ---------------------------------------------------------------------------------------------

    def _follow(self, func: Any, kind: Kind, args: Any, kwargs: Any) -> Op | None:
        """The op on the tape that this call is; None for a call that leaves none there.

        Such are calls on the user's own meta tensors, geometry, and looks at the values of tensors from outside.
        """
        tensors = list(tensors_in(args, kwargs))
        if any(map(is_plain_meta, tensors)) or _asks_for_meta(kwargs):
            return None
        if kind in _UNRECORDED and not (kind is Kind.EMPTY and _makes_opaque(tensors, kwargs)):
            return None
        op = self._ops[self._next] if self._next < len(self._ops) else None
        if op is not None and op.func is func:
            self._next += 1
            return op
        if kind in _SOMETIMES_RECORDED:
            return None
        raise self._difference(str(func), op)

    def _difference(self, here: str, op: Op | None) -> Diverged:
        self._given_up = True
        return Diverged(f"{here} where the tape has {op.describe() if op else 'nothing more'}")

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        target, generator = args[0], kwargs.get("generator")
        if is_opaque(target):
            op = self._follow(func, Kind.GENERAL, args, kwargs)
            return func(*args, **kwargs) if op is None or not op.random else self._source.call(op, args, kwargs)
        op = self._follow(func, Kind.FILL, args, kwargs)
        if op is None:
            return func(*args, **kwargs)
        self._check_same(op, target, args[1:])
        call = (op, func, target, args[1:], generator)
        if op.unread and self._leave_out(*call):
            return target
        if self._may_wait(op, target) and self._put_off(*call):
            return target
        self.waiting.fill(target)
        if is_random(func):
            self._source.fill(*call)
        else:
            prefer_huge_pages(target.untyped_storage())
            func(*args, **kwargs)
        self._progress(target.nbytes)
        return target

    def _leave_out(self, op: Op, func: Any, target: torch.Tensor, *rest: Any) -> bool:
        """Leave out a fill that nothing reads, if its draws can be passed over."""
        return not is_random(func) or self._source.pass_over(op, func, target, *rest)

    def _put_off(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Any) -> bool:
        """Let a fill wait, if its draws can be passed over."""
        if is_random(func):
            return self.waiting.take(target, lambda: self._source.put_off(op, func, target, args, generator))
        return self.waiting.take(target, lambda: Constant(func, args))

    def _call(self, op: Op, args: Any, kwargs: dict[str, Any]) -> Any:
        """Any other op that draws."""
        for tensor in tensors_in(args, kwargs):
            self.waiting.fill(tensor)
        return self._source.call(op, args, kwargs)

    def _convert(self, tensor: torch.Tensor, **options: Any) -> torch.Tensor | None:
        """A waiting tensor's conversion to another dtype, done while it is drawn; None for any other call."""
        dtype, kept = options.pop("dtype", None), options.pop("memory_format", None)
        device = options.pop("device", None)
        if dtype is None or kept not in (None, torch.preserve_format) or device not in (None, tensor.device):
            return None
        if any(options.values()) or not self.waiting.holds(tensor):
            return None
        return self.waiting.converted(tensor, dtype)

    def _check_same(self, op: Op, target: torch.Tensor, args: tuple[Any, ...]) -> None:
        view = op.writes[0]
        here = (target.dtype, tuple(target.shape), target.stride(), target.storage_offset(), *args)
        if here != (view.dtype, view.size, view.stride, view.offset, *op.args[1:]):
            raise self._difference(f"{op.name} on {here}", op)

    def _may_wait(self, op: Op, target: torch.Tensor) -> bool:
        """Whether the storage holds nothing yet but fills that wait, and nothing looks at it behind torch's back."""
        storage = op.writes[0].storage
        if not self._waits or storage in self._exposed or any(name != "generator" for name, _ in op.kwargs):
            return False
        return self.waiting.holds(target) or self._first_writes.get(storage) == op.index

    def trunc_normal(self, original: Any, tensor: torch.Tensor, bounds: tuple[float, ...], generator: Any) -> torch.Tensor:
        """`trunc_normal_` is one op on the tape; what it is made of is not followed."""
        if is_plain_meta(tensor):
            return original(tensor, *bounds, generator=generator)  # type: ignore[no-any-return]
        op = self._ops[self._next] if self._next < len(self._ops) else None
        if op is None or op.func is not original:
            raise self._difference("trunc_normal_", op)
        self._check_same(op, tensor, bounds)
        self._next += 1
        with _disable_current_modes():
            done = self._truncate(op, tensor, bounds, generator)
        if not done:
            self._following = False
            try:
                original(tensor, *bounds, generator=generator)
            finally:
                self._following = True
        self._progress(tensor.nbytes)
        return tensor

    def _truncate(self, op: Op, tensor: torch.Tensor, bounds: tuple[float, ...], generator: Any) -> bool:
        """Do a `trunc_normal_`, leave it out or let it wait; False, and nothing is done, where torch is to do it."""
        if is_static(op):  # a normal_ whose numbers are all within the bounds
            call = (op, aten.normal_.default, tensor, bounds[:2], generator)
            if (op.unread and self._leave_out(*call)) or (self._may_wait(op, tensor) and self._put_off(*call)):
                return _written(tensor, 1)
        self.waiting.fill(tensor)
        times = self._source.truncate(op, tensor, bounds, generator)
        return times is not None and _written(tensor, times)


def _written(tensor: torch.Tensor, times: int) -> bool:
    """Count writes that were done behind the back of a tensor's version counter."""
    if not tensor.is_inference():
        for _ in range(times):
            torch.autograd.graph.increment_version(tensor)
    return True


def _is_host(op: Op) -> bool:
    """Whether the op stands for what Python did behind torch's back: the second run has no call for it."""
    return not isinstance(op.func, torch._ops.OpOverload) and not is_anchor(op.func)


def _first_writes(graph: ParamGraph) -> dict[int, int]:
    """For every storage, the first op that writes it and is not left out."""
    first: dict[int, int] = {}
    for op in graph.ops:
        if not op.unread:
            for view in op.targets:
                first.setdefault(view.storage, op.index)
    return first


def _makes_opaque(tensors: list[torch.Tensor], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("layout") not in (None, torch.strided) or any(map(is_opaque, tensors))


def _asks_for_meta(kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


@contextlib.contextmanager
def _trunc_normal_replaced(mode: Guided) -> Iterator[None]:
    original = nn.init._no_grad_trunc_normal_

    def trunc_normal_(
        tensor: torch.Tensor, mean: float, std: float, a: float, b: float, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        if torch._C._len_torch_dispatch_stack() == 0:  # another thread, outside the mode
            return original(tensor, mean, std, a, b, generator=generator)
        return mode.trunc_normal(original, tensor, (mean, std, a, b), generator)

    nn.init._no_grad_trunc_normal_ = trunc_normal_
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = original
