"""Checkpoints of every form, loaded: what `build()` and `load_state_dict` give, bit for bit, and where the generators stand."""

from __future__ import annotations

import logging
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

import groundplan as gp
from groundplan.runtime.checkpoint import Checkpoint
from groundplan.runtime.entries import held
from groundplan.runtime.loading import all_members
from groundplan.runtime.matching import matched
from groundplan.runtime.parts import PartialReplay

from . import zoo
from .checkpoint_files import (
    FORMS,
    State,
    assert_same_values,
    eager,
    is_drawn,
    lightning,
    one_file,
    other_state,
    saved_by_dcp,
    state_of,
)
from .test_poison import ROOT

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # torch's own
SEED = 3


class Mixed(nn.Module):
    """Ties, shared memory, strange strides, buffers of all kinds, parametrizations, an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True)
        self.new = parametrizations.weight_norm(nn.Linear(4, 3))
        self.flat = nn.Parameter(torch.randn(24))
        self.part = nn.Parameter(self.flat.data[4:16].view(3, 4))
        self.turned = nn.Parameter(torch.randn(5, 7).t())
        self.narrow = nn.Parameter(torch.randn(4, 9)[:, 2:7])
        self.scale = nn.Parameter(torch.rand(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("row", self.get_buffer("table")[1])
        self.register_buffer("noise", torch.zeros(4), persistent=False)
        self.register_buffer("mask", torch.rand(5) > 0.5)
        self.as_half, self.as_double = nn.Linear(3, 3).half(), nn.Linear(3, 3).double()
        self.frozen = nn.Parameter(torch.rand(3), requires_grad=False)


def pair() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def named_pair() -> dict[str, nn.Module]:
    return {"actor": nn.Linear(2, 3), "critic": nn.LSTM(3, 2)}


BUILDS: dict[str, Callable[[], Any]] = {"mixed": Mixed, "tuple": pair, "dict": named_pair}
BUILDS |= {name: lambda name=name: zoo.transformers_types()[name]() for name in ("Llama", "T5")}  # type: ignore[misc]


CASES = [(name, form) for name in BUILDS for form in FORMS if name in ("mixed", "tuple") or form in ("index", "dcp", "mapping")]


def loaded(build: Callable[[], Any], checkpoint: Any, seed: int | None = SEED, **options: Any) -> Any:
    """What groundplan makes of a checkpoint, from another state of the generator."""
    torch.manual_seed(99)
    return gp.trace(build).materialize(seed=seed, checkpoint=checkpoint, **options)


def untouched() -> bool:
    """Whether the generator stands where `loaded` found it."""
    return torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(99).get_state())


def assert_state(build: Callable[[], Any], some: State, state: torch.Tensor) -> None:
    """The generator stands where eager leaves it if anything that the checkpoint does not have is drawn, else where it stood."""
    drawn = is_drawn(gp.trace(build).graph, some)
    torch.manual_seed(SEED if drawn else 99)
    if drawn:
        build()
    assert torch.equal(state, torch.get_rng_state()), ("drawn" if drawn else "not drawn", list(some))


# -- forms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_form_is_loaded_as_eager_loads_it(tmp_path: Path, name: str, form: str) -> None:
    build = BUILDS[name]
    tensors = other_state(build)
    found = loaded(build, FORMS[form](tmp_path, tensors), missing="error")
    assert name == "mixed" or untouched()  # what shares memory is made whole before a part of it is loaded
    assert_same_values(eager(build, tensors, SEED), found)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_what_is_missing_is_eagers(tmp_path: Path, name: str, form: str) -> None:
    build, draw = BUILDS[name], random.Random(name + form)
    some = {key: tensor for key, tensor in other_state(build).items() if draw.random() < 0.6}
    checkpoint = FORMS[form](tmp_path, some)
    found = loaded(build, checkpoint)
    state = torch.get_rng_state()
    assert_same_values(eager(build, some, SEED), found)
    assert_state(build, some, state)


ZOO = zoo.builtins() | zoo.awkward() | zoo.transformers_types()
LAZY = [name for name in ZOO if name.startswith("nn.Lazy")]


@pytest.mark.parametrize("name", [name for name in ZOO if name not in (*LAZY, "decides", "from outside")])
def test_every_constructor_is_loaded_as_eager_loads_it(name: str) -> None:
    tensors = other_state(ZOO[name])
    for share in (1.0, 0.5):
        draw = random.Random(name)
        some = {key: tensor for key, tensor in tensors.items() if draw.random() <= share}
        found = loaded(ZOO[name], some)
        state = torch.get_rng_state()
        assert_same_values(eager(ZOO[name], some, SEED), found)
        assert_state(ZOO[name], some, state)


def test_a_constructor_that_looks_at_its_values() -> None:
    tensors = other_state(ZOO["decides"], SEED)
    torch.manual_seed(SEED)
    found = gp.trace(ZOO["decides"]).materialize(seed=SEED, checkpoint=tensors)
    state = torch.get_rng_state()
    assert_same_values(eager(ZOO["decides"], tensors, SEED), found)
    assert torch.equal(state, torch.get_rng_state())


def test_what_comes_from_outside_is_not_written_to() -> None:
    inner, table = nn.Linear(3, 3), torch.arange(4.0)

    def build() -> nn.Module:
        return zoo.FromOutside(inner, table)

    tensors = {name: tensor.clone() for name, tensor in state_of(build()).items()}
    assert loaded(build, tensors).inner is inner  # the same values: nothing to write
    tensors["inner.weight"] += 1
    before = inner.weight.detach().clone()
    with pytest.raises(gp.CheckpointError, match=r"inner\.weight .*was passed to the constructor"):
        loaded(build, tensors)
    assert torch.equal(inner.weight, before) and untouched()
    assert loaded(build, tensors, rename={r"^inner\.": None}).inner is inner


# -- single forms' own ways ---------------------------------------------------------------------------------------------


def test_headers_of_every_length(tmp_path: Path) -> None:
    """A header of 128, 384, 640 … bytes begins as a pickle does."""
    path, lengths = tmp_path / "model.safetensors", set()
    weight, plan = torch.randn(2), gp.trace(nn.LayerNorm, 2, bias=False)
    for count in range(0, 1200, 8):
        save_file({"weight": weight}, path, metadata={"x": "x" * count})
        lengths.add(int.from_bytes(path.read_bytes()[:8], "little"))
        assert torch.equal(plan.materialize(checkpoint=path).weight, weight)
    assert {128, 384, 640} <= lengths


def views() -> State:
    """Tensors that lie in their storages in all ways."""
    base = torch.randn(6, 8)
    return {
        "base": base,
        "turned": base.t(),
        "row": base[2],
        "column": base[:, 3],
        "part": base[1:4, 2:7],
        "steps": base[::2, ::3],
        "turned part": base.t()[2:5],
        "expanded": torch.randn(3, 1).expand(3, 5),
        "expanded scalar": torch.tensor(2.0).expand(2, 2),
        "overlapping": torch.randn(10).as_strided((4, 4), (2, 1)),
        "diagonal": base[:, :6].diagonal(),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "permuted": torch.randn(2, 3, 4).permute(1, 2, 0),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0),
        "empty inside": torch.empty(3, 0, 2),
        "complex": torch.randn(3, 4, dtype=torch.complex64),
        "conjugate": torch.randn(3, 4, dtype=torch.complex64).conj(),
        "negative": torch.randn(5, dtype=torch.complex64).conj().imag,
        "real": torch.view_as_real(torch.randn(5, dtype=torch.complex64)),
    }


class Holder(nn.Module):
    """Parameters of given shapes and dtypes."""

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        for name, (shape, dtype) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))


def holder_of(tensors: State) -> gp.Plan:
    return gp.trace(Holder, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})


@pytest.mark.parametrize("form", ["zip", "legacy", "mapping", "dcp"])
def test_views_of_all_kinds(tmp_path: Path, form: str) -> None:
    tensors = views()
    if form == "dcp":  # it has no conjugates
        tensors = {name: tensor for name, tensor in tensors.items() if not (tensor.is_conj() or tensor.is_neg())}
    path: Any = tensors if form == "mapping" else tmp_path / "views.pt"
    if form == "dcp":
        path = saved_by_dcp(tmp_path, tensors)
    elif form != "mapping":
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    module = holder_of(tensors).materialize(checkpoint=path)
    for name, tensor in tensors.items():
        assert torch.equal(module.get_parameter(name), tensor), name
        assert module.get_parameter(name).is_contiguous(), name


def test_a_checkpoint_of_lightning_is_its_state_dict(tmp_path: Path) -> None:
    tensors = other_state(pair)
    assert_same_values(eager(pair, tensors, SEED), loaded(pair, lightning(tmp_path, tensors), missing="error"))


def test_a_checkpoint_with_an_optimizer(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "last.pt")
    found = loaded(
        lambda: nn.Linear(2, 3), tmp_path / "last.pt", rename={r"^model\.": "", r"^optimizer\.": None}, missing="error"
    )
    assert_same_values(module, found)


def test_old_scalars_of_one_element() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(()))

    assert float(loaded(Scaled, {"scale": torch.tensor([5.0])}).scale) == 5


def test_equal_nans_of_a_tied_tensor_are_no_difference(tmp_path: Path) -> None:
    build = BUILDS["Llama"]
    tensors = {name: tensor.clone() for name, tensor in other_state(build).items()}
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name][0, 0] = float("nan")
    for checkpoint in (tensors, one_file(tmp_path, tensors)):
        assert bool(loaded(build, checkpoint).lm_head.weight[0, 0].isnan())


@pytest.mark.parametrize("kept", ["lm_head.weight", "model.embed_tokens.weight"])
def test_either_name_of_a_tied_tensor_is_enough(kept: str) -> None:
    build = BUILDS["Llama"]
    tensors = {
        n: t for n, t in other_state(build).items() if n == kept or n not in ("lm_head.weight", "model.embed_tokens.weight")
    }
    found = loaded(build, tensors, missing="error")
    assert found.lm_head.weight is found.model.embed_tokens.weight and torch.equal(found.lm_head.weight, tensors[kept])


def test_two_values_for_memory_that_is_shared_end_as_in_eager() -> None:
    tensors = {name: tensor.clone() for name, tensor in other_state(Mixed).items()}
    tensors["part"] += 100
    tensors["row"] += 100
    for _ in range(3):
        assert_same_values(eager(Mixed, tensors, SEED), loaded(Mixed, tensors, threads=2))


# -- dtypes and casts ---------------------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool)
PAIRS = [(one, two) for one in FLOATS for two in FLOATS] + [
    (one, two) for one in INTEGERS for two in (torch.float32, torch.bfloat16)
]
PAIRS += [(torch.bool, torch.int64), (torch.int32, torch.int64), (torch.uint8, torch.int16), (torch.float32, torch.complex64)]
PAIRS += [(torch.float8_e4m3fn, torch.float32), (torch.float32, torch.float8_e5m2), (torch.int64, torch.int32)]


@pytest.mark.parametrize(("stored", "wanted"), PAIRS, ids=str)
def test_values_are_converted_as_copy_does(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    numbers = torch.randn(37, 3, dtype=torch.float64) * 50
    tensors = {"a": numbers.abs().to(stored), "b": numbers[:, 0].abs().to(stored)}
    plan = gp.trace(Holder, {name: (tuple(tensor.shape), wanted) for name, tensor in tensors.items()})
    for form in ("safetensors", "torch", "mapping", "dcp"):
        folder = tmp_path / form
        folder.mkdir()
        module = plan.materialize(checkpoint=FORMS[form](folder, tensors))
        for name, tensor in tensors.items():
            expected = torch.zeros(tensor.shape, dtype=wanted).copy_(tensor)
            assert module.get_parameter(name).view(torch.uint8).equal(expected.view(torch.uint8)), (form, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", BUILDS)
def test_a_cast_comes_before_loading(name: str, dtype: torch.dtype) -> None:
    build = BUILDS[name]
    tensors = other_state(build)
    for share in (1.0, 0.5):
        draw = random.Random(name)
        some = {key: tensor for key, tensor in tensors.items() if draw.random() <= share}
        torch.manual_seed(99)
        found = gp.trace(build).cast(dtype).materialize(seed=SEED, checkpoint=some)
        state = torch.get_rng_state()
        assert_same_values(eager(build, some, SEED, dtype), found)
        assert_state(build, some, state)


def test_a_cast_by_patterns(tmp_path: Path) -> None:
    build = BUILDS["Llama"]
    tensors = other_state(build)
    plan = gp.trace(build).cast({"*norm*": torch.float32, "*": torch.bfloat16})
    module = plan.materialize(checkpoint=one_file(tmp_path, tensors), missing="error")
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


# -- generators and draws -----------------------------------------------------------------------------------------------


class NothingDrawn(TorchDispatchMode):
    """Raises where torch draws."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert torch.Tag.nondeterministic_seeded not in func.tags, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is made from recipes: the storages that were asked for."""
    found: list[Any] = []
    real = PartialReplay.run_parts

    def run_parts(self: PartialReplay, wanted: Any, *rest: Any) -> Any:
        found.extend(view.storage for view, _ in wanted)
        return real(self, wanted, *rest)

    monkeypatch.setattr(PartialReplay, "run_parts", run_parts)
    return found


