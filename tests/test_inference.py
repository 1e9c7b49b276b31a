"""Serving on fake tensors: equal to the byte to what real runs allocate, on one device, and by rule where a plan divides it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.allocations import FIRST_STEP, START, STEP, Allocation, Timeline
from groundplan.planner.allocator_driver import Device
from groundplan.planner.replayed_run import Allocator, replay_run

from .measured_inference import LENGTHS, QUICK, SERVED, measured_inference
from .measured_steps import plain_kernels
from .serving_ranks import CASES, launch

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with plain_kernels():
        yield


def served(model: str, **options: Any) -> tuple[gp.Plan, gp.Inference]:
    return gp.trace(SERVED[model]), gp.Inference(**{"batch_size": 2, "seq_len": LENGTHS.get(model, 16), **options})


def run_of(memory: gp.Memory) -> Timeline:
    assert memory.run is not None
    return memory.run


def peaks_of(plan: gp.Plan, inference: gp.Inference) -> Mapping[str, int]:
    peaks = run_of(plan.memory(inference, tier="T1")).peaks
    return {phase: peaks[phase]["cpu"] for phase in (START, FIRST_STEP, STEP)}


# -- equal to the byte --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize(
    "model", [name if name in QUICK else pytest.param(name, marks=pytest.mark.conformance) for name in SERVED]
)
def test_a_fake_run_takes_what_a_real_one_does(model: str, dtype: torch.dtype) -> None:
    plan, inference = served(model, new_tokens=5)
    plan = plan.cast(dtype)
    assert peaks_of(plan, inference) == measured_inference(plan, inference)


@pytest.mark.parametrize(
    "options",
    [
        {"new_tokens": 1},
        {"new_tokens": 2},
        {"new_tokens": 4},
        {"cache": "static", "new_tokens": 5},
        {"autocast": BF16},
        {"inputs": lambda: (torch.ones(3, 7, dtype=torch.int64),)},
        {"inputs": lambda: {"input_ids": torch.ones(3, 7, dtype=torch.int64), "position_ids": torch.arange(7)[None]}},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("model", ["Llama", "Mistral, a window of 8"])
def test_so_it_does_with_every_option(model: str, options: dict[str, Any]) -> None:
    plan, inference = served(model, **options)
    assert peaks_of(plan, inference) == measured_inference(plan, inference)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, value: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(value)))


def test_a_module_without_a_cache_runs_forward_again() -> None:
    plan, inference = gp.trace(Plain), gp.Inference(batch_size=8)
    peaks = peaks_of(plan, inference)
    assert peaks == measured_inference(plan, inference) and peaks[STEP] == peaks[FIRST_STEP]


FUSED = {
    "an encoder of torch.nn": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2), 1),
    "attention of torch.nn": (lambda: nn.MultiheadAttention(32, 4, batch_first=True), 3),
    "a transformer of torch.nn": (lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True), 2),
}


@pytest.mark.parametrize("name", FUSED)
def test_layers_of_torch_are_fused_where_no_gradient_is_asked_for(name: str) -> None:
    build, count = FUSED[name]
    plan, inference = gp.trace(build), gp.Inference(inputs=lambda: (torch.ones(2, 100, 32),) * count)
    assert peaks_of(plan, inference) == measured_inference(plan, inference)
    assert plan.to("cuda").memory(inference).left_out == ("what torch's fused transformer layers need",)


# -- what is where ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_cache_has_a_kind_of_its_own(cache: Any) -> None:
    plan, inference = served("Llama", new_tokens=5, cache=cache)
    run = run_of(plan.memory(inference))
    a_token = 2 * 2 * 2 * 2 * 8 * 4  # keys and values, layers, prompts, heads of keys, of 8 float32 each
    counts = 2 * 8  # of a static cache's tokens, one for each layer
    assert run.by_kind(FIRST_STEP, "cpu")["KV cache"] == (16 * a_token if cache == "dynamic" else 21 * a_token + counts)
    assert (
        sum(each.nbytes for each in held_in_the_end(run) if each.kind == "KV cache")
        == 21 * a_token + (cache == "static") * counts
    )
    assert run.by_kind(STEP, "cpu")["parameter"] == sum(each.nbytes for each in plan.graph.parameters)


def held_in_the_end(run: Timeline) -> list[Allocation]:
    """What is there just before the run lets go of everything: before the last moments, at which things only go."""
    last = max(position for position, moment in enumerate(run.moments) if moment.born)
    held: dict[int, None] = {}
    for moment in run.moments[: last + 1]:
        held.pop(moment.allocation) if not moment.born else held.setdefault(moment.allocation)
    return [run.allocations[index] for index in held]


def test_a_window_bounds_the_cache() -> None:
    sizes = []
    for seq_len in (32, 64):
        plan, inference = served("Mistral, a window of 8", seq_len=seq_len, new_tokens=5)
        sizes.append(sum(each.nbytes for each in held_in_the_end(run_of(plan.memory(inference))) if each.kind == "KV cache"))
    assert sizes[0] == sizes[1]


def test_what_an_encoder_gives_stays_while_tokens_are_decoded() -> None:
    plan, inference = served("T5", new_tokens=5)
    kinds = run_of(plan.memory(inference)).by_kind(STEP, "cpu")
    assert kinds["activation"] == 2 * 16 * 32 * 4  # prompts, tokens, width, float32


def test_phases_and_tiers() -> None:
    plan, inference = served("Llama")
    found, ran = plan.memory(inference), plan.memory(inference, tier="T1")
    assert list(found.phases) == ["construct", "load", "first_step", "step", "checkpoint"]
    assert (found.tier, ran.tier) == ("T0", "T1") and found.by_device == ran.by_device and found.notes[:3] == ran.notes[:3]
    assert found.phases["checkpoint"] == plan.memory().phases["checkpoint"]
    assert found.binding.phase == FIRST_STEP and found.binding.bytes == found.peak
    shown = found.to_json()
    assert json.loads(json.dumps(shown)) == shown and sum(each["bytes"] for each in shown["at_peak"]) == found.peak


def test_nothing_is_allocated_and_no_generator_moves() -> None:
    state = torch.get_rng_state()
    memory = gp.trace(nn.Linear, 200_000, 200_000).memory(gp.Inference(batch_size=2))  # 160 GB of weights
    assert memory.phases["step"] > 160e9 and torch.equal(torch.get_rng_state(), state)


class Looking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, value: torch.Tensor) -> Any:
        found = self.linear(value)
        return found if found.sum() > 0 else -found


def test_a_forward_that_looks_at_values_has_its_weights_alone_in_t0() -> None:
    plan = gp.trace(Looking).to("cuda")
    memory = plan.memory(gp.Inference())
    assert memory.phases["step"] == memory.phases["load"] == 80 and memory.left_out == ("the KV cache", "activations")
    assert memory.fits("80GB").verdict == "tight"
    with pytest.raises(gp.MemoryRunError, match="looks at values"):
        plan.memory(gp.Inference(), tier="T1")


# -- plans that divide, place and quantize ------------------------------------------------------------------------------


def test_tensor_parallelism_by_rule_is_what_a_rank_really_runs() -> None:
    plan, inference = served("Llama")
    plan = plan.shard({"tp": 2}, tensor="auto")
    for rank in (0, 1):
        by_rule, ran = (plan.memory(inference, tier=tier).rank(rank) for tier in ("T0", "T1"))
        for phase, nbytes in ran.phases.items():
            assert by_rule.phases[phase] == pytest.approx(nbytes, rel=0.002)  # gloo's own is in the run alone
        assert by_rule.left_out == ran.left_out == ()
    whole = gp.trace(SERVED["Llama"]).memory(inference)
    ranks = run_of(plan.memory(inference)).by_kind(STEP, "cpu")
    assert 2 * ranks["KV cache"] == run_of(whole).by_kind(STEP, "cpu")["KV cache"]


def test_what_only_some_matrices_of_a_block_are_divided_for_stays_whole() -> None:
    plan, inference = served("Llama")
    rules = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}
    kinds = run_of(plan.shard({"tp": 2}, tensor=rules).memory(inference)).by_kind(STEP, "cpu")
    assert kinds["KV cache"] == run_of(plan.memory(inference)).by_kind(STEP, "cpu")["KV cache"]


def test_gathered_units_are_left_out_by_rule_and_counted_in_a_run() -> None:
    plan, inference = served("Llama")
    plan = plan.shard({"dp": 2})
    by_rule, ran = plan.memory(inference), plan.memory(inference, tier="T1")
    assert by_rule.left_out == ("gathered units", "communication buffers") and ran.left_out == ()
    kinds = run_of(ran).by_kind(STEP, "cpu")
    assert kinds["gathered parameter"] and ran.phases["step"] > by_rule.phases["step"]


def test_a_rank_of_replicas_has_the_buckets_of_gradients_besides() -> None:
    """DDP's reducer makes them at the first forward, also where no gradient is asked for."""
    plan, inference = served("Llama")
    trained = sum(each.nbytes for each in plan.graph.parameters)
    for tier in ("T0", "T1"):
        memory = plan.shard({"ddp": 2}).memory(inference, tier=tier)
        assert memory.phases["step"] == plan.memory(inference).phases["step"] + trained and not memory.left_out


