"""The law on real constructors: identical to eager in everything that can be observed, at two seeds and under a cast."""

from __future__ import annotations

import pytest
import torch

from . import zoo
from .law import assert_law

pytestmark = pytest.mark.filterwarnings("ignore")
BUILTINS, AWKWARD, TRANSFORMERS = zoo.builtins(), zoo.awkward(), zoo.transformers_types()
SEEDS = (0, 1234)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", BUILTINS)
def test_torch_nn(name: str, seed: int) -> None:
    assert_law(BUILTINS[name], seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward(name: str, seed: int) -> None:
    assert_law(AWKWARD[name], seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, seed: int) -> None:
    assert_law(TRANSFORMERS[name], seed)


@pytest.mark.parametrize("name", BUILTINS | AWKWARD | TRANSFORMERS)
def test_under_a_cast(name: str) -> None:
    assert_law((BUILTINS | AWKWARD | TRANSFORMERS)[name], cast=torch.bfloat16)


def test_every_module_class_of_torch_nn_that_holds_tensors_is_covered() -> None:
    """Classes of torch.nn whose constructor makes parameters or buffers, read off their source, against the zoo."""
    import inspect

    from torch import nn

    makes = ("Parameter(", "register_buffer(", "register_parameter(")
    abstract = {"Module", "Container", "NLLLoss2d", "ParameterList", "ParameterDict", "Buffer"}
    for name, cls in vars(nn).items():
        if not (inspect.isclass(cls) and issubclass(cls, nn.Module)) or name in abstract:
            continue
        own = cls.__dict__.get("__init__")
        if own is not None and any(word in inspect.getsource(own) for word in makes):
            assert any(key.startswith(f"nn.{name}") for key in BUILTINS), name