@pytest.mark.parametrize("name", ["Llama", "T5", "tuple"])
def test_nothing_is_drawn_where_all_is_there(tmp_path: Path, made: list[Any], name: str) -> None:
    checkpoint = one_file(tmp_path, other_state(BUILDS[name]))
    plan = gp.trace(BUILDS[name])
    for seed in (None, 0, 7):
        root = nn.Module()
        built = plan.meta_module()
        root._modules.update({"0": built} if isinstance(built, nn.Module) else {str(key): each for key, each in enumerate(built)})
        torch.manual_seed(99)
        with NothingDrawn():
            gp.materialize(root, seed=seed, checkpoint=checkpoint, threads=1)
        assert untouched()
    kinds = {tensor.kind for tensor in plan.graph.tensors if tensor.view.storage in made and tensor.persistent}
    assert "parameter" not in kinds


@pytest.mark.parametrize("seed", range(4))
def test_only_what_is_missing_is_made(made: list[Any], seed: int) -> None:
    build, draw = BUILDS["Llama"], random.Random(seed)
    plan = gp.trace(build)
    some = {key: tensor for key, tensor in other_state(build).items() if draw.random() < 0.7}
    lost = {tensor.view.storage for tensor in plan.graph.tensors if not any(name in some for name in tensor.names)}
    loaded(build, some)
    assert set(made) <= lost