def test_offloaded_weights_come_to_the_device_of_a_single_rank_too() -> None:
    plan, inference = served("Llama")
    plan = plan.to("cuda").shard({"dp": 1}, offload=True)
    by_rule, ran = plan.memory(inference), plan.memory(inference, tier="T1")
    assert "gathered units" in by_rule.left_out and not ran.left_out
    assert ran.by_device["step"]["cuda:0"] > by_rule.by_device["step"]["cuda:0"]


@pytest.mark.parametrize("axes", [{"pp": 2}, {"cp": 2}, {"dp": 2, "cp": 2}])
def test_axes_that_are_not_run_are_left_out_by_rule_and_refused_in_a_run(axes: dict[str, int]) -> None:
    plan, inference = served("Llama")
    plan = plan.to("cuda").shard(axes)
    memory = plan.memory(inference)
    assert "communication buffers" in memory.left_out and memory.fits("4x80GB").verdict == "tight"
    assert any(f"not divided along {list(axes)[-1]}" in note for note in memory.notes)
    with pytest.raises(gp.DecisionError, match='tier="T0"'):
        plan.memory(inference, tier="T1")


@pytest.mark.parametrize("build", [lambda: nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), lambda: LookingLayers()])
def test_of_a_pipeline_the_worst_stage_is_given(build: Any) -> None:
    memory = gp.trace(build).shard({"pp": 2}, stages=[1, 3]).memory(gp.Inference())
    assert memory.phases == memory.rank(1).phases and memory.rank(1).peak > memory.rank(0).peak


