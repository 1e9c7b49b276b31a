"""What everything that a plan saves is made of: frozen records of plain data, and names for dtypes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict

from ..tracer.errors import DecisionError, nearest

DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}


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
