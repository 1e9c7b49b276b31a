"""Every architecture of the transformers library that builds from a shrunk configuration, all its classes: identical to eager.

A random tenth of the types runs always, another one each day (`GROUNDPLAN_TENTH=3` asks for one); all of them run with

    python -m pytest tests/conformance -m conformance -n 2
"""

from __future__ import annotations

import datetime
import gc
import os
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from ..law import assert_law
from .architectures import classes_of, types
from .shrink import buildable

pytestmark = pytest.mark.filterwarnings("ignore")
TYPES = types("a", "z")
DAY = int(os.environ.get("GROUNDPLAN_TENTH", datetime.date.today().toordinal()))
TENTH = sorted(random.Random(DAY).sample(TYPES, len(TYPES) // 10))


@cache
def small_models(model_type: str) -> tuple[tuple[type[nn.Module], Any], ...]:
    """The classes of a type that build here, each with a small configuration."""
    try:
        config_class, classes = classes_of(model_type)
    except Exception as error:
        pytest.skip(f"the library does not load it here: {error}")
    found = tuple((model, config) for model in classes if (config := buildable(model, config_class)) is not None)
    if not found:
        pytest.skip("no class of it builds from a shrunk default configuration")
    return found


def assert_conforms(model_type: str, seed: int = 0, cast: torch.dtype | None = None) -> None:
    for model, config in small_models(model_type):
        assert_law(lambda model=model, config=config: model(config), seed, cast)  # type: ignore[misc]
    gc.collect()


@pytest.mark.parametrize("model_type", TENTH)
def test_a_random_tenth(model_type: str) -> None:
    assert_conforms(model_type)


@pytest.mark.conformance
@pytest.mark.parametrize("model_type", TYPES)
def test_every_type(model_type: str) -> None:
    assert_conforms(model_type)


@pytest.mark.conformance
@pytest.mark.parametrize("model_type", TYPES[::4])
def test_under_a_cast(model_type: str) -> None:
    assert_conforms(model_type, cast=torch.bfloat16)


@pytest.mark.conformance
@pytest.mark.parametrize("model_type", TYPES[1::4])
def test_under_another_default_dtype(model_type: str) -> None:
    small_models(model_type)  # under the usual one: some classes build under no other
    torch.set_default_dtype(torch.bfloat16)
    try:
        for model, config in small_models(model_type):
            if _builds(model, config):
                assert_law(lambda model=model, config=config: model(config))  # type: ignore[misc]
    finally:
        torch.set_default_dtype(torch.float32)


def _builds(model: type[nn.Module], config: Any) -> bool:
    try:
        model(config)
    except Exception:
        return False
    return True
