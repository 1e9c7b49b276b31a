"""The tape: every call that creates or changes tensor values, written down while the constructor runs.

`Tape` is a `TorchDispatchMode`. It answers each ATen call with `Traced` tensors, whose geometry torch's own meta kernels compute,
and keys what it writes down by storage, never by Python object: ties, views and `.data =` then need no further thought.
Real tensors come from outside (arguments, files, constants): views of them are taken for real, everything else is written down.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .errors import TraceError
from .graph import Constant, Frame, Op, Storage, StreamPosition, View
from .liveness import mark_liveness
from .replay import Replay
from .schema import Kind, aten, is_random, kind_of, mutated_arguments, overwrites, reads_geometry_only
from .sites import RawSite, capture, here, spell
from .streams import Streams
from .traced import META, Hooks, Traced, hooks, meta_over, view_of, wrap

_FALLBACK_BYTES = 2**30
_CACHED_BYTES = 2**20


@dataclass(slots=True, eq=False)
class Entry:
    """An op while it is recorded; `finish` turns it into an `Op`. It offers what replay reads of one."""

    index: int
    func: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    reads: tuple[View, ...]
    writes: tuple[View, ...]
    outputs: tuple[View | None, ...]
    overwrites: bool
    site: RawSite
    position: StreamPosition | None
    sensed: bool

    @property
    def targets(self) -> tuple[View, ...]:
        return self.writes + tuple(view for view in self.outputs if view is not None)


@dataclass(slots=True, eq=False)
class Record:
    """A storage while it is recorded. `handle` is the meta storage that stands for it, and keeps its key unique."""

    index: int
    handle: torch.UntypedStorage
    device: torch.device
    constant: Constant | None = None
    exposed: bool = False
    writers: list[int] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.handle.nbytes()


@dataclass(slots=True)
class _Watched:
    """Real memory that Python code holds (a numpy array) and that stands for a storage: it may change without a call."""

    record: Record
    memory: torch.Tensor
    digest: str


def host_write(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Stands on the tape for a change that Python made to a tensor's memory behind torch's back."""
    return target.copy_(source)


def host_read(*_: torch.Tensor) -> None:
    """Stands on the tape for a look at a tensor's memory that torch did not see."""


