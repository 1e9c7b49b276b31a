"""Writing a checkpoint: of a module, or straight from a plan, tensor by tensor, so that the whole model is never there.

safetensors files are laid out before anything is drawn, as every size is known; each tensor is written to its place as soon as it
is finished. For `torch.distributed.checkpoint`, torch's own writer asks for one tensor after the other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import _TYPES
from torch import nn

from ..planner.check import check_decisions
from ..planner.decisions import Decisions
from ..planner.memory import human_bytes
from ..tracer.collect import roots_of
from ..tracer.errors import CheckpointError, MaterializeError
from ..tracer.graph import ParamGraph, TensorNode
from ..tracer.streams import generators_kept
from .build import Build
from .files import bytes_of
from .inplace import fill_module
from .job import Whereto
from .keyed import drawn_seed
from .meta import meta_module
from .new_files import NewFiles, NewFilesOfRanks, sync
from .options import Options
from .ranks import Ranks
from .state import materialize_state
from .steps import traced_with_casts
from .targets import Target

_DTYPES = {dtype: name for name, dtype in _TYPES.items()}
_UNITS = {
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_ALIGNED = 8  # bytes, as the safetensors library pads its headers


def save_checkpoint(
    build: Build,
    decisions: Decisions,
    source: int | nn.Module | None,
    path: str | os.PathLike[str],
    max_shard_size: int | str,
    format: str,
    options: Options,
) -> None:
    """Write what a seed gives, or what a module holds; raises `CheckpointError`, and leaves nothing behind then."""
    check_decisions(decisions, build.graph)
    if format not in ("safetensors", "dcp"):
        raise CheckpointError(f'format={format!r} is neither "safetensors" nor "dcp"')
    if isinstance(source, bool) or not isinstance(source, int | nn.Module | None):
        raise CheckpointError(f"a checkpoint is written of a seed, of None or of a module, not of {source!r}")
    path = Path(path)
    if format == "dcp":
        _save_dcp(_State.of(build, decisions, source, options), path)
        return
    graph = build.graph if isinstance(source, nn.Module) or not decisions.casts else traced_with_casts(build, decisions)[0].graph
    held = _members(source) if isinstance(source, nn.Module) else None
    tensors = _tensors(graph, held)
    if path.suffix == ".safetensors":
        layout, folder = [_File(path.name, tensors)], path.parent
    else:
        layout, folder = _shards(tensors, _bytes(max_shard_size)), path
    names = {file.name for file in layout} | {_INDEX}
    together = held is not None and _are_divided(held)
    with _new_files(folder, lambda each: _is_ours(each, path, names), _INDEX, together) as files:
        mine = layout if not together or dist.get_rank() == 0 else ()
        with ExitStack() as open_files:
            if held is not None:
                _gathered(held, lambda: _all_opened(files, mine, open_files))
            elif not isinstance(source, nn.Module):
                _write(build, decisions, _all_opened(files, mine, open_files), replace(options, seed=source))
        with files.writing():
            if len(mine) > 1:
                (files.temporary / _INDEX).write_text(json.dumps(_index(layout), indent=2) + "\n")
            sync(files.temporary)


def _new_files(folder: Path, in_the_way: Callable[[Path], bool], last: str, together: bool) -> NewFiles:
    def complaint(folder: Path) -> str | None:
        there = next((each for each in sorted(folder.iterdir()) if in_the_way(each)), None)
        return None if there is None else f"{there} is there already, and would be lost"

    kind = NewFilesOfRanks if together else NewFiles
    return kind(folder, complaint, last, "name another path", CheckpointError)


def _are_divided(held: Mapping[str, torch.Tensor]) -> bool:
    """Whether several ranks hold parts of the tensors, and write them together."""
    there = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return there and any(hasattr(tensor, "full_tensor") for tensor in held.values())


_INDEX = "model.safetensors.index.json"


# -- what is written ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a checkpoint: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for each in self.shape:
            size *= each
        return size


@dataclass(frozen=True, slots=True)
class _File:
    """One file, and the tensors in it."""

    name: str
    tensors: Sequence[_Tensor]

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The file's first bytes, and every tensor's position: those of larger elements come first, so that all are aligned."""
        said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        places, end = {}, 0
        for each in sorted(self.tensors, key=lambda each: -each.dtype.itemsize):
            places[each.name] = end
            said[each.name] = {"dtype": _DTYPES[each.dtype], "shape": list(each.shape), "data_offsets": [end, end + each.nbytes]}
            end += each.nbytes
        text = json.dumps(said, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNED)
        head = len(text).to_bytes(8, "little") + text
        return head, {name: len(head) + place for name, place in places.items()}


