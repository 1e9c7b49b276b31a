"""DeepSpeed's ZeRO-3 for a meta module: every submodule is filled, and its parameters divided between the ranks, before the next.

DeepSpeed does the dividing, by `deepspeed.zero.Init`. It would also send every parameter from rank 0 to the others, each of which
has drawn the same one already: that is left out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..tracer.errors import MaterializeError
from .inplace import materialize_module
from .modules import ModuleFiller
from .options import Options
from .ranks import together
from .targets import find_targets

Config = Mapping[str, Any] | str | os.PathLike[str]
_SHOWN = 8


def fill_zero3(
    module: nn.Module,
    config: Config,
    options: Options,
    device: str | torch.device | None = None,
    group: Any = "world",
    timeout: float | None = None,
) -> nn.Module:
    """Fill `module` and divide its parameters as `config`, a configuration of ZeRO-3, says; returns the module.

    Every rank makes the same call; where one raises, all do. Raises `MaterializeError` where DeepSpeed is missing, or the
    parameters are not of the dtype that `config` says.
    """
    divided = _divided_by(config)
    device = divided.local_device if device is None else device
    with together(group, timeout) as ranks:
        blueprint, _ = find_targets(module)
        _check_dtypes(module, divided.dtype)
        filler = ModuleFiller(options, device)
        ranks.agree(filler.says(blueprint) if ranks.count > 1 else {})
        for each in module.modules():
            ranks.check()
            filler.fill(each)
            divided.divide(each.parameters(recurse=False))
        ranks.finish()
    materialize_module(module, filler.options, device, group=None)  # nothing is left: the generators go on to where eager's are
    return module


def _divided_by(config: Config) -> Any:
    """DeepSpeed's own object that divides parameters, without its broadcast."""
    try:
        from deepspeed.runtime.config import DeepSpeedConfig
        from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
    except ImportError as error:
        raise MaterializeError(f"DeepSpeed cannot be imported ({error}); pip install deepspeed") from error

    class Divided(Init):  # type: ignore[misc]
        def divide(self, parameters: Any) -> None:
            self._convert_to_zero_parameters(each for each in parameters if not is_zero_param(each))

        def _zero_init_param(self, param: nn.Parameter) -> None:
            """As DeepSpeed's, which sends rank 0's values in between."""
            self._convert_to_deepspeed_param(param)
            param.partition()  # type: ignore[attr-defined]

    plain = dict(config) if isinstance(config, Mapping) else os.fspath(config)
    stage = DeepSpeedConfig(plain).zero_optimization_stage
    if stage != 3:
        raise MaterializeError(
            f"the DeepSpeed configuration is for ZeRO stage {stage}, which keeps whole parameters: give plan.materialize() to "
            'deepspeed.initialize, or say {"zero_optimization": {"stage": 3}}'
        )
    return Divided(nn.Module(), config_dict_or_path=plain)  # with a module, it sets up DeepSpeed's own linear layer too


def _check_dtypes(module: nn.Module, dtype: torch.dtype) -> None:
    """DeepSpeed takes the parameters for what its configuration says, and does not look."""
    others = {name: each.dtype for name, each in module.named_parameters() if each.is_floating_point() and each.dtype != dtype}
    if others:
        shown = "".join(f"\n  {name} {found}" for name, found in list(others.items())[:_SHOWN])
        more = f"\n  … and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        raise MaterializeError(
            f"the DeepSpeed configuration computes in {dtype}, and {len(others)} parameters are not of it:{shown}{more}\n"
            f"say plan.cast({dtype}).meta_module(), or enable bf16 or fp16 in the configuration as the plan has it"
        )
