"""Pipeline schedules: their order against torch's schedule objects, their bytes against real pipelines."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import schedules as torchs

from groundplan.planner.schedules import Load, Turn, in_flight, peak_of_rank, receive_buffers, turns
from groundplan.planner.sharding import Pipeline

from .jobs import launch


def pipeline(schedule: Any, stages: int, microbatches: int) -> Pipeline:
    return Pipeline(schedule=schedule, microbatches=microbatches, stages=tuple((f"layers.{number}",) for number in range(stages)))


# -- the order, as torch's objects have it ------------------------------------------------------------------------------


class Stage:
    """A stage that writes down what it is told to do, and does nothing."""

    def __init__(self, index: int, stages: int, rank: int, ranks: int) -> None:
        self.stage_index, self.num_stages, self.group_rank, self.group_size = index, stages, rank, ranks
        self.submod, self.device, self.group, self.has_backward = nn.Identity(), torch.device("cpu"), None, True
        self.is_first, self.is_last = index == 0, index == stages - 1
        self.done: list[Turn] = []

    def forward_one_chunk(self, number: int, *args: Any, **options: Any) -> None:
        self.done.append(Turn(self.stage_index, number, True))

    def backward_one_chunk(self, number: int, *args: Any, **options: Any) -> None:
        self.done.append(Turn(self.stage_index, number, False))

    def get_fwd_recv_ops(self, number: int) -> list[Any]:
        return []

    get_fwd_send_ops = get_bwd_recv_ops = get_bwd_send_ops = get_fwd_recv_ops

    def perform_reduce_grad(self, factor: int) -> None:
        pass


def torchs_order(schedule: str, ranks: int, per_rank: int, microbatches: int) -> dict[int, list[Turn]]:
    """The forwards and backwards of every rank, as torch's real schedules take them."""
    if schedule == "interleaved1f1b":
        return interleaved_order(ranks, per_rank, microbatches)
    kind: Any = {"1f1b": torchs.Schedule1F1B, "gpipe": torchs.ScheduleGPipe}[schedule]
    found = {}
    for rank in range(ranks):
        stage = Stage(rank, ranks, rank, ranks)
        running = kind(stage, microbatches)
        running._initialize_stage = lambda *args: None  # no peers to ask
        running._step_microbatches([()] * microbatches, [{}] * microbatches)
        found[rank] = stage.done
    return found


def interleaved_order(ranks: int, per_rank: int, microbatches: int) -> dict[int, list[Turn]]:
    own: Any = [Stage(number, ranks * per_rank, 0, ranks) for number in range(0, ranks * per_rank, ranks)]
    order = torchs.ScheduleInterleaved1F1B(own, microbatches, loss_fn=nn.functional.mse_loss).pipeline_order
    forward, backward = torchs._ComputationType.FORWARD, torchs._ComputationType.FULL_BACKWARD
    return {
        rank: [
            Turn(action.stage_index, action.microbatch_index or 0, action.computation_type == forward)
            for action in actions
            if action is not None and action.computation_type in (forward, backward)
        ]
        for rank, actions in order.items()
    }


CASES = [
    *(("gpipe", ranks, 1, many) for ranks, many in product((1, 2, 3, 5), (1, 2, 4, 7))),
    *(("1f1b", ranks, 1, many) for ranks, many in product((1, 2, 3, 5), (1, 2, 4, 7, 16)) if many >= ranks),
    *(
        ("interleaved1f1b", ranks, each, many)
        for ranks, each, many in product((2, 3, 4), (2, 3), (1, 2, 4, 6, 8, 12))
        if many % max(1, many // ranks) == 0
    ),
]


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "microbatches"), CASES)
def test_the_order_is_torchs(schedule: str, ranks: int, per_rank: int, microbatches: int) -> None:
    found = torchs_order(schedule, ranks, per_rank, microbatches)
    made = pipeline(schedule, ranks * per_rank, microbatches)
    assert {rank: turns(made, ranks, rank) for rank in range(ranks)} == found


@pytest.mark.parametrize(("schedule", "ranks", "per_rank", "microbatches"), CASES)
def test_what_is_in_flight_is_what_the_order_holds(schedule: Any, ranks: int, per_rank: int, microbatches: int) -> None:
    for rank, order in torchs_order(schedule, ranks, per_rank, microbatches).items():
        held = [sum(1 if turn.forward else -1 for turn in order[:end]) for end in range(len(order) + 1)]
        assert in_flight(schedule, ranks, rank, microbatches, per_rank) == max(held)
        assert held[-1] == 0


# -- bytes --------------------------------------------------------------------------------------------------------------


def test_bytes_of_a_schedule_by_hand() -> None:
    load = Load(saved=100, forward=130, backward=20, first_backward=50, gradients=40)
    assert peak_of_rank(pipeline("gpipe", 2, 4), 2, 0, {0: load}) == 4 * 100 + 50
    assert peak_of_rank(pipeline("1f1b", 2, 4), 2, 0, {0: load}) == 40 + 100 + 130
    assert peak_of_rank(pipeline("1f1b", 2, 4), 2, 1, {1: load}) == 40 + 130
    with_sends = Load(saved=100, forward=130, backward=20, first_backward=50, gradients=40, sent=7, sent_back=5)
    assert peak_of_rank(pipeline("1f1b", 2, 4), 2, 0, {0: with_sends}) == 40 + 100 + 130 + 7 + 5
    assert receive_buffers(0, 1, 4, 10, 10) == 0


loads = st.builds(
    lambda saved, over, backward, more: Load(saved, saved + over, backward, backward + more, more),
    *(st.integers(0, 1000) for _ in range(4)),
)


@given(load=loads, ranks=st.integers(1, 6), extra=st.integers(0, 8), data=st.data())
def test_the_peak_is_at_least_what_is_in_flight(load: Load, ranks: int, extra: int, data: st.DataObject) -> None:
    rank, microbatches = data.draw(st.integers(0, ranks - 1)), ranks + extra
    made = pipeline("1f1b", ranks, microbatches)
    peak = peak_of_rank(made, ranks, rank, {rank: load})
    assert peak >= in_flight("1f1b", ranks, rank, microbatches) * load.saved
    assert peak <= peak_of_rank(pipeline("gpipe", ranks, microbatches), ranks, rank, {rank: load}) + load.gradients + load.forward


def compared(folder: Path, cases: list[tuple[str, int, int]]) -> None:
    wanted = [pipeline(*each).model_dump_json() for each in cases]
    for rank, found in enumerate(launch("tests.pipeline_ranks", folder, *wanted, world=3)):
        for (schedule, stages, microbatches), one in zip(cases, found, strict=True):
            what = f"{schedule} of {stages} stages, {microbatches} micro-batches, rank {rank}"
            assert one["measured"][1] == one["reckoned"], what
            assert one["left"] == one["buffers"], what
            assert one["measured"][0] == one["reckoned"] + one["buffers"], what
            reckoned, measured = one["planned"]
            assert reckoned == pytest.approx(measured, rel=0.01), what


def test_real_pipelines_take_what_is_reckoned_to_the_byte(tmp_path: Path) -> None:
    compared(tmp_path, [("gpipe", 3, 6), ("1f1b", 3, 6), ("interleaved1f1b", 6, 6)])


@pytest.mark.conformance
def test_more_real_pipelines_do_too(tmp_path: Path) -> None:
    others = [("gpipe", 3, 1), ("1f1b", 3, 3), ("1f1b", 3, 9), ("interleaved1f1b", 9, 3), ("interleaved1f1b", 6, 12)]
    compared(tmp_path, others)
