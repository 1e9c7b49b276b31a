"""`gp.lightning`: what is traced for a Fabric, a Trainer or a precision string is what `init_module` constructs, bit for bit."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import nn

import groundplan as gp

from . import zoo
from .law import assert_same, assert_same_states, generator_states

pytest.importorskip("transformers")


def lightnings(*names: str) -> Any:
    """Lightning's package under the first of its names that is there."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    pytest.skip(f"needs {names[0]}", allow_module_level=True)


fabrics = lightnings("lightning_fabric", "lightning.fabric")
trainers = lightnings("pytorch_lightning", "lightning.pytorch")
plugins = importlib.import_module(f"{fabrics.__name__}.plugins")
HalfPrecision: Any = plugins.HalfPrecision
LightningModule: Any = trainers.LightningModule
table = importlib.import_module(f"{fabrics.__name__}.plugins.precision.precision")

NAMES = ["32-true", "16-true", "bf16-true", "64-true", "16-mixed", "bf16-mixed"]
DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_checkpoint = pytest.mark.skipif(
    "checkpoint" not in inspect.signature(gp.Plan.materialize).parameters, reason="materialize has no checkpoint= yet"
)


class Details(nn.Module):
    """Tensors whose dtype the default decides, others whose dtype is said, and what asks for the default."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5))
        self.said = nn.Parameter(torch.rand(3, dtype=torch.float32))
        self.register_buffer("frequencies", 1.0 / 10000 ** (torch.arange(0, 8, 2).float() / 8))
        self.register_buffer("scale", torch.tensor(0.1))
        self.register_buffer("steps", torch.linspace(0, 1, 5))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.like = torch.zeros(2).add_(torch.tensor([1.0, 2.0]))
        self.whole = torch.arange(5)
        self.dtype = torch.get_default_dtype()
        self.third = float(torch.tensor(1.0) / 3)
        self.spectral = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))


SOME = (
    "nn.Transformer",
    "nn.LSTM bidirectional proj",
    "nn.BatchNorm2d",
    "nn.MultiheadAttention kdim",
    "nn.Embedding padding_idx",
)
AWKWARD = ("buffers", "tied", "decides", "moved to half", "half within")
MODELS: dict[str, Callable[[], Any]] = {"details": Details} | zoo.transformers_types()
MODELS |= {name: (zoo.builtins() | zoo.awkward())[name] for name in SOME + AWKWARD}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert torch.get_default_dtype() == before


def fabric_of(precision: Any = None, **kwargs: Any) -> Any:
    return fabrics.Fabric(accelerator="cpu", devices=1, precision=precision, **kwargs)


def trainer_of(precision: Any = None, **kwargs: Any) -> Any:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return trainers.Trainer(accelerator="cpu", devices=1, precision=precision, **quiet, **kwargs)


def constructed(host: Any, build: Callable[[], Any], seed: int = 1) -> Any:
    """As the users of Fabric do it."""
    torch.manual_seed(seed)
    with host.init_module():
        return build()


# -- the same bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_init_module_constructs(name: str, precision: str) -> None:
    fabric, build = fabric_of(precision), MODELS[name]
    expected = constructed(fabric, build)
    after = generator_states()
    built = gp.lightning.trace(fabric, build).materialize(seed=1)
    assert_same(expected, built)
    assert_same_states({"torch": after["torch"]}, generator_states(), "materialize left elsewhere")
    assert_same(expected, gp.lightning.trace(precision, build).materialize(seed=1))


@pytest.mark.parametrize("precision", [*NAMES, 16, 32, 64, "16", "32", "64", "bf16"])
def test_whoever_says_the_precision(precision: Any) -> None:
    fabric, trainer = fabric_of(precision), trainer_of(precision)
    expected = constructed(fabric, Details)
    for said in (fabric, trainer, precision, fabric.strategy.precision, trainer.precision_plugin):
        assert_same(expected, gp.lightning.trace(said, Details).materialize(seed=1))
        with gp.lightning.ambient(said):
            assert_same(expected, gp.trace(Details).materialize(seed=1))
    with fabric.init_module():
        assert_same(expected, gp.trace(Details).materialize(seed=1))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_every_way_to_build(precision: str) -> None:
    expected = dict(constructed(fabric_of(precision), MODELS["Llama"]).named_parameters())
    plan = gp.lightning.trace(precision, MODELS["Llama"])
    filled = gp.materialize(plan.meta_module(), seed=1, group=None)
    parts = plan.materialize_state(list(expected), seed=1)
    for name, tensor in expected.items():
        assert torch.equal(filled.get_parameter(name), tensor) and torch.equal(parts[name], tensor)
        assert tensor.dtype == DTYPES[precision]


def test_what_the_constructor_raises_comes_out() -> None:
    def orthogonal() -> nn.Module:
        module = nn.Linear(3, 3)
        nn.init.orthogonal_(module.weight)  # torch has no QR decomposition of float16
        return module

    with pytest.raises(RuntimeError) as eager:
        constructed(fabric_of("16-true"), orthogonal)
    with pytest.raises(type(eager.value), match="not implemented for 'Half'"):
        gp.lightning.trace("16-true", orthogonal).materialize(seed=1)


@pytest.mark.parametrize("precision", NAMES)
def test_the_users_default_dtype(precision: str) -> None:
    """Fabric leaves it alone where it says nothing."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        expected = constructed(fabric_of(precision), Details)
        built = [gp.lightning.trace(said, Details).materialize(seed=1) for said in (precision, fabric_of(precision))]
    finally:
        torch.set_default_dtype(before)
    for each in built:
        assert_same(expected, each)
    assert expected.weight.dtype == DTYPES.get(precision, torch.float64)


