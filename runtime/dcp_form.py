"""Checkpoints of `torch.distributed.checkpoint`: a folder with `.metadata`, a pickle, and files with the pieces of every tensor.

torch itself would execute whatever that pickle says. Here it may name only the classes of DCP's own metadata, which hold data.
"""

from __future__ import annotations

import dataclasses
import enum
import io
import math
import pickle
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch

from ..tracer.errors import CheckpointError
from . import safetensors_form, torch_form
from .boxes import Box
from .entries import Entry, Pieced, Strange
from .files import File

_METADATA = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"
_ALLOWED = {
    _METADATA: (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    _FILESYSTEM: ("_StorageInfo", "_StoragePrefix"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "collections": ("OrderedDict",),
    "builtins": ("set", "frozenset"),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
}


def entries(folder: Path, files: list[File]) -> dict[str, Entry]:
    """The tensors of a checkpoint, by DCP's names: dotted, where dicts were nested."""
    metadata = _metadata(folder, files)
    opened: dict[str, File] = {}

    def file_of(name: str) -> File:
        if name not in opened:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(f"{folder / '.metadata'} names {name!r}, which is no file in the folder")
            opened[name] = File(folder / name)
            files.append(opened[name])
        return opened[name]

    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    found: dict[str, Entry] = {}
    try:
        places = {(index.fqn, tuple(index.offset or ())): place for index, place in metadata.storage_data.items()}
        for name, said in metadata.state_dict_metadata.items():
            if isinstance(said, TensorStorageMetadata):
                found[name] = _entry(name, said, places, folder, file_of)
    except (AttributeError, TypeError, LookupError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{folder / '.metadata'} is no metadata of torch.distributed.checkpoint: {error!r}") from error
    return found


def _metadata(folder: Path, files: list[File]) -> Any:
    from torch.distributed.checkpoint.metadata import Metadata

    file = File(folder / ".metadata")
    files.append(file)
    try:
        found = _Unpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{file.path} cannot be read: {error!r}") from error
    if not isinstance(found, Metadata):
        raise CheckpointError(f"{file.path} holds a {type(found).__name__} where DCP's metadata belongs")
    return found


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the classes that DCP's metadata consists of.

    Each is a class of this unpickler's own, as a pickle can also set attributes of what it names.
    """

    def __init__(self, file: File) -> None:
        pickled = file.head(file.size)
        _check_sizes(pickled)
        super().__init__(io.BytesIO(pickled))
        self._path = file.path
        self._own: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """As `pickle.Unpickler`, of those that are allowed."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            if (module, name) not in self._own:
                self._own[module, name] = _own(super().find_class(module, name))
            return self._own[module, name]
        raise CheckpointError(
            f"{self._path} names {module}.{name}, which is no part of DCP's metadata; to read it would execute code, so it is "
            "refused"
        )


_ARGUMENTS = {ord(each.code): each.arg.n if each.arg else 0 for each in pickletools.opcodes}
_COUNTS = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4}
_COUNTS[pickletools.TAKEN_FROM_ARGUMENT8U] = 8
_STOP, _TWO_LINES, _LINE_PUT, _LONG_PUT = ord("."), b"ci", ord("p"), ord("r")


def _check_sizes(pickled: bytes) -> None:
    """Raise `ValueError` where a pickle says sizes beyond its own: Python would take so much memory before it looks further."""
    at = 0
    while (code := pickled[at]) != _STOP:
        size, at = _ARGUMENTS[code], at + 1
        start = at
        if size >= 0:
            at += size
        elif size == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if code in _TWO_LINES else 1):
                at = pickled.index(b"\n", at) + 1
        else:
            at += _COUNTS[size] + int.from_bytes(pickled[at : at + _COUNTS[size]], "little")
        number = int.from_bytes(pickled[start:at], "little") if code == _LONG_PUT else 0
        number = int(pickled[start:at]) if code == _LINE_PUT else number
        if max(at, number) > len(pickled):
            raise ValueError("it is cut short or damaged")


def _own(found: Any) -> Any:
    """A class of the same kind, or a function that does the same."""
    if not isinstance(found, type) or issubclass(found, enum.Enum | PurePath):
        return lambda *args: found(*args)
    return type(found.__name__, (found,), {}) if dataclasses.is_dataclass(found) else found


def _entry(name: str, said: Any, places: Any, folder: Path, file_of: Callable[[str], File]) -> Entry:
    shape, dtype, where = tuple(said.size), said.properties.dtype, str(folder)
    if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} of {dtype!r} is no tensor")
    pieces: list[tuple[tuple[int, ...], Entry]] = []
    for chunk in said.chunks:
        place = places.get((name, tuple(chunk.offsets)))
        if place is None:
            raise CheckpointError(f"{folder / '.metadata'} does not say in which file {name} lies from {list(chunk.offsets)} on")
        if getattr(place, "transform_descriptors", None):
            return Strange(
                name, shape, dtype, where, f"is stored with {', '.join(place.transform_descriptors)}, which is not read"
            )
        file = file_of(place.relative_path)
        file.check_reaches(place.offset + place.length, name)
        pieces.append((tuple(chunk.offsets), _Piece(name, tuple(chunk.sizes), dtype, file, place.offset, place.length)))
    _check_pieces([(offsets, piece.shape) for offsets, piece in pieces], shape, f"{folder / '.metadata'}", name)
    return Pieced(name, shape, dtype, where, pieces)


