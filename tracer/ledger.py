"""The ledger of a running trace: its storages and its ops, as they are written down.

Storages are known by the key of the meta storage that stands for them; a storage from outside gets one when it is first used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch

from .errors import TraceError
from .graph import Constant, Op, Site, Storage, StreamPosition, View
from .schema import is_random
from .sites import Sites
from .streams import Streams
from .traced import META, Traced, meta_over, view_of

_COPIED_BYTES = 2**20
_OWN_FRAMES = 4  # `capture`, `write_down`, and at least two more in all that calls it


@dataclass(slots=True, eq=False)
class Entry:
    """An op while it is recorded: the fields of `Op`, in its order. `live`: the constructor looked at what it reads."""

    index: int
    name: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    reads: tuple[View, ...]
    writes: tuple[View, ...]
    outputs: tuple[View | None, ...]
    overwrites: bool
    site: Site
    position: StreamPosition | None
    live: bool
    unread: bool
    func: Any
    default_dtype: torch.dtype

    @property
    def targets(self) -> tuple[View, ...]:
        """As for an `Op`."""
        return self.writes if not self.outputs else self.writes + tuple([view for view in self.outputs if view is not None])

    def finished(self, live: bool, unread: bool) -> Op:
        """The op as the graph keeps it: this same object, frozen. Half of a large graph would otherwise be made twice."""
        self.live, self.unread = live, unread
        self.__class__ = Op  # type: ignore[assignment]  # the fields are laid out alike
        return cast(Op, self)


@dataclass(slots=True, eq=False)
class Record:
    """A storage while it is recorded. `handle` is the meta storage that stands for it, and keeps its key unique.

    `seen` is the view of it that was written down last: the next one is mostly the same.
    """

    index: int
    handle: torch.UntypedStorage
    device: torch.device
    constant: Constant | None = None
    exposed: bool = False
    seen: View | None = None
    writers: array[int] = field(default_factory=lambda: array("q"))  # unlike a list, none of the garbage collector's business

    @property
    def nbytes(self) -> int:
        return self.handle.nbytes()

    @property
    def everything(self) -> View:
        """All of its bytes."""
        return View(self.index, torch.uint8, (self.nbytes,), (1,))

    @property
    def is_referenced(self) -> bool:
        """Whether anything but the ledger still refers to it."""
        return torch._C._storage_Use_Count(self.handle._cdata) > 1

    def finished(self, nbytes: int, held: bool) -> Storage:
        """The storage as the graph keeps it."""
        return Storage(self.index, nbytes, _device_name(self.device), self.constant, self.exposed, held)


class Ledger:
    """Storages and ops of one trace, in the order in which they came to be."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.records: list[Record] = []
        self.streams = Streams()
        self.sites = Sites()
        self._by_key: dict[int, Record] = {}
        self._outside: dict[int, tuple[int, torch.UntypedStorage]] = {}

    # -- storages -------------------------------------------------------------------------------------------------------

    def adopt(self, twin: torch.Tensor, device: torch.device, constant: Constant | None = None) -> Record:
        """Enter the storage of a new meta tensor."""
        storage = twin.untyped_storage()
        record = Record(len(self.records), storage, device, constant)
        self.records.append(record)
        self._by_key[storage._cdata] = record
        return record

    def adopt_constant(self, memory: torch.Tensor, like: torch.Tensor, device: torch.device) -> Record:
        """Enter a storage with known contents, the bytes `memory`, which are described as having the geometry of `like`."""
        constant = Constant(tuple(like.shape), like.dtype, digest_of(memory), memory)
        nbytes = memory.nbytes  # not `numel()`, which torch.jit.trace would take for a value of its own
        return self.adopt(torch.empty(nbytes, dtype=torch.uint8, device=META), device, constant)

    def outside(self, storage: torch.UntypedStorage, like: torch.Tensor | None = None) -> Record:
        """The record of a real storage: its contents are noted when it is first used."""
        known = self._outside.get(storage._cdata)
        if known is not None:
            return self.records[known[0]]
        memory = bytes_of(storage)
        if memory.device.type == "cpu" and memory.numel() <= _COPIED_BYTES:
            with torch._C._DisableTorchDispatch():
                memory = memory.clone()
        record = self.adopt_constant(memory, memory if like is None else like, storage.device)
        self._outside[storage._cdata] = (record.index, storage)
        return record

    def opaque_view(self, tensor: torch.Tensor) -> View:
        """The bytes of a tensor that is sparse, quantized or nested, as one constant."""
        with torch._C._DisableTorchDispatch(), torch.no_grad():
            memory = torch.cat([bytes_of(part.detach().contiguous().untyped_storage()).cpu() for part in _parts(tensor)])
        return self.adopt_constant(memory, memory, tensor.device).everything

    def is_outside(self, tensor: torch.Tensor) -> bool:
        """Whether it is a real tensor that has been used before."""
        return not isinstance(tensor, Traced) and not tensor.is_meta and tensor.untyped_storage()._cdata in self._outside

    def record_of(self, twin: torch.Tensor) -> Record | None:
        """The record of a meta tensor's storage, if it has been entered."""
        return self._by_key.get(twin.untyped_storage()._cdata)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The meta tensor that stands for `tensor`; the user's own meta tensors stand for themselves."""
        if isinstance(tensor, Traced):
            if self.record_of(tensor._twin) is None:
                raise _from_earlier(tensor)
            return tensor._twin
        if tensor.is_meta:
            return tensor
        return meta_over(self.outside(tensor.untyped_storage(), tensor).handle, tensor)

    def view(self, tensor: torch.Tensor) -> View:
        """`tensor` as the tape writes it down; one that the user made on the meta device has a storage without contents."""
        twin = tensor._twin if isinstance(tensor, Traced) else self.twin(tensor)
        record = self.record_of(twin)
        if record is None:
            if twin is not tensor:
                raise _from_earlier(tensor)
            record = self.adopt(twin, META)
        view = view_of(twin, record.index)
        if record.seen is None or view != record.seen:
            record.seen = view
        return record.seen

    # -- ops ------------------------------------------------------------------------------------------------------------

    def write_down(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: tuple[tuple[str, Any], ...] = (),
        *,
        reads: tuple[View, ...] = (),
        writes: tuple[View, ...] = (),
        outputs: tuple[View | None, ...] = (),
        overwrites: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device = META,
        sensed: bool = False,
    ) -> None:
        """Add an op at the end of the tape; one that draws takes its place in its generator's stream."""
        index, position = len(self.entries), None
        if _draws(func):
            stream = generator.device if generator is not None else device
            position = self.streams.take(generator, stream, index)
        call = (index, _name(func), args, kwargs, reads, writes, outputs, overwrites)
        entry = Entry(*call, self.sites.capture(_OWN_FRAMES), position, sensed, False, func, torch.get_default_dtype())
        self.entries.append(entry)
        for view in entry.targets:
            self.records[view.storage].writers.append(index)


