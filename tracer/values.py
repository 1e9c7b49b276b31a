"""Real values while a constructor is traced: the recipe of just the tensor that was asked for is replayed.

Where Python holds on to the memory it was shown (a numpy array), changes on either side are carried over to the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .graph import Frame, View
from .ledger import Ledger, Record, bytes_of, digest_of, host_read, host_write
from .replay import Replay
from .sites import here
from .traced import Traced

_CACHED_BYTES = 2**20


@dataclass(slots=True)
class _Watched:
    """Real memory that Python code holds and that stands for a storage: it may change without a call."""

    record: Record
    memory: torch.Tensor
    digest: str


class Values:
    """Answers for the values of traced tensors; `states` are the generators' states that the constructor started from."""

    def __init__(self, ledger: Ledger, states: dict[str, torch.Tensor]) -> None:
        self.seed_dependent: dict[Frame, None] = {}
        self._ledger = ledger
        self._states = states
        self._watched: list[_Watched] = []
        self._borrowed: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._versions: list[tuple[torch.Tensor, int]] = []
        self._cache: dict[int, tuple[int, torch.UntypedStorage]] = {}

    @property
    def watches(self) -> bool:
        """Whether Python holds memory that stands for a storage."""
        return bool(self._watched)

    @contextmanager
    def real(self, views: Iterable[View]) -> Iterator[Replay]:
        """The storages behind `views`, replayed; meanwhile nothing is recorded."""
        wanted = list(dict.fromkeys(view.storage for view in views))
        with _disable_current_modes():
            replay = Replay(self._ledger.entries, self._ledger.records, self._states)
            known = self._known(wanted)
            replay.run([index for index in wanted if index not in known])
            replay.storages.update(known)
            if not replay.ambient:
                self._remember(wanted, replay)
            elif (frame := here()) is not None:
                self.seed_dependent[frame] = None
            yield replay

    def _known(self, wanted: Iterable[int]) -> dict[int, torch.UntypedStorage]:
        """What has been replayed before and not been written since."""
        hits = ((index, self._cache.get(index)) for index in wanted)
        return {index: hit[1] for index, hit in hits if hit and hit[0] == len(self._ledger.records[index].writers)}

    def _remember(self, wanted: Iterable[int], replay: Replay) -> None:
        for index in wanted:
            record = self._ledger.records[index]
            if record.nbytes <= _CACHED_BYTES:
                self._cache[index] = (len(record.writers), replay.storages[index])

    def read(self, tensor: Traced, shared: bool) -> torch.Tensor:
        """The real value of a traced tensor; `shared` when the caller may hold on to its memory.

        The real run reads that memory without a call that torch could see, so its storage is exposed: never dead, never waiting.
        """
        view = self._ledger.view(tensor)
        self._ledger.write_down(host_read, (view,), reads=(view,), sensed=True)
        record = self._ledger.records[view.storage]
        record.exposed = True
        with self.real([view]) as real:
            if not shared:
                return real.open(view).clone()
            real.storages[view.storage] = self._shown(record, real).untyped_storage()
            return real.open(view)

    def _shown(self, record: Record, real: Replay) -> torch.Tensor:
        """The memory that Python is shown for a storage: the same one each time."""
        for watched in self._watched:
            if watched.record is record:
                return watched.memory
        memory = bytes_of(real.storages[record.index].clone())
        self.watch(record, memory)
        return memory

    # -- memory that Python holds ---------------------------------------------------------------------------------------

    def watch(self, record: Record, memory: torch.Tensor) -> None:
        """From now on `memory` shows a storage's contents to Python code, which may change them."""
        record.exposed = True
        self._watched.append(_Watched(record, memory, digest_of(memory)))

    def borrow(self, tensor: torch.Tensor) -> None:
        """A real tensor from outside is about to be written: let its memory show it, until `give_back`.

        A large one is not written for real; only Python code that looks behind torch could tell.
        """
        storage = tensor.untyped_storage()
        record = self._ledger.outside(storage, tensor)
        if not tensor.is_inference():
            self._versions.append((tensor, tensor._version))
        if record.nbytes <= _CACHED_BYTES and record.device.type == "cpu":
            self.lend(record, bytes_of(storage))

    def lend(self, record: Record, memory: torch.Tensor) -> None:
        """Watch `memory`, and put it back into its present state in the end."""
        if all(watched.record is not record for watched in self._watched):
            with torch._C._DisableTorchDispatch():
                self._borrowed.append((memory, memory.clone()))
            self.watch(record, memory)

    def give_back(self) -> None:
        """Put everything from outside back into the state in which the trace found it."""
        for memory, content in self._borrowed:
            memory.copy_(content)
        for tensor, version in reversed(self._versions):
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
        self._watched.clear()
        self._borrowed.clear()

    def sync(self) -> None:
        """Write down what Python has changed in memory that it holds."""
        for watched in self._watched:
            with torch._C._DisableTorchDispatch():
                digest = digest_of(watched.memory)
                if digest == watched.digest:
                    continue
                watched.digest = digest
                source = self._ledger.adopt_constant(watched.memory.clone(), watched.memory, watched.memory.device)
            views = (watched.record.everything, source.everything)
            self._ledger.write_down(host_write, views, reads=views[1:], writes=views[:1], overwrites=True)

    def refresh(self, writes: Iterable[View]) -> None:
        """Show the effect of an op in memory that Python holds."""
        for watched in self._watched:
            if any(view.storage == watched.record.index for view in writes):
                with self.real([watched.record.everything]) as real:
                    watched.memory.copy_(bytes_of(real.storages[watched.record.index]))
                    watched.digest = digest_of(watched.memory)
