"""What a profile says of a step's work, held against torch's own counter on real modules that really run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import groundplan as gp
from groundplan.planner.optimizer_work import NEWTON_SCHULZ, PASSES
from groundplan.planner.optimizers import OPTIMIZERS
from groundplan.planner.profile import Profile, Stretch
from groundplan.planner.step_time import flops_of
from groundplan.planner.work import Exchange, Op, Work
from groundplan.runtime.checkpointing import checkpoint_layers
from groundplan.runtime.op_work import noted
from groundplan.runtime.optimizers import optimizers_of
from groundplan.runtime.profiles import profile_of
from groundplan.runtime.training_step import forward_and_backward
from groundplan.runtime.verify import real_inputs

aten = torch.ops.aten

_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7, "num_attention_heads": 4}
MODELS: dict[str, Any] = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, num_key_value_heads=2, **_SMALL)),
    "BERT": lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=128, max_position_embeddings=64, **_SMALL)),
}


def training(**changes: Any) -> gp.Training:
    return gp.Training(**{"optimizer": "sgd", "batch_size": 2, "seq_len": 16, **changes})


def profile_for(plan: gp.Plan, workload: gp.Training) -> Profile:
    found = profile_of(plan._bound, plan.decisions, workload)
    assert isinstance(found, Profile), found
    return found


def works(profile: Profile) -> Iterator[tuple[int, Work]]:
    return ((block.times, part.work) for block in profile.blocks for part in block.parts if isinstance(part, Stretch))


def exchanges(profile: Profile) -> Counter[Exchange]:
    found: Counter[Exchange] = Counter()
    for times, work in works(profile):
        for each, count in work.exchanges:
            found[each] += times * count
    return found


def bytes_of(profile: Profile) -> int:
    return sum(times * count * op.nbytes for times, work in works(profile) for op, count in work.ops)


# -- operations ---------------------------------------------------------------------------------------------------------


def _cpu_forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, _heads(key, query), _heads(value, query)))


def _cpu_backward(out: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(out, query, _heads(key, query), _heads(value, query)))


def _heads(shape: Any, query: Any) -> tuple[int, ...]:
    return (shape[0], query[1], *shape[2:])


COUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_backward,
}
"""The CPU's kernel of attention, which the counter does not know by itself."""


def really_counted(build: Any, workload: gp.Training) -> int:
    module = build().train()
    inputs = real_inputs(module, workload, "cpu")
    if workload.checkpointing != "none":
        checkpoint_layers(module, workload.checkpointing)
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        forward_and_backward(module, inputs, workload)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("model", MODELS)
def test_flops_are_those_that_a_real_step_is_counted_to_have(model: str, checkpointing: Any) -> None:
    workload = training(checkpointing=checkpointing)
    assert flops_of(profile_for(gp.trace(MODELS[model]), workload)) == really_counted(MODELS[model], workload) > 0


def test_layers_that_are_checkpointed_run_twice_and_say_so() -> None:
    plain, full = (profile_for(gp.trace(MODELS["Llama"]), training(checkpointing=each)) for each in ("none", "full"))
    again = sum(times * count * op.flops for times, work in works(full) for op, count in work.ops if op.again)
    assert flops_of(full) == flops_of(plain) + again
    assert not any(op.again for _, work in works(plain) for op, _ in work.ops)
    config = transformers.LlamaConfig(vocab_size=128, num_key_value_heads=2, **_SMALL)
    layer = (
        2 * 32 * config.hidden_size * (2 * 32 + 2 * 16 + 2 * 64) + 4 * 2 * 4 * 16 * 16 * 8
    )  # the last product is not needed again
    assert again == config.num_hidden_layers * layer


def test_a_rank_of_two_has_half_of_the_products_and_says_what_it_exchanges() -> None:
    rules = {
        "model.layers.*.self_attn.[qkv]_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.mlp.*ate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
    }
    plan = gp.trace(MODELS["Llama"])
    whole, half = profile_for(plan, training()), profile_for(plan.shard({"tp": 2}, tensor=rules), training())
    head = 3 * 2 * (2 * 16) * 32 * 128
    assert flops_of(whole) - head == 2 * (flops_of(half) - head)
    found = exchanges(half)
    residual = 2 * 16 * 32 * 4
    assert {(each.kind, each.nbytes, each.ranks) for each in found} == {("all-reduce", residual, 2)}
    assert found.total() == 7 * (2 + 5)  # in the forward of a layer two; in its backward one for each product that is by columns