def test_arguments_and_results() -> None:
    plan = gp.lightning.trace("bf16-true", nn.Linear, 3, out_features=4)
    assert plan.decisions.ambient.default_dtype == "bfloat16" and plan.decisions.constructor.endswith("Linear")
    pair = gp.lightning.trace("64-true", lambda: (nn.Linear(2, 2), nn.Linear(3, 3))).materialize(seed=0)
    assert [each.weight.dtype for each in pair] == [torch.float64] * 2


def test_a_saved_plan_comes_back_under_the_same_settings(tmp_path: Path) -> None:
    fabric = fabric_of("bf16-true")
    gp.lightning.trace(fabric, Details).save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    with gp.lightning.ambient(fabric):
        built = loaded.bind(Details).materialize(seed=1)
    assert_same(constructed(fabric, Details), built)
    with pytest.raises(gp.PlanFileError):
        loaded.bind(Details)


# -- names --------------------------------------------------------------------------------------------------------------


def test_every_name_that_fabric_knows_is_known() -> None:
    names = [*get_args(table._PRECISION_INPUT_STR), *get_args(table._PRECISION_INPUT_STR_ALIAS)]
    assert names
    for name in (*names, *get_args(table._PRECISION_INPUT_INT)):
        try:
            gp.lightning.trace(name, nn.Linear, 2, 2)
        except gp.DecisionError as error:
            assert "needs the package transformer_engine" in str(error)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("bf16true", "bf16-true"), ("fp16", "bf16, 16"), ("bnb.nf5", "bnb.nf4"), ("mixed-bf16", ""), (8, ""), (True, "64-true")],
)
def test_a_name_that_there_is_not(wrong: Any, near: str) -> None:
    with pytest.raises(ValueError, match="is no precision of Lightning Fabric; known are 16-true, ") as raised:
        gp.lightning.trace(wrong, nn.Linear, 2, 2)
    assert isinstance(raised.value, gp.DecisionError)
    assert repr(str(wrong)) in str(raised.value) and near in str(raised.value).partition("did you mean")[2]
    with pytest.raises(gp.DecisionError), gp.lightning.ambient(wrong):
        pass


