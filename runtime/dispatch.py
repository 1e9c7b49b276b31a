"""A plan that places tensors on several devices of one process, carried out: filled where they go, dispatched by accelerate.

1. a meta module is filled, each tensor on its device; what goes to disk is written as soon as it is finished, and stays meta
2. accelerate's `dispatch_model` adds the hooks that bring inputs to the weights, and weights from the disk
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ..planner.check import check_decisions
from ..planner.decisions import Decisions
from ..planner.placing import DISK, Placing, device_map
from ..tracer.errors import MaterializeError
from .build import Build
from .check import check_device
from .inplace import fill_module
from .job import Whereto
from .materialize import restored_on_failure
from .meta import meta_module
from .options import Options
from .ranks import Ranks
from .targets import Target

_WAY_OUT = "name a folder that does not exist yet, or is empty: offload_dir=PATH"


def materialize_placed(
    build: Build,
    decisions: Decisions,
    options: Options,
    offload_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The module, with every tensor where the plan places it, ready to be called on the first device.

    Parameters on disk lie in `offload_dir`, which has to stay for as long as the module is used. On failure nothing is left.
    """
    check_decisions(decisions, build.graph)
    placing = decisions.placing
    assert placing is not None
    accelerate = _accelerate()
    entries = device_map(placing, build.graph)
    for device in dict.fromkeys(entries.values()):
        if device != DISK:
            check_device(device, "the plan", "place it elsewhere, or build on a machine that has it")
    with restored_on_failure(), _Folder(offload_dir, DISK in entries.values()) as folder:
        places = _Places(placing, folder)
        module: nn.Module = meta_module(build, decisions)
        fill_module(module, Ranks(), options, places)
        folder.finish()
        where = None if folder.path is None else str(folder.path)
        accelerate.dispatch_model(module, device_map=entries, main_device=placing.main, offload_dir=where)
    return module


def _accelerate() -> ModuleType:
    try:
        accelerate = importlib.import_module("accelerate")
    except ModuleNotFoundError as error:
        raise MaterializeError(f"a plan that places tensors needs accelerate ({error}): pip install accelerate") from error
    return accelerate


class _Places(Whereto):
    """The device of every tensor; the meta device stands for the disk."""

    def __init__(self, placing: Placing, folder: _Folder) -> None:
        self._placing, self._folder = placing, folder

    def device(self, target: Target) -> torch.device:
        """As `Whereto`: buffers of modules on disk are where those are run."""
        device = self._placing.device_for(target.node)
        if device == DISK and isinstance(target.tensor, nn.Parameter):
            return torch.device("meta")
        return torch.device(self._placing.main if device in (DISK, None) else str(device))

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """As `Whereto`: write it, under all of its names."""
        self._folder.write(tuple(name for name in target.node.names if not name.endswith("]")), value)


class _Folder:
    """A folder for tensors in accelerate's form, one file each, and an index; gone again where the body fails."""

    def __init__(self, path: str | os.PathLike[str] | None, needed: bool) -> None:
        self.path = Path(path) if path is not None and needed else None
        if needed and path is None:
            raise MaterializeError(f"the plan puts tensors on disk; {_WAY_OUT}")
        self._index: dict[str, Any] = {}
        self._made: list[Path] = []

    def __enter__(self) -> _Folder:
        if self.path is None:
            return self
        new = [each for each in (self.path, *self.path.parents) if not each.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise MaterializeError(f"{self.path} is not empty, and what is there would be lost; {_WAY_OUT}")
            self._temporary = Path(tempfile.mkdtemp(prefix=".groundplan-", dir=self.path))
        except OSError as error:
            if new:
                shutil.rmtree(new[-1], ignore_errors=True)
            raise MaterializeError(f"cannot write to {self.path}: {error.strerror or error}; {_WAY_OUT}") from error
        self._remove = new[-1:] or [self._temporary]
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None and self.path is not None:
            for each in (*self._made, *self._remove):
                shutil.rmtree(each, ignore_errors=True) if each.is_dir() else each.unlink(missing_ok=True)

    def write(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """Write a tensor; its other names are links to the same file."""
        from accelerate.utils import offload_weight

        try:
            if value.nbytes > shutil.disk_usage(self._temporary).free:  # it writes mapped memory, where a full disk is a signal
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offload_weight(value.detach().cpu(), names[0], str(self._temporary), self._index)
            for name in names[1:]:
                self._index[name] = self._index[names[0]]
                (self._temporary / f"{name}.dat").hardlink_to(self._temporary / f"{names[0]}.dat")
        except OSError as error:
            raise MaterializeError(f"cannot write {names[0]} to {self.path}: {error.strerror or error}; {_WAY_OUT}") from error

    def finish(self) -> None:
        """Move the files to where they belong, the index last."""
        if self.path is None:
            return
        try:
            (self._temporary / "index.json").write_text(json.dumps(self._index, indent=2))
            for file in sorted(self._temporary.iterdir(), key=lambda file: file.name == "index.json"):
                self._made.append(self.path / file.name)
                file.rename(self._made[-1])
            self._temporary.rmdir()
        except OSError as error:
            raise MaterializeError(f"cannot write to {self.path}: {error.strerror or error}; {_WAY_OUT}") from error
