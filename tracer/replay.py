"""Replay: the values of some storages, from the slice of the tape that they depend on and nothing else.

The random ops of the slice draw from torch's default generator, placed where the tape says: each op follows another one, or the
state the constructor started from. The ops in between are passed over by arithmetic where their draws are certain, and run
otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from .ambient import default_dtype_kept
from .draws import draw_of
from .errors import TraceError
from .graph import StreamPosition, View
from .liveness import slice_indices
from .places import Place
from .schema import aten
from .streams import default_generator, generators_kept

Spot = Place | torch.Tensor
"""Where a generator stands: a place in the CPU's stream; on CUDA its state, which is only a seed and an offset."""


class Filler:
    """How a replay draws: what a faster one may take over from running every call whole, where its turn comes."""

    def check(self) -> None:
        """Called before each op; an error that it raises ends the replay."""

    def passed(self, op: Any, start: Place) -> Place | None:
        """Where the CPU's stream stands after `op`, without its values; None where that takes running it."""
        draw = draw_of(op)
        return None if draw is None else start.after(draw)

    def passed_on_cuda(self, op: Any, start: torch.Tensor) -> torch.Tensor | None:
        """The same for the state of a CUDA generator."""
        return None

    def filled(self, op: Any, open_view: Callable[[View], torch.Tensor], start: Place) -> Place | None:
        """Draw what `op` fills; None where it is to be called as it is."""
        return None


