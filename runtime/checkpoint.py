"""Checkpoints: what a file or a folder holds, opened by its form.

`open_checkpoint` reads headers and indices only, and never anything that executes. The forms are those of `safetensors_form`,
`torch_form` and `dcp_form`; a mapping of names to tensors is a checkpoint too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..tracer.errors import CheckpointError
from . import dcp_form, safetensors_form, torch_form
from .entries import Entry, held
from .files import File

Source = str | os.PathLike[str] | Mapping[str, torch.Tensor]
Rename = Mapping[str, str | None] | Callable[[str], str | None]
_INDEX = ".index.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by their names, and the files that they lie in; `folder` is a hub directory's."""

    where: str
    entries: Mapping[str, Entry]
    files: tuple[File, ...] = ()
    folder: Path | None = None

    def renamed(self, rename: Rename | None) -> Checkpoint:
        """The same under other names: by regular expressions and what takes their place, as `re.sub`, or by a function.

        None instead of a name leaves the tensor out. Raises `CheckpointError` where two get one name.
        """
        if rename is None:
            return self
        function = rename if callable(rename) else _by_patterns(rename)
        found: dict[str, Entry] = {}
        sources: dict[str, str] = {}
        for name, entry in self.entries.items():
            new = function(name)
            if new is None:
                continue
            if not isinstance(new, str):
                raise CheckpointError(f"rename gives {new!r} for {name!r}, which is no name")
            if new in found:
                raise CheckpointError(f"rename gives {new!r} for {sources[new]!r} and for {name!r}; a tensor has one source")
            found[new], sources[new] = entry, name
        return Checkpoint(self.where, found, self.files, self.folder)

    def digest(self) -> str:
        """What ranks compare: a digest of names, shapes and dtypes."""
        text = repr([(name, entry.shape, str(entry.dtype)) for name, entry in sorted(self.entries.items())])
        return f"{self.where} ({len(self.entries)} tensors, {hashlib.sha256(text.encode()).hexdigest()[:16]})"

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` where a file has been written to meanwhile."""
        for file in self.files:
            file.check_unchanged()


@contextmanager
def open_checkpoint(source: Source) -> Iterator[Checkpoint]:
    """The checkpoint at a path, or that a mapping is; its files are closed at the end. Raises `CheckpointError`."""
    if isinstance(source, Mapping):
        yield _held(source)
        return
    try:
        path = Path(source)
    except TypeError:
        raise CheckpointError(f"checkpoint={source!r} is neither a path nor a mapping of names to tensors") from None
    files: list[File] = []
    try:
        try:
            found = _opened(path, files)
        except OSError as error:  # a folder that may not be read, a name that is too long
            raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror or error}") from error
        yield found
    finally:
        for file in files:
            file.close()


def _held(tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"a state dict maps names to tensors; {name!r} is mapped to a {type(tensor).__name__}")
    return Checkpoint("the state dict", {name: held(name, tensor) for name, tensor in tensors.items()})


def _opened(path: Path, files: list[File]) -> Checkpoint:
    if path.is_dir():
        return _folder(path, files)
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}; a checkpoint is a file or a folder on this machine (of a model on the Hugging Face hub the "
            "folder that huggingface_hub.snapshot_download returns)"
        )
    if path.name.endswith(_INDEX):
        return Checkpoint(str(path), _indexed(path, files), tuple(files), _hub_folder(path.parent))
    return Checkpoint(str(path), _file(path, files), tuple(files))


def _file(path: Path, files: list[File]) -> dict[str, Entry]:
    """The tensors of one file, whose first bytes tell its form."""
    file = File(path)
    files.append(file)
    head = file.head(16)
    if torch_form.is_torch(head):
        return torch_form.entries(file)
    if not head:
        raise CheckpointError(f"{path} is empty")
    return safetensors_form.entries(file)


def _folder(path: Path, files: list[File]) -> Checkpoint:
    if (path / ".metadata").exists():
        return Checkpoint(str(path), dcp_form.entries(path, files), tuple(files))
    indices = sorted(path.glob(f"*{_INDEX}"))
    indices = [each for each in indices if "safetensors" in each.name] or indices
    weights = [path / name for name in _WEIGHTS if (path / name).exists()]
    weights = weights[:1] or sorted(path.glob("*.safetensors"))
    hub = _hub_folder(path)
    if len(indices) == 1 and not (weights and weights[0].name in _WEIGHTS[:1]):
        return Checkpoint(str(path), _indexed(indices[0], files), tuple(files), hub)
    if len(weights) == 1:
        return Checkpoint(str(path), _file(weights[0], files), tuple(files), hub)
    if not indices and not weights:
        raise CheckpointError(
            f"{path} holds no checkpoint: neither {', '.join(_WEIGHTS[:2])}, nor one with an index, nor .metadata of "
            f"torch.distributed.checkpoint; it holds {_listed(each.name for each in path.iterdir())}"
        )
    names = _listed(each.name for each in indices or weights)
    raise CheckpointError(f"{path} holds several checkpoints: {names}; name one of them (or the index that joins them)")


def _hub_folder(path: Path) -> Path | None:
    return path if (path / "config.json").exists() else None


def _indexed(path: Path, files: list[File]) -> dict[str, Entry]:
    """The tensors of the files that an index names."""
    where = _weight_map(path)
    found: dict[str, Entry] = {}
    for name in dict.fromkeys(where.values()):
        if not (path.parent / name).exists():
            lost = [tensor for tensor, file in where.items() if file == name]
            raise CheckpointError(f"{path} says that {_listed(lost)} are in {name}, and there is no such file beside it")
        for tensor, entry in _file(path.parent / name, files).items():
            if tensor not in found or where.get(tensor) == name:
                found[tensor] = entry
    lost = [tensor for tensor, file in where.items() if tensor not in found or Path(found[tensor].where).name != file]
    if lost:
        raise CheckpointError(f"{path} says that {lost[0]} is in {where[lost[0]]}, and it is not ({len(lost)} such tensors)")
    return found


def _weight_map(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read the index {path}: {error}") from error
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f'the index {path} has no "weight_map" of tensor names to files')
    for name, file in found.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(f"the index {path} says that {name} is in {file!r}, which is no file beside it")
    return found


def _by_patterns(rename: Mapping[str, str | None]) -> Callable[[str], str | None]:
    """The first pattern that is found in a name is replaced; None leaves the tensor out."""
    patterns = []
    for pattern, new in rename.items():
        if new is not None and not isinstance(new, str):
            raise CheckpointError(f"rename puts {new!r} in the place of {pattern!r}, which is neither a string nor None")
        try:
            patterns.append((re.compile(pattern), new))
        except (re.error, TypeError) as error:
            raise CheckpointError(f"rename has {pattern!r}, which is no regular expression: {error}") from error

    def renamed(name: str) -> str | None:
        for pattern, new in patterns:
            if pattern.search(name):
                return None if new is None else _put(pattern, new, name)
        return name

    return renamed


def _put(pattern: re.Pattern[str], new: str, name: str) -> str:
    try:
        return pattern.sub(new, name)
    except (re.error, IndexError) as error:
        raise CheckpointError(f"rename cannot put {new!r} in the place of {pattern.pattern!r}: {error}") from error


def _listed(names: Iterable[Any], shown: int = 8) -> str:
    found = sorted(map(str, names))
    more = f", … and {len(found) - shown} more" if len(found) > shown else ""
    return (", ".join(found[:shown]) or "nothing") + more
