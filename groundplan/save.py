"""What `groundplan materialize` leaves in a folder: a model's state_dict as a safetensors file, and its configuration.

Tensors that share memory are stored once, as `safetensors.torch.save_model` does; a folder gets all of its files or none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.nn.parameter import is_lazy

from .tracer.errors import MaterializeError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


@dataclass(frozen=True)
class Saved:
    """What a file holds: its tensors, their bytes, and the names that are not in it, each with the name that is."""

    tensors: int
    nbytes: int
    ties: Mapping[str, str]


def save_state(state: Mapping[str, torch.Tensor], path: Path) -> Saved:
    """Write `state` to `path` as `safetensors.torch.save_model` does: what shares memory once, the other names in the metadata.

    Of tied names the first one stays. Raises `MaterializeError` for a value that safetensors cannot hold.
    """
    for name, value in state.items():
        _check_storable(name, value)
    ties = _shared_names(state)
    kept = {name: value.detach() for name, value in state.items() if name not in ties}
    _separate_overlaps(kept)
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file({name: _plain(value) for name, value in kept.items()}, path, {"format": "pt", **ties})
        path.chmod(mode)  # safetensors leaves a file that only its owner may read
    except (OSError, SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise MaterializeError(f"writing {path.parent / WEIGHTS} failed: {error}") from error
    return Saved(len(kept), sum(value.nbytes for value in kept.values()), ties)


def _check_storable(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        what = f"is a {type(value).__name__}"
    elif is_lazy(value):
        what = "is lazy and has no shape yet"
    elif value.is_meta:
        what = "is on the meta device and has no values"
    elif value.layout != torch.strided:
        what = f"has the layout {value.layout}"
    else:
        return
    raise MaterializeError(
        f"{name} {what}: a safetensors file cannot hold it. Build in Python with plan.materialize() and use torch.save"
    )


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value.resolve_conj().resolve_neg().contiguous()


def _shared_names(state: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """For every name whose values are in another one's memory: that other name."""
    ties: dict[str, str] = {}
    for names in _by_storage(state).values():
        whole = next((name for name in names if _covers_storage(state[name])), None)
        first: dict[Any, str] = {}
        for name in names:
            keeper = whole or first.setdefault(_geometry(state[name]), name)
            if keeper != name:
                ties[name] = keeper
    return ties


def _by_storage(state: Mapping[str, torch.Tensor]) -> dict[Any, list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        if value.numel():
            groups.setdefault((value.device, value.untyped_storage().data_ptr()), []).append(name)
    return groups


def _covers_storage(value: torch.Tensor) -> bool:
    by_stride = sorted(range(value.dim()), key=value.stride, reverse=True)
    return value.nbytes == value.untyped_storage().nbytes() and value.permute(by_stride).is_contiguous()


def _geometry(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride(), value.storage_offset(), value.is_conj(), value.is_neg()


def _separate_overlaps(kept: dict[str, torch.Tensor]) -> None:
    """Give the views of one storage memory of their own: safetensors refuses those that overlap."""
    for names in _by_storage(kept).values():
        if len(names) > 1:
            kept.update({name: kept[name].clone(memory_format=torch.contiguous_format) for name in names})


def named_state(built: Any) -> dict[str, torch.Tensor]:
    """The state_dict of what the constructor returned; the members of a tuple or a dict come under their index or key."""
    if isinstance(built, torch.nn.Module):
        return built.state_dict()
    members = built.items() if isinstance(built, Mapping) else enumerate(built)
    return {f"{key}.{name}": value for key, member in members for name, value in named_state(member).items()}


def write_config(config: Mapping[str, Any], model: torch.nn.Module, path: Path) -> None:
    """The configuration that loads these weights as they are: their dtype, and no quantization that they did not go through."""
    fields = {key: value for key, value in config.items() if key not in ("torch_dtype", "dtype", "quantization_config")}
    dtypes = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    if dtypes:
        fields["dtype"] = str(max(dtypes, key=dtypes.count)).removeprefix("torch.")
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Output:
    """The files that a command leaves in a folder: all of them, or none, and no folder that it made in vain.

    1. entering refuses files that are there already and makes the folder
    2. `temporary(name)` is where to write
    3. `commit()` gives the files their names; leaving without it removes them
    """

    def __init__(self, folder: Path, names: Sequence[str], force: bool) -> None:
        self.paths = [folder / name for name in names]
        self._folder = folder
        self._force = force
        self._made: list[Path] = []

    def temporary(self, name: str) -> Path:
        return self._folder / f".{name}.{os.getpid()}.tmp"

    def __enter__(self) -> Output:
        for path in self.paths:
            if path.exists() and not self._force:
                raise MaterializeError(f"{path} exists; choose another --out, or replace it with --force")
        self._made = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.temporary(self.paths[0].name).touch()
        except OSError as error:
            self._clean()
            raise MaterializeError(f"--out {self._folder} cannot be written to: {error.strerror}") from error
        return self

    def commit(self) -> None:
        for path in reversed(self.paths):  # the weights last: where they are, everything is
            os.replace(self.temporary(path.name), path)
        self._made = []

    def __exit__(self, *_: object) -> None:
        self._clean()

    def _clean(self) -> None:
        for path in self.paths:
            with suppress(NotADirectoryError):  # a file stood in the folder's way
                self.temporary(path.name).unlink(missing_ok=True)
        for folder in self._made:
            with suppress(OSError):  # somebody else has put something there meanwhile
                folder.rmdir()