@pytest.mark.parametrize("wrong", [None, 1.5, torch.bfloat16, [], {"16-true"}], ids=str)
def test_what_says_no_precision(wrong: Any) -> None:
    with pytest.raises(gp.DecisionError, match="a Fabric, a Trainer, a precision plugin or a string"):
        gp.lightning.trace(wrong, nn.Linear, 2, 2)


# -- plugins and strategies ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="transformer_engine is installed")
@pytest.mark.parametrize(("name", "instead"), [("transformer-engine", "bf16-true"), ("transformer-engine-float16", "16-true")])
def test_transformer_engine_says_what_it_needs(name: str, instead: str) -> None:
    with pytest.raises(gp.DecisionError, match=f'transformer_engine, 0.11 or newer, which is not installed.*"{instead}"'):
        gp.lightning.trace(name, nn.Linear, 2, 2)


def stand_in(kind: Any, **attributes: Any) -> Any:
    """A plugin whose package is not installed here."""
    plugin = object.__new__(kind)
    vars(plugin).update(attributes)
    return plugin


def test_transformer_engine_constructs_in_its_dtype() -> None:
    kind = plugins.TransformerEnginePrecision
    plugin = stand_in(kind, weights_dtype=torch.float16, replace_layers=None)
    assert gp.lightning.trace(plugin, nn.Linear, 2, 2).graph.tensor("weight").dtype == torch.float16
    with pytest.raises(gp.DecisionError, match="replace_layers=True"):
        gp.lightning.trace(stand_in(kind, weights_dtype=torch.float16, replace_layers=True), nn.Linear, 2, 2)


def linear_class(name: str) -> type:
    return type(name, (nn.Linear,), {})


QUANTIZED = {
    "nf4": "_NF4Linear",
    "nf4-dq": "_NF4DQLinear",
    "fp4": "_FP4Linear",
    "fp4-dq": "_FP4DQLinear",
    "int8": "_Int8LinearInference",
    "int8-training": "_Linear8bitLt",
}


