"""Storage dtypes: a cast, whole or by pattern, to every dtype that `nn.Module.to` takes, is that call, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner import construct
from groundplan.runtime import waiting

from . import zoo
from .law import assert_law, assert_same, content, named_tensors
from .test_parts import shrink

pytest.importorskip("transformers")

FLOAT8 = [each for name, each in vars(torch).items() if name.startswith("float8_") and isinstance(each, torch.dtype)]
NARROW = [torch.float16, torch.float8_e4m3fn]
KINDS = zoo.builtins() | zoo.awkward() | zoo.transformers_types()
SOME = ["nn.Linear", "nn.LSTM", "nn.Sequential", "tied", "data", "weight_norm", "Llama", "GPT-2", "Swin"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tensors take the ways of large ones: converted while they are drawn, in pieces, on several threads."""
    with monkeypatch.context() as patched:
        shrink(patched)
        for module in (waiting, construct):
            patched.setattr(module, "WAITING_BYTES", 64)
        yield


def by_name(dtypes: Mapping[str, torch.dtype], module: nn.Module) -> nn.Module:
    """What a cast by patterns stands for, written down anew: `module.to`, tensor by tensor."""
    found: dict[int, torch.dtype] = {}
    members = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in members:
        dtype = next((dtype for pattern, dtype in dtypes.items() if fnmatchcase(name, pattern)), None)
        if dtype is not None and (tensor.is_floating_point() or tensor.is_complex()):
            found.setdefault(id(tensor), dtype)
    cast: nn.Module = module._apply(lambda tensor: tensor.to(found.get(id(tensor), tensor.dtype)))
    return cast


def eager(name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    return KINDS[name]()


# -- whole modules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_cast_is_module_to(name: str, dtype: torch.dtype, small: None) -> None:
    assert_law(KINDS[name], 3, dtype)


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.float64], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_every_dtype_at_its_real_size(name: str, dtype: torch.dtype) -> None:
    assert_law(KINDS[name], 4, dtype)


@pytest.mark.parametrize("steps", [(FLOAT8[0], torch.bfloat16), (torch.bfloat16, torch.float8_e5m2)], ids=str)
@pytest.mark.parametrize("name", SOME)
def test_casts_in_a_row_round_in_that_order(name: str, steps: tuple[torch.dtype, ...]) -> None:
    plan, expected = gp.trace(KINDS[name]), eager(name, 5)
    for dtype in steps:
        plan = plan.cast(dtype)
        expected.to(dtype)
    assert_same(expected, plan.materialize(seed=5))


# -- by pattern ---------------------------------------------------------------------------------------------------------

PATTERNS: dict[str, dict[str, torch.dtype]] = {
    "all but biases": {"*bias*": torch.float32, "*": torch.float8_e4m3fn},
    "weights": {"*weight*": torch.float8_e5m2},
    "both": {"*bias*": torch.float16, "*weight*": torch.float8_e4m3fn},
    "wide": {"*weight*": torch.float64},
}


@pytest.mark.parametrize("kind", PATTERNS)
@pytest.mark.parametrize("name", ["nn.Linear", "nn.LSTM", "nn.Transformer", "GPT-2", "BERT", "Swin", "Wav2Vec2"])
def test_a_cast_by_pattern(name: str, kind: str, small: None) -> None:
    dtypes = PATTERNS[kind]
    plan = gp.trace(KINDS[name]).cast(dtypes)
    built = plan.materialize(seed=6)
    assert_same(by_name(dtypes, eager(name, 6)), built)
    filled = gp.materialize(plan.meta_module(), seed=6, group=None)
    for each, tensor in named_tensors(built).items():
        assert content(tensor) == content(named_tensors(filled)[each]), each


def test_norms_keep_their_precision() -> None:
    dtypes = {"*norm*": torch.float32, "*": torch.float8_e4m3fn}
    plan = gp.trace(KINDS["Llama"]).cast(dtypes)
    model = plan.materialize(seed=0)
    assert_same(by_name(dtypes, eager("Llama", 0)), model)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    assert model.lm_head.weight is model.model.embed_tokens.weight


# -- parts, other values, files, bytes ----------------------------------------------------------------------------------


class Wide(nn.Module):
    """Tensors of odd sizes from several kernels, no elements, one element, a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(130, 70)
        nn.init.trunc_normal_(self.first.weight, std=0.02, a=-0.04, b=0.04)
        self.second = nn.Linear(70, 33)
        nn.init.orthogonal_(self.second.weight)
        self.table = nn.Parameter(torch.rand(61, 47))
        self.register_buffer("rows", self.table.detach()[:10])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_parts_of_float8(dtype: torch.dtype) -> None:
    plan = gp.trace(Wide).cast(dtype)
    torch.manual_seed(3)
    for name, tensor in named_tensors(Wide().to(dtype)).items():
        indices: list[Any] = [...]
        indices += [slice(1, None, 2), slice(2, 9)] if tensor.dim() and len(tensor) else []
        indices += [(slice(None, None, 3), slice(1, 7)), 3] if tensor.dim() == 2 and len(tensor) else []
        for index in indices:
            found = plan.materialize_state({name: index}, seed=3)[name]
            assert found.dtype == dtype and content(found) == content(tensor.detach()[index]), (name, index)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_keyed_values_are_rounded_too(dtype: torch.dtype) -> None:
    wide = gp.trace(Wide).materialize(seed=3, rng="keyed").to(dtype)
    narrow = gp.trace(Wide).cast(dtype).materialize(seed=3, rng="keyed")
    for name, tensor in named_tensors(wide).items():
        assert content(tensor) == content(named_tensors(narrow)[name]), name


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_in_a_file_and_in_bytes(dtype: torch.dtype, tmp_path: Path) -> None:
    plan = gp.trace(Wide).cast({"*bias": torch.bfloat16, "*": dtype})
    plan.save(tmp_path / "plan.json")
    assert gp.Plan.load(tmp_path / "plan.json").bind(Wide).decisions == plan.decisions
    saved = sum(tensor.nbytes for tensor in plan.materialize(seed=0).state_dict().values())
    assert plan.memory().phases["checkpoint"] == saved


def test_what_torch_cannot_convert_to_is_refused() -> None:
    with pytest.raises(NotImplementedError):
        nn.Linear(3, 4).to(torch.float4_e2m1fn_x2)
    with pytest.raises(gp.DecisionError, match="float8_e4m3fn"):
        gp.trace(nn.Linear, 3, 4).cast(torch.float4_e2m1fn_x2)