class LookingLayers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(Looking() for _ in range(4)))


def test_what_a_module_makes_is_on_its_device() -> None:
    plan, inference = served("Llama")
    placed = plan.place({"model.layers.0": "cuda:0", "model.layers.1": "cuda:1", "*": "cuda:0"})
    run, whole = run_of(placed.memory(inference)), run_of(plan.memory(inference))
    caches = [
        sum(each.nbytes for each in run.allocations if each.kind == "KV cache" and each.device == f"cuda:{i}") for i in (0, 1)
    ]
    assert caches[0] == caches[1] and sum(caches) == sum(each.nbytes for each in whole.allocations if each.kind == "KV cache")
    assert {each.device for each in run.allocations if each.kind == "input"} == {"cuda:0"}


def test_weights_of_the_host_come_to_the_device_one_module_at_a_time() -> None:
    plan = gp.trace(SERVED["Llama"]).place({"model.layers.1": "cpu", "*": "cuda:0"})
    run = run_of(plan.memory(served("Llama")[1]))
    brought = [each for each in run.allocations if each.op == "weights brought from the host"]
    assert [(each.device, each.nbytes) for each in brought] == [("cuda:0", 32 * 64 * 4)]  # a matrix of the feed-forward network


def test_a_quantized_layer_is_converted_back_while_it_runs() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plan, inference = served("Llama")
    quantized = plan.quantize(quantization.Int8WeightOnlyConfig())
    memory = quantized.memory(inference)
    back = [each for each in run_of(memory).allocations if each.op == "weight converted back"]
    assert [each.nbytes for each in back] == [96 * 32 * 4]  # the head's
    whole, kept = (run_of(each).by_kind(STEP, "cpu")["parameter"] for each in (plan.memory(inference), memory))
    assert kept < whole / 2  # of float32, all but the embedding