def test_no_seed_goes_on_from_the_global_generator() -> None:
    tensors = {name: tensor for name, tensor in other_state(pair).items() if "1.0" not in name}
    found = loaded(pair, tensors, seed=None)
    state = torch.get_rng_state()
    assert_same_values(eager(pair, tensors, 99), found)
    assert torch.equal(state, torch.get_rng_state())


def test_keyed_values_where_something_is_missing() -> None:
    plan = gp.trace(pair)
    whole = plan.materialize(seed=SEED, rng="keyed")
    tensors = {name: tensor for name, tensor in other_state(pair).items() if "1.0" not in name}
    found = loaded(pair, tensors, rng="keyed")
    assert untouched()
    for prefix, left, right in zip("01", whole, found, strict=True):
        for name, tensor in right.state_dict().items():
            key = f"{prefix}.{name}"
            assert torch.equal(tensor, tensors.get(key, left.state_dict()[name])), key


def test_uninitialized_tensors_are_covered_by_a_checkpoint() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.utils.skip_init(nn.Linear, 3, 4), nn.Linear(4, 2))

    with pytest.raises(gp.UninitializedError, match=r"0\.weight"):
        loaded(build, {"0.bias": torch.ones(4)})
    assert untouched()
    found = loaded(build, {"0.bias": torch.ones(4), "0.weight": torch.full((4, 3), 2.0)})
    assert float(found[0].weight.sum()) == 24
    assert float(loaded(build, {"0.bias": torch.ones(4)}, uninitialized="zero")[0].weight.detach().sum()) == 0


