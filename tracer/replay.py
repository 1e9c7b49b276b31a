"""Replay: the values of some storages, from the slice of the tape that they depend on and nothing else.

The random ops of the slice draw from torch's default generator, placed where the tape says: each op follows another one (or the
state the constructor started from), so the ops in between are drawn as well, or skipped where their draws can be counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from .ambient import default_dtype_kept
from .draws import skip, words
from .errors import TraceError
from .graph import StreamPosition, View
from .liveness import slice_indices
from .streams import default_generator, generators_kept


class Replay:
    """Runs slices of a tape for real; `storages` holds what has been built, by the storage's index.

    `states` are the generators' states that the constructor started from, by device. With `zeros`, memory starts out as 0.
    """

    def __init__(
        self, ops: Sequence[Any], records: Sequence[Any], states: Mapping[str, torch.Tensor], zeros: bool = False
    ) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.ambient = False
        self._ops = ops
        self._records = records
        self._states = states
        self._zeros = zeros
        self._ends: dict[int, torch.Tensor] = {}
        self._different: dict[int, str] = {}

    def run(self, wanted: Iterable[int]) -> None:
        """Build the storages `wanted`."""
        wanted = list(wanted)
        needed, chain = self._to_run(wanted)
        self.ambient = any(self._ops[index].position.origin == "ambient" for index in chain)
        with generators_kept(), torch.no_grad(), default_dtype_kept():
            self._run_all(needed, chain, set(wanted))
        for index in wanted:
            self._storage(index)

    def open(self, view: View) -> torch.Tensor:
        """The real tensor that `view` stands for."""
        storage = self._storage(view.storage)
        tensor = torch.empty(0, dtype=view.dtype, device=storage.device)
        tensor.set_(storage, view.offset, view.size, view.stride)
        if view.conj:
            tensor = tensor.conj()
        return tensor._neg_view() if view.neg else tensor

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

    def _to_run(self, wanted: Sequence[int]) -> tuple[list[int], list[int]]:
        """The ops to run, and the random ones to pass over: where one of these reads something, its draws may depend on that."""
        needed = slice_indices(self._ops, self._nbytes, self._writers, wanted)
        while True:
            chain = self._chain(needed)
            also = [index for index in chain if self._ops[index].reads]
            if set(also) <= set(needed):
                return needed, chain
            needed = slice_indices(self._ops, self._nbytes, self._writers, wanted, [*needed, *also])

    def _chain(self, needed: Iterable[int]) -> list[int]:
        """The random ops among `needed`, and all those that their places in the stream follow from."""
        found: set[int] = set()
        for start in needed:
            index: int | None = start
            while index is not None and index not in found and (position := self._ops[index].position) is not None:
                found.add(index)
                index = position.op
        return sorted(found)

    # -- running --------------------------------------------------------------------------------------------------------

    def _run_all(self, needed: Sequence[int], chain: Sequence[int], wanted: set[int]) -> None:
        needs, last_use = set(needed), self._last_uses(needed)
        branches = self._branch_points(chain)
        for index in sorted({*needed, *chain}):
            op = self._ops[index]
            if op.position is not None:
                self._place(op.position)
            if index in needs:
                self._call(op)
            else:
                self._pass_over(op)
            if index in branches:
                self._ends[index] = default_generator(op.position.device).get_state()
            for storage in last_use.get(index, ()):
                if storage not in wanted:
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

    def _branch_points(self, chain: Sequence[int]) -> set[int]:
        """The random ops that are not simply followed by the next one of the chain: their end states are kept."""
        followed = {later for earlier, later in pairwise(chain) if self._ops[later].position.op == earlier}
        return {op for later in chain if later not in followed and (op := self._ops[later].position.op) is not None}

    def _place(self, position: StreamPosition) -> None:
        if position.device not in self._states and torch.device(position.device).type != "cpu":
            raise TraceError(f"the values depend on the random stream of {position.device}, which this machine does not have")
        generator = default_generator(position.device)
        if position.origin == "ambient":
            generator.set_state(self._states[position.device])
        elif position.origin == "explicit":
            if position.state is None:
                generator.manual_seed(position.seed or 0)
            else:
                generator.set_state(torch.frombuffer(bytearray(position.state), dtype=torch.uint8))
        elif (end := self._ends.get(position.op or 0)) is not None:
            generator.set_state(end)

    def _call(self, op: Any) -> None:
        torch.set_default_dtype(op.default_dtype)
        args = [_opened(value, self.open) for value in op.args]
        kwargs = {name: _opened(value, self.open) for name, value in op.kwargs}
        if kwargs.get("device") is not None:
            kwargs["device"] = _present(kwargs["device"])
        out = op.func(*args, **kwargs)
        results = [out] if not isinstance(out, list | tuple) else list(_flat(out))
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

    def _pass_over(self, op: Any) -> None:
        """Let the generator pass over an op whose values nobody wants."""
        view = op.targets[0]
        generator = default_generator(op.position.device)
        count = None
        if generator.device.type == "cpu":
            count = words(op.func, view.dtype, view.numel, view.is_contiguous)
        if count is not None:
            skip(count, generator)
            return
        kept = {target.storage: self.storages.pop(target.storage, None) for target in op.targets}
        self._call(op)
        for index, storage in kept.items():
            self.storages.pop(index, None)
            if storage is not None:
                self.storages[index] = storage

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
