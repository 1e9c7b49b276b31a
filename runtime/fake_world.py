"""One process taken for a rank of many: a process group that talks to nobody, for as long as a fake run lasts.

torch's `fake` backend does every collective at once and leaves what it finds. It stands beside the user's own process groups,
which keep their names and ranks: torch reads its groups from `torch.distributed.distributed_c10d._world`, an "experimental
extension point to override it", and a world of our own is put there.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import _unregister_process_group
from torch.distributed import distributed_c10d

_numbers = itertools.count(10**9, 10**4)
"""The number that the next world counts its groups from: far beyond those of the user's, which go by their numbers too."""


class _World(distributed_c10d._World):
    """The process groups of one fake run; the tables of torch's own are global."""

    pg_map: Any = None
    pg_names: Any = None
    pg_group_ranks: Any = None
    pg_backend_config: Any = None
    tags_to_pg: Any = None
    pg_to_tag: Any = None
    group_count: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.pg_map, self.pg_names, self.pg_group_ranks, self.pg_backend_config = {}, {}, {}, {}
        self.tags_to_pg, self.pg_to_tag = {}, {}
        self.group_count = next(_numbers)


@contextmanager
def fake_world(ranks: int, rank: int) -> Iterator[None]:
    """Be rank number `rank` of `ranks` in the body; then everything is as it was, on an error too."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    kept = (distributed_c10d._world, distributed_c10d._default_pg_init_method, sys.excepthook)
    forget_meshes()
    world = distributed_c10d._world = _World()
    try:
        dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
        yield
    finally:
        for group, name in list(world.pg_names.items()):
            group.shutdown()
            _unregister_process_group(name)
        distributed_c10d._world, distributed_c10d._default_pg_init_method, sys.excepthook = kept
        own = distributed_c10d._world.default_pg
        distributed_c10d._update_default_pg(own)
        forget_meshes()


def forget_meshes() -> None:
    """Empty DTensor's caches: meshes of the same shape are equal to them, whatever their process groups are.

    Otherwise the user's DTensors would be sent through a fake run's groups, and a fake run's through the user's.
    """
    for clear in _caches():
        clear()


def _caches() -> Iterator[Callable[[], object]]:
    from torch.distributed.tensor import DTensor, _redistribute, debug

    yield DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache_clear
    for owner, name in ((debug, "_clear_fast_path_sharding_prop_cache"), (_redistribute, "clear_redistribute_planner_cache")):
        if (clear := getattr(owner, name, None)) is not None:
            yield clear
    if (clear := getattr(_redistribute._gen_transform_infos, "cache_clear", None)) is not None:
        yield clear