# -- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["patterns", "function", "several patterns"])
def test_names_are_changed(tmp_path: Path, how: str) -> None:
    build = BUILDS["tuple"]
    tensors = other_state(build)
    there = {f"module.model.{name}": tensor for name, tensor in tensors.items()} | {"module.ema": torch.ones(3)}
    rename: Any = {
        "patterns": {r"^module\.model\.": "", r"ema$": None},
        "function": lambda name: None if name.endswith("ema") else name.removeprefix("module.model."),
        "several patterns": {r"^module\.model\.(\d)\.(.*)": r"\1.\2", r"ema$": None},
    }[how]
    found = loaded(build, one_file(tmp_path, there), rename=rename, missing="error")
    assert untouched()
    assert_same_values(eager(build, tensors, SEED), found)


def test_names_that_are_too_many_are_ignored(tmp_path: Path) -> None:
    tensors = other_state(pair)
    found = loaded(pair, one_file(tmp_path, tensors | {"other": torch.ones(3)}), unexpected="ignore", missing="error")
    assert untouched()
    assert_same_values(eager(pair, tensors, SEED), found)


def test_missing_names_are_logged(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    tensors = other_state(BUILDS["Llama"])
    lost = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    path = one_file(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in lost})
    with caplog.at_level(logging.WARNING, logger="groundplan"):
        loaded(BUILDS["Llama"], path)
        loaded(BUILDS["Llama"], tensors)
    assert [record.name for record in caplog.records] == ["groundplan"]
    message = caplog.records[0].getMessage()
    assert str(path) in message and "2 tensors" in message and all(name in message for name in lost)


