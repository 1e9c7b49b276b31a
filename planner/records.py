"""What everything that a plan saves is made of: frozen records of plain data, and names for dtypes and devices."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict

from ..tracer.errors import DecisionError, nearest

DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
_DEVICE = re.compile(r"(cpu|cuda)(?::(0|[1-9][0-9]{0,2}))?")
_HIGHEST_INDEX = 127  # torch keeps a device index in eight signed bits and wraps larger ones around without a word


class Record(BaseModel):
    """Frozen data that is saved as JSON; unknown fields and wrong types are refused."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def dtype_name(dtype: torch.dtype) -> str:
    """The name a dtype is saved under.

    >>> dtype_name(torch.half)
    'float16'
    """
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype saved under `name`; raises `DecisionError` with the nearest names."""
    try:
        return DTYPES[name]
    except KeyError:
        raise DecisionError(f"torch has no dtype called {name!r}{nearest(name, DTYPES)}") from None


def device_name(device: object) -> str:
    """The name a device is saved under; raises `DecisionError` for anything but CPU and CUDA.

    >>> device_name(torch.device("cuda", 1)), device_name("cpu:0")
    ('cuda:1', 'cpu')
    """
    match = _DEVICE.fullmatch(str(device)) if isinstance(device, str | torch.device) else None
    if match is None or int(match[2] or 0) > _HIGHEST_INDEX:
        raise DecisionError(f"cannot place tensors on {device!r}: CPU and CUDA are supported; say 'cpu', 'cuda' or 'cuda:1'")
    return "cpu" if match[1] == "cpu" else match[0]
