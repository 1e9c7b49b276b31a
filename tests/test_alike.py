"""Tensors are looked at by kinds, and changes are added up in columns: the same as one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.alike import Alike, alike, changes_of
from groundplan.planner.changes import Change, Changes
from groundplan.planner.decisions import Decisions
from groundplan.planner.estimate import timelines_of
from groundplan.planner.held import Naming, held_by
from groundplan.planner.kept import MOST, kept
from groundplan.planner.optimizer import Trained
from groundplan.planner.stages import stages_by_name, stages_of

F32, BF16 = torch.float32, torch.bfloat16

# -- columns ------------------------------------------------------------------------------------------------------------

lists = st.lists(
    st.builds(Change, st.sampled_from(["cpu", "cuda:0", "cuda:1"]), st.sampled_from("abcd"), st.integers(-50, 100)), max_size=30
)


def peaks_one_by_one(changes: Iterable[Change]) -> dict[str, int]:
    now: dict[str, int] = {}
    peaks: dict[str, int] = {}
    for device, _, nbytes in changes:
        now[device] = held = now.get(device, 0) + nbytes
        if held > peaks.get(device, 0):
            peaks[device] = held
    return peaks | {device: 0 for device in now if device not in peaks}


def held_one_by_one(changes: Iterable[Change], device: str, peak: int) -> dict[str, int]:
    held: dict[str, int] = {}
    now = 0
    for change in changes:
        if now == peak:
            break
        if change.device == device:
            now += change.nbytes
            held[change.tensor] = held.get(change.tensor, 0) + change.nbytes
    return held


@settings(deadline=None)
@given(first=lists, second=lists)
def test_columns_are_the_changes_one_by_one(first: list[Change], second: list[Change]) -> None:
    every, changes = [*first, *second], Changes.of(first) + Changes.of(iter(second))
    assert list(changes) == every and len(changes) == len(every)
    assert list(changes.released()) == [each._replace(nbytes=-each.nbytes) for each in every]
    assert list(changes.peaks().items()) == list(peaks_one_by_one(every).items())
    for device, peak in changes.peaks().items():
        assert changes.tensors_at(device, peak) == held_one_by_one(every, device, peak)
        assert list(changes.on(device)) == [each for each in every if each.device == device]
    for besides in (None, "cpu"):
        there = [each for each in every if each.device != besides]
        assert changes.largest(besides) == max(there, key=lambda each: each.nbytes, default=None)


@settings(deadline=None)
@given(
    of=st.lists(st.tuples(st.sampled_from(["cpu", "cuda:0"]), st.integers(1, 3)), max_size=20),
    dropped=st.sets(st.integers(0, 19)),
)
def test_things_by_kind_are_the_things_one_by_one(of: list[tuple[str, int]], dropped: set[int]) -> None:
    things = [(f"t{number}", Trained(device, (size,), F32)) for number, (device, size) in enumerate(of)]
    found: Alike[Trained] = alike(things)
    assert len(set(found.kinds)) == len(found.kinds) and found.each == [each for _, each in things]
    made = changes_of(found, lambda each: each.nbytes, lambda each: -each.numel)
    assert list(made) == [Change(each.device, name, by) for name, each in things for by in (each.nbytes, -each.numel)]
    left = [thing for number, thing in enumerate(things) if number not in dropped]
    for some in (found.named(name for name, _ in left), alike(left)):
        assert list(zip(some.names.tolist(), some.each, strict=True)) == left
        assert some.kinds == tuple(dict.fromkeys(each for _, each in left))  # no kind that there is nothing of
    large = found.to(lambda each: each if each.numel > 1 else None)
    assert list(zip(large.names.tolist(), large.each, strict=True)) == [thing for thing in things if thing[1].numel > 1]


# -- kinds of tensors ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Layers that repeat, and in them all that makes two tensors of one shape different."""

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 36), nn.Linear(36, 12)
            self.gate, self.norm = nn.Linear(12, 36), nn.LayerNorm(12)
            self.experts = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))
            self.router = nn.Linear(12, 4, bias=False)
            if number % 2:
                nn.init.orthogonal_(self.up.weight)  # made as a whole
                self.gate.weight.requires_grad_(False)
            self.register_buffer("scale", torch.ones(12))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            every = torch.stack([expert(x) for expert in self.experts], dim=-1)
            mixed = (every * self.router(x).softmax(-1).unsqueeze(-2)).sum(-1)
            found: torch.Tensor = x + self.down(self.up(self.norm(x)) * self.gate(x)) + mixed * self.scale
            return found

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.layers = nn.ModuleList(self.Layer(number) for number in range(6))
        self.head = nn.Linear(12, 50, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self.embed(tokens)
        for layer in self.layers:
            found = layer(found)
        logits: torch.Tensor = self.head(found)
        return logits


RULES = {"layers.*.up": "colwise", "layers.1.gate": "colwise", "layers.*.down": "rowwise"}
SHARDINGS: dict[str, dict[str, Any]] = {
    "uneven": {"axes": {"dp": 5}},
    "HSDP, offloaded": {"axes": {"dp_replicate": 2, "dp_shard": 2}, "offload": True, "compute_dtype": BF16},
    "DDP": {"axes": {"ddp": 2}},
    "tensor": {"axes": {"dp": 2, "tp": 2}, "tensor": RULES},
    "experts": {"axes": {"dp_shard": 4, "ep": 2}, "experts": ["layers.*.experts"]},
    "pipeline": {"axes": {"pp": 2, "dp": 2}, "microbatches": 4},
    "context": {"axes": {"dp_shard": 2, "cp": 2}, "reduce_dtype": F32, "compute_dtype": BF16},
}
CASTS: list[Any] = [None, {"*norm*": F32, "layers.0.*": F32, "*": BF16}]
PLACED = {"layers.0": "cuda:0", "layers.1": "cpu", "layers.2": "disk", "layers.*.norm": "cuda:1", "*": "cuda:0"}


@pytest.fixture(scope="module")
def traced() -> gp.Plan:
    return gp.trace(Model)


def one_by_one(decisions: Decisions) -> Naming:
    return NAMING(decisions)._replace(apart=True)


NAMING = Naming.of


def everything(plan: gp.Plan, workload: gp.Training | None) -> list[Any]:
    worst = plan.memory(workload)
    ranks = [worst, *(worst.rank(rank) for rank in {0, worst.ranks - 1})]
    return [[each, {phase: list(changes) for phase, changes in each.changes.items()}, str(each)] for each in ranks]


@pytest.mark.parametrize("dtype", CASTS, ids=["as it is", "cast by rules"])
@pytest.mark.parametrize("name", [*SHARDINGS, "placed", "quantized"])
def test_kinds_say_what_each_tensor_says(traced: gp.Plan, name: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = traced if dtype is None else traced.cast(dtype)
    if name == "placed":
        plan = plan.place(PLACED)
    elif name == "quantized":
        quantization = pytest.importorskip("torchao.quantization")
        plan = plan.quantize(quantization.Int8WeightOnlyConfig(), filter="layers.[12].*")
    else:
        plan = plan.to("cuda").shard(**SHARDINGS[name])
    tokens = torch.zeros(4, 8, dtype=torch.int64)
    workloads = [None, *(gp.Training(each, inputs=tokens, clip_grad_norm=1.0, accumulate=2) for each in ("adamw", "muon"))]
    by_kind = [everything(plan, workload) for workload in workloads]
    kinds = held_by(plan.graph, plan.decisions, 0).kinds
    monkeypatch.setattr(Naming, "of", staticmethod(one_by_one))
    alone = held_by(plan.graph, plan.decisions, 0)
    assert len(alone.kinds) == len(alone) and (len(kinds) < len(alone) / 2 or name == "quantized")
    assert [everything(plan, workload) for workload in workloads] == by_kind


def test_stages_of_all_tensors_at_once(traced: gp.Plan) -> None:
    pipeline = traced.shard({"pp": 3}, microbatches=4).decisions.sharding.pipeline  # type: ignore[union-attr]
    assert pipeline is not None
    found = stages_by_name(traced.graph, pipeline.stages)
    assert found == {tensor.name: stages_of(tensor, pipeline) for tensor in traced.graph.tensors}
    assert set(found.values()) == {(0,), (1,), (2,)}


def test_a_phase_makes_its_changes_when_asked(traced: gp.Plan) -> None:
    plan = traced.shard({"dp": 2})
    construct = timelines_of(plan.graph, plan.decisions, None)["construct"]
    assert construct[0] == next(iter(construct)) and construct[-2:] == list(construct)[-2:]
    assert all(type(each.nbytes) is int and type(each.tensor) is str for each in construct)


# -- kept ---------------------------------------------------------------------------------------------------------------


def test_what_is_kept_is_so_by_all_arguments_and_not_without_end() -> None:
    class Owner:
        pass

    asked: list[tuple[object, ...]] = []

    @kept
    def found(owner: Owner, number: int, word: str = "") -> int:
        asked.append((number, word))
        return number

    one, other = Owner(), Owner()
    assert [found(one, 1), found(one, 1), found(one, 2), found(one, 1, "a"), found(one, 1, word="a"), found(other, 1)] == [
        1,
        1,
        2,
        1,
        1,
        1,
    ]
    assert asked == [(1, ""), (2, ""), (1, "a"), (1, "a"), (1, "")]
    for number in range(2 * MOST):
        found(one, number)
    before = len(asked)
    assert found(one, 1) == 1 and len(asked) == before + 1  # dropped long ago