def test_attention_of_cuda_is_counted_and_half_of_it_is_spared_where_it_is_causal() -> None:
    plan = gp.trace(MODELS["Llama"]).cast(torch.bfloat16).to("cuda")
    attention = Counter({op: times * count for times, work in works(profile_for(plan, training())) for op, count in work.ops})
    found = [(op, count) for op, count in attention.items() if op.bound == "attention"]
    shape = (2, 4, 16, 8)
    wanted = {sdpa_flop_count(shape, shape, shape), sdpa_backward_flop_count(shape, shape, shape, shape)}
    assert {op.flops for op, _ in found} == wanted and {op.dtype for op, _ in found} == {"bfloat16"}
    assert all(op.spared * 2 == op.flops for op, _ in found)


def test_float32_on_cuda_is_computed_as_torch_is_set_to() -> None:
    plan = gp.trace(nn.Linear, 8, 8).to("cuda")
    before = torch.get_float32_matmul_precision()
    dtypes = []
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            found = profile_for(plan, gp.Training("sgd", batch_size=4))
            dtypes.append({op.dtype for _, work in works(found) for op, _ in work.ops if op.bound == "matmul"})
    finally:
        torch.set_float32_matmul_precision(before)
    assert dtypes == [{"float32"}, {"tf32"}]


# -- bytes --------------------------------------------------------------------------------------------------------------


def op_of(call: Any) -> list[Op]:
    found: list[Op] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            op = noted(func, args, kwargs or {}, out, True, False)
            assert isinstance(op, Op)
            found.append(op)
            return out

    with Watching():  # type: ignore[no-untyped-call]
        call()
    return found


ROW, TABLE, KNOWN = torch.ones(64, 32), torch.ones(1000, 32), torch.arange(64)
MOVED: dict[str, tuple[Any, int]] = {
    "reads two and writes one": (lambda: ROW + ROW.clone(), 64 * 32 * 4 * 5),
    "in place it is the same": (lambda: ROW.clone().add_(1), 64 * 32 * 4 * 4),
    "a view is nothing": (lambda: ROW.t().reshape(32, 64).view(32, 64), 0),
    "memory as it comes is nothing": (lambda: torch.empty(100), 0),
    "rows that are looked up": (lambda: torch.embedding(TABLE, KNOWN), 2 * 64 * 32 * 4 + 64 * 8),
    "what is overwritten is not read": (lambda: torch.ops.aten.copy_(torch.ops.aten.empty([64, 32]), ROW), 2 * 64 * 32 * 4),
    "foreach ops write what they are given": (lambda: torch._foreach_add_([ROW.clone()], [ROW]), (2 + 3) * 64 * 32 * 4),
}


@pytest.mark.parametrize("what", MOVED)
def test_bytes_of_ops(what: str) -> None:
    call, nbytes = MOVED[what]
    assert sum(op.nbytes for op in op_of(call)) == nbytes


def test_an_expanded_tensor_is_read_once() -> None:
    scale = torch.ones(1, 32)
    (added,) = [op for op in op_of(lambda: ROW + scale.expand(64, 32)) if op.nbytes]
    assert added.nbytes == 2 * 64 * 32 * 4 + 32 * 4


# -- optimizers ---------------------------------------------------------------------------------------------------------


def _hidden() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256), nn.Linear(256, 256), nn.Linear(256, 256))


def step_all(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("implementation", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw-8bit"])  # whose step is compiled
def test_passes_of_an_optimizer_are_those_of_a_real_step(name: str, implementation: Any) -> None:
    if implementation not in OPTIMIZERS[name].implementations:
        return
    module = _hidden()
    optimizers = optimizers_of(module, gp.Training(name, implementation=implementation))
    for parameter in module.parameters():
        parameter.grad = torch.randn_like(parameter)
    step_all(optimizers)
    ops = op_of(lambda: step_all(optimizers))
    accesses = sum(op.nbytes for op in ops) / sum(parameter.nbytes for parameter in module.parameters())
    unwritten = implementation == "fused" and name != "muon"  # gradients, which are unscaled in place where they are scaled
    assert accesses - unwritten == pytest.approx(PASSES[name, implementation].accesses, rel=0.08)
    if name == "muon":
        sides = [(256, 512), (256, 512), (256, 256)]
        assert sum(op.flops for op in ops) == NEWTON_SCHULZ * sum(4 * small**2 * large + 2 * small**3 for small, large in sides)