@pytest.mark.parametrize("model", ["T5", "ViT"])
def test_a_static_cache_is_for_decoders(model: str) -> None:
    plan, inference = served(model, cache="static")
    with pytest.raises(gp.GroundplanError, match=r'cache="static" is for decoders'):
        plan.memory(inference)


@pytest.mark.parametrize("tier", ["T1", "T2"])
def test_what_cannot_be_run_is_refused(tier: Any) -> None:
    plan, inference = served("Llama")
    with pytest.raises(gp.GroundplanError, match="places tensors"):
        plan.place({"*": "cpu"}).memory(inference, tier=tier)


# -- CUDA ---------------------------------------------------------------------------------------------------------------


def test_experts_copy_the_weights_of_each_token_on_cuda() -> None:
    """transformers' `_optimize_model_for_decode`: not on the CPU."""
    plan, inference = served("Mixtral")
    matrix = 2 * 64 * 32 * 4  # an expert's, up and gate, float32
    on_cuda, on_cpu = (run_of(each.memory(inference)) for each in (plan.to("cuda"), plan))
    assert any(
        each.nbytes == 2 * 2 * matrix and "batched" in str(each.source) for each in on_cuda.allocations
    )  # prompts, experts
    assert not any("batched" in str(each.source) for each in on_cpu.allocations)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_takes_what_is_said() -> None:
    from groundplan.runtime.inference_step import run_inference

    plan, inference = gp.trace(SERVED["Llama"]).to("cuda"), gp.Inference(batch_size=8, seq_len=64, new_tokens=4)
    peaks = run_of(plan.memory(inference)).peaks
    module, phases = plan.materialize(seed=0), [START]
    found: dict[str, int] = {}
    inputs = {"input_ids": torch.zeros(8, 64, dtype=torch.int64, device="cuda")}
    torch.nn.functional.linear(torch.ones(1, 1, device="cuda"), torch.ones(1, 1, device="cuda"))  # cuBLAS's workspace is there
    before = torch.cuda.memory_allocated() - peaks[START]["cuda:0"]

    def phase(name: str) -> None:
        found[phases[-1]] = max(found.get(phases[-1], 0), torch.cuda.max_memory_allocated())
        phases.append(name)
        torch.cuda.reset_peak_memory_stats()

    run_inference(module, inputs, inference, phase, on_cuda=True)
    phase("end")
    for name in (FIRST_STEP, STEP):
        assert found[name] - before == pytest.approx(peaks[name]["cuda:0"], rel=0.05)


# -- verdicts -----------------------------------------------------------------------------------------------------------


def llama(**options: Any) -> gp.Plan:
    import transformers

    def build() -> nn.Module:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))

    return gp.trace(build).cast(BF16)


LLAMA_3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_3_70B = LLAMA_3_8B | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64}
CONTEXT = gp.Inference(seq_len=8192)