# -- places, shards, parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_plan_that_places(tmp_path: Path, share: float) -> None:
    pytest.importorskip("accelerate")
    build, draw = BUILDS["Llama"], random.Random(1)
    some = {key: tensor for key, tensor in other_state(build).items() if draw.random() <= share}
    plan = gp.trace(build).place({"model.layers.1": "disk", "*": "cpu"})
    torch.manual_seed(99)
    folder = tmp_path / "offloaded"
    module = plan.materialize(seed=SEED, checkpoint=one_file(tmp_path, some), offload_dir=folder)
    state = torch.get_rng_state()
    expected = eager(build, some, SEED)
    assert torch.equal(state, torch.get_rng_state()) or share == 1
    words = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(module(words).logits, expected(words).logits)
    for name, tensor in expected.state_dict().items():
        if name.startswith("model.layers.1."):
            assert (folder / f"{name}.dat").read_bytes() == tensor.numpy().tobytes(), name


def test_a_part_with_layers_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build: Any = BUILDS["Llama"]
    tensors = other_state(build)
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    for number, some in enumerate((tensors, kept)):
        (tmp_path / str(number)).mkdir()
        module = gp.trace(build).meta_module()
        del module.model.layers[1]
        torch.manual_seed(99)
        with caplog.at_level(logging.WARNING, logger="groundplan"):
            gp.materialize(module, checkpoint=one_file(tmp_path / str(number), some), missing="error")
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in kept.items())
    assert not caplog.records


def test_parts_one_after_the_other(tmp_path: Path) -> None:
    build: Any = BUILDS["Llama"]
    tensors = other_state(build)
    path, module = one_file(tmp_path, tensors), gp.trace(build).meta_module()
    for layer in module.model.layers:
        gp.materialize(layer, checkpoint=path, missing="error")
    assert module.lm_head.weight.is_meta
    gp.materialize(module, checkpoint=path, missing="error")
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_a_plan_is_used_again_and_again(tmp_path: Path) -> None:
    tensors = other_state(Mixed)
    path, plan = one_file(tmp_path, tensors), gp.trace(Mixed)
    one, two = plan.materialize(seed=SEED, checkpoint=path), plan.materialize(seed=SEED, checkpoint=path)
    assert_same_values(one, two)
    memory = {tensor.data_ptr() for tensor in one.parameters() if tensor.numel()}
    assert not memory & {tensor.data_ptr() for tensor in two.parameters()}


