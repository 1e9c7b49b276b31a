"""The doors that fill a `plan.meta_module()`, whoever divides it: your own sharding, torch's FSDP1, DeepSpeed's ZeRO-3."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .runtime.checkpoint import Rename, Source
from .runtime.options import Options


def materialize(
    module: torch.nn.Module,
    seed: int | None = None,
    checkpoint: Source | None = None,
    *,
    rng: str = "eager",
    uninitialized: str = "error",
    missing: str = "init",
    unexpected: str = "error",
    rename: Rename | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    group: Any = "world",
    timeout: float | None = None,
) -> torch.nn.Module:
    """Fill a `plan.meta_module()` in place, after you have sharded it: each rank draws its own part only. Returns the module.

    The values are those of the single-device model, bit for bit, whatever the mesh: every DTensor gets its local shard of them,
    ordinary tensors all of them. It takes the place of `module.to_empty(...)` and the initialization that follows it. Submodules
    may be wrapped, renamed, moved or deleted before; parts may be filled one by one. `seed`, `rng`, `uninitialized` and
    `threads` are as in `Plan.materialize`, and so are `checkpoint`, `missing`, `unexpected` and `rename`: of what the checkpoint
    has, each rank reads only its own part.

    Tensors go to `device`, else where the plan says, else to the mesh's device (`cpu` with FSDP2's CPU offload).

    Every rank of `group` makes the same call; None is this process alone. The ranks compare what they are about to build,
    and wait for each other at the end: where one raises, dies, or does not come within `timeout` seconds (45 if None), all raise
    `RanksError`. On any failure the module and the generators are as they were.

    Raises `MaterializeError`, naming the tensor, for a meta tensor that the plan does not know; `UninitializedError`;
    `CheckpointError`.

    >>> import groundplan as gp
    >>> module = gp.materialize(gp.trace(torch.nn.Linear, 3, 4).meta_module(), seed=0)
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(module.weight, torch.nn.Linear(3, 4).weight)
    True
    """
    from .runtime.inplace import materialize_module  # torch.distributed, which it imports, takes a second

    options = Options.of(seed, checkpoint, rng, uninitialized, missing, unexpected, rename, threads)
    return materialize_module(module, options, device, group, timeout)


def param_init_fn(
    seed: int | None = None,
    checkpoint: Source | None = None,
    *,
    rng: str = "eager",
    uninitialized: str = "error",
    missing: str = "init",
    unexpected: str = "error",
    rename: Rename | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    group: Any = "world",
    timeout: float | None = None,
) -> Callable[[torch.nn.Module], None]:
    """The `param_init_fn` with which torch's `FullyShardedDataParallel` (FSDP1) fills a `plan.meta_module()`, unit by unit.

    `FSDP(plan.meta_module(), param_init_fn=gp.param_init_fn(seed=0), auto_wrap_policy=...)` holds on every rank its part of the
    values that a single device would have, bit for bit. No more than one unit is there in whole meanwhile, twice for a moment, as
    FSDP1 copies it. Modules that FSDP1 is told to ignore stay on the meta device: `gp.materialize(module, seed=0)` fills them
    afterwards.

    Every unit draws from the same state of the generators: that of `seed`, or with None the one at the time of this call, which
    has to be the same on all ranks. The generators are left as they are: unlike after `gp.materialize`, the next number drawn is
    not the one that follows the constructor. The ranks of `group`, None for this process alone, compare once what they are about
    to build, and raise `RanksError` where they differ, or where one does not come within `timeout` seconds (45 if None).

    `device` is where tensors are made, the plan's device if None; FSDP1 moves a unit from there to its `device_id`. `checkpoint`,
    `missing`, `unexpected` and `rename` are as in `gp.materialize`; every rank reads its units whole.

    Raises `MaterializeError`, when FSDP1 calls it, for a meta tensor that the plan does not know; `UninitializedError`.

    >>> import groundplan as gp
    >>> module = gp.trace(torch.nn.Linear, 3, 4).meta_module()
    >>> gp.param_init_fn(seed=0)(module)  # what FSDP1 does with each module of a unit
    >>> _ = torch.manual_seed(0)
    >>> torch.equal(module.weight, torch.nn.Linear(3, 4).weight)
    True
    """
    from .runtime.fsdp1 import ParamInitFn  # torch.distributed, which it imports, takes a second

    options = Options.of(seed, checkpoint, rng, uninitialized, missing, unexpected, rename, threads)
    return ParamInitFn(options, device, group, timeout)


def deepspeed_zero3(
    module: torch.nn.Module,
    config: Mapping[str, Any] | str | os.PathLike[str],
    seed: int | None = None,
    checkpoint: Source | None = None,
    *,
    rng: str = "eager",
    uninitialized: str = "error",
    missing: str = "init",
    unexpected: str = "error",
    rename: Rename | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    group: Any = "world",
    timeout: float | None = None,
) -> torch.nn.Module:
    """Fill a `plan.meta_module()` and divide it as DeepSpeed's ZeRO-3 does, one submodule after the other. Returns the module.

    It takes the place of building under `deepspeed.zero.Init(config_dict_or_path=config)`, and comes before
    `deepspeed.initialize(model=module, config=config, ...)`. Each parameter has the values that a single device would have, bit
    for bit; a rank holds its parts, and for a moment one submodule's own parameters. Nothing is sent between ranks.
    `config` is a mapping or a file's path; where it enables bf16 or fp16, so does the plan: `plan.cast(torch.bfloat16)`. ZeRO-1
    and ZeRO-2 need none of this: they take `plan.materialize()`.

    `seed`, `checkpoint`, `rng`, `uninitialized`, `missing`, `unexpected`, `rename`, `threads`, `group` and `timeout` are as in
    `gp.materialize`, as is where the generators stand afterwards. `device` is where tensors are made; DeepSpeed's if None. On a
    failure the module is of no more use, and the generators are as they were.

    Raises `MaterializeError` where DeepSpeed is not installed, for parameters of another dtype than that of `config`, and for a
    meta tensor that the plan does not know; `UninitializedError`; `RanksError`.
    """
    from .runtime.zero3 import fill_zero3  # torch.distributed, which it imports, takes a second

    options = Options.of(seed, checkpoint, rng, uninitialized, missing, unexpected, rename, threads)
    return fill_zero3(module, config, options, device, group, timeout)
