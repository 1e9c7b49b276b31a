"""safetensors files: a header in JSON that says where every tensor lies, and the tensors, one behind the other."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import _TYPES

from ..tracer.errors import CheckpointError
from .entries import Entry, Stored, Strange
from .files import File

_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def entries(file: File) -> dict[str, Entry]:
    """The tensors of a file; raises `CheckpointError` for a header that is not one, or not this file's."""
    header, start = header_of(file)
    found: dict[str, Entry] = {}
    for name, said in header.items():
        if name != "__metadata__":
            found[name] = _entry(file, start, name, said)
    _check_gapless(file, start, header)
    return found


def _check_gapless(file: File, start: int, header: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless the tensors lie one behind the other, up to the file's end, as the format asks for."""
    places = sorted((*said["data_offsets"], name) for name, said in header.items() if name != "__metadata__")
    reached = 0
    for first, last, name in places:
        if first != reached:
            what = "overlaps the one before it" if first < reached else "does not begin where the one before it ends"
            raise CheckpointError(f"the header of {file.path} says that {name} {what}; the file is damaged")
        reached = last
    if start + reached != file.size:
        raise CheckpointError(
            f"{file.path} has {file.size:,} bytes, where its header ends with byte {start + reached:,}; the file is damaged"
        )


def header_of(file: File, at: int = 0) -> tuple[dict[str, Any], int]:
    """The header that starts at byte `at`, and the byte that its offsets count from."""
    length = int.from_bytes(file.head(8, at), "little")
    if not 2 <= length <= _LONGEST_HEADER or at + 8 + length > file.size:
        raise CheckpointError(
            f"{file.path} is neither a safetensors file nor one of torch.save: its header would be {length:,} bytes long, in a "
            f"file of {file.size:,}"
        )
    try:
        header = json.loads(file.head(length, at + 8), object_pairs_hook=lambda pairs: _unique(pairs, file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {file.path} is no JSON ({error}); it is no safetensors file, or is damaged"
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"the header of {file.path} is a {type(header).__name__} where names of tensors belong")
    return header, at + 8 + length


def _unique(pairs: list[tuple[str, Any]], file: File) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"the header of {file.path} names {twice} twice")
    return found


def _entry(file: File, start: int, name: str, said: Any) -> Entry:
    try:
        kind, shape, (first, last) = said["dtype"], tuple(said["shape"]), said["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"the header of {file.path} does not say where {name} lies: {said!r}") from error
    if type(kind) is not str or any(type(each) is not int or each < 0 for each in (*shape, first, last)) or last < first:
        raise CheckpointError(f"the header of {file.path} does not say where {name} lies: {said!r}")
    file.check_reaches(start + last, name)
    dtype = _TYPES.get(kind)
    if dtype is None:
        return Strange(
            name, shape, torch.uint8, str(file.path), f"has the dtype {kind}, which torch {torch.__version__} does not"
        )
    stride, numel = [], 1
    for size in reversed(shape):
        stride.append(numel)
        numel *= size
    if last - first != numel * dtype.itemsize:
        raise CheckpointError(
            f"the header of {file.path} gives {name} {last - first:,} bytes, where {list(shape)} of {kind} take "
            f"{numel * dtype.itemsize:,}; the file is damaged"
        )
    return Stored(name, shape, dtype, file, start + first, tuple(reversed(stride)))


def entry_at(file: File, at: int, name: str) -> Entry:
    """The one tensor of a safetensors file that lies inside another, from byte `at` on."""
    header, start = header_of(file, at)
    names = [each for each in header if each != "__metadata__"]
    if len(names) != 1:
        raise CheckpointError(f"{file.path} holds {len(names)} tensors at byte {at:,} where {name} belongs")
    return _entry(file, start, name, header[names[0]])
