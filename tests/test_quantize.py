"""plan.quantize: what torchao or bitsandbytes makes of eager's model, bit for bit; what is saved, counted and refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.quantizing import config_data, config_of, picks
from groundplan.runtime import quantizers

from .jobs import GIVEN_BACK
from .law import content

SEED = 3
INT4 = torch.int4  # type: ignore[attr-defined]
warnings.filterwarnings("ignore", message="enable_nested_tensor")

Build = Callable[[], nn.Module]


# -- models and configs -------------------------------------------------------------------------------------------------


def llama(tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: Any = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config: Any = LlamaConfig(num_hidden_layers=2, vocab_size=256, tie_word_embeddings=tied, **size)
    return LlamaForCausalLM(config)


class Mixed(nn.Module):
    """Layers in a list, a convolution, a buffer, ties between two layers, a shape that no group divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)) for _ in range(2))
        self.conv, self.norm = nn.Conv1d(64, 64, 3), nn.BatchNorm1d(64)
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.other.weight = self.one.weight
        self.odd = nn.Linear(64, 10).requires_grad_(False)


BUILDS: dict[str, Build] = {
    "tied Llama": lambda: llama(True),
    "Llama": lambda: llama(False),
    "nn.Transformer": lambda: nn.Transformer(32, 2, 2, 2, 64),
    "mixed": Mixed,
    "a layer": lambda: nn.Linear(32, 64),
}


def configs() -> dict[str, Any]:
    quantization = pytest.importorskip("torchao.quantization")
    return {
        "int8": quantization.Int8WeightOnlyConfig(),
        "int8 by groups": quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32)),
        "int8 by tensor": quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor()),
        "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig(),
        "int4": quantization.IntxWeightOnlyConfig(weight_dtype=INT4, granularity=quantization.PerGroup(32)),
        "float8": quantization.Float8WeightOnlyConfig(),
    }


NAMES = ("int8", "int8 by groups", "int8 by tensor", "int8 dynamic", "int4", "float8")


def config_named(name: str) -> Any:
    return configs()[name]


def eager(build: Build, config: Any, dtype: torch.dtype | None = None, **chosen: Any) -> nn.Module:
    from torchao.quantization import quantize_

    torch.manual_seed(SEED)
    model = build() if dtype is None else build().to(dtype)
    quantize_(model, config, **chosen)
    return model


# -- comparing ----------------------------------------------------------------------------------------------------------


def parts(tensor: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a tensor is made of: torchao's, or what bitsandbytes hangs on to it."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from ((f"{name}.{inner}", each) for inner, each in parts(getattr(tensor, name)))
        return
    yield "", tensor.detach()
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield from (("absmax", state.absmax), ("code", state.code))
        state = state.state2
    if getattr(tensor, "SCB", None) is not None:
        yield "SCB", tensor.SCB


def members(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict((*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)))


def assert_equal(found: nn.Module, expected: nn.Module) -> None:
    """Every value, inside quantized tensors as well, and the classes, ties and flags."""
    mine, theirs = members(found), members(expected)
    assert list(mine) == list(theirs)
    assert [type(each) for each in found.modules()] == [type(each) for each in expected.modules()]
    for name, tensor in theirs.items():
        assert type(mine[name]) is type(tensor) and mine[name].requires_grad == tensor.requires_grad, name
        for (inner, one), (also, other) in zip(parts(mine[name]), parts(tensor), strict=True):
            assert (inner, one.dtype, one.shape, one.stride()) == (also, other.dtype, other.shape, other.stride()), name
            assert content(one) == content(other), (name, inner)
        if hasattr(tensor, "dequantize"):
            assert torch.equal(mine[name].dequantize(), tensor.dequantize()), name
    assert ties(mine) == ties(theirs)
    assert repr(found) == repr(expected)


def ties(tensors: dict[str, torch.Tensor]) -> set[frozenset[str]]:
    return {frozenset(name for name, each in tensors.items() if each is tensor) for tensor in tensors.values()}


# -- it is eager's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as built", "bfloat16"])
@pytest.mark.parametrize("name", ["int8", "int8 dynamic", "float8"])
@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_it_is_eagers_model_quantized(build: Build, name: str, dtype: torch.dtype | None) -> None:
    config = config_named(name)
    plan = gp.trace(build) if dtype is None else gp.trace(build).cast(dtype)
    found = plan.quantize(config).materialize(seed=SEED)
    after = torch.get_rng_state()
    expected = eager(build, config, dtype)
    assert torch.equal(after, torch.get_rng_state())
    assert_equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_in_one_go_or_by_stretches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "_STRETCH", 2**10)
    monkeypatch.setattr(quantizers, "_STRETCHES", 2**10)
    config = config_named(name)
    plan = gp.trace(llama, False).cast(torch.bfloat16).quantize(config)
    assert_equal(plan.materialize(seed=SEED), eager(lambda: llama(False), config, torch.bfloat16))