def _state_of(graph: ParamGraph) -> tuple[TensorNode, ...]:
    """The graph's state; raises `CheckpointError` where a part of it can have no values yet."""
    lazy = next((node for node in graph.state if node.lazy), None)
    if lazy is not None:
        raise CheckpointError(
            f"{lazy.name} belongs to a lazy module, whose shapes the first call decides; build the module, call it once, and "
            "save its state_dict()"
        )
    return graph.state


def _tensors(graph: ParamGraph, held: Mapping[str, torch.Tensor] | None) -> list[_Tensor]:
    if held is not None:
        found = [_Tensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()]
    else:
        found = [_Tensor(node.name, node.shape, node.dtype) for node in _state_of(graph)]
        strange = next((node for node in graph.state if node.opaque), None)
        if strange is not None:
            raise CheckpointError(f"{strange.name} is a {strange.type} tensor, which a safetensors file does not hold")
    for each in found:
        if each.dtype not in _DTYPES:
            raise CheckpointError(f'{each.name} is {each.dtype}, which a safetensors file does not hold; say format="dcp"')
    return found


def _members(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state, ties once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise CheckpointError(f"{name} in the module's state dict is a {type(tensor).__name__}, which is no tensor")
        if tensor.is_meta:
            raise CheckpointError(f"{name} is still on the meta device; say gp.materialize(module) first")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def _shards(tensors: Sequence[_Tensor], most: int) -> list[_File]:
    """Files of at most `most` bytes of tensors each, or of one tensor that is larger, in order."""
    shards: list[list[_Tensor]] = [[]]
    size = 0
    for each in tensors:
        if shards[-1] and size + each.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    if len(shards) == 1:
        return [_File("model.safetensors", shards[0])]
    return [_File(f"model-{number:05}-of-{len(shards):05}.safetensors", each) for number, each in enumerate(shards, 1)]


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", size) if isinstance(size, str) else None
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise CheckpointError(f'max_shard_size={size!r} is no size: say a number of bytes, or one such as "5GB" or "4GiB"')
    return int(float(match[1]) * _UNITS[match[2]])


def _is_ours(each: Path, path: Path, names: set[str]) -> bool:
    """Whether a file that is there stands in the way of what is to be written."""
    if path.suffix == ".safetensors":
        return each.name == path.name
    return each.name in names or each.suffix in (".safetensors", ".distcp") or each.name in (".metadata", "pytorch_model.bin")


def _index(layout: Sequence[_File]) -> dict[str, Any]:
    total = sum(each.nbytes for file in layout for each in file.tensors)
    where = {each.name: file.name for file in layout for each in file.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}


# -- writing it ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Writer:
    """Where one tensor goes."""

    files: NewFiles
    descriptor: int
    place: int
    tensor: _Tensor

    def write(self, value: torch.Tensor) -> None:
        if tuple(value.shape) != self.tensor.shape or value.dtype != self.tensor.dtype:
            raise CheckpointError(
                f"{self.tensor.name} is {value.dtype}{list(value.shape)} now, and was laid out as {self.tensor}"
            )
        memory, done = bytes_of(value.detach().cpu().resolve_conj().resolve_neg().contiguous()), 0
        with self.files.writing(self.tensor.name):
            while done < len(memory):
                done += os.pwrite(self.descriptor, memory[done : done + 2**30], self.place + done)


def _all_opened(files: NewFiles, layout: Iterable[_File], until: ExitStack) -> dict[str, _Writer]:
    return {name: writer for file in layout for name, writer in _opened(files, file, until).items()}


def _opened(files: NewFiles, file: _File, until: ExitStack) -> dict[str, _Writer]:
    """Make a file with its header, all of its room taken: a full disk shows at once."""
    head, places = file.header()
    size = len(head) + sum(each.nbytes for each in file.tensors)
    until.enter_context(files.writing())  # of the callbacks, which come before its end
    with files.writing(file.name):
        descriptor = os.open(files.temporary / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        until.callback(os.close, descriptor)
        until.callback(os.fsync, descriptor)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        os.pwrite(descriptor, head, 0)
    return {each.name: _Writer(files, descriptor, places[each.name], each) for each in file.tensors}


def _write(
    build: Build,
    decisions: Decisions,
    writers: Mapping[str, _Writer],
    options: Options,
) -> None:
    root = nn.Module()
    with generators_kept():
        root._modules.update(roots_of(meta_module(build, decisions)))
        hand = _Hand(writers)
        fill_module(root, Ranks(), options, hand)
    left = next((name for name in writers if name not in hand.written), None)
    if left is not None:
        raise MaterializeError(f"{left} was not written; this is a bug in groundplan, please report it")


class _Hand(Whereto):
    """Writes every tensor of the state as soon as it is finished, and keeps none."""

    def __init__(self, writers: Mapping[str, _Writer]) -> None:
        self._writers = writers
        self.written: set[str] = set()

    def device(self, target: Target) -> torch.device:
        """As `Whereto`: the meta device for what is written."""
        return torch.device("meta" if target.node.name in self._writers else "cpu")

    def leave(self, target: Target, value: torch.Tensor) -> None:
        """As `Whereto`."""
        self._writers[target.node.name].write(value)
        self.written.add(target.node.name)


# -- torch.distributed.checkpoint ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """A state dict whose values are made when they are asked for: meta tensors, and what gives the values. A module's is real."""

    tensors: dict[str, torch.Tensor]
    value: Callable[[str], torch.Tensor] | None

    @classmethod
    def of(cls, build: Build, decisions: Decisions, source: Any, options: Options) -> _State:
        if isinstance(source, nn.Module):
            return cls(_members(source), None)
        graph = traced_with_casts(build, decisions)[0].graph if decisions.casts else build.graph
        nodes = _state_of(graph)
        if options.rng == "keyed" and source is None:
            source = drawn_seed()

        def value(name: str) -> torch.Tensor:
            return materialize_state(build, decisions, [name], source, options.uninitialized, options.threads, options.rng)[
                name
            ].detach()

        return cls({node.name: torch.empty(node.shape, dtype=node.dtype, device="meta") for node in nodes}, value)


def _save_dcp(state: _State, path: Path) -> None:
    """By torch's own writer; a module that ranks divide is written by all of them, and each makes this call."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    together = state.value is None and _are_divided(state.tensors)
    with _new_files(path, _is_checkpoint, ".metadata", together) as files, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = None if state.value is None else _lazy_planner(state.value)
        # torch's writer holds all that it puts in one file until that is finished, so every tensor gets one
        writer = FileSystemWriter(files.temporary, single_file_per_rank=planner is None)
        with files.writing():
            try:
                save(dict(state.tensors), storage_writer=writer, planner=planner, no_dist=not together)
            except CheckpointException as failure:  # no `Exception`, and around what happened
                raise _cause(next(iter(failure.failures.values()))[0], path) from failure


def _cause(error: BaseException, path: Path) -> BaseException:
    """What one rank's part of torch's writer failed of; on a full disk torch complains of its own file's position."""
    if not isinstance(error, RuntimeError):
        return error
    left = human_bytes(shutil.disk_usage(path).free)
    return CheckpointError(f"torch cannot write to {path}, where {left} are left: {error}; name another path")


def _lazy_planner(value: Callable[[str], torch.Tensor]) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class Lazy(DefaultSavePlanner):
        """Makes each tensor when the writer asks for it."""

        def lookup_object(self, index: Any) -> Any:
            return value(index.fqn)

    return Lazy()


def _gathered(held: Mapping[str, torch.Tensor], opened: Callable[[], Mapping[str, _Writer]]) -> None:
    """Every rank gives its part of every tensor, to the end; the first one writes them."""
    from .gathered import whole

    error: CheckpointError | None = None
    writers: Mapping[str, _Writer] = {}
    try:
        writers = opened()
    except CheckpointError as raised:
        error = raised
    for name, tensor in held.items():
        value = whole(tensor)
        try:
            if name in writers and error is None:
                writers[name].write(value)
        except CheckpointError as raised:  # the others wait for this rank's parts of the rest
            error = raised
    if error is not None:
        raise error


def _is_checkpoint(each: Path) -> bool:
    return each.suffix in (".distcp", ".safetensors") or each.name == ".metadata"
