"""Files of `torch.save`: torch's own unpickler says with `weights_only=True` what they hold, and the tensors are read by place.

torch is asked for tensors on the meta device, which then know where in the file their elements lie.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..tracer.errors import CheckpointError
from .entries import Entry, Held, Stored, Strange
from .files import File, Slice

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_STATE = "state_dict"


def is_torch(head: bytes) -> bool:
    """Whether a file that begins so is one of `torch.save`, of today's form or the one before torch 1.6.

    A safetensors file may begin with a pickle's first byte too: with the length of its header, in eight bytes, before the header.
    """
    return head.startswith(_ZIP) or (head.startswith(_PICKLE) and head[4:9] != b"\0\0\0\0{")


def entries(file: File) -> dict[str, Entry]:
    """The tensors of a file, those of nested dicts under dotted names; of a Lightning checkpoint those of its `state_dict`.

    Raises `CheckpointError` for what is damaged, or would have to be executed.
    """
    found = _loaded(file, str(file.path), map_location="meta")
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{file.path} holds a {type(found).__name__} where a dict of tensors belongs; save module.state_dict() instead"
        )
    state = found.get(_STATE)
    if isinstance(state, Mapping) and any(isinstance(each, torch.Tensor) for each in state.values()):
        found = state
    tensors = dict(_flat(found, ""))
    if any(_place(each) is None for each in tensors.values() if type(each) in _PLAIN) or not _as_stored(file):
        loaded = _loaded(file, str(file.path), map_location="cpu")
        tensors = dict(_flat(loaded.get(_STATE, loaded) if found is state else loaded, ""))
        return {name: _held(name, each, file) for name, each in tensors.items()}
    return {name: entry_of(name, each, file, 0) for name, each in tensors.items()}


_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _loaded(file: File, source: Any, map_location: str) -> Any:
    try:
        return torch.load(source, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0] if str(error) else "its pickle is damaged"
        )
        raise CheckpointError(
            f"{file.path} holds more than tensors, and to read it would execute code ({reason}); save module.state_dict() alone"
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise CheckpointError(
            f"{file.path} cannot be read by torch.load: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _flat(found: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")


def _place(tensor: torch.Tensor) -> int | None:
    """The byte of the file at which a tensor's storage begins."""
    try:
        found: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    except NotImplementedError:
        return None
    return found


def entry_of(name: str, tensor: torch.Tensor, file: File, start: int) -> Entry:
    """A tensor that torch has read onto the meta device, from what lies in `file` from byte `start` on."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = str(tensor.layout).removeprefix("torch.") if type(tensor) in _PLAIN else type(tensor).__name__
        return Strange(
            name, tuple(tensor.shape), tensor.dtype, str(file.path), f"is a {kind} tensor, which cannot be read in parts"
        )
    place = _place(tensor)
    if place is None:
        return Strange(name, tuple(tensor.shape), tensor.dtype, str(file.path), "lies at no certain place")
    first = start + place + int(tensor.storage_offset()) * tensor.dtype.itemsize
    entry = Stored(name, tuple(tensor.shape), tensor.dtype, file, first, tensor.stride())
    file.check_reaches(entry.end, name)
    return entry


def entry_at(file: File, at: int, length: int, name: str) -> Entry:
    """The one tensor of a file of `torch.save` that lies inside another, from byte `at` on."""
    found = _loaded(file, Slice(file, at, length, name), map_location="meta")
    if not isinstance(found, torch.Tensor):
        raise CheckpointError(f"{file.path} holds a {type(found).__name__} at byte {at:,} where {name} belongs")
    return entry_of(name, found, file, at)


def _held(name: str, tensor: torch.Tensor, file: File) -> Entry:
    if type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_quantized:
        return Held(name, tensor.detach(), str(file.path))
    return entry_of(name, tensor, file, 0)


def _as_stored(file: File) -> bool:
    """Whether the tensors lie in the file as they lie in memory here: uncompressed, in this machine's byte order."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            order = next((each for each in archive.infolist() if each.filename.endswith("/byteorder")), None)
            little = order is None or archive.read(order) == b"little"
            return little and all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError):
        return False