def test_stretches_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "_STRETCH", 2**10)
    by_rows = {name: quantizers.is_by_rows(config_data(config)) for name, config in configs().items()}
    assert [name for name, whether in by_rows.items() if not whether] == ["int8 by tensor"]
    taken: list[nn.Module] = []
    monkeypatch.setattr(quantizers.Torchao, "_in_stretches", lambda self, layer: taken.append(layer))
    gp.trace(llama, False).quantize(config_named("int8")).materialize(seed=SEED)
    assert len([layer for layer in taken if not layer.weight.is_meta]) == 15


def test_tied_weights_come_apart_as_in_eager() -> None:
    model = gp.trace(llama, True).quantize(config_named("int8")).materialize(seed=SEED)
    assert type(model.model.embed_tokens.weight) is nn.Parameter
    assert model.lm_head.weight is not model.model.embed_tokens.weight and hasattr(model.lm_head.weight, "dequantize")


def test_what_it_computes_is_eagers() -> None:
    config = config_named("int8")
    model = gp.trace(llama, True).quantize(config).materialize(seed=SEED)
    expected, words = eager(lambda: llama(True), config), torch.arange(12).reshape(3, 4)
    with torch.no_grad():
        assert content(model(words).logits) == content(expected(words).logits)


def test_without_a_seed_it_draws_from_the_global_generator() -> None:
    plan = gp.trace(Mixed).quantize(config_named("int8"))
    torch.manual_seed(SEED)
    first, second = plan.materialize(), plan.materialize()
    after = torch.get_rng_state()
    assert_equal(first, eager(Mixed, config_named("int8")))
    torch.manual_seed(SEED)
    Mixed()
    Mixed()
    assert torch.equal(after, torch.get_rng_state())
    assert content(first.conv.weight.detach()) != content(second.conv.weight.detach())


def test_keyed_values_are_those_of_the_plain_build() -> None:
    from torchao.quantization import quantize_

    plan, config = gp.trace(Mixed).cast(torch.bfloat16), config_named("int8")
    before = torch.get_rng_state()
    found = plan.quantize(config).materialize(seed=SEED, rng="keyed")
    assert torch.equal(before, torch.get_rng_state())
    expected = plan.materialize(seed=SEED, rng="keyed")
    quantize_(expected, config)
    assert_equal(found, expected)


def test_the_users_settings_hold_while_it_is_quantized() -> None:
    from torchao.quantization import quantize_

    config = config_named("int8")
    plan = gp.trace(Mixed).quantize(config)
    with torch.no_grad():
        found = plan.materialize(seed=SEED)
        torch.manual_seed(SEED)
        expected = Mixed()
        quantize_(expected, config)
    assert_equal(found, expected)
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


# -- which layers -------------------------------------------------------------------------------------------------------


