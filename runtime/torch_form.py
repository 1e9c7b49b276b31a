"""Files of `torch.save`: torch's own unpickler says with `weights_only=True` what they hold, and the tensors are read by place.

torch is asked for tensors on the meta device, which then know where in the file their elements lie.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..tracer.errors import CheckpointError
from .entries import PLAIN, Entry, Stored, Strange, held, is_plain, strange
from .files import File, Slice

_ZIP, _PICKLE = b"PK\x03\x04", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_STATE = "state_dict"


def is_torch(head: bytes) -> bool:
    """Whether a file that begins so is one of `torch.save`, of today's form or the one before torch 1.6.

    A safetensors file begins with its header's length in eight bytes, the first of which can be a pickle's.
    """
    return head.startswith((_ZIP, *_PICKLE)) and head[4:9] != b"\0\0\0\0{"


def entries(file: File) -> dict[str, Entry]:
    """The tensors of a file, those of nested dicts under dotted names; of a Lightning checkpoint those of its `state_dict`.

    Raises `CheckpointError` for what is damaged, or would have to be executed.
    """
    tensors = _tensors(_loaded(file, 0, file.size, "meta"), file)
    if any(_place(each) is None for each in tensors.values() if type(each) in PLAIN) or not _as_stored(file):
        tensors = _tensors(_loaded(file, 0, file.size, "cpu"), file)
        return {name: held(name, each, str(file.path)) for name, each in tensors.items()}
    return {name: entry_of(name, each, file, 0) for name, each in tensors.items()}


def _loaded(file: File, at: int, length: int, device: str) -> Any:
    """What torch reads in a file of its own, which is so many bytes of `file`; on the meta device it reads no elements."""
    try:
        source: Any = Slice(file, at, length, "what it holds")
        return torch.load(source, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file.path} holds more than tensors, and to read it would execute code ({_reason(error)}); save "
            "module.state_dict() alone"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        if isinstance(error, NotImplementedError) and device == "meta":
            return _loaded(file, at, length, "cpu")  # tensors that torch does not have on the meta device, such as quantized ones
        raise CheckpointError(f"{file.path} cannot be read by torch.load: {_reason(error)}") from error


_ADVICE = re.compile(r"Weights only load failed.*(WeightsUnpickler error:|from a trusted source\.)", re.DOTALL)


def _reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong, without the advice to execute what the file says."""
    lines = _ADVICE.sub("", str(error)).strip().splitlines()
    return re.sub(r" was not an allowed global by default\..*", " is no tensor", lines[0]) if lines else repr(error)


def _tensors(found: Any, file: File) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts; raises `CheckpointError` for anything else, and where two get one name."""
    if not isinstance(found, Mapping):
        raise CheckpointError(
            f"{file.path} holds a {type(found).__name__} where a dict of tensors belongs; save module.state_dict() instead"
        )
    state = found.get(_STATE)
    if isinstance(state, Mapping) and any(isinstance(each, torch.Tensor) for each in state.values()):
        found = state
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in _flat(found, ""):
        if name in tensors:
            raise CheckpointError(f"{file.path} holds two tensors called {name}, in a dict and in one inside it")
        tensors[name] = tensor
    return tensors


def _flat(found: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in found.items():
        name = f"{prefix}{key}"
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")


def _place(tensor: torch.Tensor) -> int | None:
    """The byte of the file at which a tensor's storage begins; None where its elements are not there as they are."""
    if tensor.is_conj() or tensor.is_neg():
        return None
    try:
        found: int | None = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    except NotImplementedError:
        return None
    return found


def entry_of(name: str, tensor: torch.Tensor, file: File, start: int) -> Entry:
    """A tensor that torch has read onto the meta device, from what lies in `file` from byte `start` on."""
    if not is_plain(tensor):
        return strange(name, tensor, str(file.path))
    place = _place(tensor)
    if place is None:
        return Strange(name, tuple(tensor.shape), tensor.dtype, str(file.path), "lies at no certain place")
    first = start + place + int(tensor.storage_offset()) * tensor.dtype.itemsize
    entry = Stored(name, tuple(tensor.shape), tensor.dtype, file, first, tensor.stride())
    file.check_reaches(entry.end, name)
    return entry


def entry_at(file: File, at: int, length: int, name: str) -> Entry:
    """The one tensor of a file of `torch.save` that lies inside another, from byte `at` on."""
    found = _loaded(file, at, length, "meta")
    if not isinstance(found, torch.Tensor):
        raise CheckpointError(f"{file.path} holds a {type(found).__name__} at byte {at:,} where {name} belongs")
    return entry_of(name, found, file, at)


def _as_stored(file: File) -> bool:
    """Whether the tensors lie in the file as they lie in memory here: uncompressed, in this machine's byte order."""
    try:
        with zipfile.ZipFile(Slice(file, 0, file.size, "its directory")) as archive:
            order = next((each for each in archive.infolist() if each.filename.endswith("/byteorder")), None)
            little = order is None or archive.read(order) == b"little"
            return little and all(each.compress_type == zipfile.ZIP_STORED for each in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError, LookupError, EOFError):  # torch says what is wrong
        return False
