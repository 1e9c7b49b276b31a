"""The tape: every call that creates or changes tensor values, written down while the constructor runs.

`Tape` is a `TorchDispatchMode`. It answers each ATen call with `Traced` tensors, whose geometry torch's own meta kernels compute,
and keys what it writes down by storage, never by Python object: ties, views and `.data =` then need no further thought.
Real tensors come from outside (arguments, files, constants): views of them are taken for real, everything else is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .arguments import (
    frozen,
    frozen_kwargs,
    generator_in,
    is_plain_meta,
    mapped,
    mapped_kwargs,
    on_meta,
    operands,
    result_device,
    tensors_in,
    without_generator,
    written,
)
from .errors import TraceError
from .graph import Op, Storage, View
from .ledger import Entry, Ledger, bytes_of
from .liveness import mark_liveness
from .opaque import NotStrided, Opaque, is_opaque
from .schema import Kind, aten, checks_values, is_random, kind_of, overwrites, quantizes, reads_geometry_only
from .sites import here
from .streams import generators_kept
from .traced import FAKE, META, Hooks, Traced, has_own_rules, hooks, meta_over, view_of, wrap
from .values import Values

_DEVICE = torch.ops.prim.device.default
_STRIDED = (None, torch.strided)
_LEARNED_BYTES = 2**30
_CHECKED_BYTES = 2**20


_Twins = dict[int, torch.Tensor]  # the meta tensors that stand for a call's operands, by the operands' ids


class Tape(TorchDispatchMode):
    """Records one constructor; `states` are the generators' states that it starts from, by device."""

    def __init__(self, states: dict[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = Ledger()
        self.values = Values(self.ledger, states)
        self.opaque = Opaque(self.ledger, self.values)
        self._valid: set[Any] = set()
        self._handlers: dict[Any, Callable[..., Any]] = {_DEVICE: self._ask_device}
        self._by_kind: dict[Kind, Callable[..., Any]] = {
            Kind.EMPTY: self._empty,
            Kind.FILL: self._fill,
            Kind.COPY: self._general,
            Kind.LIFT: self._lift,
            Kind.VIEW: self._take_view,
            Kind.METADATA: self._change_geometry,
            Kind.GEOMETRY: self._ask_geometry,
            Kind.VALUE: self._ask_value,
            Kind.GENERAL: self._general,
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes longer than a trace

    @contextmanager
    def recording(self) -> Iterator[None]:
        """The time during which calls are recorded, and traced tensors answer for their values."""
        hooks.append(Hooks(self.values.read, self.clone, self.copy_storage))
        try:
            with self:
                yield
        finally:
            hooks.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(FAKE) is not None:
            return func(*args, **(kwargs or {}))  # somebody plays through a call (DTensor, to know its sharding)
        for kind in types:
            if kind is not Traced and has_own_rules(kind):
                return NotImplemented  # a subclass such as DTensor: it calls us for what it is made of
        handler = self._handlers.get(func)
        if handler is None:
            handler = self._handlers[func] = self._by_kind[kind_of(func)]
        if self.values.watches:
            self.values.sync()
        return handler(func, args, kwargs or {})

    def finish(self, named: Iterable[int]) -> tuple[tuple[Op, ...], tuple[Storage, ...]]:
        """The finished tape; `named` are the storages of the module's own tensors."""
        self.values.sync()
        kept = set(named)
        entries, records = self.ledger.entries, self.ledger.records
        held = {record.index for record in records if record.constant is None and record.is_referenced} - kept
        sizes = [record.nbytes for record in records]
        exposed = {record.index for record in records if record.exposed}
        live, unread = mark_liveness(entries, sizes, exposed, kept | held)
        ops = tuple(map(Entry.finished, entries, live, unread))
        return ops, tuple([record.finished(sizes[record.index], record.index in held) for record in records])

    # -- storages without values, and fills -----------------------------------------------------------------------------

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None or device.type != "cpu":
            device = result_device(tensors_in(args, kwargs), kwargs)
            if device.type == "meta":
                return func(*args, **kwargs)
        plain = func is aten.empty.memory_format
        if kwargs.get("layout") not in _STRIDED or (not plain and any(map(is_opaque, tensors_in(args, {})))):
            return self.opaque.call(func, args, kwargs)
        rest = args if plain else mapped(args, self.ledger.twin)
        twin = func(*rest, **{**kwargs, "device": META, "pin_memory": False})
        self.ledger.adopt(twin, device)
        return wrap(twin, device)

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0]
        if not isinstance(target, Traced):
            if target.is_meta:
                return func(*args, **kwargs)
            if is_opaque(target):
                return self.opaque.call(func, args, kwargs)
            self.values.borrow(target)
        view = self.ledger.view(target)
        rest = args[1:]
        overlaps = 0 in view.stride and torch._debug_has_internal_overlap(self.ledger.twin(target)) == 1
        self._check_fill(func, view.dtype, overlaps, rest, kwargs)
        self.ledger.write_down(
            func,
            (view, *rest),
            frozen_kwargs(kwargs, self.ledger.view),
            writes=(view,),
            overwrites=True,
            generator=kwargs.get("generator"),
            device=target.device,
        )
        if self.values.watches:
            self.values.refresh((view,))
        return target

    def _check_fill(self, func: Any, dtype: torch.dtype, overlaps: bool, args: Any, kwargs: Any) -> None:
        """Raise what the real operator raises for these scalars and this dtype, by calling it on one element."""
        key = (func, dtype, args, tuple(kwargs), overlaps)
        if key in self._valid:
            return
        sample = torch.empty(1, dtype=dtype, device="cpu").expand(2 if overlaps else 1)
        func(sample, *args, **kwargs | ({"generator": torch.Generator("cpu")} if is_random(func) else {}))
        self._valid.add(key)

    def trunc_normal(
        self, original: Callable[..., torch.Tensor], tensor: torch.Tensor, *bounds: float, generator: torch.Generator | None
    ) -> torch.Tensor:
        """`torch.nn.init.trunc_normal_` as one op: how often it redraws depends on values that a trace does not have."""
        with _disable_current_modes():
            sample = torch.empty(min(1, tensor.numel()), dtype=tensor.dtype, device="cpu")
            original(sample, *bounds, generator=torch.Generator("cpu"))
        view = self.ledger.view(tensor)
        self.ledger.write_down(
            original, (view, *bounds), writes=(view,), overwrites=True, generator=generator, device=tensor.device
        )
        self.values.refresh((view,))
        return tensor

    # -- tensors from outside -------------------------------------------------------------------------------------------

    def _lift(self, func: Any, args: Any, kwargs: Any) -> Any:
        (source,) = args
        if isinstance(source, Traced):
            return wrap(source._twin.detach(), source.device)
        if source.is_meta or is_opaque(source):
            return func(source)
        storage = source.untyped_storage()
        record = self.ledger.outside(storage, source)
        if source.device.type == "cpu" and not storage.resizable():
            self.values.lend(record, bytes_of(storage))  # numpy's own memory
        return wrap(meta_over(record.handle, source), source.device)

    def _borrow(self, target: torch.Tensor) -> None:
        if not isinstance(target, Traced):
            self.values.borrow(target)

    def clone(self, tensor: Traced) -> Traced:
        """What `copy.deepcopy` does to a parameter: `tensor.data.clone()`, without the way through the dispatcher."""
        with torch._C._DisableTorchDispatch():
            twin = tensor._twin.clone(memory_format=torch.preserve_format)
        source, copy = self.ledger.view(tensor), self.ledger.adopt(twin, tensor.device)
        kwargs = (("memory_format", torch.preserve_format),)
        self.ledger.write_down(aten.clone.default, (source,), kwargs, reads=(source,), outputs=(view_of(twin, copy.index),))
        return wrap(twin, tensor.device)

    def copy_storage(self, tensor: Traced) -> torch.Tensor:
        """What `copy.deepcopy` does to a plain tensor: its whole storage is copied, and the same view taken of the copy."""
        source = self.ledger.records[self.ledger.view(tensor).storage]
        copy = self.ledger.adopt(torch.empty(source.nbytes, dtype=torch.uint8, device=META), tensor.device)
        views = (copy.everything, source.everything)
        self.ledger.write_down(aten.copy_.default, views, reads=views[1:], writes=views[:1], overwrites=True)
        return wrap(meta_over(copy.handle, tensor._twin), tensor.device)

    def relocated(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor that `torch.tensor` has just made on the CPU, as if it had made it on `device`."""
        record = self.ledger.records[self.ledger.view(tensor).storage]
        if not isinstance(tensor, Traced) or record.constant is None or record.writers:
            return tensor.to(device)
        record.device = device
        return wrap(tensor._twin, device, requires_grad=tensor.requires_grad)

    def seed_imagined(self, seed: int, index: int | None) -> None:
        """What `torch.cuda.manual_seed` does on a machine without CUDA."""
        self.ledger.streams.seed_imagined(seed, index)

    # -- geometry -------------------------------------------------------------------------------------------------------

    def _take_view(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = next(tensors_in(args, kwargs), None)
        if not isinstance(source, Traced):
            return func(*args, **kwargs) if source is not None else self._general(func, args, kwargs)
        twin = self.ledger.twin(source)
        if func is aten.detach.default:
            return wrap(twin.detach(), source._traced_device)
        out = func(*mapped(args, self.ledger.twin), **mapped_kwargs(kwargs, self.ledger.twin))
        first = next(tensors_in((out,), {}), None)
        if first is twin:
            return source
        if first is not None and self.ledger.record_of(first) is None:  # a view that turned out to need a copy
            return self._general(func, args, kwargs)
        return mapped(out, lambda each: wrap(each, source.device))

    def _change_geometry(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0]
        if not isinstance(target, Traced):
            if any(isinstance(value, Traced) for value in tensors_in(args, kwargs)):
                raise TraceError(f"{func} puts a traced tensor's memory under a tensor from outside the constructor ({here()})")
            return func(*args, **kwargs)
        twin = self.ledger.twin(target)
        rest = [self._source(value) for value in args[1:]]
        options = on_meta({name: self._source(value) for name, value in kwargs.items()})
        try:
            func(twin, *rest, **options)
        except Exception:
            func(torch.empty(1, dtype=twin.dtype, device="cpu").expand(twin.shape), *rest, **options)  # eager's own error
            raise
        if self.ledger.record_of(twin) is None:
            self.ledger.adopt(twin, target.device)
        target._mirror(wrap(twin.detach(), target.device))
        return target

    def _source(self, value: Any) -> Any:
        """An argument of `set_`: the meta twin of a tensor, or of a storage."""
        if isinstance(value, torch.Tensor):
            return self.ledger.twin(value)
        if isinstance(value, torch.UntypedStorage) and value.device.type != "meta":
            return self.ledger.outside(value).handle
        return value

    def _ask_device(self, func: Any, args: Any, kwargs: Any) -> Any:
        return args[0].device

    def _ask_geometry(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*mapped(args, self.ledger.twin), **mapped_kwargs(kwargs, self.ledger.twin))

    # -- values ---------------------------------------------------------------------------------------------------------

    def _ask_value(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(tensors_in(args, kwargs))
        if any(map(is_opaque, tensors)):
            return self.opaque.call(func, args, kwargs)
        if not any(isinstance(each, Traced) or self.ledger.is_outside(each) for each in tensors):
            return func(*args, **kwargs)
        view = self.ledger.view
        views = tuple(view(each) for each in tensors)
        self.ledger.write_down(func, frozen(args, view), frozen_kwargs(kwargs, view), reads=views, sensed=True)
        with self.values.real(views) as real, torch.no_grad():

            def value_of(tensor: torch.Tensor) -> torch.Tensor:
                return real.open(view(tensor))

            return func(*mapped(args, value_of), **mapped_kwargs(kwargs, value_of))

    # -- everything else ------------------------------------------------------------------------------------------------

    def _general(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(tensors_in(args, kwargs))
        device = result_device(tensors, kwargs)
        if device.type == "meta" or any(is_plain_meta(each) for each in tensors):
            return func(*mapped(args, _meta_twin), **mapped_kwargs(kwargs, _meta_twin))
        try:
            if not quantizes(func) and not any(is_opaque(each) for each in tensors):
                return self._recorded(func, args, kwargs, tensors, device)
        except NotStrided:
            pass
        return self.opaque.call(func, args, kwargs)

    def _recorded(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], device: torch.device) -> Any:
        changed = written(func, args, kwargs)
        for each in changed:
            self._borrow(each)
        views = {id(each): self.ledger.view(each) for each in tensors}

        def view(tensor: torch.Tensor) -> View:
            return views[id(tensor)]

        reads = () if reads_geometry_only(func) else tuple([view(each) for each in operands(func, args, kwargs, tensors)])
        twins = {id(each): self.ledger.twin(each) for each in tensors}
        out = self._result_geometry(func, args, kwargs, twins, views)
        resized = [each for each in changed if each.shape != twins[id(each)].shape]  # the targets of an `out=`
        if resized:
            self._follow_resize(func, args, kwargs, twins, views, resized)
        writes = tuple([view(each) for each in changed])
        originals = {id(twins[id(each)]): each for each in tensors}
        result, outputs = self._received(out, originals, device)
        self.ledger.write_down(
            func,
            frozen(args, view),
            frozen_kwargs(kwargs, view),
            reads=reads,
            writes=writes,
            outputs=outputs,
            overwrites=overwrites(func),
            generator=generator_in(args, kwargs),
            device=device,
            sensed=not writes and not any(outputs),
        )
        if self.values.watches:
            self.values.refresh(writes)
        return result

    def _follow_resize(
        self, func: Any, args: Any, kwargs: Any, twins: _Twins, views: dict[int, View], resized: list[torch.Tensor]
    ) -> None:
        """Give the targets of an `out=` the geometry that the operator gives them."""
        if not all(isinstance(each, Traced) for each in resized):
            raise TraceError(f"{func} gives a tensor from outside the constructor another shape ({here()}); pass in a copy")
        if self._nbytes(views.values()) <= _LEARNED_BYTES:
            self._learned_geometry(func, args, kwargs, twins, views)  # torch's meta kernels forget the strides here
        for each in resized:
            assert isinstance(each, Traced)
            each._mirror(wrap(twins[id(each)].detach(), each.device))
            views[id(each)] = self.ledger.view(each)

    def _received(
        self, out: Any, originals: dict[int, torch.Tensor], device: torch.device
    ) -> tuple[Any, tuple[View | None, ...]]:
        """What the caller gets for the meta tensors of a result, and the views that are new."""
        outputs: list[View | None] = []

        def receive(twin: torch.Tensor) -> torch.Tensor:
            _check_strided(twin)
            original = originals.get(id(twin))
            if original is not None or self.ledger.record_of(twin) is not None:
                outputs.append(None)
                return wrap(twin.detach(), device) if original is None else original
            record = self.ledger.adopt(twin, device)
            outputs.append(view_of(twin, record.index))
            return wrap(twin, device)

        return mapped(out, receive), tuple(outputs)

    def _result_geometry(self, func: Any, args: Any, kwargs: Any, twins: _Twins, views: dict[int, View]) -> Any:
        """What the operator returns, on the meta device; where there is no meta kernel, learned from the real one."""

        def twin(tensor: torch.Tensor) -> torch.Tensor:
            return twins[id(tensor)]

        if checks_values(func) and self._nbytes(views.values()) <= _CHECKED_BYTES:
            return self._learned_geometry(func, args, kwargs, twins, views)
        rest, options = without_generator(mapped(args, twin), on_meta(mapped_kwargs(kwargs, twin)))
        if not twins:
            options["device"] = META
        try:
            with torch.no_grad():
                return func(*rest, **options)
        except Exception:
            if self._nbytes(views.values()) > _LEARNED_BYTES:
                raise
        return self._learned_geometry(func, args, kwargs, twins, views)

    def _nbytes(self, inputs: Iterable[View]) -> int:
        return sum(self.ledger.records[view.storage].nbytes for view in inputs)

    def _learned_geometry(self, func: Any, args: Any, kwargs: Any, twins: _Twins, views: dict[int, View]) -> Any:
        """Run the operator on real values: either it raises eager's own error, or its results have the geometry."""
        with self.values.real(views.values()) as real, torch.no_grad(), generators_kept():
            copies = {key: real.open(view).clone() for key, view in views.items()}
            known = {id(copies[key]): twin for key, twin in twins.items()}

            def copy_of(tensor: torch.Tensor) -> torch.Tensor:
                return copies[id(tensor)]

            rest, options = without_generator(mapped(args, copy_of), mapped_kwargs(kwargs, copy_of))
            out = func(*rest, **options)
            for key, copy in copies.items():
                if copy.shape != views[key].size:
                    twins[key].resize_(copy.shape).as_strided_(copy.shape, copy.stride())
            return mapped(out, lambda each: known[id(each)] if id(each) in known else _meta_like(each))


def _check_strided(tensor: torch.Tensor) -> None:
    if is_opaque(tensor):
        raise NotStrided


def _meta_like(tensor: torch.Tensor) -> torch.Tensor:
    _check_strided(tensor)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _meta_twin(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Traced):
        return tensor._twin
    return tensor if tensor.is_meta else torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)
