"""The law where everything takes the way of large tensors: pieces, threads, jumps, conversions while drawing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from groundplan.planner import construct
from groundplan.runtime import waiting

from . import zoo
from .law import assert_law
from .programs import Constructed, Program
from .test_law_random import eager_error, programs
from .test_parts import shrink

KINDS = zoo.builtins() | zoo.awkward() | zoo.transformers_types()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Thresholds so low that small tensors take the ways of large ones; all that can wait does."""
    with monkeypatch.context() as patched:
        shrink(patched)
        for module in (waiting, construct):
            patched.setattr(module, "WAITING_BYTES", 64)
        yield


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("cast", [None, torch.bfloat16, torch.float64], ids=["", "bfloat16", "float64"])
def test_modules(name: str, cast: torch.dtype | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_law(KINDS[name], 3, cast, state=False)


@settings(
    max_examples=int(os.environ.get("GROUNDPLAN_EXAMPLES", "150")),
    deadline=None,
    derandomize="GROUNDPLAN_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(program=programs, seed=st.integers(0, 3), cast=st.sampled_from([None, torch.bfloat16, torch.float64]))
def test_random_constructors(program: Program, seed: int, cast: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assume(eager_error(program, seed) is None)
        assert_law(lambda: Constructed(program), seed, cast)
