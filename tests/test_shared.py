"""Ranks find the lengths of `trunc_normal_` while they draw what they hold, one rank after the other in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import groundplan as gp
from groundplan.runtime.ranks import Ranks, Seen, covered
from groundplan.runtime.truncated import Truncated
from groundplan.tracer.draws import REDRAWS

pytestmark = pytest.mark.skipif(not REDRAWS, reason="trunc_normal_ takes one round before torch 2.12")
COUNT = 3
Said = dict[str, list[Seen | None]]


class Towers(nn.Module):
    """Parameters that are drawn in rounds: rows of uneven number, one that is overwritten, one that is scaled, few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self._drawn(1003, 64)
        self.dead = self._drawn(300, 64)
        nn.init.trunc_normal_(self.dead, a=-1, b=1)
        self.scaled = self._drawn(200, 3, 32)
        with torch.no_grad():
            self.scaled.mul_(0.5)
        self.small = self._drawn(2, 16)
        self.last = nn.Parameter(torch.randn(40, 8))

    def _drawn(self, *size: int) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(*size))
        nn.init.trunc_normal_(parameter, std=1.0, a=-1.5, b=2.0)
        return parameter


class OneOf(Ranks):
    """A rank among some that are not there: `said` is what each says of each op, in the order of ranks."""

    def __init__(self, rank: int, said: Said, lengths: dict[str, int]) -> None:
        self.rank, self.count, self.said, self.lengths, self.divided = rank, COUNT, said, lengths, 0

    def agree(self, said: Mapping[str, str]) -> None:
        pass

    def united(self, key: str, first: int, seen: Seen | None, numel: int) -> int | None:
        self.said.setdefault(key, []).append(seen)
        return self.lengths.get(key)

    def largest(self, key: str, first: int, parts: int, find: Callable[[int], int]) -> int:
        self.divided += 1
        self.lengths[key] = max(map(find, range(parts)))
        return self.lengths[key]


@contextmanager
def group(rank: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=COUNT, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def filled(rank: int, ranks: Ranks, seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = gp.trace(Towers).meta_module()
    if dtype != torch.float32:
        module.to(dtype)
    # by another name for each rank: torch keeps what it knows of a mesh, the rank included, for the next one that is equal
    fully_shard(module, mesh=init_device_mesh("cpu", (COUNT,), mesh_dim_names=(f"of_{rank}",)))
    with mock.patch("groundplan.runtime.inplace.together", lambda *_: nullcontext(ranks)):
        return gp.materialize(module, seed=seed)


def eager(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Towers()


def check_rank(rank: int, module: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> None:
    for name, parameter in eager(seed).named_parameters():
        parts = parameter.detach().to(dtype).chunk(COUNT)
        expected = parts[rank] if rank < len(parts) else parameter.detach()[:0].to(dtype)
        held: Any = module.get_parameter(name)
        assert torch.equal(held.to_local(), expected), name


def test_what_all_ranks_see_is_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    said: Said = {}
    first = OneOf(0, {}, {})
    with group(0):
        check_rank(0, filled(0, first, 5), 5)
    assert first.divided == len(first.lengths) == 5, "it was told that the others have not seen the rest"
    writes: list[tuple[Any, ...]] = []
    write = Truncated.write

    def counted(self: Truncated, *args: Any) -> int:
        writes.append((args[2].words, self.fill.numel))
        return write(self, *args)

    monkeypatch.setattr(Truncated, "write", counted)
    for rank in range(COUNT):
        writes.clear()
        ranks = OneOf(rank, said, first.lengths)
        monkeypatch.setattr("groundplan.tracer.places._streams", {})  # of another process
        with group(rank):
            check_rank(rank, filled(rank, ranks, 5), 5)
        assert ranks.divided == 0 and len(writes) == len(set(writes)) == (3 if rank == 2 else 4), "nothing is drawn twice"
    sizes = {key: max(each.stop for each in seen if each is not None) for key, seen in said.items() if any(seen)}
    assert len(said) == 5 and len(sizes) == 4, "the overwritten draws are nobody's part"
    for key, numel in sizes.items():
        assert covered(said[key], numel) == first.lengths[key]


def test_what_is_converted_is_not_drawn_early() -> None:
    said: Said = {}
    ranks = OneOf(1, said, {})
    with group(1):
        check_rank(1, filled(1, ranks, 3, torch.bfloat16), 3, torch.bfloat16)
    assert ranks.divided == 5 and not any(map(any, said.values()))


@given(cuts=st.lists(st.integers(0, 50)), rounds=st.lists(st.integers(1, 9), min_size=52, max_size=52), lost=st.integers(-1, 51))
def test_covered(cuts: list[int], rounds: list[int], lost: int) -> None:
    ends = sorted({0, *cuts, 50})
    every = [Seen(rounds[number], *span) for number, span in enumerate(pairwise(ends))]
    seen: list[Seen | None] = [each for number, each in enumerate(every) if number != lost]
    expected = max(each.rounds for each in every) if len(seen) == len(every) else None
    assert covered([*seen, None], 50) == covered([None, *seen[::-1], *seen[:1]], 50) == expected
