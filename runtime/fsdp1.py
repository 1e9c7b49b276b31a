"""The `param_init_fn` of torch's first FSDP, `FullyShardedDataParallel`, which Lightning Fabric's `FSDPStrategy` uses.

What FSDP1 does with it, innermost units first: it calls the function on every module of the unit, each of which is to fill the
tensors that it holds itself; copies them into one flat tensor; keeps its rank's part of that. So nothing of another unit is there
meanwhile. Modules that it was told to ignore are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .meta import Blueprint, remembered
from .modules import ModuleFiller
from .options import Options
from .ranks import together


class ParamInitFn:
    """Fills a module of a meta module when FSDP1 calls it; the first call for a meta module compares the ranks."""

    def __init__(self, options: Options, device: str | torch.device | None, group: Any, timeout: float | None) -> None:
        self._filler = ModuleFiller(options, device)
        self._group = group
        self._timeout = timeout
        self._agreed: dict[int, Blueprint] = {}  # with the blueprint, or another could get its id

    def __call__(self, module: nn.Module) -> None:
        memory = remembered(module)
        if memory is not None and id(memory.blueprint) not in self._agreed:
            with together(self._group, self._timeout) as ranks:
                ranks.agree(self._filler.says(memory.blueprint) if ranks.count > 1 else {})
                ranks.finish()
            self._agreed[id(memory.blueprint)] = memory.blueprint
        self._filler.fill(module)