def test_llama_3_8b_does_not_fit_16_gb_until_it_is_quantized() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    plan = llama(**LLAMA_3_8B).to("cuda")
    whole, quantized = (each.memory(CONTEXT) for each in (plan, plan.quantize(quantization.Int8WeightOnlyConfig())))
    assert whole.certain["cuda:0"] > 16.06e9 and whole.fits("1x16GB").verdict == "does not fit" and whole.fits("24GB")
    assert quantized.fits("1x16GB").verdict == "fits" and quantized.fits("12GB").verdict == "does not fit"
    assert run_of(whole).by_kind(STEP, "cuda:0")["KV cache"] == pytest.approx(8192 * 32 * 2 * 8 * 128 * 2, rel=0.02)


@pytest.mark.parametrize("way", ["divided", pytest.param("placed", marks=pytest.mark.conformance)])
def test_llama_3_70b_fits_two_of_80_gb(way: str) -> None:
    plan = llama(**LLAMA_3_70B)
    halves = {"model.layers.0-39": "cuda:0", "model.embed_tokens": "cuda:0", "*": "cuda:1"}
    plan = plan.place(halves) if way == "placed" else plan.to("cuda").shard({"tp": 2}, tensor="auto")
    memory = plan.memory(CONTEXT)
    room = memory.fits("2x80GB").binding
    assert room.verdict == "fits" and room.margin < 0.03 * room.needed
    assert memory.fits("2x74GB").verdict == "does not fit"


def grown(run: Timeline, share: float) -> Timeline:
    """The same run with all that is no weight larger by a share: what kernels or libraries were wrongly taken to need."""
    allocations = (
        each if each.kind in ("parameter", "buffer") else Allocation(each.kind, int(each.nbytes * share), each.device, op=each.op)
        for each in run.allocations
    )
    return Timeline(tuple(allocations), run.moments)


@pytest.mark.parametrize(
    ("batch_size", "seq_len", "cache"), [(1, 2000, "dynamic"), (4, 512, "static"), (16, 64, "dynamic"), (1, 64, "static")]
)
def test_what_is_said_to_fit_does_when_all_but_the_weights_takes_a_fifth_more(batch_size: int, seq_len: int, cache: Any) -> None:
    """On the smallest device of which it is said, in the allocator's rules."""
    plan = llama(**LLAMA_3_8B | {"num_hidden_layers": 4, "vocab_size": 4096}).to("cuda")
    memory = plan.memory(gp.Inference(batch_size=batch_size, seq_len=seq_len, cache=cache, new_tokens=8))
    low, high = 2 * 10**9, 40 * 10**9
    while high - low > 2**22:
        usable = (low + high) // 2
        low, high = (low, usable) if memory.fits(f"{usable / 1e9:.3f}GB") else (usable, high)
    outside = memory.fits(f"{high / 1e9:.3f}GB").binding.added["CUDA context"]
    assert replay_run(grown(run_of(memory), 1.2), Allocator(), Device(high, outside)).out_of_memory is None


def test_the_margin_is_of_what_is_not_certain() -> None:
    memory = llama(**LLAMA_3_8B | {"num_hidden_layers": 4}).to("cuda").memory(gp.Inference(seq_len=64))
    room = memory.fits("80GB").binding
    assert room.margin == -int(-(room.needed - memory.certain["cuda:0"]) * 0.2 // 1)
    assert memory.fits("80GB", margin=0).binding.margin == 0
    assert "beside the weights" in str(memory.fits("80GB"))


# -- real ranks ---------------------------------------------------------------------------------------------------------


def test_ranks_take_what_fake_ones_do(tmp_path: Path) -> None:
    for rank in launch(tmp_path):
        assert [each["case"] for each in rank] == list(CASES)
        for each in rank:
            for phase, real in each["real"].items():
                assert each["fake"][phase] == pytest.approx(real, rel=0.02), each


# -- refused ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 1.5}, "seq_len is 1.5"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"cache": "statik"}, "did you mean static"),
        ({"autocast": torch.float32}, "autocast is torch.float32"),
    ],
)
def test_a_workload_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        gp.Inference(**fields)


def test_a_length_is_needed() -> None:
    with pytest.raises(gp.GroundplanError, match="seq_len="):
        gp.trace(SERVED["Llama"]).memory(gp.Inference())