def test_a_mapping_is_not_shared_with_the_module() -> None:
    tensors = other_state(pair)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for module in loaded(pair, tensors):
        for tensor in module.parameters():
            nn.init.zeros_(tensor)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = one_file(tmp_path, other_state(BUILDS["Llama"]))
    gp.trace(BUILDS["Llama"]).materialize(checkpoint=path, progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] and [done for done, _ in seen] == sorted(done for done, _ in seen)


# -- nothing uninitialized ----------------------------------------------------------------------------------------------

PROGRAM = """
import logging, random, sys, tempfile, warnings, torch
from pathlib import Path
warnings.simplefilter("ignore")
logging.getLogger("groundplan").setLevel(logging.ERROR)
import groundplan as gp
from groundplan.runtime import entries, loading
from tests.checkpoint_files import FORMS, assert_same_values, eager, other_state
from tests.test_checkpoint import BUILDS

forms = [name for name in FORMS if name not in ("string", "folder", "hub", "dcp, nested")]
for number in range(25):
    draw = random.Random(number)
    name, form = draw.choice(list(BUILDS)), draw.choice(forms)
    entries._SHORTEST, entries._ROWS = draw.choice([(1, 1), (64, 100), (512, 2**22)])
    loading.READ_BYTES, entries._CONVERTED = draw.choice([(64, 16), (1000, 300), (2**24, 2**20)])
    dtype = draw.choice([None, torch.bfloat16])
    share = draw.random()
    some = {key: tensor for key, tensor in other_state(BUILDS[name]).items() if draw.random() < share}
    some = some or dict(list(other_state(BUILDS[name]).items())[:1])
    plan = gp.trace(BUILDS[name])
    plan = plan.cast(dtype) if dtype else plan
    with tempfile.TemporaryDirectory() as folder:
        found = plan.materialize(seed=number, checkpoint=FORMS[form](Path(folder), some), threads=draw.choice([1, 3]))
    assert_same_values(eager(BUILDS[name], some, number, dtype), found)
print("done")
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="fresh memory is poisoned by glibc")
def test_random_parts_of_checkpoints_in_poisoned_memory() -> None:
    environment = os.environ | {"MALLOC_PERTURB_": "85", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    plan = gp.trace(lambda: nn.Sequential(*[nn.Linear(2, 2) for _ in range(40)]))
    plan.save_checkpoint(plan.materialize(seed=0), tmp_path, max_shard_size=20)
    assert len(list(tmp_path.glob("*.safetensors"))) == 80
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, before[1]))
    try:
        plan.materialize(checkpoint=tmp_path, missing="error")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_what_may_be_missing_is_neither_an_error_nor_listed(caplog: pytest.LogCaptureFixture) -> None:
    graph = gp.trace(nn.Linear, 2, 3).graph
    half = Checkpoint("half", {"weight": held("weight", torch.ones(3, 2))})
    with pytest.raises(gp.CheckpointError, match="bias is missing"):
        matched(graph, half, all_members(graph), missing="error")
    found = matched(graph, half, all_members(graph), missing="error", optional=["bias"])
    found.log_missing(alone=True)
    assert found.missing == found.missing_here == () and not caplog.records


# -- any subset ---------------------------------------------------------------------------------------------------------


@given(st.data(), st.sampled_from(sorted(BUILDS)), st.integers(0, 2**31), st.sampled_from([None, torch.bfloat16]))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_subset_of_the_keys(data: st.DataObject, name: str, seed: int, dtype: torch.dtype | None) -> None:
    """Those present are the checkpoint's, the missing ones eager's; the generator goes on as eager's where anything is drawn."""
    build = BUILDS[name]
    every = other_state(build)
    names = sorted(every)
    some = {key: every[key] for key in data.draw(st.sets(st.sampled_from(names)))}
    plan = gp.trace(build)
    plan = plan.cast(dtype) if dtype else plan
    torch.manual_seed(99)
    before = torch.get_rng_state()
    found = plan.materialize(seed=seed, checkpoint=some) if some else plan.materialize(seed=seed)
    after = torch.get_rng_state()
    assert_same_values(eager(build, some, seed, dtype), found)
    assert torch.equal(after, torch.get_rng_state() if is_drawn(plan.graph, some) else before)