class Tape(TorchDispatchMode):
    """Records one constructor; `states` are the generators' states that it starts from, by device."""

    def __init__(self, states: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.entries: list[Entry] = []
        self.records: list[Record] = []
        self.streams = Streams()
        self.seed_dependent: dict[Frame, None] = {}
        self._states = states
        self._ids: dict[int, int] = {}
        self._outside: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._valid: set[Any] = set()
        self._watched: list[_Watched] = []
        self._cache: dict[int, tuple[int, torch.UntypedStorage]] = {}
        self._handlers: dict[Kind, Callable[..., Any]] = {
            Kind.EMPTY: self._empty,
            Kind.FILL: self._fill,
            Kind.COPY: self._general,
            Kind.LIFT: self._lift,
            Kind.VIEW: self._view_call,
            Kind.METADATA: self._metadata,
            Kind.GEOMETRY: self._geometry,
            Kind.VALUE: self._value,
            Kind.GENERAL: self._general,
        }

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes longer than a trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for kind in types:
            if kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not issubclass(kind, Traced):
                return NotImplemented  # a subclass with rules of its own (DTensor): it calls us for what it is made of
        if func is _DEVICE:
            return args[0].device
        if self._watched:
            self._sync()
        return self._handlers[kind_of(func)](func, args, kwargs or {})

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """The time during which traced tensors answer for their values."""
        hooks.append(Hooks(self.read, self.clone_storage))
        try:
            with self:
                yield self
        finally:
            hooks.pop()

    # -- storages -------------------------------------------------------------------------------------------------------

    def _adopt(self, twin: torch.Tensor, device: torch.device, constant: Constant | None = None) -> Record:
        storage = twin.untyped_storage()
        record = Record(len(self.records), storage, device, constant)
        self.records.append(record)
        self._ids[storage._cdata] = record.index
        return record

    def view(self, tensor: torch.Tensor) -> View:
        """`tensor` as the tape writes it down; a tensor from outside gets its place on the tape when it is first used."""
        twin = self._twin(tensor)
        return view_of(twin, self._ids[twin.untyped_storage()._cdata])

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, Traced):
            if tensor._twin.untyped_storage()._cdata not in self._ids:
                raise TraceError(
                    f"a tensor of shape {tuple(tensor.shape)} that an earlier trace made was used in this one: the constructor "
                    "kept it in a global, a cache or a default argument. Clear that cache, or create the tensor outside the trace"
                )
            return tensor._twin
        if tensor.is_meta:
            return tensor
        storage = tensor.untyped_storage()
        index = self._outside_index(storage, tensor)
        return meta_over(self.records[index].handle, tensor)

    def _outside_index(self, storage: torch.UntypedStorage, tensor: torch.Tensor | None = None) -> int:
        known = self._outside.get(storage._cdata)
        if known is not None:
            return known[0]
        memory = bytes_of(storage)
        kept = memory.clone() if memory.device.type == "cpu" and memory.numel() <= _CACHED_BYTES else memory
        geometry = memory if tensor is None else tensor
        constant = Constant(tuple(geometry.shape), geometry.dtype, digest_of(memory), kept)
        record = self._adopt(torch.empty(storage.nbytes(), dtype=torch.uint8, device=META), storage.device, constant)
        self._outside[storage._cdata] = (record.index, storage)
        return record.index

    # -- one handler a kind ---------------------------------------------------------------------------------------------

    def _empty(self, func: Any, args: Any, kwargs: Any) -> Any:
        device = self._device(func, args, kwargs)
        if device.type == "meta":
            return func(*args, **kwargs)
        twin = func(*_map(args, self._twin), **(_on_meta(kwargs) | {"device": META}))
        self._adopt(twin, device)
        return wrap(twin, device)

    def _fill(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0]
        if is_plain_meta(target):
            return func(*args, **kwargs)
        twin = self._twin(target)
        self._check_fill(func, twin, args[1:], kwargs)
        view = view_of(twin, self._ids[twin.untyped_storage()._cdata])
        generator = kwargs.get("generator")
        kept = tuple((name, value) for name, value in kwargs.items() if name != "generator")
        self._record(func, (view, *args[1:]), kept, (), (view,), (), True, generator, target.device)
        self._refresh_exposed((view,))
        return target

    def _check_fill(self, func: Any, twin: torch.Tensor, args: Any, kwargs: Any) -> None:
        """Raise what the real operator raises for these scalars and this dtype, by calling it on one element."""
        overlap = 1 if torch._debug_has_internal_overlap(twin) == 1 else 0
        key = (func, twin.dtype, args, tuple(kwargs), overlap)
        if key in self._valid:
            return
        sample = torch.empty(1, dtype=twin.dtype, device="cpu").expand(2 if overlap else 1)
        func(sample, *args, **(kwargs | {"generator": torch.Generator("cpu")} if "generator" in kwargs or is_random(func) else kwargs))
        self._valid.add(key)

    def trunc_normal(self, original: Callable[..., torch.Tensor], tensor: torch.Tensor, *bounds: float, generator: Any) -> torch.Tensor:
        """`torch.nn.init.trunc_normal_` as one op: how often it redraws depends on the values, which the trace does not have."""
        with _disable_current_modes():
            sample = torch.empty(1 if tensor.numel() else 0, dtype=tensor.dtype, device="cpu")
            original(sample, *bounds, generator=torch.Generator("cpu"))
        view = self.view(tensor)
        self._record(original, (view, *bounds), (), (), (view,), (), True, generator, tensor.device)
        return tensor

    def _lift(self, func: Any, args: Any, kwargs: Any) -> Any:
        (source,) = args
        if isinstance(source, Traced):
            return wrap(source._twin.detach(), source.device)
        if source.is_meta:
            return func(source)
        twin = meta_over(self.records[self._outside_index(source.untyped_storage(), source)].handle, source)
        if source.device.type == "cpu" and not source.untyped_storage().resizable():
            self._watch(self._ids[twin.untyped_storage()._cdata], bytes_of(source.untyped_storage()))  # numpy's own memory
        return wrap(twin, source.device)

    def _view_call(self, func: Any, args: Any, kwargs: Any) -> Any:
        source = next((value for value in _tensors(args, kwargs)), None)
        if not isinstance(source, Traced):
            return func(*args, **kwargs) if source is not None else self._general(func, args, kwargs)
        twin = self._twin(source)
        out = func(*_map(args, self._twin), **_map_kwargs(kwargs, self._twin))
        first = out[0] if isinstance(out, list | tuple) else out
        if first is twin:
            return source
        if isinstance(first, torch.Tensor) and first.untyped_storage()._cdata not in self._ids:
            return self._general(func, args, kwargs)
        return _map(out, lambda each: wrap(each, source.device), keep=True)

    def _metadata(self, func: Any, args: Any, kwargs: Any) -> Any:
        target = args[0]
        if not isinstance(target, Traced):
            if any(isinstance(value, Traced) for value in _tensors(args, kwargs)):
                raise TraceError(f"{func} would put a traced tensor's memory under a tensor from outside the constructor ({here()})")
            return func(*args, **kwargs)
        twin = self._twin(target)
        func(twin, *(self._source(value) for value in args[1:]), **_on_meta(_map_kwargs(kwargs, self._source)))
        if twin.untyped_storage()._cdata not in self._ids:
            self._adopt(twin, target.device)
        target._mirror(wrap(twin.detach(), target.device))
        return target

    def _source(self, value: Any) -> Any:
        """An argument of `set_`: the meta twin of a tensor, or of a storage."""
        if isinstance(value, torch.Tensor):
            return self._twin(value)
        if isinstance(value, torch.UntypedStorage) and value.device.type != "meta":
            return self.records[self._outside_index(value)].handle
        return value

    def _geometry(self, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*_map(args, self._twin), **_map_kwargs(kwargs, self._twin))

    def _value(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(_tensors(args, kwargs))
        if not any(isinstance(each, Traced) or self._on_tape(each) for each in tensors):
            return func(*args, **kwargs)
        views = tuple(self.view(each) for each in tensors)
        self._record(func, _map(args, self.view, frozen=True), _pairs(kwargs, self.view), views, (), (), False, None, META, sensed=True)
        with self._real(views) as real, torch.no_grad():
            values = iter([real.open(view) for view in views])
            return func(*_map(args, lambda _: next(values)), **_map_kwargs(kwargs, lambda _: next(values)))

    def _on_tape(self, tensor: torch.Tensor) -> bool:
        return not is_plain_meta(tensor) and tensor.untyped_storage()._cdata in self._outside

    def _general(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = list(_tensors(args, kwargs))
        if any(is_plain_meta(each) for each in tensors):
            return func(*_map(args, _plain_meta), **_map_kwargs(kwargs, _plain_meta))
        device = self._device(func, args, kwargs)
        if device.type == "meta":
            return func(*_map(args, self._twin), **_map_kwargs(kwargs, self._twin))
        originals: dict[int, torch.Tensor] = {}
        twins = self._twins_of(tensors, originals)
        writes = tuple(self.view(each) for each in _written(func, args, kwargs))
        recorded, recorded_kwargs = _map(args, self.view, frozen=True), _pairs(kwargs, self.view)
        reads = () if reads_geometry_only(func) else tuple(self.view(each) for each in _read(func, args, kwargs))
        out = self._geometry_of_result(func, args, kwargs, twins, bool(tensors), reads + writes)
        outputs: list[View | None] = []

        def receive(twin: torch.Tensor) -> torch.Tensor:
            original = originals.get(id(twin))
            if original is not None:
                outputs.append(None)
                return original
            if known := twin.untyped_storage()._cdata in self._ids:
                outputs.append(None)
            else:
                outputs.append(view_of(twin, self._adopt(twin, device).index))
            return wrap(twin.detach() if known else twin, device)

        result = _map(out, receive, keep=True)
        generator = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)), None)
        sensed = not writes and not any(outputs)
        self._record(func, recorded, recorded_kwargs, reads, writes, tuple(outputs), overwrites(func), generator, device, sensed)
        self._refresh_exposed(writes)
        return result

    def _twins_of(self, tensors: Sequence[torch.Tensor], originals: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        twins = {}
        for tensor in tensors:
            twin = twins[id(tensor)] = self._twin(tensor)
            originals[id(twin)] = tensor
        return twins

    def _geometry_of_result(
        self, func: Any, args: Any, kwargs: Any, twins: dict[int, torch.Tensor], has_tensors: bool, inputs: tuple[View, ...]
    ) -> Any:
        """What the operator returns, on the meta device; where there is no meta kernel, learned from the real one."""
        with torch.no_grad():
            meta_kwargs = _on_meta(_map_kwargs(kwargs, lambda each: twins[id(each)]))
            if not has_tensors:
                meta_kwargs["device"] = META
            try:
                return func(*_map(args, lambda each: twins[id(each)], generator=False), **meta_kwargs)
            except Exception as error:
                return self._learned(func, args, kwargs, inputs, error)

    def _learned(self, func: Any, args: Any, kwargs: Any, inputs: tuple[View, ...], error: Exception) -> Any:
        """Run the operator on real values: either it raises eager's own error, or its result has the geometry."""
        if sum(self.records[view.storage].nbytes for view in inputs) > _FALLBACK_BYTES:
            raise error
        with self._real(inputs) as real:
            opened = {view: real.open(view).clone() for view in inputs}
            back = {id(opened[view]): self._ids_twin(view) for view in inputs}
            out = func(
                *_map(args, lambda each: opened[self.view(each)], generator=False),
                **_without_generator(_map_kwargs(kwargs, lambda each: opened[self.view(each)])),
            )

            def geometry(each: torch.Tensor) -> torch.Tensor:
                if each.layout != torch.strided or each.is_quantized:
                    raise TraceError(f"{func} makes a tensor that is not strided, which a trace cannot follow ({here()})") from error
                twin = back.get(id(each))
                return torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=META) if twin is None else twin

            return _map(out, geometry, keep=True)

    def _ids_twin(self, view: View) -> torch.Tensor:
        handle = self.records[view.storage].handle
        return torch.empty(0, dtype=view.dtype, device=META).set_(handle, view.offset, view.size, view.stride)  # type: ignore[call-overload]

    # -- writing down ---------------------------------------------------------------------------------------------------

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: tuple[tuple[str, Any], ...],
        reads: tuple[View, ...],
        writes: tuple[View, ...],
        outputs: tuple[View | None, ...],
        overwrites_targets: bool,
        generator: torch.Generator | None,
        device: torch.device,
        sensed: bool = False,
    ) -> None:
        index = len(self.entries)
        draws = is_random(func) or func not in _PLAIN_FUNCTIONS and not isinstance(func, torch._ops.OpOverload)
        stream = generator.device if generator is not None else device
        position = self.streams.position(generator, stream) if draws else None
        entry = Entry(
            index, func, args, kwargs, reads, writes, outputs, overwrites_targets, capture(), position, sensed
        )
        self.entries.append(entry)
        for view in entry.targets:
            self.records[view.storage].writers.append(index)
        if position is not None:
            self.streams.advance(generator, stream, index)

    def _device(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """The device on which eager puts the result: the one asked for, or the operands' (scalars on the CPU adapt to them)."""
        if kwargs.get("device") is not None:
            return with_index(torch.device(kwargs["device"]))
        devices = [(each.device, each.dim()) for each in _tensors(args, kwargs)]
        if not devices:
            return torch.device("cpu")
        return next((device for device, dim in devices if dim and device.type != "cpu"), devices[0][0])

    # -- values ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _real(self, views: Iterable[View]) -> Iterator[Replay]:
        """The storages behind `views`, replayed; meanwhile nothing is recorded."""
        wanted = list(dict.fromkeys(view.storage for view in views))
        known = {index: hit[1] for index in wanted if (hit := self._cache.get(index)) and hit[0] == len(self.records[index].writers)}
        with _disable_current_modes():
            replay = Replay(self.entries, self.records, self._states)
            replay.run([index for index in wanted if index not in known], known)
            if replay.ambient and (frame := here()) is not None:
                self.seed_dependent[frame] = None
            if not replay.ambient:
                self._remember(wanted, replay)
            yield replay

    def _remember(self, wanted: Iterable[int], replay: Replay) -> None:
        for index in wanted:
            if self.records[index].nbytes <= _CACHED_BYTES:
                self._cache[index] = (len(self.records[index].writers), replay.storages[index])

    def read(self, tensor: Traced, shared: bool) -> torch.Tensor:
        """The real value of a traced tensor; `shared` when the caller may hold on to its memory.

        The real run reads that memory without a call that torch could see, so its storage is exposed: never dead, never waiting.
        """
        view = self.view(tensor)
        self._record(host_read, (view,), (), (view,), (), (), False, None, META, sensed=True)
        record = self.records[view.storage]
        record.exposed = True
        with self._real([view]) as real:
            if not shared:
                return real.open(view).clone()
            for watched in self._watched:
                if watched.record is record:
                    real.storages[view.storage] = watched.memory.untyped_storage()
                    return real.open(view)
            own = real.storages[view.storage] = real.storages[view.storage].clone()
            self._watch(view.storage, bytes_of(own))
            return real.open(view)

    def clone_storage(self, tensor: Traced) -> torch.Tensor:
        """What `copy.deepcopy` does to a plain tensor: its whole storage is copied, and the same view taken of the copy."""
        source = self.records[self.view(tensor).storage]
        nbytes = source.nbytes
        twin = torch.empty(nbytes, dtype=torch.uint8, device=META)
        copy = self._adopt(twin, tensor.device)
        target, origin = view_of(twin, copy.index), View(source.index, torch.uint8, (nbytes,), (1,))
        self._record(aten.copy_.default, (target, origin), (), (origin,), (target,), (), True, None, META)
        return wrap(meta_over(copy.handle, tensor._twin), tensor.device)

    def _watch(self, index: int, memory: torch.Tensor) -> None:
        self.records[index].exposed = True
        self._watched.append(_Watched(self.records[index], memory, digest_of(memory)))

    def _sync(self) -> None:
        """Write down what Python has changed in memory that it shares with a tensor."""
        for watched in self._watched:
            with torch._C._DisableTorchDispatch():
                digest = digest_of(watched.memory)
                if digest == watched.digest:
                    continue
                watched.digest = digest
                kept = watched.memory.clone()
                constant = Constant(tuple(kept.shape), kept.dtype, digest, kept)
                source = self._adopt(torch.empty(kept.numel(), dtype=torch.uint8, device=META), kept.device, constant)
            views = [View(index, torch.uint8, (kept.numel(),), (1,)) for index in (watched.record.index, source.index)]
            self._record(host_write, tuple(views), (), (views[1],), (views[0],), (), True, None, META)

    def _refresh_exposed(self, writes: Iterable[View]) -> None:
        """Show an op's effect in memory that Python holds."""
        for watched in self._watched:
            if any(view.storage == watched.record.index for view in writes):
                with self._real([View(watched.record.index, torch.uint8, (watched.record.nbytes,), (1,))]) as real:
                    watched.memory.copy_(bytes_of(real.storages[watched.record.index]))
                    watched.digest = digest_of(watched.memory)

    # -- the end --------------------------------------------------------------------------------------------------------

    def finish(self, named: Iterable[int]) -> tuple[tuple[Op, ...], tuple[Storage, ...]]:
        """The finished tape; `named` are the storages of the module's own tensors."""
        self._sync()
        kept = set(named)
        held = {record.index for record in self.records if _is_referenced(record) and record.constant is None}
        live, unread = mark_liveness(self.entries, self.records, kept | held)
        ops = tuple(_freeze(entry, live[entry.index], unread[entry.index]) for entry in self.entries)
        storages = tuple(
            Storage(each.index, each.nbytes, str(each.device), each.constant, each.exposed, each.index in held and each.index not in kept)
            for each in self.records
        )
        return ops, storages


_DEVICE = torch.ops.prim.device.default
_PLAIN_FUNCTIONS = (host_write, host_read)


def _is_referenced(record: Record) -> bool:
    """Whether anything but the tape still refers to a storage."""
    return torch._C._storage_Use_Count(record.handle._cdata) > 1


def _freeze(entry: Entry, live: bool, unread: bool) -> Op:
    return Op(
        entry.index,
        str(entry.func) if isinstance(entry.func, torch._ops.OpOverload) else entry.func.__name__.removeprefix("_no_grad_"),
        entry.args,
        entry.kwargs,
        entry.reads,
        entry.writes,
        entry.outputs,
        entry.overwrites,
        spell(entry.site),
        entry.position,
        live,
        unread,
        entry.func,
    )


# -- arguments ----------------------------------------------------------------------------------------------------------


def _tensors(args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, torch.Tensor))


