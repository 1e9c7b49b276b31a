"""The construct phase in closed form: what is resident while the constructor's module goes through the plan's steps.

The steps are taken on sizes alone, in the order of `nn.Module._apply`, and every allocation and release is written down.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from ..tracer.draws import draw_of, is_counted_fill
from ..tracer.graph import Op, ParamGraph, Storage, TensorNode, View
from .changes import HOST, Change
from .decisions import Cast, Move, castable

WAITING_BYTES = 2**20
"""A storage of at least this many bytes that a step converts stays empty until the conversion reads it."""


def memory_device(device: str) -> str:
    return "cuda:0" if device == "cuda" else device


@dataclass(slots=True, eq=False)
class _Block:
    """Memory that one or more places of the module refer to. `kept` is set where something outside the module does as well."""

    device: str
    label: str
    nbytes: int
    places: int = 0
    kept: bool = False
    may_wait: bool = False
    waiting: bool = False
    drawn: View | None = None  # what its last fill writes, where that can be converted while it is drawn


@dataclass(slots=True, eq=False)
class _Place:
    """An entry of a module's `_parameters` or `_buffers`, or a plain attribute: it refers to a block, as elements of a dtype."""

    tensor: TensorNode
    block: _Block
    dtype: torch.dtype

    def after(self, step: Cast | Move) -> tuple[str, torch.dtype]:
        """The device and dtype that `step` asks for."""
        if isinstance(step, Move):
            return (self.block.device if self.tensor.kind == "attribute" else memory_device(step.device)), self.dtype
        wanted = step.dtype_for(self.tensor.names) if castable(self.tensor) else None
        return self.block.device, wanted or self.dtype


class Walk:
    """Takes the steps on sizes alone, in the order of `nn.Module._apply`, and writes down every allocation and release.

    `_apply` visits children first, then a module's own parameters, then its buffers. A parameter is one object under all of its
    names (`param.data = converted`); a buffer is replaced in every module that holds it, so each holder gets a copy of its own.
    """

    def __init__(self, graph: ParamGraph) -> None:
        self.changes: list[Change] = []
        self._blocks = _blocks(graph)
        self._places = _places(graph, self._blocks)
        self._graph = graph
        self._devices = {storage.index: storage.device for storage in graph.storages}
        self._started = False

    def take(self, step: Cast | Move) -> None:
        """`module.to(dtype)` or `module.to(device)`: the places that it converts, one at a time."""
        converted = [(place, *place.after(step)) for place in self._places]
        converted = [each for each in converted if each[1:] != (each[0].block.device, each[0].dtype)]
        self._start([place.block for place, _, _ in converted])
        for place, device, dtype in converted:
            self._convert(place, device, dtype)

    def finish(self) -> None:
        """The end of the build: what still waits, and is referred to, is allocated and filled."""
        self._start([])
        for block in self._blocks.values():
            if block.waiting and (block.places or block.kept):
                block.waiting = False
                self._allocate(block)

    def resident(self) -> list[Change]:
        """What is there when every step is taken: one change per block."""
        blocks = {id(place.block): place.block for place in self._places}
        blocks.update((id(block), block) for block in self._blocks.values() if block.kept)
        return [Change(block.device, block.label, block.nbytes) for block in blocks.values()]

    def _start(self, converted: Iterable[_Block]) -> None:
        """The constructor's own work: all that need not wait for the first step is allocated and filled before it."""
        if self._started:
            return
        self._started = True
        for block in converted:
            block.waiting = block.may_wait
        here = {index for index, block in self._blocks.items() if not block.waiting}
        for index, nbytes in _constructed(self._graph, here):
            if index in self._blocks:
                self._allocate(self._blocks[index])
            else:
                self.changes.append(Change(memory_device(self._devices[index]), _dropped_label(index), nbytes))

    def _convert(self, place: _Place, device: str, dtype: torch.dtype) -> None:
        source = place.block
        drawn = source.waiting and source.device == device and source.drawn == place.tensor.view  # converted as it is drawn
        if source.waiting and not drawn:
            source.waiting = False
            self._allocate(source)
        place.block = _Block(device, source.label, place.tensor.numel * dtype.itemsize, places=1)
        place.dtype = dtype
        self._allocate(place.block)
        source.places -= 1
        if not source.places and not source.kept and not source.waiting:
            self.changes.append(Change(source.device, source.label, -source.nbytes))

    def _allocate(self, block: _Block) -> None:
        self.changes.append(Change(block.device, block.label, block.nbytes))


def _blocks(graph: ParamGraph) -> dict[int, _Block]:
    """A block for every storage that takes up memory, by the storage's index; a meta storage takes up none."""
    labels = {tensor.view.storage: tensor.name for tensor in reversed(graph.tensors)}
    looked_at, last = _looked_at(graph), {op.writes[0].storage: op for op in graph.ops if not op.unread and is_counted_fill(op)}
    return {
        storage.index: _Block(
            device=memory_device(storage.device),
            label=labels.get(storage.index, f"storage {storage.index}, which has no name"),
            nbytes=storage.nbytes,
            kept=storage.held,
            may_wait=_may_wait(storage) and storage.index not in looked_at,
            drawn=_converted(last.get(storage.index), storage),
        )
        for storage in graph.held_storages
        if storage.device != "meta"
    }


