"""A hub's checkpoint, by groundplan: the same as `from_pretrained`, for many architectures of the transformers library."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import groundplan as gp
from groundplan.runtime.boxes import Box, whole_box
from groundplan.runtime.entries import Entry
from groundplan.runtime.hub import Converted, can_load, converted, finish_loading

from .hub_models import Small, inputs_of, mixture, outputs_of, small

pytestmark = pytest.mark.filterwarnings("ignore")

# Left out: chinese_clip, whose row for the padding token from_pretrained sets to zero after it has read it from the file.
WITH_OUTPUTS = (
    *("llama", "gemma2", "gemma3", "gemma3_text", "qwen3", "falcon", "bloom", "gpt2", "gpt_neox", "opt", "glm", "granite"),
    *("qwen2_moe", "qwen3_moe", "deepseek_v3", "olmoe", "ernie4_5_moe", "jetmoe", "granitemoe"),
    *("bert", "roberta", "albert", "deberta-v2", "distilbert", "modernbert", "electra", "gte", "big_bird", "convbert"),
    *("t5", "mt5", "bart:ForConditionalGeneration", "m2m_100", "marian:MTModel", "pegasus:ForConditionalGeneration"),
    *("vit", "beit", "deit", "dinov2", "swin", "convnext", "resnet", "segformer", "vit_mae", "depth_anything", "pixtral"),
    *("wav2vec2:ForCTC", "hubert:ForCTC", "audio-spectrogram-transformer", "whisper:ForConditionalGeneration", "speech_to_text"),
    *("llava", "got_ocr2", "git", "florence2", "internvl", "siglip:ForImageClassification", "gradium_phonon_tts"),
    *("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "falcon_h1"),
)
TENSORS_ONLY = (
    *("encodec", "encoder-decoder", "rt_detr", "idefics", "blip", "blip-2", "clip:Model", "zamba2", "recurrent_gemma", "lfm2"),
    *("timesformer", "vivit", "hrm_text", "wav2vec2-bert", "sam", "gpt_oss", "inkling2_loop_text", "qwen2_vl"),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small models are no work for two, which wait for each other where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- a checkpoint's entries, and loading by them ------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file; how many elements of it are read is noted."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    where: str
    file: Any
    reads: list[int]

    divisible = True
    position = ("", 0)

    @property
    def elements(self) -> Any:
        return id(self)

    def expect(self, box: Box) -> None:
        pass

    def read(self, box: Box, out: torch.Tensor) -> None:
        assert tuple(map(len, box)) == tuple(out.shape)
        self.reads.append(out.numel())
        out.copy_(self.file.get_tensor(self.name)[slices(box)])


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(each.start, each.stop, each.step) for each in box)


def entries_of(directory: Path) -> dict[str, Stored]:
    found: dict[str, Stored] = {}
    for path in sorted(directory.glob("*.safetensors")):
        file: Any = safe_open(path, "pt")
        for name in file.keys():  # noqa: SIM118 (no mapping)
            tensor = file.get_tensor(name)
            found[name] = Stored(name, tuple(tensor.shape), tensor.dtype, str(path), file, [])
    return found


def loaded(build: Callable[[], Any], directory: Path) -> Any:
    """Load with groundplan."""
    torch.manual_seed(2)
    return gp.trace(build).materialize(checkpoint=directory, unexpected="ignore")


def filled(module: nn.Module, entries: Mapping[str, Entry]) -> None:
    state = module.state_dict()
    for name, entry in entries.items():
        assert tuple(entry.shape) == tuple(state[name].shape), name
        entry.read(whole_box(entry.shape), state[name])


def whole(entry: Entry, dtype: torch.dtype | None = None) -> torch.Tensor:
    out = torch.empty(entry.shape, dtype=dtype or entry.dtype)
    entry.read(whole_box(entry.shape), out)
    return out


def assert_same(module: nn.Module, reference: nn.Module, missing: set[str]) -> None:
    state, expected = module.state_dict(), reference.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert name in missing or torch.equal(state[name], tensor), name
    buffers = dict(module.named_buffers())
    for name, buffer in reference.named_buffers():
        assert name in missing or (buffers[name].dtype == buffer.dtype and torch.equal(buffers[name], buffer)), name


def assert_same_outputs(module: Any, reference: Any) -> None:
    for parameter in reference.parameters():  # from where it lies in the file, some kernels sum in another order
        parameter.data = parameter.data.clone()
    inputs = inputs_of(reference)
    found, expected = outputs_of(module, inputs), outputs_of(reference, inputs)
    assert len(found) == len(expected) > 0
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine.nan_to_num(), its.nan_to_num())


def chosen(text: str) -> Small:
    model_type, _, ending = text.partition(":")
    return small(model_type, ending)


# -- the same as from_pretrained ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*WITH_OUTPUTS, *TENSORS_ONLY])
def test_equals_from_pretrained(text: str, tmp_path: Path) -> None:
    model = chosen(text)
    directory = model.saved(tmp_path)
    reference, info = model.reference(directory)
    module = loaded(model.build, directory)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same(module, reference, set())
    if text in WITH_OUTPUTS:
        assert_same_outputs(module, reference)


@pytest.mark.parametrize("text", ["llama", "qwen3_moe", "bert:MaskedLM", "t5", "llava"])
def test_in_many_files(text: str, tmp_path: Path) -> None:
    model = chosen(text)
    directory = model.saved(tmp_path, max_shard_size="40KB")
    assert (directory / "model.safetensors.index.json").exists()
    assert_same(loaded(model.build, directory), model.reference(directory)[0], set())


BASE_AND_HEAD = ("llama", "qwen3_moe", "bert", "vit", "gpt2", "llava", "wav2vec2", "mamba", "gemma3", "dinov2")


@pytest.mark.parametrize("model_type", BASE_AND_HEAD)
def test_a_head_from_its_base(model_type: str, tmp_path: Path) -> None:
    head, base = small(model_type), small(model_type, "Model")
    directory = Small(base.kind, head.config).saved(tmp_path)
    reference, info = head.reference(directory)
    assert_same(loaded(head.build, directory), reference, set(info["missing_keys"]))


@pytest.mark.parametrize("model_type", BASE_AND_HEAD)
def test_a_base_from_a_head(model_type: str, tmp_path: Path) -> None:
    head, base = small(model_type), small(model_type, "Model")
    directory = head.saved(tmp_path)
    reference, info = Small(base.kind, head.config).reference(directory)
    module = loaded(Small(base.kind, head.config).build, directory)
    assert_same(module, reference, set(info["missing_keys"]))
    assert set(converted(module, entries_of(directory)).unexpected) == set(info["unexpected_keys"])


def test_in_another_dtype(tmp_path: Path) -> None:
    model = mixture()
    directory = model.saved(tmp_path)
    reference, _ = model.reference(directory, dtype=torch.bfloat16)
    build = functools.partial(model.kind._from_config, model.config, dtype=torch.bfloat16)
    assert_same(loaded(build, directory), reference, set())


def test_what_is_missing_is_named_as_by_transformers(tmp_path: Path) -> None:
    model = small("bert", "ForSequenceClassification")
    directory = Small(small("bert", "Model").kind, model.config).saved(tmp_path)
    _, info = model.reference(directory)
    module = model.build()
    checkpoint = converted(module, entries_of(directory))
    assert set(module.state_dict()) - set(checkpoint.entries) - set(checkpoint.optional) == set(info["missing_keys"])


# -- names of old files -------------------------------------------------------------------------------------------------


def renamed(directory: Path, change: Callable[[str], str], **more: torch.Tensor) -> None:
    """The file with other keys, and with more of them."""
    path = directory / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(path).items()} | more
    save_file(tensors, path, metadata={"format": "pt"})


def test_gamma_and_beta(tmp_path: Path) -> None:
    model = small("bert", "MaskedLM")
    directory = model.saved(tmp_path)
    renamed(directory, lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("Norm.bias", "Norm.beta"))
    assert any(name.endswith("gamma") for name in entries_of(directory))
    assert_same(loaded(model.build, directory), model.reference(directory)[0], set())


def test_weight_norm(tmp_path: Path) -> None:
    model = small("wav2vec2", "ForCTC")
    directory = model.saved(tmp_path)
    old = {".parametrizations.weight.original0": ".weight_g", ".parametrizations.weight.original1": ".weight_v"}
    renamed(directory, lambda name: next((name.replace(new, key) for new, key in old.items() if new in name), name))
    assert any(name.endswith("weight_g") for name in entries_of(directory))
    assert_same(loaded(model.build, directory), model.reference(directory)[0], set())


def test_keys_without_a_place(tmp_path: Path) -> None:
    model = small("llama")
    directory = model.saved(tmp_path)
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    renamed(directory, str, **{old: torch.ones(3), "model.layers.0.extra.weight": torch.ones(2)})
    checkpoint = converted(model.build(), entries_of(directory))
    assert (checkpoint.ignored, checkpoint.unexpected) == ((old,), ("model.layers.0.extra.weight",))
    assert not set(checkpoint.entries) - set(model.build().state_dict())


# -- tied weights -------------------------------------------------------------------------------------------------------


def tied(tmp_path: Path) -> tuple[Small, Path]:
    model = small("llama")
    model.config.tie_word_embeddings = True
    return model, model.saved(tmp_path)


def test_a_tied_weight_under_its_other_name(tmp_path: Path) -> None:
    model, directory = tied(tmp_path)
    renamed(directory, lambda name: name.replace("model.embed_tokens", "lm_head"))
    reference, info = model.reference(directory)
    module = loaded(model.build, directory)
    assert not info["missing_keys"] and module.lm_head.weight is module.model.embed_tokens.weight
    assert_same(module, reference, set())


def test_a_tied_weight_under_both_names(tmp_path: Path) -> None:
    model, directory = tied(tmp_path)
    same = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    renamed(directory, str, **{"lm_head.weight": same.clone()})
    assert_same(loaded(model.build, directory), model.reference(directory)[0], set())
    renamed(directory, str, **{"lm_head.weight": same + 1})
    with pytest.raises(gp.GroundplanError, match=r"lm_head.weight is tied .*tie_word_embeddings=False"):
        loaded(model.build, directory)


# -- conversions --------------------------------------------------------------------------------------------------------

FUSED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    "box",
    [
        (range(1, 3), range(48), range(16)),
        (range(8), range(20, 30), range(16)),
        (range(3, 4), range(24, 48), range(3, 9)),
        (range(0, 8, 3), range(1, 48, 5), range(2, 16, 7)),
        (range(5, 5), range(48), range(16)),
    ],
)
def test_of_merged_experts_only_the_part_is_read(box: Box, tmp_path: Path) -> None:
    model = mixture(experts=8)
    directory = model.saved(tmp_path)
    entries = entries_of(directory)
    entry = converted(model.build(), entries).entries[FUSED]
    expected = model.reference(directory)[0].get_parameter(FUSED).detach()[slices(box)]
    assert entry.shape == (8, 48, 16) and entry.where == str(directory / "model.safetensors")
    assert not any(each.reads for each in entries.values()), "converting reads nothing"
    transposed = torch.empty(tuple(map(len, box))[::-1], dtype=torch.float64).permute(2, 1, 0)
    entry.read(box, transposed)
    assert torch.equal(transposed, expected.double())
    assert sum(sum(each.reads) for each in entries.values()) == expected.numel()


def test_what_is_computed_is_read_once(tmp_path: Path) -> None:
    model = small("gradium_phonon_tts")  # one stored tensor, split in three, the rows of two of them in another order
    directory = model.saved(tmp_path)
    entries = entries_of(directory)
    found = converted(model.build(), entries).entries
    names = [name for name in found if name.endswith("layers.0.self_attn.q_proj.weight")]
    expected = model.reference(directory)[0].state_dict()
    for name in (name.replace("q_proj", each) for name in names for each in ("q_proj", "k_proj", "v_proj")):
        part = torch.empty(2, found[name].shape[1])
        found[name].read((range(2, 6, 2), range(found[name].shape[1])), part)
        assert torch.equal(part, expected[name][2:6:2]), name
    reads = [len(each.reads) for each in entries.values() if each.reads]
    assert names and reads == [1] * len(names)


@dataclass(frozen=True)
class Held:
    """A tensor in memory as an entry."""

    name: str
    tensor: torch.Tensor
    where: str = "memory"

    divisible = True
    position = ("", 0)

    @property
    def elements(self) -> Any:
        return id(self)

    def expect(self, box: Box) -> None:
        pass

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self, box: Box, out: torch.Tensor) -> None:
        assert out.dim() == self.tensor.dim()
        out.copy_(self.tensor[slices(box)])


def operations() -> dict[str, Callable[..., Any]]:
    """What conversions do, on two tensors of [4, 6]."""
    return {
        "stack": lambda a, b: torch.stack([a, b]),
        "stack last": lambda a, b: torch.stack([a, b], -1),
        "stack, then concatenate": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], 1),
        "chunk": lambda a, b: torch.chunk(a, 3, 1)[1].contiguous(),
        "split": lambda a, b: torch.cat(torch.split(a, [1, 3], 0)[::-1], 0),
        "transposed": lambda a, b: torch.cat([a.transpose(0, 1).contiguous(), b.t()], -1),
        "unstacked": lambda a, b: torch.chunk(torch.stack([a, b], 1), 2, 1)[1].squeeze(1),
        "unbound": lambda a, b: torch.stack(torch.unbind(torch.cat([a, b]), 0)[2:7:2], 1),
        "sliced": lambda a, b: torch.cat([a[1:, :4], b[:2, 2:]]).permute(1, 0),
        "one dim less": lambda a, b: torch.cat([a[1], b[:, -1]]),
    }


@pytest.mark.parametrize("name", operations())
def test_tiles_are_what_the_operations_make(name: str) -> None:
    from groundplan.runtime.tiles import Tiled

    first, second = torch.randn(4, 6), torch.randn(4, 6)
    expected = operations()[name](first, second)
    entry = operations()[name](Tiled.of(Held("a", first)), Tiled.of(Held("b", second))).entry(name)
    assert torch.equal(whole(entry), expected)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        box = tuple(some_range(size, generator) for size in expected.shape)
        out = torch.full(tuple(map(len, box)), float("nan"))
        entry.read(box, out)
        assert torch.equal(out, expected[slices(box)]), box


def some_range(size: int, generator: torch.Generator) -> range:
    start, stop, step = (int(torch.randint(0, size + 1, (), generator=generator)) for _ in range(3))
    return range(min(start, stop), max(start, stop), step + 1)


def test_parts_that_do_not_fit_together(tmp_path: Path) -> None:
    model = mixture()
    directory = model.saved(tmp_path)
    broken = next(name for name in entries_of(directory) if name.endswith("experts.1.w1.weight"))
    renamed(directory, str, **{broken: torch.ones(5, 16)})
    with pytest.raises(gp.GroundplanError, match=r"conversion of 8 tensors .*gate_up_proj fails: .*do not fit together"):
        converted(model.build(), entries_of(directory))


# -- sharded and wrapped modules ----------------------------------------------------------------------------------------


@contextmanager
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def described(checkpoint: Converted) -> dict[str, Any]:
    return {name: (entry.name, tuple(entry.shape), type(entry)) for name, entry in checkpoint.entries.items()}


@pytest.mark.parametrize("model", [mixture(), small("llava"), small("gemma3")], ids=lambda model: model.kind.__name__)
def test_sharded_and_wrapped(model: Small, tmp_path: Path) -> None:
    directory = model.saved(tmp_path)
    entries = entries_of(directory)
    expected = converted(model.build(), entries)
    module = gp.trace(model.build).meta_module()
    assert described(converted(module, entries)) == described(expected)
    with fake_group():
        for each in list(module.modules()):
            if isinstance(each, nn.ModuleList) and len(each) and hasattr(each[0], "self_attn"):
                each[0] = checkpoint_wrapper(each[0])
                for layer in each:
                    fully_shard(layer)
        fully_shard(module)
        compiled: Any = torch.compile(module)
        for each in (module, compiled):
            assert can_load(each, directory)
            assert described(converted(each, entries)) == described(expected)


# -- which directories --------------------------------------------------------------------------------------------------


def test_can_load(tmp_path: Path) -> None:
    model = small("gpt2")
    directory = model.saved(tmp_path / "hub")
    assert can_load(model.build(), directory) and can_load(model.build(), str(directory))
    assert not can_load(nn.Linear(2, 2), directory)
    assert not can_load(model.build(), tmp_path)
    (directory / "config.json").write_text("[]")
    assert not can_load(model.build(), directory)


def test_a_constructor_that_has_to_run_for_real_runs_once(tmp_path: Path) -> None:
    """It is looked at under trace only: what is missing gets the numbers that the generator stands at."""
    model = small("llama")
    directory = model.saved(tmp_path)
    stored = load_file(directory / "model.safetensors")
    save_file({name: each for name, each in stored.items() if name != "lm_head.weight"}, directory / "model.safetensors")

    def build() -> Any:
        module: Any = model.build()
        module.lm_head.weight.register_hook(lambda grad: grad)
        return module

    torch.manual_seed(5)
    expected = build().lm_head.weight
    torch.manual_seed(5)
    found = gp.trace(build).materialize(checkpoint=directory)
    assert len(found.lm_head.weight._backward_hooks) == 1 and torch.equal(found.lm_head.weight, expected)
    assert torch.equal(found.model.norm.weight, stored["model.norm.weight"])


def test_quantized(tmp_path: Path) -> None:
    model = small("gpt2")
    directory = model.saved(tmp_path)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(gp.GroundplanError, match=r"quantized \(quantization_config: mxfp4\).*dequantize\(\)"):
        can_load(model.build(), directory)


# -- what a model has besides tensors -----------------------------------------------------------------------------------


def finished(model: Small, directory: Path) -> Any:
    module = model.build()
    finish_loading(module, directory, converted(module, entries_of(directory)))
    return module


def test_the_generation_config(tmp_path: Path) -> None:
    model = small("llama")
    directory = model.saved(tmp_path)
    path = directory / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.25, "do_sample": True, "max_length": 77}))
    code = directory / "custom_generate"
    code.mkdir()
    (code / "generate.py").write_text("raise AssertionError('remote code was run')")
    found, expected = finished(model, directory).generation_config, model.reference(directory)[0].generation_config
    assert found.temperature == 0.25 and found.to_dict() == expected.to_dict()
    path.unlink()
    found, expected = finished(model, directory).generation_config, model.reference(directory)[0].generation_config
    assert found.to_dict() == expected.to_dict()


@pytest.mark.parametrize("text", ["llama", "qwen3_moe", "gpt2", "t5", "bart:ForConditionalGeneration", "mamba"])
def test_it_generates_the_same(text: str, tmp_path: Path) -> None:
    model = chosen(text)
    directory = model.saved(tmp_path)
    path = directory / "generation_config.json"
    path.write_text(
        json.dumps(
            json.loads(path.read_text())
            | {"max_new_tokens": 6, "do_sample": True, "temperature": 0.5}
            | {"decoder_start_token_id": 1}
        )
    )
    tokens = []
    for each in (gp.trace(model.build).materialize(checkpoint=directory).eval(), model.reference(directory)[0].eval()):
        torch.manual_seed(1)
        tokens.append(each.generate(torch.arange(2, 7).view(1, 5)))
    assert torch.equal(*tokens)


def test_a_model_that_does_not_generate(tmp_path: Path) -> None:
    model = small("vit")
    assert not hasattr(finished(model, model.saved(tmp_path)), "generation_config")


@pytest.mark.parametrize("model", [mixture(), small("llava"), small("gte")], ids=lambda model: model.kind.__name__)
def test_it_is_saved_as_it_was(model: Small, tmp_path: Path) -> None:
    directory = model.saved(tmp_path / "from")
    for module, to in ((finished(model, directory), tmp_path / "mine"), (model.reference(directory)[0], tmp_path / "its")):
        module.save_pretrained(to)
    assert set(entries_of(tmp_path / "mine")) == set(entries_of(tmp_path / "its"))


def test_transformers_is_not_imported() -> None:
    code = "import sys; import groundplan.runtime.hub; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
