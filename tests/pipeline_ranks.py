"""One rank of a real pipeline: what torch's schedules allocate, step by step, beside what `planner/schedules.py` reckons."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.profiler import ProfilerActivity, profile

import groundplan as gp
from groundplan.planner.schedules import Load, peak_of_rank, receive_buffers
from groundplan.planner.sharding import Pipeline

from .jobs import finish
from .measured_steps import memory_events, plain_kernels

WIDTH, SAMPLES, LENGTH, WORDS = 32, 2, 64, 96
SENT = SAMPLES * LENGTH * WIDTH * 4
_MARK = 2**30


class Block(nn.Module):
    """A layer like Llama's, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        return value + self.down(torch.nn.functional.silu(self.up(self.norm(value))))


def stage_module(stage: int, stages: int) -> nn.Module:
    return nn.Sequential(Block(), Block(), *([nn.Linear(WIDTH, WORDS)] if stage == stages - 1 else []))


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


# -- what one micro-batch takes -----------------------------------------------------------------------------------------


def load_of(stage: int, stages: int) -> Load:
    """Measured in one process, without a pipeline: forward and backward of one micro-batch, twice."""
    module, last = stage_module(stage, stages), stage == stages - 1
    value = torch.randn(SAMPLES, LENGTH, WIDTH, requires_grad=stage > 0)
    target, gradient = torch.randint(0, WORDS, (SAMPLES, LENGTH)), torch.randn(SAMPLES, LENGTH, WIDTH)

    def step() -> Iterator[None]:
        output = module(value)
        loss = loss_of(output, target) if last else output
        yield
        torch.autograd.backward(loss, None if last else gradient)
        kept, value.grad = value.grad, None
        yield
        del output, loss, kept
        yield

    peaks = measured_parts(step, step)
    (before, forward, saved), (begin, first, _), (_, _, left) = peaks[:3]
    again, later, _ = peaks[5]
    sent_back = SENT if stage else 0
    return Load(saved - before, forward - before, later - again, first - begin, left - before, 4 if last else SENT, sent_back)


def measured_parts(*runs: Callable[[], Iterator[None]]) -> list[tuple[int, int, int]]:
    """For every part of the runs, up to its `yield`: the bytes at its beginning, its peak and its end."""

    def mark() -> None:
        torch.empty(_MARK, dtype=torch.uint8)

    gc.collect()
    with plain_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for run in runs:
            mark()
            for _ in run():
                mark()
    return parts_of(memory_events(profiler))


def parts_of(events: list[int]) -> list[tuple[int, int, int]]:
    now, parts = 0, []
    for nbytes in events:
        if nbytes >= _MARK:
            parts.append((now, now, now))
        elif nbytes > -_MARK:
            now += nbytes
            if parts:
                begin, peak, _ = parts[-1]
                parts[-1] = (begin, max(peak, now), now)
    return parts


# -- a pipeline ---------------------------------------------------------------------------------------------------------


def measured_steps(pipeline: Pipeline, modules: dict[int, nn.Module], loss: Any) -> tuple[list[int], int]:
    """The peaks of the first two steps on this rank, and what the first one leaves behind beside the gradients."""
    rank, ranks, stages = dist.get_rank(), dist.get_world_size(), len(pipeline.stages)
    made = [PipelineStage(module, stage, stages, torch.device("cpu")) for stage, module in modules.items()]
    schedule = _schedule(pipeline, made, loss)
    value, target = _batch(pipeline.microbatches)
    inputs = (value,) if rank == 0 else ()
    named: dict[str, Any] = {"target": target} if rank == ranks - 1 else {}
    peaks, left = [], 0
    for number in range(2):
        for module in modules.values():
            module.zero_grad(set_to_none=True)
        gc.collect()
        with plain_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            schedule.step(*inputs, return_outputs=False, **named)
        sums = list(_sums(memory_events(profiler)))
        peaks.append(max(sums))
        left = left if number else sums[-1]
    return peaks, left - sum(each.nbytes for module in modules.values() for each in module.parameters())


def _batch(microbatches: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(microbatches * SAMPLES, LENGTH, WIDTH), torch.randint(0, WORDS, (microbatches * SAMPLES, LENGTH))


def _schedule(pipeline: Pipeline, stages: list[PipelineStage], loss: Any) -> Any:
    if pipeline.schedule == "interleaved1f1b":
        return ScheduleInterleaved1F1B(list(stages), pipeline.microbatches, loss_fn=loss)
    known = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
    return known[pipeline.schedule](stages[0], pipeline.microbatches, loss_fn=loss)


def _sums(events: list[int]) -> Iterator[int]:
    now = 0
    for nbytes in events:
        now += nbytes
        yield now


def _compared(pipeline: Pipeline) -> dict[str, Any]:
    rank, ranks, stages = dist.get_rank(), dist.get_world_size(), len(pipeline.stages)
    own = range(rank, stages, ranks)
    peaks, left = measured_steps(pipeline, {stage: stage_module(stage, stages) for stage in own}, loss_of)
    reckoned = peak_of_rank(pipeline, ranks, rank, {stage: load_of(stage, stages) for stage in own})
    buffers = sum(receive_buffers(stage, stages, pipeline.microbatches, SENT, SENT) for stage in own)
    return {"measured": peaks, "left": left, "reckoned": reckoned, "buffers": buffers}


# -- a plan -------------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Nine blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(9)), nn.Linear(WIDTH, WORDS)

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = layer(value)
        return self.head(value)


def _planned(pipeline: Pipeline) -> tuple[list[int], list[int]]:
    """The first two steps of a plan's pipeline, by `plan.memory` and measured: whole peaks, of this rank."""
    ranks, many = dist.get_world_size(), pipeline.microbatches
    plan = gp.trace(Stack).shard({"pp": ranks}, schedule=pipeline.schedule, microbatches=many, stages=len(pipeline.stages))
    inputs = (torch.empty(many * SAMPLES, LENGTH, WIDTH, device="meta"),)
    with plain_kernels():
        memory = plan.memory(gp.Training("sgd", inputs=inputs, loss=lambda output: output.square().mean()))
    assert plan.decisions.sharding is not None and plan.decisions.sharding.pipeline is not None and not memory.left_out
    stages, whole = plan.decisions.sharding.pipeline.stages, Stack()
    own = range(dist.get_rank(), len(stages), ranks)
    modules: dict[int, nn.Module] = {stage: nn.Sequential(*map(whole.get_submodule, stages[stage])) for stage in own}
    (first, second), left = measured_steps(plan.decisions.sharding.pipeline, modules, lambda output, _: output.square().mean())
    given = many if {0, len(stages) - 1} & set(own) else 1  # the batch is there whole where it goes in, and where its loss is
    held = given * SENT + sum(each.nbytes for module in modules.values() for each in module.parameters())
    reckoned = memory.rank(dist.get_rank()).phases
    return [reckoned["first_step"], reckoned["step"]], [held + first, held + left + second]


def main(folder: str, *pipelines: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    wanted = list(map(Pipeline.model_validate_json, pipelines))
    finish(folder, [_compared(each) | {"planned": _planned(each)} for each in wanted])


if __name__ == "__main__":
    main(*sys.argv[1:])
