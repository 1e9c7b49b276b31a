"""`rng="keyed"`: numbers that depend on the seed, the tensor and the element alone, not on what is drawn before them.

What a tensor's op fills is cut into blocks of 2^18 elements, in the order of memory. Every block has a generator of its own,
whose state is a hash of the seed, the tensor's name, the number of the op among those that draw for the tensor, and the block's
number; torch's own kernel fills it. So any part can be made in any order, on any number of ranks and threads, with the same
values for a device type. They are not eager's. Ops that are not taken apart (a permutation, a multinomial sample) draw whole,
from such a generator as well.

On the CPU the whole state (624 words) comes from the hash: torch seeds mt19937 with 32 bits, so that of a million blocks some
would be the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..tracer.arguments import without_generator
from ..tracer.draws import is_trunc_normal
from ..tracer.elements import by_element
from ..tracer.graph import Op, ParamGraph
from ..tracer.liveness import slice_indices
from ..tracer.places import Place, state_from
from ..tracer.replay import Spot
from ..tracer.streams import default_generator
from .boxes import fill_box, fill_stretch
from .fill import Fill, as_fill, created
from .filler import alias_of
from .pages import prefer_huge_pages
from .parts import PartialReplay
from .pens import Pen
from .sources import Generator, Pending
from .truncated import Truncated
from .windows import memory_order
from .workers import Workers

BLOCK = 1 << 18
"""Elements of a block: small enough that a CUDA kernel gives each its own thread on every data-center GPU."""


@dataclass(frozen=True)
class Keys:
    """The seed, and what tells the ops of one graph apart: a tensor's name and a number, by the op's index."""

    seed: int
    by_op: Mapping[int, tuple[str, int]]

    @classmethod
    def of(cls, seed: int, graph: ParamGraph) -> Keys:
        """The keys of a graph: an op that several tensors depend on belongs to the first of them."""
        sizes = {storage.index: storage.nbytes for storage in graph.storages}
        writers = {storage: [op.index for op in ops] for storage, ops in graph.writers.items()}
        found: dict[int, tuple[str, int]] = {}
        for tensor in graph.tensors:
            recipe = slice_indices(graph.ops, sizes, writers, [tensor.view.storage])
            for number, index in enumerate(index for index in recipe if graph.ops[index].random):
                found.setdefault(index, (tensor.name, number))
        return cls(seed, found)

    def state(self, op: Op, block: int, device: torch.device) -> torch.Tensor:
        """The state of the generator of a block."""
        name, number = self.by_op.get(op.index, ("", op.index))
        key = hashlib.shake_256(repr((self.seed, name, number, block)).encode())
        if device.type == "cpu":
            return state_from(key.digest(4 * 624))
        return torch.Generator(device).manual_seed(int.from_bytes(key.digest(8), "little")).get_state()


@dataclass(frozen=True, slots=True)
class KeyedFill:
    """What one op fills: elements of `dtype`, `numel` in all, in the order of memory."""

    keys: Keys
    op: Op
    func: Callable[..., Any]
    args: tuple[Any, ...]
    dtype: torch.dtype
    numel: int
    quantum: ClassVar[int] = BLOCK

    @classmethod
    def of(cls, keys: Keys, op: Op) -> KeyedFill | None:
        """The fill that an op is; None for one that is not made element by element."""
        view = op.targets[0]
        if is_trunc_normal(op.func):
            return cls(keys, op, op.func, op.args[1:], view.dtype, view.numel)
        call = as_fill(op)
        return None if call is None else cls(keys, op, *call, view.dtype, view.numel)

    def pen(self, place: Place | None, first: int = 0) -> Pen:
        """A pen at element `first`; there is no stream whose place would matter."""
        pen = _KeyedPen(self)
        pen.skip(first)
        return pen

    def draw(self, block: int, out: torch.Tensor) -> None:
        """Write all elements of a block into the row `out`."""
        state = self.keys.state(self.op, block, out.device)
        if out.device.type != "cpu" or not self._draw_in_pieces(out, Place.at(state)):
            generator = torch.Generator(out.device)
            generator.set_state(state)
            self.func(out, *self.args, generator=generator)

    def _draw_in_pieces(self, out: torch.Tensor, start: Place) -> bool:
        """The same bits, sooner where compiled code draws; False, and nothing is done, where torch is to draw."""
        if is_trunc_normal(self.func):
            call = Truncated.of(self.args, self.dtype, len(out), True)
            return call is not None and call.write(0, out, start, Workers(1)) > 0
        fill = Fill.of(self.func, self.args, self.dtype, len(out), True)
        if fill is None:
            return False
        fill.pen(start).write(out)
        return True

    def fill(self, target: torch.Tensor, workers: Workers) -> None:
        """Write all elements into `target`, on whatever device."""
        order = memory_order(self.op.targets[0])
        ordered = alias_of(target).permute(order)
        row = ordered.reshape(-1)  # a copy where memory has gaps
        prefer_huge_pages(row.untyped_storage())
        if target.device.type == "cpu":
            fill_stretch(self, 0, row, None, workers)
        else:
            self.pen(None).run(row)
        if row.data_ptr() != target.data_ptr():
            ordered.copy_(row.view(ordered.shape))


class _KeyedPen(Pen):
    """Writes elements block by block; one that is wanted in part is kept for the next call."""

    def __init__(self, fill: KeyedFill) -> None:
        super().__init__(fill.dtype)
        self.fill = fill
        self._kept: tuple[int, torch.Tensor] | None = None

    def chunks(self, count: int, converted: bool) -> Any:
        """As a `Pen`: up to the end of each block."""
        at = self.at
        while count:
            step = min(count, BLOCK - at % BLOCK)
            yield step
            at, count = at + step, count - step

    def write(self, out: torch.Tensor) -> None:
        start = 0
        for count in list(self.chunks(len(out), False)):
            self._write(out[start : start + count])
            start += count

    def skip(self, count: int) -> None:
        self.at += count

    def _write(self, out: torch.Tensor) -> None:
        block, within = divmod(self.at, BLOCK)
        size = min(BLOCK, self.fill.numel - block * BLOCK)
        if len(out) == size:
            self.fill.draw(block, out)
        else:
            if self._kept is None or self._kept[0] != block:
                drawn = torch.empty(size, dtype=self.fill.dtype, device=out.device)
                self.fill.draw(block, drawn)
                self._kept = block, drawn
            out.copy_(self._kept[1][within : within + len(out)])
        self.at += len(out)


# -- a whole module -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _KeyedPending:
    fill_: KeyedFill
    workers: Workers

    def fill(self, target: torch.Tensor) -> None:
        self.fill_.fill(target, self.workers)

    def convert(self, like: torch.Tensor, out: torch.Tensor) -> bool:
        row = out.permute(memory_order(self.fill_.op.targets[0]))
        if not row.is_contiguous() or out.stride() != like.stride():
            return False
        prefer_huge_pages(out.untyped_storage())
        fill_stretch(self.fill_, 0, row.view(-1), None, self.workers)
        return True


class KeyedSource:
    """The source of a guided run under `rng="keyed"`."""

    def __init__(self, keys: Keys, workers: Workers) -> None:
        self._keys = keys
        self._workers = workers

    def fill(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> None:
        """As a `Source`."""
        self._fill_of(op).fill(target, self._workers)

    def put_off(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> Pending | None:
        """As a `Source`."""
        return _KeyedPending(self._fill_of(op), self._workers)

    def pass_over(self, op: Op, func: Any, target: torch.Tensor, args: tuple[Any, ...], generator: Generator) -> bool:
        """As a `Source`."""
        return True

    def truncate(self, op: Op, tensor: torch.Tensor, bounds: tuple[float, ...], generator: Generator) -> int | None:
        """As a `Source`."""
        self._fill_of(op).fill(tensor, self._workers)
        return 1

    def call(self, op: Op, args: Any, kwargs: dict[str, Any]) -> Any:
        """As a `Source`: a new tensor is filled block by block, anything else draws whole from a generator of its own."""
        call = created(op, args, kwargs)
        if call is not None:
            self._fill_of(op).fill(call[0], self._workers)
            return call[0]
        args, kwargs = without_generator(args, kwargs)
        return drawn_whole(self._keys, op, lambda: op.func(*args, **kwargs))

    def _fill_of(self, op: Op) -> KeyedFill:
        fill = KeyedFill.of(self._keys, op)
        assert fill is not None
        return fill


def drawn_seed() -> int:
    """A seed of 64 bits from torch's global generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None).item())