def _blocks_only(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith("blocks.")


@pytest.mark.parametrize(
    ("chosen", "layers"),
    [
        ("blocks.*", ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]),
        (["blocks.0.*", "odd"], ["blocks.0.0", "blocks.0.2", "odd"]),
        (_blocks_only, ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]),
        ("o*", ["one", "other", "odd"]),
        (None, ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "one", "other", "odd"]),
    ],
)
def test_a_filter_picks_layers(chosen: Any, layers: list[str]) -> None:
    config = config_named("int8")
    plan = gp.trace(Mixed).quantize(config, filter=chosen)
    assert list(plan.decisions.quantizing[0].layers) == layers
    picked = eager(Mixed, config, filter_fn=lambda module, name: name in layers)
    assert_equal(plan.materialize(seed=SEED), picked)


def test_a_plain_name_picks_any_module() -> None:
    config = config_named("int4")
    plan = gp.trace(Mixed).quantize(config, filter="embed")
    assert_equal(plan.materialize(seed=SEED), eager(Mixed, config, filter_fn=lambda module, name: name == "embed"))
    assert not picks("em*", "embed", False)


def test_several_calls_for_layers_of_their_own() -> None:
    from torchao.quantization import quantize_

    eight, four = config_named("int8"), config_named("int4")
    plan = gp.trace(Mixed).quantize(eight, filter="blocks.0.*").quantize(four, filter=["blocks.1.*"])
    expected = eager(Mixed, eight, filter_fn=lambda module, name: name in ("blocks.0.0", "blocks.0.2"))
    quantize_(expected, four, filter_fn=lambda module, name: name in ("blocks.1.0", "blocks.1.2"))
    assert_equal(plan.materialize(seed=SEED), expected)
    with pytest.raises(gp.DecisionError, match=r"blocks\.0\.0 is quantized already \(Int8WeightOnlyConfig"):
        plan.quantize(four)


def test_what_torchao_passes_over_stays_as_it_is() -> None:
    """Int4WeightOnlyConfig leaves a layer alone whose rows its groups do not divide."""
    quantization = pytest.importorskip("torchao.quantization")
    config = quantization.Int4WeightOnlyConfig(group_size=128)
    plan = gp.trace(odd).quantize(config)
    assert_equal(plan.materialize(seed=SEED), eager(odd, config))
    assert "float32[8, 100]: stays at 3.20 kB" in str(plan.explain())


def odd() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 8))


# -- saved and shown ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    config = config_named(name)
    plan = gp.trace(llama, True).cast(torch.bfloat16).quantize(config, filter=["model.layers.*", "lm_head"])
    plan.save(tmp_path / "plan.json")
    again = gp.Plan.load(tmp_path / "plan.json").bind(llama, True)
    assert again.decisions == plan.decisions
    assert config_of(again.decisions.quantizing[0].config) == config
    assert_equal(again.materialize(seed=SEED), plan.materialize(seed=SEED))


INT8 = {"_type": "Int8WeightOnlyConfig", "_version": 2}


@pytest.mark.parametrize(
    "data",
    [
        {"_type": "quantize_", "_version": 1, "_data": {"model": None}},
        {"_type": "Int8Tensor", "_version": 1, "_data": {}},
        {"_type": "torch.dtype", "_data": "load"},
        {
            "_type": "Int8WeightOnlyConfig",
            "_version": 2,
            "_data": {"granularity": {"_type": "swap_conv2d_1x1_to_linear", "_data": {}}},
        },
        {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": {"_type": "MappingType", "_data": "mro"}}},
        {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"no_such_field": 1}},
        {"_type": ["a", "list"], "_data": {}},
    ],
)
def test_a_file_names_records_of_torchao_and_nothing_else(data: Any) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(gp.DecisionError, match="torchao"):
        config_of(data)


