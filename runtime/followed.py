"""What ops allocate and do, together with whose turn it is: which of a module's parts run forward or backward meanwhile."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..planner.allocations import START, Moment
from ..planner.profile import Mark
from ..planner.work import Exchange, Op
from .allocations import ACCUMULATE, Allocations
from .op_work import noted


@dataclass(frozen=True, slots=True)
class Visit:
    """From here on the backward is at work for the modules in `inside`, the innermost last."""

    inside: tuple[str, ...]


Item = Moment | Mark | Visit | Op | Exchange


class Followed(Allocations):
    """Writes down besides when modules begin and end their forward, and when the backward comes to each.

    The backward is where the autograd node that runs was made: nodes are numbered in the order of the forward.
    """

    def __init__(self, on_cpu: bool) -> None:
        super().__init__(on_cpu)
        self.early: set[str] = set()  # modules that are given a tensor that requires a gradient
        self._notes: list[tuple[int, Mark | Visit | Op | Exchange]] = []
        self._inside: tuple[str, ...] = ()
        self._back: tuple[str, ...] | None = None
        self._numbered: list[int] = [0]  # the first autograd node of each stay in a module, by its sequence number
        self._stays: list[tuple[str, ...]] = [()]

    def turns(self, module: nn.Module, names: Iterable[str]) -> list[Any]:
        """Watch the modules called `names`, and the whole; gives the hooks' handles."""
        handles: list[Any] = []
        for name in dict.fromkeys(["", *names]):
            each = module.get_submodule(name)
            handles.append(
                each.register_forward_pre_hook(lambda _, *given, name=name: self._enter(name, given), with_kwargs=True)
            )
            handles.append(each.register_forward_hook(lambda *_, name=name: self._leave(name), always_call=True))
        return handles

    def stream(self) -> list[Item]:
        """All moments after the start, with the turns between them, in order."""
        found: list[Item] = []
        notes = iter([*self._notes, (len(self._moments) + 1, Visit(()))])
        place, note = next(notes)
        for index, moment in enumerate(self._moments):
            while place <= index:
                found.append(note)
                place, note = next(notes)
            if moment.phase != START:
                found.append(moment)
        return found + [note for at, note in self._notes if at >= len(self._moments)]

    def _enter(self, name: str, given: Any) -> None:
        if torch._C._current_autograd_node() is None:  # else a checkpoint runs it again
            self._note(Mark("forward", name))
            self._stay((*self._inside, name))
            if any(isinstance(each, torch.Tensor) and each.requires_grad for each in tree_leaves(given)):
                self.early.add(name)

    def _leave(self, name: str) -> None:
        if torch._C._current_autograd_node() is None and name in self._inside:
            self._note(Mark("forward ends", name))
            self._stay(self._inside[: self._inside.index(name)])

    def _stay(self, inside: tuple[str, ...]) -> None:
        self._inside = inside
        self._numbered.append(torch._C._autograd._get_sequence_nr())
        self._stays.append(inside)

    def _note(self, note: Mark | Visit | Op | Exchange) -> None:
        self._notes.append((len(self._moments), note))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        if node is not None and (number := node._sequence_nr()) != ACCUMULATE:
            self._release_numbers(node)
            inside = self._stays[bisect.bisect_right(self._numbered, number) - 1]
            if inside != self._back:
                self._back = inside
                self._note(Visit(inside))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _ran_op(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Note what an op does. A forward that runs while the backward does is a checkpoint's second."""
        again = torch._C._current_autograd_node() is not None and torch.is_grad_enabled()
        found = noted(func, args, kwargs, out, self._on_cpu, again)
        if found is not None:
            self._note(found)


def with_turns(stream: Iterable[Item], watched: Iterable[str]) -> Iterator[Moment | Mark | Op | Exchange]:
    """The same with marks where the backward of each of the `watched` modules begins and ends, in place of the visits."""
    items, names = list(stream), set(watched)
    last = {name: place for place, item in enumerate(items) if isinstance(item, Visit) for name in item.inside if name in names}
    opened: list[str] = []
    closed: list[str] = []
    for place, item in enumerate(items):
        if not isinstance(item, Visit):
            yield item
            continue
        for name in [each for each in reversed(opened) if last[each] < place and each not in item.inside]:
            opened.remove(name)
            closed.append(name)
            yield Mark("backward ends", name)
        for name in item.inside:
            if name in names and name not in opened and name not in closed:
                opened.append(name)
                yield Mark("backward", name)
    yield from (Mark("backward ends", name) for name in reversed(opened))