def drawn_whole(keys: Keys, op: Op, call: Callable[[], Any]) -> Any:
    """`call()`, with the default generator in the op's own state."""
    assert op.position is not None
    generator = default_generator(op.position.device)
    before = generator.get_state()
    generator.set_state(keys.state(op, 0, generator.device))
    try:
        return call()
    finally:
        generator.set_state(before)


# -- some tensors, or parts of them -------------------------------------------------------------------------------------


class KeyedReplay(PartialReplay):
    """A replay under `rng="keyed"`: nothing has to be passed over."""

    def __init__(self, keys: Keys, *args: Any) -> None:
        super().__init__(*args)
        self._keys = keys

    def _chain(self, needed: Any) -> list[int]:
        return []

    def _start(self, position: Any) -> Spot:
        return _NOWHERE

    def _is_by_element(self, op: Op) -> bool:
        return by_element(op, lambda drawing: KeyedFill.of(self._keys, drawing) is not None)

    def _drawn(self, op: Any, start: Spot) -> Spot:
        local, fill = self._local(op), KeyedFill.of(self._keys, op)
        if fill is None:
            drawn_whole(self._keys, op, lambda: self._call(op))
        elif local is None:
            fill.fill(self.open(op.targets[0]), self._threaded.workers)
        elif all(local):
            self._fill_box(op, local, lambda size, box, out: fill_box(fill, size, box, out, None, self._threaded.workers))
        return _NOWHERE


_NOWHERE = torch.empty(0, dtype=torch.uint8)