def test_the_decision_is_explained() -> None:
    plan = gp.trace(llama, True).cast(torch.bfloat16).quantize(config_named("int8"), filter="*mlp*")
    told = str(plan.explain())
    assert "quantize 6 layers by Int8WeightOnlyConfig" in told and "bfloat16[128, 64]: 16.38 kB → 8.83 kB" in told
    assert "as model.layers.0.mlp.up_proj.weight" in " ".join(str(plan.explain("model.layers.0.mlp.up_proj.weight")).split())
    assert "quantized" not in str(plan.explain("model.norm.weight"))
    assert "quantize 6 layers" in " ".join(str(plan.report()).split())
    assert plan.report().to_json()["quantizing"][0]["filter"] == ["*mlp*"]


# -- memory -------------------------------------------------------------------------------------------------------------


def held_bytes(module: nn.Module) -> int:
    found = {id(each): sum(part.nbytes for _, part in parts(each)) for each in members(module).values()}
    return sum(found.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("build", [BUILDS["tied Llama"], BUILDS["Llama"], Mixed], ids=["tied Llama", "Llama", "mixed"])
def test_memory_counts_quantized_weights(build: Build, name: str) -> None:
    plan = gp.trace(build).cast(torch.bfloat16).quantize(config_named(name))
    memory, held = plan.memory(), held_bytes(plan.materialize(seed=SEED))
    assert memory.phases["checkpoint"] == held
    assert held < memory.phases["construct"]


def test_what_cannot_be_tried_here_counts_as_it_is() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plan = gp.trace(nn.Linear, 256, 64)
    config = quantization.Int4WeightOnlyConfig(group_size=128, int4_packing_format="plain_int32")  # CUDA and XPU only
    quantized = plan.quantize(config)
    assert quantized.memory().phases["checkpoint"] == plan.memory().phases["checkpoint"]
    assert "weights of float32[64, 256] count as not quantized" in str(quantized.memory())
    before = torch.get_rng_state()
    with pytest.raises(gp.MaterializeError, match=r"the module \(Linear, float32\[64, 256\]\) cannot be quantized by Int4Weight"):
        quantized.materialize(seed=SEED)
    assert torch.equal(before, torch.get_rng_state())


# -- what is refused ----------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(gp.DecisionError, match=r"'blocks\.0\.1x' matches no linear layer; did you mean blocks"):
        gp.trace(Mixed).quantize(config_named("int8"), filter=["blocks.0.*", "blocks.0.1x"])


@pytest.mark.parametrize("chosen", ["", [], [3], 3, lambda module, name: False])
def test_a_filter_that_is_none(chosen: Any) -> None:
    with pytest.raises(gp.DecisionError, match="filter="):
        gp.trace(Mixed).quantize(config_named("int8"), filter=chosen)


def test_a_module_without_linear_layers() -> None:
    with pytest.raises(gp.DecisionError, match="no linear layer"):
        gp.trace(nn.Embedding, 3, 4).quantize(config_named("int8"))


@pytest.mark.parametrize("config", ["int8", "bnb.nf5", 8, torch.int8, None, nn.Linear])
def test_a_config_that_is_none(config: Any) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(gp.DecisionError, match=r"quantize takes a torchao config such as .*, or one of bnb\.nf4"):
        gp.trace(Mixed).quantize(config)


def test_a_config_that_cannot_be_saved() -> None:
    quantization = pytest.importorskip("torchao.quantization")

    class Own(quantization.Int8WeightOnlyConfig):  # type: ignore[name-defined, misc]
        pass

    with pytest.raises(gp.DecisionError, match="a plan cannot keep this Own"):
        gp.trace(Mixed).quantize(Own())
    static = quantization.Int8StaticActivationInt8WeightConfig(act_quant_scale=torch.ones(1))
    with pytest.raises(gp.DecisionError, match="a plan cannot keep this Int8StaticActivationInt8WeightConfig"):
        gp.trace(Mixed).quantize(static)
    with pytest.raises(gp.DecisionError, match="give each of its configs a call"):
        gp.trace(Mixed).quantize(quantization.FqnToConfig())


def test_groups_that_do_not_divide_a_row_raise_as_in_torchao() -> None:
    config, before = config_named("int4"), torch.get_rng_state()
    with pytest.raises(AssertionError, match="divisible"):
        eager(odd, config)
    torch.set_rng_state(before)
    with pytest.raises(gp.MaterializeError, match=r"0 \(Linear, float32\[8, 100\]\) cannot be quantized by Intx.*divisible"):
        gp.trace(odd).quantize(config).materialize(seed=SEED)
    assert torch.equal(before, torch.get_rng_state())


def test_beside_other_decisions() -> None:
    config = config_named("int8")
    plan = gp.trace(Mixed)
    with pytest.raises(gp.DecisionError, match=r"leave out \.shard\(\.\.\.\)"):
        plan.shard({"dp": 2}, units="blocks.*").quantize(config)
    with pytest.raises(gp.DecisionError, match=r"leave out \.place\(\.\.\.\)"):
        plan.place({"*": "cpu"}).quantize(config)
    quantized = plan.quantize(config)
    later: list[Callable[[], gp.Plan]] = [
        lambda: quantized.shard({"dp": 2}, units="blocks.*"),
        lambda: quantized.place({"*": "cpu"}),
        lambda: quantized.cast(torch.bfloat16),
        lambda: quantized.to("cpu"),
    ]
    for decide in later:
        with pytest.raises(gp.DecisionError, match="quantize"):
            decide()
    with pytest.raises(gp.DecisionError, match="several modules"):
        gp.trace(lambda: (nn.Linear(3, 4), nn.Linear(4, 3))).quantize(config)


def test_parts_of_a_plan_that_quantizes() -> None:
    plan = gp.trace(Mixed).quantize(config_named("int8"))
    with pytest.raises(gp.MaterializeError, match=r"one\.weight is quantized"):
        plan.materialize_state(["one.weight"], seed=SEED)
    assert torch.equal(plan.materialize_state(["norm.weight"], seed=SEED)["norm.weight"], torch.ones(64))
    with pytest.raises(gp.MaterializeError, match=r"the plan quantizes .* which plan\.materialize\(\) does"):
        gp.materialize(plan.meta_module(), seed=SEED)


@pytest.mark.parametrize(("library", "config"), [("torchao.core.config", "int8"), ("bitsandbytes", "bnb.nf4")])
def test_a_library_that_is_missing(library: str, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config if config.startswith("bnb") else config_named(config)
    monkeypatch.setitem(sys.modules, library, None)
    name = library.partition(".")[0]
    with pytest.raises(gp.DecisionError, match=f"needs {name} .*pip install {name}"):
        gp.trace(Mixed).quantize(given)


# -- bitsandbytes -------------------------------------------------------------------------------------------------------

MODES = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")


def by_bitsandbytes(model: nn.Module, mode: str) -> nn.Module:
    """Every linear layer replaced by bitsandbytes' class with the same values, as its documentation does."""
    bnb: Any = pytest.importorskip("bitsandbytes")
    for name, child in model.named_children():
        if not isinstance(child, nn.Linear):
            by_bitsandbytes(child, mode)
            continue
        shape = (child.in_features, child.out_features, child.bias is not None)
        if mode == "bnb.int8":
            made = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
            made.weight = bnb.nn.Int8Params(child.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        else:
            kind = {"quant_type": mode[4:7], "compress_statistics": mode.endswith("-dq")}
            made = bnb.nn.Linear4bit(*shape, **kind)
            made.weight = bnb.nn.Params4bit(child.weight.data.clone(), requires_grad=False, module=made, **kind)
        made.bias = child.bias
        setattr(model, name, made.to("cpu"))
    return model


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["as built", "float16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "build", [BUILDS["tied Llama"], BUILDS["nn.Transformer"], Mixed], ids=["Llama", "nn.Transformer", "mixed"]
)
def test_bitsandbytes_makes_of_eagers_model(build: Build, mode: str, dtype: torch.dtype | None) -> None:
    pytest.importorskip("bitsandbytes")
    plan = gp.trace(build) if dtype is None else gp.trace(build).cast(dtype)
    found = plan.quantize(mode).materialize(seed=SEED)
    after = torch.get_rng_state()
    torch.manual_seed(SEED)
    model = build() if dtype is None else build().to(dtype)
    assert torch.equal(after, torch.get_rng_state())
    assert_equal(found, by_bitsandbytes(model, mode))


@pytest.mark.parametrize("mode", MODES)
def test_bitsandbytes_as_lightning_converts(mode: str) -> None:
    """Its classes are Lightning's own subclasses; the values are compared."""
    pytest.importorskip("bitsandbytes")
    fabric: Any = pytest.importorskip("lightning_fabric.plugins.precision.bitsandbytes")
    found = gp.trace(llama, True).cast(torch.float16).quantize(mode).materialize(seed=SEED)
    torch.manual_seed(SEED)
    expected = fabric.BitsandbytesPrecision(mode[4:], dtype=torch.float16).convert_module(llama(True).to(torch.float16)).to("cpu")
    mine, theirs = members(found), members(expected)
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        for (inner, one), (also, other) in zip(parts(mine[name]), parts(tensor), strict=True):
            assert (inner, content(one)) == (also, content(other)), name


@pytest.mark.parametrize("mode", MODES)
def test_memory_counts_what_bitsandbytes_makes(mode: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plan = gp.trace(llama, False).quantize(mode)
    held = held_bytes(plan.materialize(seed=SEED))
    assert held * 0.99 <= plan.memory().phases["checkpoint"] <= held * 1.01
    plan.save(tmp_path / "plan.json")
    assert gp.Plan.load(tmp_path / "plan.json").bind(llama, False).decisions == plan.decisions
    assert f"quantize 15 layers by {mode}" in str(plan.explain())


def test_bitsandbytes_takes_linear_layers_only() -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(gp.MaterializeError, match=r"embed \(Embedding, .*bitsandbytes quantizes nn\.Linear"):
        gp.trace(Mixed).quantize("bnb.nf4", filter="embed").materialize(seed=SEED)


def test_from_a_checkpoint() -> None:
    """What is in it is read layer by layer and quantized; the rest is the constructor's: as eager's model, loaded before."""
    build, config = BUILDS["Llama"], config_named("int8")
    from torchao.quantization import quantize_

    given = {name: tensor + 1 for number, (name, tensor) in enumerate(build().state_dict().items()) if number % 2}
    torch.manual_seed(SEED)
    expected = build()
    expected.load_state_dict(given, strict=False)
    quantize_(expected, config)
    assert_equal(gp.trace(build).quantize(config).materialize(seed=SEED, checkpoint=given), expected)


PEAK = """
import resource, sys, torch, groundplan as gp
from torchao.quantization import Int8WeightOnlyConfig
def build(): return torch.nn.Sequential(*[torch.nn.Linear(2048, 2048, bias=False) for _ in range(48)])
def built(build, **options): return gp.trace(build).cast(torch.bfloat16).quantize(Int8WeightOnlyConfig()).materialize(**options)
built(lambda: torch.nn.Sequential(torch.nn.Linear(8, 8)), seed=0)
gp.trace(build).save_checkpoint(1, sys.argv[1] + "/all.safetensors")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
built(build, **({"checkpoint": sys.argv[1] + "/all.safetensors"} if sys.argv[2] == "read" else {"seed": 0}))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("how", ["drawn", "read"])
def test_layers_that_are_quantized_are_gone(how: str, tmp_path: Path) -> None:
    """201 MB quantized, 403 MB in bfloat16: of these no more than two layers, beside torchao's temporaries."""
    pytest.importorskip("torchao")
    command, surroundings = [sys.executable, "-c", PEAK, str(tmp_path), how], os.environ | GIVEN_BACK
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 201e6 + 2 * 17e6 + 150e6, f"{int(done.stdout):,}"