def _map(value: Any, change: Callable[[torch.Tensor], Any], *, frozen: bool = False, keep: bool = False, generator: bool = True) -> Any:
    """`value` with every tensor changed; `frozen` makes lists tuples and drops generators, `keep` keeps the container's type."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        changed = [_map(each, change, frozen=frozen, keep=keep, generator=generator) for each in value]
        if frozen or not isinstance(value, list):
            return tuple(changed)
        return changed
    if isinstance(value, torch.Generator) and (frozen or not generator):
        return None
    return value


def _map_kwargs(kwargs: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: _map(value, change) for name, value in kwargs.items()}


def _pairs(kwargs: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _map(value, change, frozen=True)) for name, value in kwargs.items() if name != "generator")


def _on_meta(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments as a meta kernel takes them."""
    changed = _without_generator(kwargs)
    if kwargs.get("device") is not None:
        changed["device"] = META
    if kwargs.get("pin_memory"):
        changed["pin_memory"] = None
    return changed


def _without_generator(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"generator": None} if "generator" in kwargs else dict(kwargs)


def _written(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for position, name in mutated_arguments(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        found.extend(_tensors((value,), {}))
    return found


def _read(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors whose values the call depends on, those aside that it merely overwrites or changes in place."""
    mutated = mutated_arguments(func)
    if not mutated:
        return list(_tensors(args, kwargs))
    positions, names = {position for position, _ in mutated}, {name for _, name in mutated}
    return list(
        _tensors(
            [value for position, value in enumerate(args) if position not in positions],
            {name: value for name, value in kwargs.items() if name not in names},
        )
    )


def is_plain_meta(tensor: torch.Tensor) -> bool:
    """Whether it is a meta tensor that the constructor asked for: such a one stays what it is."""
    return not isinstance(tensor, Traced) and tensor.is_meta


def _plain_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._twin if isinstance(tensor, Traced) else tensor


def with_index(device: torch.device) -> torch.device:
    """`cuda` as eager's tensors report it: with the current device's number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A real storage as one uint8 tensor over the same memory."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload, no-any-return]


def digest_of(memory: torch.Tensor) -> str:
    """A digest of the bytes of a uint8 tensor."""
    with torch._C._DisableTorchDispatch():
        return hashlib.sha256(memory.cpu().numpy().data).hexdigest()