def _dropped_label(index: int) -> str:
    return f"storage {index}, which the constructor drops"


def _constructed(graph: ParamGraph, here: set[int]) -> Iterator[tuple[int, int]]:
    """What the constructor allocates, and releases as a negative number, in its order, as (storage, bytes).

    `here` are the storages that stay and are not put off. One that is dropped counts where values depend on it, such as what
    `orthogonal_` decomposes: until the next value that stays is written, as a function's variables live until it returns.
    """
    storages = {storage.index: storage for storage in graph.storages}
    ends = _ends_of_dropped(graph, storages)
    waiting, living, gone = set(here), set[int](), _by_end(ends)
    for op in graph.ops if ends else ():
        for view in (*op.reads, *op.targets):
            if view.storage in waiting:
                waiting.remove(view.storage)
                yield view.storage, storages[view.storage].nbytes
            elif view.storage in ends and view.storage not in living:
                living.add(view.storage)
                yield view.storage, storages[view.storage].nbytes
        yield from ((index, -storages[index].nbytes) for index in gone.get(op.index, ()) if index in living)
    yield from ((index, storages[index].nbytes) for index in sorted(waiting))


def _by_end(ends: Mapping[int, int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, end in ends.items():
        found.setdefault(end, []).append(index)
    return found


def _ends_of_dropped(graph: ParamGraph, storages: Mapping[int, Storage]) -> dict[int, int]:
    """The op after which each dropped storage, that values depend on, is gone."""
    held = {storage.index for storage in graph.held_storages}
    last: dict[int, int] = {}
    for op in graph.ops:
        for view in (*op.reads, *op.targets) if op.live and not op.unread else ():
            if view.storage not in held and storages[view.storage].constant is None and storages[view.storage].device != "meta":
                last[view.storage] = op.index
    written = [op.index for op in graph.ops if any(view.storage in held for view in op.targets)]
    ends = {}
    for index, position in last.items():
        after = bisect_left(written, position)
        ends[index] = written[after] if after < len(written) else graph.ops[-1].index
    return ends


def _may_wait(storage: Storage) -> bool:
    return storage.nbytes >= WAITING_BYTES and storage.constant is None and not storage.exposed and storage.device == HOST


def _converted(last: Op | None, storage: Storage) -> View | None:
    """What the last fill of a storage writes, if it is all of it and can be converted while it is drawn."""
    if last is None or last.writes[0].nbytes != storage.nbytes or last.writes[0].dtype.is_complex:
        return None
    draw = draw_of(last) if last.random else None
    return last.writes[0] if not last.random or (draw is not None and not draw.normals) else None


def _looked_at(graph: ParamGraph) -> set[int]:
    """The storages that the constructor does more with than fill them: these are filled at once."""
    ops = (op for op in graph.ops if not op.unread and not is_counted_fill(op))
    return {view.storage for op in ops for view in (*op.reads, *op.targets)}


def _places(graph: ParamGraph, blocks: Mapping[int, _Block]) -> list[_Place]:
    """Every place, in the order in which `nn.Module._apply` comes to it."""
    modules = {name: module.name for module in graph.modules for name in module.names}
    order = _apply_order(graph, modules)
    found: list[tuple[int, bool, _Place]] = []
    for tensor in graph.tensors:
        block = blocks.get(tensor.view.storage)
        if block is not None:
            for owner in _owners(tensor, modules, order):
                block.places += 1
                found.append((order[owner], tensor.kind != "parameter", _Place(tensor, block, tensor.dtype)))
    return [place for _, _, place in sorted(found, key=lambda each: each[:2])]


def _owners(tensor: TensorNode, modules: Mapping[str, str], order: Mapping[str, int]) -> list[str]:
    """The module of each place that a step converts by itself: one for a parameter, every holder for a buffer."""
    entries = (name.rpartition(".") for name in tensor.names if not name.endswith("]"))
    held = {(modules.get(path, path), key) for path, _, key in entries}
    owners = sorted((owner for owner, _ in held), key=order.__getitem__)
    return owners if tensor.kind == "buffer" else owners[:1]


def _apply_order(graph: ParamGraph, modules: Mapping[str, str]) -> dict[str, int]:
    """The modules' places in `_apply`'s order, children first, under their first names."""
    paths = [module.name for module in graph.modules]
    paths += [modules.get(path, path) for tensor in graph.tensors for path in (name.rpartition(".")[0] for name in tensor.names)]
    children: dict[str, dict[str, None]] = {}  # dicts for the order of their keys
    for path in dict.fromkeys(paths):
        while path and path not in children.setdefault(parent := path.rpartition(".")[0], {}):
            children[parent][path] = None
            path = parent
    return {path: position for position, path in enumerate(_children_first("", children))}


def _children_first(path: str, children: Mapping[str, Iterable[str]]) -> Iterator[str]:
    for child in children.get(path, ()):
        yield from _children_first(child, children)
    yield path
