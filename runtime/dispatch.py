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
from collections.abc import Iterator
from contextlib import contextmanager
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
from .new_files import NewFiles
from .options import Options
from .ranks import Ranks
from .targets import Target

_INDEX = "index.json"
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
    with restored_on_failure(), _offloaded(offload_dir, DISK in entries.values()) as folder:
        places = _Places(placing, folder)
        module: nn.Module = meta_module(build, decisions)
        fill_module(module, Ranks(), options, places)
        where = None if folder is None else folder.finish()
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

    def __init__(self, placing: Placing, folder: _Folder | None) -> None:
        self._placing, self._folder = placing, folder

    def device(self, target: Target) -> torch.device:
        """As `Whereto`: buffers of modules on disk are where those are run."""
        device = self._placing.device_for(target.node)
        if device == DISK and isinstance(target.tensor, nn.Parameter):
            return torch.device("meta")
        return torch.device(self._placing.main if device in (DISK, None) else str(device))

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """As `Whereto`: write it, under all of its names."""
        assert self._folder is not None  # as something goes to disk
        self._folder.write(tuple(name for name in target.node.names if not name.endswith("]")), value)


class _Folder:
    """Tensors in accelerate's form, one file each, and an index."""

    def __init__(self, files: NewFiles) -> None:
        self._files = files
        self._index: dict[str, Any] = {}

    def write(self, names: tuple[str, ...], value: torch.Tensor) -> None:
        """Write a tensor; its other names are links to the same file."""
        from accelerate.utils import offload_weight

        folder = self._files.temporary
        with self._files.writing(names[0]):
            if value.nbytes > shutil.disk_usage(folder).free:  # it writes mapped memory, where a full disk is a signal
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            offload_weight(value.detach().cpu(), names[0], str(folder), self._index)
            for name in names[1:]:
                self._index[name] = self._index[names[0]]
                (folder / f"{name}.dat").hardlink_to(folder / f"{names[0]}.dat")

    def finish(self) -> str:
        """Move the files to where they belong; where that is."""
        with self._files.writing(_INDEX):
            (self._files.temporary / _INDEX).write_text(json.dumps(self._index, indent=2))
        self._files.finish()
        return str(self._files.folder)


@contextmanager
def _offloaded(path: str | os.PathLike[str] | None, needed: bool) -> Iterator[_Folder | None]:
    """The folder for what goes to disk, gone again where the body fails; None where nothing does."""
    if not needed:
        yield None
        return
    if path is None:
        raise MaterializeError(f"the plan puts tensors on disk; {_WAY_OUT}")
    with NewFiles(Path(path), _in_use, _INDEX, _WAY_OUT) as files:
        yield _Folder(files)


def _in_use(folder: Path) -> str | None:
    return f"{folder} is not empty, and what is there would be lost" if any(folder.iterdir()) else None
