"""Checkpoints of `torch.distributed.checkpoint`: a folder with `.metadata`, a pickle, and files with the pieces of every tensor.

torch itself would execute whatever that pickle says. Here it may name only the classes of DCP's own metadata, which hold data.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
    "pathlib": ("PosixPath", "PurePosixPath", "Path"),
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

    found: dict[str, Entry] = {}
    try:
        for name, said in metadata.state_dict_metadata.items():
            if type(said).__name__ == "TensorStorageMetadata":
                found[name] = _entry(name, said, metadata.storage_data, folder, file_of)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{folder / '.metadata'} is no metadata of torch.distributed.checkpoint: {error!r}") from error
    return found


def _metadata(folder: Path, files: list[File]) -> Any:
    file = File(folder / ".metadata")
    files.append(file)
    try:
        found = _Unpickler(file).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{file.path} cannot be read: {error!r}") from error
    if type(found).__name__ != "Metadata":
        raise CheckpointError(f"{file.path} holds a {type(found).__name__} where DCP's metadata belongs")
    return found


class _Unpickler(pickle.Unpickler):
    """Makes nothing but the classes that DCP's metadata consists of."""

    def __init__(self, file: File) -> None:
        super().__init__(io.BytesIO(file.head(file.size)))
        self._path = file.path

    def find_class(self, module: str, name: str) -> Any:
        """As `pickle.Unpickler`, of those that are allowed."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(
            f"{self._path} names {module}.{name}, which is no part of DCP's metadata; to read it would execute code, so it is "
            "refused"
        )


def _entry(name: str, said: Any, places: Any, folder: Path, file_of: Callable[[str], File]) -> Entry:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    shape, dtype, where = tuple(said.size), said.properties.dtype, str(folder)
    pieces: list[tuple[tuple[int, ...], Entry]] = []
    for chunk in said.chunks:
        place = places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise CheckpointError(f"{folder / '.metadata'} does not say in which file {name} lies from {list(chunk.offsets)} on")
        if getattr(place, "transform_descriptors", None):
            return Strange(
                name, shape, dtype, where, f"is stored with {', '.join(place.transform_descriptors)}, which is not read"
            )
        file = file_of(place.relative_path)
        file.check_reaches(place.offset + place.length, name)
        pieces.append((tuple(chunk.offsets), _Piece(name, tuple(chunk.sizes), dtype, file, place.offset, place.length)))
    held = sum(math.prod(piece.shape) for _, piece in pieces)
    if held != math.prod(shape):
        raise CheckpointError(f"{folder / '.metadata'} has {held:,} of the {math.prod(shape):,} elements of {name}")
    return Pieced(name, shape, dtype, where, pieces)


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
