"""Writing a checkpoint: of a module, or straight from a plan, tensor by tensor, so that the whole model is never there.

safetensors files are laid out before anything is drawn, as every size is known; each tensor is written to its place as soon as it
is finished. For `torch.distributed.checkpoint`, torch's own writer asks for one tensor after the other.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import _TYPES
from torch import nn

from ..planner.check import check_decisions
from ..planner.decisions import Decisions
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
from .new_files import new_files, sync
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
_WAY_OUT = "name another path"
_ALIGNED = 8  # bytes, as the safetensors library pads its headers
Values = Iterator[tuple[str, torch.Tensor]]


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
    with _new_files(folder, lambda each: _is_ours(each, path, names), _INDEX, together) as temporary:
        with ExitStack() as open_files:
            mine = layout if not together or dist.get_rank() == 0 else ()
            if held is not None:
                _gathered(held, lambda: _all_opened(temporary, mine, open_files))
            elif not isinstance(source, nn.Module):
                _write(build, decisions, _all_opened(temporary, mine, open_files), replace(options, seed=source))
        if len(mine) > 1:
            (temporary / _INDEX).write_text(json.dumps(_index(layout), indent=2) + "\n")
        sync(temporary)


def _new_files(folder: Path, refuse: Callable[[Path], bool], last: str, together: bool) -> AbstractContextManager[Path]:
    if together:
        return _new_files_of_all(folder, refuse, last)
    return new_files(folder, refuse, _WAY_OUT, last, CheckpointError)


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


def state_nodes(graph: ParamGraph) -> list[TensorNode]:
    """What a state dict has, ties once."""
    nodes = [node for node in graph.tensors if node.kind == "parameter" or (node.kind == "buffer" and node.persistent)]
    return [node for node in nodes if graph.storages[node.view.storage].device != "meta"]


def _tensors(graph: ParamGraph, held: Mapping[str, torch.Tensor] | None) -> list[_Tensor]:
    if held is not None:
        found = [_Tensor(name, tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()]
    else:
        found = [_Tensor(node.name, node.shape, node.dtype) for node in state_nodes(graph)]
        strange = next((node for node in state_nodes(graph) if node.opaque), None)
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

    descriptor: int
    place: int
    tensor: _Tensor

    def write(self, value: torch.Tensor) -> None:
        if tuple(value.shape) != self.tensor.shape or value.dtype != self.tensor.dtype:
            raise CheckpointError(
                f"{self.tensor.name} is {value.dtype}{list(value.shape)} now, and was laid out as {self.tensor}"
            )
        memory, done = bytes_of(value.detach().cpu().resolve_conj().resolve_neg().contiguous()), 0
        while done < len(memory):
            done += os.pwrite(self.descriptor, memory[done : done + 2**30], self.place + done)


def _all_opened(folder: Path, files: Iterable[_File], until: ExitStack) -> dict[str, _Writer]:
    return {name: writer for file in files for name, writer in _opened(folder, file, until).items()}


def _opened(folder: Path, file: _File, until: ExitStack) -> dict[str, _Writer]:
    """Make a file with its header, all of its room taken: a full disk shows at once."""
    head, places = file.header()
    descriptor = os.open(folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    until.callback(os.close, descriptor)
    until.callback(os.fsync, descriptor)
    size = len(head) + sum(each.nbytes for each in file.tensors)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)
    os.pwrite(descriptor, head, 0)
    return {each.name: _Writer(descriptor, places[each.name], each) for each in file.tensors}


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


def _full(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of one that is divided between ranks, these give it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


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
        nodes = state_nodes(graph)
        if options.rng == "keyed" and source is None:
            source = drawn_seed()

        def value(name: str) -> torch.Tensor:
            return materialize_state(build, decisions, [name], source, options.uninitialized, options.threads, options.rng)[
                name
            ].detach()

        return cls({node.name: torch.empty(node.shape, dtype=node.dtype, device="meta") for node in nodes}, value)


def _save_dcp(state: _State, path: Path) -> None:
    """By torch's own writer; a module that ranks divide is written by all of them, and each makes this call."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    together = state.value is None and _are_divided(state.tensors)
    with _new_files(path, _is_checkpoint, ".metadata", together) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        planner = None if state.value is None else _lazy_planner(state.value)
        # torch's writer holds all that it puts in one file until that is finished, so every tensor gets one
        writer = FileSystemWriter(temporary, single_file_per_rank=planner is None)
        save(dict(state.tensors), storage_writer=writer, planner=planner, no_dist=not together)


def _lazy_planner(value: Callable[[str], torch.Tensor]) -> Any:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    class Lazy(DefaultSavePlanner):
        """Makes each tensor when the writer asks for it."""

        def lookup_object(self, index: Any) -> Any:
            return value(index.fqn)

    return Lazy()


@contextmanager
def _new_files_of_all(folder: Path, refuse: Callable[[Path], bool], last: str) -> Iterator[Path]:
    """As `new_files`, for ranks that write together: the first one makes the folder and moves the files; all raise, or none."""
    first, held = dist.get_rank() == 0, ExitStack()
    made = _same_on_all(
        lambda: str(held.enter_context(new_files(folder, refuse, _WAY_OUT, last, CheckpointError))) if first else ""
    )
    failures: list[Any] = [None] * dist.get_world_size()
    error: BaseException | None = None
    try:
        yield Path(made)
    except Exception as raised:  # the others have to hear of it, whatever it is
        error = raised
    dist.all_gather_object(failures, error and f"rank {dist.get_rank()}: {type(error).__name__}: {error}")
    failure = next((each for each in failures if each is not None), None)
    if failure is not None:
        held.__exit__(*((CheckpointError, CheckpointError(failure), None)))  # what is there is removed
        raise CheckpointError(f"nothing was written to {folder}; {failure}") from error
    _same_on_all(lambda: _closed(held))


def _closed(held: ExitStack) -> str:
    held.close()
    return ""


def _same_on_all(action: Callable[[], str]) -> str:
    """What the first rank's `action` gives; what it raises, all raise."""
    told: list[Any] = [None, None]
    try:
        told[0] = action()
    except CheckpointError as error:
        told[1] = str(error)
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise CheckpointError(told[1])
    return str(told[0])


def _gathered(held: Mapping[str, torch.Tensor], opened: Callable[[], Mapping[str, _Writer]]) -> None:
    """Every rank gives its part of every tensor, to the end; the first one writes them."""
    error: OSError | None = None
    writers: Mapping[str, _Writer] = {}
    try:
        writers = opened()
    except OSError as raised:
        error = raised
    for name, tensor in held.items():
        value = _full(tensor)
        try:
            if name in writers and error is None:
                writers[name].write(value)
        except OSError as raised:  # the others wait for this rank's parts of the rest
            error = raised
    if error is not None:
        raise error


def _is_checkpoint(each: Path) -> bool:
    return each.suffix in (".distcp", ".safetensors") or each.name == ".metadata"
