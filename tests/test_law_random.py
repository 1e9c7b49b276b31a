"""The law over random constructors: creation, in-place writes, views, copies, ties, randomness, control flow."""

from __future__ import annotations

import os
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import groundplan as gp

from .law import assert_law
from .programs import Constructed, Program

EXAMPLES = int(os.environ.get("GROUNDPLAN_EXAMPLES", "500"))
steps = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
programs = st.lists(steps, min_size=1, max_size=25)


def eager_error(program: Program, seed: int) -> Exception | None:
    """What the program raises when it is simply run."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(seed)
    try:
        Constructed(program)
    except Exception as error:
        return error
    return None


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="GROUNDPLAN_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(program=programs, seed=st.integers(0, 3), cast=st.sampled_from([None, None, torch.bfloat16]))
def test_the_law_holds_for_random_constructors(program: Program, seed: int, cast: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (error := eager_error(program, seed)) is None:
            assert_law(lambda: Constructed(program), seed, cast)
            return
        with pytest.raises(type(error)):
            torch.manual_seed(seed)
            random.seed(99)
            np.random.seed(99)
            gp.trace(Constructed, program).materialize(seed=seed)