def _from_earlier(tensor: torch.Tensor) -> TraceError:
    return TraceError(
        f"a tensor of shape {tuple(tensor.shape)} that an earlier trace made was used in this one: the constructor "
        "kept it in a global, a cache or a default argument. Clear that cache, or create the tensor outside the trace"
    )


def host_write(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """Stands on the tape for a change that Python made to a tensor's memory behind torch's back."""
    return target.copy_(source)


def host_read(*_: torch.Tensor) -> None:
    """Stands on the tape for a look at a tensor's memory that torch did not see."""


_HOST: tuple[Callable[..., Any], ...] = (host_write, host_read)


@cache
def _draws(func: Any) -> bool:
    return is_random(func) if isinstance(func, torch._ops.OpOverload) else func not in _HOST


@cache
def _name(func: Any) -> str:
    return str(func) if isinstance(func, torch._ops.OpOverload) else func.__name__.removeprefix("_no_grad_")


@cache
def _device_name(device: torch.device) -> str:
    return str(device)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ordinary tensors that a tensor of another kind is made of."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    raise TraceError(f"a tensor of layout {tensor.layout} is not supported")


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """A real storage as one uint8 tensor over the same memory."""
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def digest_of(memory: torch.Tensor) -> str:
    """A digest of the bytes of a uint8 tensor."""
    with torch._C._DisableTorchDispatch():
        return hashlib.sha256(memory.cpu().numpy().data).hexdigest()