@pytest.mark.parametrize("mode", QUANTIZED)
def test_bitsandbytes_is_a_step_of_the_plan(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def quantize(plan: gp.Plan, name: str) -> gp.Plan:
        asked.append(name)
        return plan

    monkeypatch.setattr(gp.Plan, "quantize", quantize, raising=False)
    attributes = {"dtype": torch.float16, "ignore_modules": set(), "_linear_cls": linear_class(QUANTIZED[mode])}
    plugin = stand_in(plugins.BitsandbytesPrecision, **attributes)
    for said in (f"bnb.{mode}", plugin):
        plan = gp.lightning.trace(said, nn.Linear, 2, 2)
        assert asked.pop() == f"bnb.{mode}"
        assert plan.graph.tensor("weight").dtype in (torch.float16, torch.bfloat16)
        with pytest.raises(gp.DecisionError, match=f"plan.quantize\\('bnb.{mode}'\\)"), gp.lightning.ambient(said):
            pass
    vars(plugin)["ignore_modules"] = {"head"}
    with pytest.raises(gp.DecisionError, match="ignore_modules"):
        gp.lightning.trace(plugin, nn.Linear, 2, 2)


def test_the_names_of_fabrics_quantized_classes() -> None:
    source = Path(inspect.getfile(plugins.BitsandbytesPrecision)).read_text(encoding="utf-8")
    for mode, name in QUANTIZED.items():
        assert f'"{mode}": globals_["{name}"]' in source


@pytest.mark.skipif(hasattr(gp.Plan, "quantize"), reason="plans can be quantized")
def test_quantizing_is_refused_until_plans_can() -> None:
    with pytest.raises(gp.DecisionError, match=r"cannot quantize yet.*bnb\.nf4"):
        gp.lightning.trace("bnb.nf4", nn.Linear, 2, 2)


class Renamed(HalfPrecision):  # type: ignore[misc]
    """A user's own plugin that says nothing about constructors."""


class Own(HalfPrecision):  # type: ignore[misc]
    """One that does."""

    def module_init_context(self) -> Any:
        return nullcontext()


def test_a_plugin_of_your_own() -> None:
    plan = gp.lightning.trace(fabric_of(plugins=Renamed("bf16-true")), nn.Linear, 2, 2)
    assert plan.graph.tensor("weight").dtype == torch.bfloat16
    with pytest.raises(gp.DecisionError, match=r"Own has a module_init_context of its own.*def build"):
        gp.lightning.trace(fabric_of(plugins=Own("bf16-true")), nn.Linear, 2, 2)


def test_a_fabric_that_is_not_launched_raises_what_init_module_raises() -> None:
    strategy = importlib.import_module(f"{fabrics.__name__}.strategies").DDPStrategy()
    fabric = fabrics.Fabric(accelerator="cpu", devices=2, strategy=strategy)
    with pytest.raises(RuntimeError) as expected:
        fabric.init_module()
    with pytest.raises(RuntimeError) as found:
        gp.lightning.trace(fabric, nn.Linear, 2, 2)
    assert str(found.value) == str(expected.value)


def on_cuda(stage_3: bool) -> Any:
    """A Fabric with one CUDA device, on a machine without."""
    kind = importlib.import_module(f"{fabrics.__name__}.strategies").SingleDeviceStrategy
    strategy = kind(torch.device("cuda", 0), precision=plugins.HalfPrecision("bf16-true"))
    vars(strategy)["zero_stage_3"] = stage_3
    refused = SimpleNamespace(strategy=strategy, init_module=lambda: pytest.fail("ZeRO stage 3 would partition the modules"))
    return refused if stage_3 else SimpleNamespace(strategy=strategy, init_module=strategy.module_init_context)


@pytest.mark.parametrize("stage_3", [False, True])
def test_the_device_of_the_strategy(stage_3: bool) -> None:
    plan = gp.lightning.trace(on_cuda(stage_3), nn.Linear, 2, 2)
    assert plan.decisions.reference == "cuda" and plan.decisions.ambient.default_device == "cuda:0"
    assert plan.decisions.ambient.default_dtype == "bfloat16"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", NAMES)
@pytest.mark.parametrize("name", ["details", "nn.Transformer", "nn.LSTM bidirectional proj", "Llama", "GPT-2", "BERT"])
def test_on_cuda_it_draws_from_cudas_stream(name: str, precision: str) -> None:
    fabric = fabrics.Fabric(accelerator="cuda", devices=1, precision=precision)
    expected = constructed(fabric, MODELS[name])
    after = torch.cuda.get_rng_state()
    assert next(expected.parameters()).device == fabric.device
    plan = gp.lightning.trace(fabric, MODELS[name])
    assert plan.decisions.reference == "cuda"
    assert_same(expected, plan.materialize(seed=1))
    assert torch.equal(torch.cuda.get_rng_state(), after)
    parts = plan.materialize_state([each for each, _ in expected.named_parameters()], seed=1)
    assert all(torch.equal(parts[each], tensor) for each, tensor in expected.named_parameters())


# -- empty_init and checkpoints -----------------------------------------------------------------------------------------


def test_what_empty_init_skips_is_never_taken_for_a_value() -> None:
    with fabric_of().init_module(empty_init=True):
        plan = gp.trace(nn.Linear, 3, 4)
    with pytest.raises(gp.UninitializedError, match="weight"):
        plan.materialize(seed=0)


@needs_checkpoint
def test_a_partial_checkpoint_leaves_nothing_uninitialized(tmp_path: Path) -> None:
    """Which is what Fabric warns of."""
    path, build, fabric = tmp_path / "model.pt", MODELS["nn.Transformer"], fabric_of("bf16-true")
    saved = constructed(fabric, build, seed=5).state_dict()
    expected = constructed(fabric, build, seed=1).state_dict() | {name: saved[name] for name in saved if "decoder" not in name}
    torch.save({name: tensor for name, tensor in saved.items() if "decoder" not in name}, path)
    plan = gp.lightning.trace(fabric, build)
    built = plan.materialize(seed=1, checkpoint=path).state_dict()  # type: ignore[call-arg,unused-ignore]
    for name, tensor in expected.items():
        assert torch.equal(built[name], tensor), name


class Classifier(LightningModule):  # type: ignore[misc]
    """A small LightningModule whose network is made with it."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        self.register_buffer("passing", torch.linspace(0, 1, 4), persistent=False)

    def training_step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.network(inputs.to(self.network[0].weight.dtype)), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def batches() -> Any:
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, generator=generator), index % 3) for index in range(8)]
    return torch.utils.data.DataLoader(data, batch_size=4)  # type: ignore[arg-type]


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint that the Trainer wrote, and the model that it is of."""
    trainer, model = trainer_of(max_steps=2), Classifier()
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt", model


@needs_checkpoint
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_state_dict_in_place_of_empty_init(precision: str, tmp_path: Path) -> None:
    fabric, path, build = fabric_of(precision), tmp_path / "model.pt", MODELS["Llama"]
    torch.save(constructed(fabric, build, seed=5).state_dict(), path)
    with fabric.init_module(empty_init=True):
        expected = build()
    expected.load_state_dict(torch.load(path))
    built = gp.lightning.trace(fabric, build).materialize(checkpoint=path)  # type: ignore[call-arg,unused-ignore]
    for name, tensor in expected.state_dict().items():
        assert torch.equal(built.state_dict()[name], tensor), name


@needs_checkpoint
def test_a_lightning_checkpoint(trained: tuple[Path, Any]) -> None:
    path, model = trained
    plan = gp.lightning.trace("32-true", Classifier)
    built: Any
    for built in (
        plan.materialize(checkpoint=path),  # type: ignore[call-arg,unused-ignore]
        gp.materialize(plan.meta_module(), checkpoint=path, group=None),  # type: ignore[call-arg,unused-ignore]
    ):
        for name, tensor in model.state_dict().items():
            assert torch.equal(built.state_dict()[name], tensor), name
        assert torch.equal(built.passing, model.passing), "a buffer that no checkpoint has comes from its recipe"


# -- in use -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_a_step_of_fabric(precision: str) -> None:
    def step(model: nn.Module) -> nn.Module:
        prepared, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(prepared(torch.ones(2, 6)).square().sum())
        optimizer.step()
        return model

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    fabric = fabric_of(precision)
    expected, found = step(constructed(fabric, build)), step(gp.lightning.trace(fabric, build).materialize(seed=1))
    for (name, tensor), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(tensor, other), name


class Configured(Classifier):
    """One whose network is made in `configure_model`, twice: by eager, and by a plan."""

    def __init__(self) -> None:
        super().__init__()
        del self.network

    def configure_model(self) -> None:
        if hasattr(self, "network"):
            return
        plan = gp.trace(Classifier)
        self.network = plan.materialize(seed=2).network
        torch.manual_seed(2)
        assert_same(Classifier(), plan.materialize(seed=2))
        self.seen = self.network[0].weight.dtype


@pytest.mark.parametrize("precision", NAMES)
def test_configure_model(precision: str) -> None:
    model = Configured()
    trainer = trainer_of(precision, max_steps=1)
    trainer.fit(model, batches())
    assert trainer.global_step == 1 and model.seen == DTYPES.get(precision, torch.float32)


def test_groundplan_imports_nothing_of_lightning() -> None:
    code = (
        "import sys, groundplan as gp, torch; gp.lightning.trace('bf16-true', torch.nn.Linear, 2, 2).materialize(seed=0); "
        "print([name for name in sys.modules if 'lightning' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert done.stdout.strip() == "['groundplan.lightning']", done.stderr
