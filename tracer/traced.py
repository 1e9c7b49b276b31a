"""The tensor a constructor holds while it is traced: `Traced`, geometry without memory.

A `Traced` tensor wraps a *meta* tensor (no memory) yet reports the device that eager would report. That difference matters: code
that asks `t.is_meta` or `t.device` (transformers' weight initialization, `torch.nn.init`) must take the path it takes in eager.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch._C import _disabled_torch_function_impl

from .errors import TraceError
from .graph import View

META = torch.device("meta")
FAKE = torch._C._TorchDispatchModeKey.FAKE


class Hooks(NamedTuple):
    """What a traced tensor asks the tape for: its values (is the memory handed out?), copies of it and of its storage."""

    read: Callable[[Traced, bool], torch.Tensor]
    clone: Callable[[Traced], Traced]
    clone_storage: Callable[[Traced], torch.Tensor]


hooks: list[Hooks] = []
"""The tapes that record now, the innermost last."""


class Traced(torch.Tensor):
    """A tensor that has a geometry, a storage identity and a device, but no memory."""

    __slots__ = ("_traced_device", "_twin")
    _twin: torch.Tensor
    _traced_device: torch.device

    __torch_function__ = _disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0]._traced_device
        if func is torch.ops.aten._has_compatible_shallow_copy_type.default:
            return all(isinstance(each, Traced) for each in args)
        raise TraceError(
            f"{func} was called on a traced tensor outside its trace. A traced tensor has no values: it must not leave the "
            "constructor (through a global, a thread or a callback). Build the module with plan.materialize() to get values."
        )

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._traced_device

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return self._traced_device.type == "cpu"

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self._traced_device.type == "cuda"

    @property
    def data(self) -> torch.Tensor:
        plain: torch.Tensor = _BASE_DATA.__get__(self, type(self))
        return plain

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, torch.Tensor):
            self._mirror(value if isinstance(value, Traced) else torch.ops.aten.lift_fresh(value))
        else:
            _BASE_DATA.__set__(self, value)  # raises what eager raises

    def _mirror(self, other: Traced) -> None:
        """Show the same view of the same storage as `other`."""
        _BASE_DATA.__set__(self, other)
        with torch._C._DisableTorchDispatch():
            self._twin, self._traced_device = other._twin.detach(), other._traced_device

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if hooks:
            return repr(self._values())
        return f"Traced(size={tuple(self.shape)}, dtype={self.dtype}, device='{self._traced_device}')"

    def __getattr__(self, name: str) -> Any:
        if name in ("_is_param", "_is_buffer"):  # what public_type asks for itself
            raise AttributeError(name)
        raise AttributeError(f"{public_type(self)!r} object has no attribute {name!r}")

    # What looks behind torch's dispatcher is answered with real values; the tape notes that it did.

    def _values(self, shared: bool = False) -> torch.Tensor:
        if not hooks:
            raise TraceError(
                f"the values of a traced tensor of shape {tuple(self.shape)} were asked for after its trace ended; "
                "use plan.materialize() or plan.materialize_state()"
            )
        return hooks[-1].read(self, shared)

    def tolist(self) -> Any:
        return self._values().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        if not force and self._traced_device.type != "cpu":
            raise TypeError(
                f"can't convert {self._traced_device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host "
                "memory first."
            )
        return self._values(shared=True).numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def data_ptr(self) -> int:
        return self._values(shared=True).data_ptr()

    def __format__(self, spec: str) -> str:
        return format(self._values(), spec)

    def __reduce_ex__(self, proto: Any) -> Any:
        value = self._values()
        if isinstance(self, torch.nn.Parameter):
            return torch.nn.Parameter(value, self.requires_grad).__reduce_ex__(proto)
        return value.__reduce_ex__(proto)

    def share_memory_(self) -> torch.Tensor:
        self._values()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError(_NOT_A_LEAF)
        result = self._copied(memo)
        memo[id(self)] = result
        return result

    def _copied(self, memo: dict[int, Any]) -> torch.Tensor:
        """The same as `Parameter.__deepcopy__` and `Tensor.__deepcopy__`: a parameter clones its view, a tensor its storage."""
        if isinstance(self, torch.nn.Parameter):
            cloned = hooks[-1].clone(self)
            plain = type(self) is Traced
            return torch.nn.Parameter(cloned, self.requires_grad) if plain else type(self)._rewrap(cloned, self.requires_grad)
        result = hooks[-1].clone_storage(self)
        result.requires_grad_(self.requires_grad)
        result.__dict__ = copy.deepcopy(self.__dict__, memo)
        return result

    @classmethod
    def _rewrap(cls, data: torch.Tensor, requires_grad: bool) -> Traced:
        return rewrap(data, cls, requires_grad)


_make_subclass = torch.Tensor._make_subclass
_BASE_DATA: Any = torch.Tensor.__dict__.get("data") or torch._C.TensorBase.data
_NOT_A_LEAF = (
    "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment.  "
    "If you were attempting to deepcopy a module, this may be because of a torch.nn.utils.weight_norm usage, "
    "see https://github.com/pytorch/pytorch/pull/103001"
)


def wrap(twin: torch.Tensor, device: torch.device, cls: type[Traced] = Traced, requires_grad: bool = False) -> Traced:
    """A traced tensor over the meta tensor `twin`, reporting `device`; the two share a (memoryless) storage."""
    traced: Traced = _make_subclass(cls, twin, requires_grad, dispatch_device=True, device_for_backend_keys=device)
    traced._twin, traced._traced_device = twin, device
    return traced


_classes: dict[type, type[Traced]] = {}


def traced_class(cls: type) -> type[Traced]:
    """A class that is both `Traced` and `cls` (a user's `nn.Parameter` subclass, `UninitializedParameter`)."""
    if cls not in _classes:
        own: dict[str, Any] = {"__slots__": ()}
        if becomes := getattr(cls, "cls_to_become", None):  # an uninitialized parameter changes its class when it gets its shape
            own["cls_to_become"] = traced_class(becomes)
        _classes[cls] = cls if issubclass(cls, Traced) else type(f"Traced{cls.__name__}", (Traced, cls), own)
    return _classes[cls]


def rewrap(data: torch.Tensor, cls: type, requires_grad: bool) -> Traced:
    """What `torch.Tensor._make_subclass(cls, data)` is for a traced `data`: another tensor over the same storage."""
    assert isinstance(data, Traced)
    with torch._C._DisableTorchDispatch():
        twin = data._twin.detach()
    return wrap(twin, data._traced_device, traced_class(cls), requires_grad)


def meta_over(handle: torch.UntypedStorage, like: torch.Tensor) -> torch.Tensor:
    """A meta tensor with the geometry of `like` over the meta storage `handle`."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        twin = torch.empty(0, dtype=like.dtype, device=META)
        twin.set_(handle, int(like.storage_offset()), like.shape, like.stride())
        if like.is_conj():
            twin = twin.conj()
        return twin._neg_view() if like.is_neg() else twin


@cache
def has_own_rules(kind: type) -> bool:
    """Whether tensors of this class answer the dispatcher themselves (DTensor), by calls on what they are made of."""
    dispatch = getattr(kind, "__torch_dispatch__", torch.Tensor.__torch_dispatch__)
    return not issubclass(kind, Traced) and dispatch is not torch.Tensor.__torch_dispatch__


def public_type(tensor: torch.Tensor) -> str:
    """The name of the class that eager would show for this tensor."""
    kind = type(tensor)
    if kind is Traced:
        marks = tensor.__dict__
        return "Parameter" if marks.get("_is_param") else "Buffer" if marks.get("_is_buffer") else "Tensor"
    return next(base.__name__ for base in kind.__mro__ if not issubclass(base, Traced))


def view_of(twin: torch.Tensor, storage: int) -> View:
    """The view that the tape writes down for a meta (or outside) tensor."""
    geometry = (storage, twin.dtype, tuple(twin.shape), twin.stride(), int(twin.storage_offset()), twin.is_conj(), twin.is_neg())
    return tuple.__new__(View, geometry)  # half the time of View(*geometry), which would only count the fields
