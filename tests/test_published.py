"""What torchtitan published is predicted, and the step that it is predicted from is made of what it should be made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from groundplan.planner.allocations import STEP

from . import titan
from .published import ALLOCATORS, RUNS, Published, reserved, run_of_plan, step_of

SIZES = titan.Sizes(width=64, layers=4, heads=4, kv_heads=2, hidden=192, words=1000, length=128)
SMALL = Published("small", SIZES, gpus=4, batch=2, checkpointing="selective", gib=0)
TOKENS = SMALL.batch * SMALL.sizes.length


@pytest.mark.conformance
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_what_is_published_is_predicted(run: Published) -> None:
    """Within 5 %, however the allocator was set."""
    step = step_of(run)
    for setting in ALLOCATORS:
        assert reserved(run, step, setting)["reserved"] == pytest.approx(run.gib, rel=0.05), setting


@pytest.mark.conformance
def test_so_it_is_by_a_plan() -> None:
    step = run_of_plan(RUNS[0])
    for setting in ALLOCATORS:
        assert reserved(RUNS[0], step, setting)["reserved"] == pytest.approx(RUNS[0].gib, rel=0.05), setting


def at_peak(run: Published) -> dict[str, int]:
    """Bytes at the peak of the step, of each kind, and of some ops among the activations."""
    step = step_of(run)
    found = step.by_kind(STEP, "cuda:0")
    for each in step.at_peak(STEP, "cuda:0"):
        if each.kind in ("activation", "temporary"):
            found[each.op] = found.get(each.op, 0) + each.nbytes
    return found


def block_of(sizes: titan.Sizes) -> int:
    """The parameters of a block."""
    heads = sizes.width // sizes.heads
    attention = sizes.width * heads * (2 * sizes.heads + 2 * sizes.kv_heads)
    return attention + 3 * sizes.width * sizes.hidden + 2 * sizes.width


def test_the_peak_is_made_of_what_it_should_be() -> None:
    """As the softmax of the logits is differentiated: three tensors of logits in float32, and what all blocks keep.

    Of a block's seven products of matrices the first, third, fifth and seventh are kept: queries, values, the hidden ones of w1,
    and the output; attention keeps its output and a number of float32 for each row.
    """
    sizes, found = SMALL.sizes, at_peak(SMALL)
    ends = 2 * sizes.words * sizes.width + sizes.width
    logits = 4 * TOKENS * sizes.words
    assert found["_log_softmax"] == found["nll_loss_backward"] == found["_log_softmax_backward_data"] == logits
    products = sizes.width + sizes.width // 2 + sizes.hidden  # queries, values, w1
    products += sizes.width  # w2 is the seventh
    assert found["mm"] == 2 * TOKENS * products * sizes.layers
    assert found["gathered parameter"] == 2 * (block_of(sizes) + ends)  # the last block is not resharded, nor is the root
    assert found["optimizer state"] == 2 * found["parameter"]
    assert found["parameter"] == 4 * (block_of(sizes) * sizes.layers + ends) // SMALL.gpus
    attended = TOKENS * sizes.heads * (2 * sizes.width // sizes.heads + 4) + 3 * 8
    assert found["_scaled_dot_product_flash_attention"] == attended * sizes.layers


def test_full_checkpointing_keeps_the_inputs_of_blocks() -> None:
    some, none = at_peak(SMALL), at_peak(replace(SMALL, checkpointing="full"))
    assert some["activation"] - none["activation"] >= some["mm"]
    assert "_scaled_dot_product_flash_attention" not in none


def test_a_plan_of_it_takes_the_same() -> None:
    """The last block, which torchtitan does not reshard, is on its way again by then. Generators' states are in host memory."""
    ours, plans = step_of(SMALL), run_of_plan(SMALL)
    for kind in ("parameter", "optimizer state", "activation"):
        assert plans.by_kind(STEP, "cuda:0")[kind] == ours.by_kind(STEP, "cuda:0")[kind], kind
    assert plans.peaks[STEP]["cuda:0"] == ours.peaks[STEP]["cuda:0"]
    states = SMALL.sizes.layers + 1  # one of each block, and that of now while a block runs again
    assert plans.peaks[STEP]["cpu"] - ours.peaks[STEP]["cpu"] == states * torch.get_rng_state().nbytes


def test_more_gpus_hold_less_each() -> None:
    few, many = at_peak(SMALL), at_peak(replace(SMALL, gpus=8))
    assert many["parameter"] * 2 == few["parameter"]
    assert all(many[kind] == few[kind] for kind in ("activation", "gathered parameter"))


def test_the_model_is_a_llama() -> None:
    """Its parameters are those of Llama 3.1, and its values those of transformers' Llama with the same weights."""
    with torch.device("meta"):
        assert sum(each.numel() for each in titan.Llama(titan.LLAMA_8B).parameters()) == 8_030_261_248
        assert sum(each.numel() for each in titan.Llama(titan.LLAMA_70B).parameters()) == 70_553_706_496
    torch.manual_seed(0)
    sizes = replace(SMALL.sizes, layers=2, words=96, length=16)
    ours, theirs = titan.Llama(sizes), transformers_llama(sizes)
    theirs.load_state_dict({their_name(name): value for name, value in their_state(ours, sizes).items()})
    tokens = torch.arange(32).reshape(2, 16)
    assert torch.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


def transformers_llama(sizes: titan.Sizes) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.words,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.hidden,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def their_name(name: str) -> str:
    head, _, rest = name.partition(".")
    if head != "layers":
        return f"{NAMES[head]}.{rest}"
    number, _, rest = rest.partition(".")
    inner, _, last = rest.rpartition(".")
    return f"model.layers.{number}.{NAMES[inner]}.{last}"


def their_state(model: titan.Llama, sizes: titan.Sizes) -> dict[str, torch.Tensor]:
    """The weights, with queries and keys in transformers' order: halves where ours has pairs."""
    found = {name: value.detach() for name, value in model.named_parameters()}
    for name, value in found.items():
        heads = {"wq.weight": sizes.heads, "wk.weight": sizes.kv_heads}.get(".".join(name.split(".")[-2:]))
        if heads:
            size = sizes.width // sizes.heads
            found[name] = value.view(heads, size // 2, 2, sizes.width).transpose(1, 2).reshape(value.shape)
    return found