class Replay:
    """Runs slices of a tape for real; `storages` holds what has been built, by the storage's index.

    `states` are the generators' states that the constructor started from, by device. With `zeros`, memory starts out as 0.
    """

    def __init__(
        self,
        ops: Sequence[Any],
        records: Sequence[Any],
        states: Mapping[str, torch.Tensor],
        zeros: bool = False,
        filler: Filler | None = None,
    ) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.ambient = False
        self._ops = ops
        self._records = records
        self._states = states
        self._zeros = zeros
        self._filler = filler or Filler()
        self._ends: dict[int, Spot | Callable[[], Spot]] = {}  # what takes time is worked out where another op starts from it
        self._different: dict[int, str] = {}

    def run(self, wanted: Iterable[int], ends: Iterable[StreamPosition] = ()) -> dict[str, torch.Tensor]:
        """Build the storages `wanted`; returns the states of generators that stand at `ends`, by their devices."""
        wanted = list(wanted)
        states = self._run(wanted, list(ends))
        for index in wanted:
            self._storage(index)
        return states

    def follow(self, earlier: Replay) -> None:
        """Take over where each draw ends, as an earlier replay of the same tape from the same states has found out."""
        self._ends.update(earlier._ends)

    def ends(self) -> dict[int, Spot]:
        """Where the draws that it has come by end, as far as that is known."""
        return {index: end for index, end in self._ends.items() if not callable(end)}

    def start_from(self, ends: Mapping[int, Spot]) -> None:
        """Take over the `ends` of earlier replays of the same tape from the same states."""
        self._ends.update(ends)

    def _run(self, wanted: Sequence[int], ends: Sequence[StreamPosition]) -> dict[str, torch.Tensor]:
        needed, chain = self._to_run(wanted, [end.op for end in ends if end.op is not None])
        self.ambient = any(self._ops[index].position.origin == "ambient" for index in chain)
        with generators_kept(), torch.no_grad(), default_dtype_kept():
            self._run_all(needed, chain, set(wanted))
            states = {end.device: self._start(end) for end in ends}
        return {device: spot.state() if isinstance(spot, Place) else spot for device, spot in states.items()}

    def open(self, view: View) -> torch.Tensor:
        """The real tensor that `view` stands for."""
        return view.over(self._storage(view.storage))

    # -- what to run ----------------------------------------------------------------------------------------------------

    @cached_property
    def _nbytes(self) -> Mapping[int, int]:
        return _Sizes(self._records)

    @cached_property
    def _writers(self) -> Mapping[int, Any]:
        if self._records and hasattr(self._records[0], "writers"):
            return _Writers(self._records)
        writers: dict[int, list[int]] = {}
        for op in self._ops:
            for view in op.targets:
                writers.setdefault(view.storage, []).append(op.index)
        return writers

    def _to_run(self, wanted: Sequence[int], last: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """The ops to run, and the random ones to pass over, up to the ops `last`.

        Where one of these reads something, its draws may depend on that.
        """
        needed = slice_indices(self._ops, self._nbytes, self._writers, wanted)
        while True:
            chain = self._chain([*needed, *last])
            also = [index for index in chain if self._ops[index].reads and draw_of(self._ops[index]) is None]
            if set(also) <= set(needed):
                return needed, chain
            needed = slice_indices(self._ops, self._nbytes, self._writers, wanted, [*needed, *also])

    def _chain(self, needed: Iterable[int]) -> list[int]:
        """The random ops among `needed`, and those that their places in the stream follow from, back to one that is known."""
        found: set[int] = set()
        for start in needed:
            index: int | None = start
            while index is not None and index not in found and (position := self._ops[index].position) is not None:
                found.add(index)
                index = position.op if position.op not in self._ends else None
        return sorted(found)

    # -- running --------------------------------------------------------------------------------------------------------

    def _run_all(self, needed: Sequence[int], chain: Sequence[int], wanted: set[int]) -> None:
        needs, order = set(needed), self._ordered({*needed, *chain})
        last_use = self._last_uses([index for index in order if index in needs])
        for index in order:
            self._filler.check()
            op = self._ops[index]
            if op.position is None:
                self._call(op)
            elif index in needs:
                self._ends.setdefault(index, self._drawn(op, self._start(op.position)))
            elif index not in self._ends:
                self._ends[index] = self._passed_over(op, self._start(op.position))
            for storage in last_use.get(index, ()):
                self._finished(storage, storage in wanted)

    def _ordered(self, indices: Iterable[int]) -> list[int]:
        """The order of the tape, except that a tensor is converted as soon as it is finished: what it was made of can go then."""
        order: list[tuple[int, int]] = []
        finished: dict[int, int] = {}
        for index in sorted(indices):
            op = self._ops[index]
            converts = op.func is aten._to_copy.default and op.position is None
            turn = max((finished.get(view.storage, -1) for view in op.reads), default=index) if converts else index
            finished.update((view.storage, turn) for view in op.targets)
            order.append((turn, index))
        return [index for _, index in sorted(order)]

    def _finished(self, storage: int, is_wanted: bool) -> None:
        """Nothing will read or write a storage any more: it can go, unless it is wanted itself."""
        if not is_wanted:
            self.storages.pop(storage, None)

    def _last_uses(self, needed: Sequence[int]) -> Mapping[int, list[int]]:
        """After which op each storage is of no more use."""
        last: dict[int, int] = {}
        for index in needed:
            for view in (*self._ops[index].reads, *self._ops[index].targets):
                last[view.storage] = index
        uses: dict[int, list[int]] = {}
        for storage, index in last.items():
            uses.setdefault(index, []).append(storage)
        return uses

    def _start(self, position: StreamPosition) -> Spot:
        """Where in its stream an op starts."""
        if position.device not in self._states and torch.device(position.device).type != "cpu":
            raise TraceError(f"the values depend on the random stream of {position.device}, which this machine does not have")
        if position.op is not None:
            end = self._ends[position.op]
            if callable(end):
                end = self._ends[position.op] = end()
            return end
        state = self._states.get(position.device)
        if position.state is not None:
            state = torch.frombuffer(bytearray(position.state), dtype=torch.uint8)
        elif position.origin == "explicit":
            state = torch.Generator(torch.device(position.device)).manual_seed(position.seed or 0).get_state()
        assert state is not None
        return Place.known(state) if position.device == "cpu" else state

    def _drawn(self, op: Any, start: Spot) -> Spot | Callable[[], Spot]:
        """Run an op that draws; where its generator stands afterwards."""
        end = self._filler.filled(op, self.open, start) if isinstance(start, Place) else None
        if end is not None:
            return end
        generator = default_generator(op.position.device)
        generator.set_state(start.state() if isinstance(start, Place) else start)
        self._call(op)
        if not isinstance(start, Place):
            return generator.get_state()
        draw = draw_of(op)
        if draw is None:
            return Place.at(generator.get_state())
        end = start.after(draw)
        end.reached(generator)
        return end

    def _passed_over(self, op: Any, start: Spot) -> Spot | Callable[[], Spot]:
        """Where the generator stands after an op whose values nobody wants."""
        filler = self._filler
        known: Spot | None = filler.passed(op, start) if isinstance(start, Place) else filler.passed_on_cuda(op, start)
        if known is not None:
            return known
        kept = {target.storage: self.storages.pop(target.storage, None) for target in op.targets}
        end = self._drawn(op, start)
        for index, storage in kept.items():
            self.storages.pop(index, None)
            if storage is not None:
                self.storages[index] = storage
        return end

    def _call(self, op: Any) -> None:
        torch.set_default_dtype(op.default_dtype)
        args = [_opened(value, self.open) for value in op.args]
        kwargs = {name: _opened(value, self.open) for name, value in op.kwargs}
        if kwargs.get("device") is not None:
            kwargs["device"] = _present(kwargs["device"])
        out = op.func(*args, **kwargs)
        results = [out] if not isinstance(out, list | tuple) else list(_flat(out))
        results = _arrived(op.func, results)
        for view, result in zip(op.outputs, results, strict=False):
            if view is not None:
                self._keep(op, view, result)

    def _keep(self, op: Any, view: View, result: torch.Tensor) -> None:
        if tuple(result.shape) != view.size or result.dtype != view.dtype:  # a kernel may leave out what nobody will look at
            self._different[view.storage] = (
                f"{op.func} gave a tensor of shape {tuple(result.shape)} and {result.dtype} where the trace had recorded "
                f"{view.size} and {view.dtype}"
            )
            return
        nbytes = self._nbytes[view.storage]
        if result.stride() != view.stride or result.storage_offset() != view.offset or result.untyped_storage().nbytes() < nbytes:
            fresh = torch.UntypedStorage(nbytes, device=result.device)
            self.storages[view.storage] = fresh
            self.open(view._replace(conj=False, neg=False)).copy_(result)
        else:
            self.storages[view.storage] = result.untyped_storage()

    def _storage(self, index: int) -> torch.UntypedStorage:
        storage = self.storages.get(index)
        if storage is None and index in self._different:
            raise TraceError(self._different[index])
        if storage is None:
            storage = self.storages[index] = self._fresh(index)
        nbytes = self._nbytes[index]
        if storage.nbytes() < nbytes:
            storage.resize_(nbytes)
        return storage

    def _fresh(self, index: int) -> torch.UntypedStorage:
        record = self._records[index]
        if record.constant is None:
            make = torch.zeros if self._zeros else torch.empty
            return make(record.nbytes, dtype=torch.uint8, device=_present(record.device)).untyped_storage()
        if record.constant.value is None:
            raise TraceError(
                f"the contents of a constant of shape {record.constant.size} and {record.constant.dtype} are gone; trace again"
            )
        source: torch.UntypedStorage = record.constant.value.untyped_storage()
        return source.clone() if self._writers.get(index) else source


def _arrived(func: Any, results: list[Any]) -> list[Any]:
    """What a call returned; a collective returns at once, and what it brings is still on its way."""
    space = getattr(func, "namespace", "")
    if space == "_c10d_functional":
        return [torch.ops._c10d_functional.wait_tensor(each) for each in results]
    for each in results if space == "c10d" else ():
        if isinstance(each, torch.ScriptObject):
            torch.distributed.Work.unbox(each).wait()
    return results


class _Sizes(Mapping[int, int]):
    """The bytes of each storage, asked of its record when needed: they may change while a constructor runs."""

    def __init__(self, records: Sequence[Any]) -> None:
        self._records = records

    def __getitem__(self, index: int) -> int:
        nbytes: int = self._records[index].nbytes
        return nbytes

    def __iter__(self) -> Any:
        return iter(range(len(self._records)))

    def __len__(self) -> int:
        return len(self._records)


class _Writers(_Sizes):
    """The writers of each storage, as its record keeps them."""

    def __getitem__(self, index: int) -> Any:
        return self._records[index].writers


def _present(device: str | torch.device) -> torch.device:
    """The device, or the CPU in place of CUDA where there is none: looks at values while tracing are then answered from there."""
    found = torch.device(device)
    return torch.device("cpu") if found.type == "cuda" and not torch.cuda.is_available() else found


def _opened(value: Any, open_view: Any) -> Any:
    if isinstance(value, View):
        return open_view(value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size):
        return [_opened(each, open_view) for each in value]
    return value


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