def _check_pieces(pieces: list[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...], path: str, name: str) -> None:
    """Raise `CheckpointError` unless pieces (their offsets and sizes) are a tensor: every element lies in one of them."""
    for offsets, sizes in pieces:
        if not all(o >= 0 and size >= 0 and o + size <= end for o, size, end in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(
                f"{path} has a piece of {name} from {list(offsets)} on, of {list(sizes)}, and the tensor is {list(shape)}"
            )
    held = sum(math.prod(sizes) for _, sizes in pieces)
    if held != math.prod(shape):
        raise CheckpointError(f"{path} has {held:,} of the {math.prod(shape):,} elements of {name}")
    near: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # those that reach as far as the next one along the first dim
    for offsets, sizes in sorted(each for each in pieces if 0 not in each[1] and shape):
        near = [each for each in near if each[0][0] + each[1][0] > offsets[0]]
        if any(_overlap(each, (offsets, sizes)) for each in near):
            raise CheckpointError(f"{path} has elements of {name} twice, from {list(offsets)} on")
        near.append((offsets, sizes))


def _overlap(one: tuple[tuple[int, ...], tuple[int, ...]], other: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return all(a < b + q and b < a + p for a, p, b, q in zip(*one, *other, strict=True))


@dataclass(frozen=True)
class _Piece:
    """A piece of a tensor: a small file inside a file, whose own header is read when it is needed."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: File
    start: int
    length: int

    divisible = True

    @property
    def where(self) -> str:
        return str(self.file.path)

    @property
    def position(self) -> tuple[str, int]:
        return self.where, self.start

    @property
    def elements(self) -> Any:
        return self.where, self.start

    @cached_property
    def _stored(self) -> Entry:
        zipped = torch_form.is_torch(self.file.head(16, self.start))
        found = (
            torch_form.entry_at(self.file, self.start, self.length, self.name)
            if zipped
            else safetensors_form.entry_at(self.file, self.start, self.name)
        )
        if found.shape != self.shape or found.dtype != self.dtype:
            raise CheckpointError(
                f"{self.where} holds {list(found.shape)} of {found.dtype} for {self.name}, where the metadata has "
                f"{list(self.shape)} of {self.dtype}"
            )
        return found

    def expect(self, box: Box) -> None:
        self._stored.expect(box)

    def read(self, box: Box, out: torch.Tensor) -> None:
        self._stored.read(box, out)
