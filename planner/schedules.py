"""A pipeline's schedule, and what a rank holds because of it: micro-batches in flight, their activations, buffers.

`turns` is the order in which a rank of torch.distributed.pipelining takes forward and backward; `in_flight` counts in closed form
what it holds at most, and `peak_of_rank` adds up bytes along that order, from what one micro-batch takes on each stage (`Load`,
measured or traced by whoever asks; no names of architectures). All sizes are bytes on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .sharding import Pipeline, Schedule


class Turn(NamedTuple):
    """The forward of a micro-batch through a stage, or its backward."""

    stage: int
    microbatch: int
    forward: bool


@dataclass(frozen=True, slots=True)
class Load:
    """What one micro-batch takes on a stage.

    `saved` stays from the end of its forward until its backward, the stage's output included; `forward` is the highest point
    within forward, above what was there when it began. `backward` is the same within backward, where gradients are added up:
    `first_backward` that of the first one, which makes `gradients`, which stay. `sent` is the output, of the last stage the loss
    (and the output, where the step returns it), and `sent_back` the gradient of the input, of the first stage nothing.
    """

    saved: int
    forward: int
    backward: int
    first_backward: int
    gradients: int = 0
    sent: int = 0
    sent_back: int = 0


# -- the order ----------------------------------------------------------------------------------------------------------


def turns(pipeline: Pipeline, ranks: int, rank: int) -> list[Turn]:
    """What the `rank`-th of a pipeline's ranks does, in order.

    As torch/distributed/pipelining/schedules.py has it: `ScheduleGPipe._step_microbatches`, `Schedule1F1B._step_microbatches`,
    and `ScheduleInterleaved1F1B._calculate_single_rank_operations` (Narayanan et al. 2021, arXiv:2104.04473, figure 4).

    >>> pipeline = Pipeline(schedule="1f1b", microbatches=3, stages=(("a",), ("b",)))
    >>> "".join("F" if turn.forward else "B" for turn in turns(pipeline, 2, 0))
    'FFBFBB'
    """
    warmup = warmup_turns(pipeline.schedule, ranks, rank, pipeline.microbatches, len(pipeline.stages) // ranks)
    forward, backward = list(_forwards(pipeline, ranks, rank)), list(_backwards(pipeline, ranks, rank))
    found = forward[:warmup]
    for number, turn in enumerate(forward[warmup:]):
        found += [turn, backward[number]]
    return found + backward[len(forward) - warmup :]


def warmup_turns(schedule: Schedule, ranks: int, rank: int, microbatches: int, per_rank: int = 1) -> int:
    """How many forwards a rank takes before it takes forward and backward by turns.

    `_get_warmup_ops` of torch's interleaved schedule, and its like for the others.
    """
    if schedule == "gpipe":
        return microbatches
    if schedule == "1f1b":
        return min(microbatches, ranks - 1 - rank)
    ahead = (per_rank - 1) * _a_round(ranks, microbatches) + 2 * (ranks - 1 - rank)
    return min(ahead, microbatches * per_rank)


def in_flight(schedule: Schedule, ranks: int, rank: int, microbatches: int, per_rank: int = 1) -> int:
    """The micro-batches whose activations a rank holds at most; with several stages on it, one on each stage counts by itself.

    1F1B holds `min(M, S - s)`, GPipe all `M`.

    >>> [in_flight("1f1b", 4, rank, 8) for rank in range(4)], in_flight("gpipe", 4, 0, 8)
    ([4, 3, 2, 1], 8)
    >>> [in_flight("interleaved1f1b", 4, rank, 8, 2) for rank in range(4)]
    [11, 9, 7, 5]
    """
    return min(warmup_turns(schedule, ranks, rank, microbatches, per_rank) + 1, microbatches * per_rank)


def _a_round(ranks: int, microbatches: int) -> int:
    """How many micro-batches the interleaved schedule takes through one stage before the next."""
    return microbatches // max(1, microbatches // ranks)


def _forwards(pipeline: Pipeline, ranks: int, rank: int) -> Iterator[Turn]:
    per_rank, many = len(pipeline.stages) // ranks, _a_round(ranks, pipeline.microbatches)
    if per_rank == 1:
        many = pipeline.microbatches
    for first in range(0, pipeline.microbatches, many):
        for number in range(per_rank):
            yield from (Turn(number * ranks + rank, first + each, True) for each in range(many))


def _backwards(pipeline: Pipeline, ranks: int, rank: int) -> Iterator[Turn]:
    """The same with a rank's stages the other way round."""
    last = (len(pipeline.stages) // ranks - 1) * ranks
    for turn in _forwards(pipeline, ranks, rank):
        yield Turn(last - turn.stage + 2 * rank, turn.microbatch, False)


# -- bytes --------------------------------------------------------------------------------------------------------------


def peak_of_rank(pipeline: Pipeline, ranks: int, rank: int, loads: Mapping[int, Load]) -> int:
    """The most that a rank holds of activations, gradients and temporaries, given the load of each of its stages.

    What is sent stays for as long as torch keeps the work of sending it (`_kept`).

    >>> pipeline = Pipeline(schedule="gpipe", microbatches=4, stages=(("a",), ("b",)))
    >>> peak_of_rank(pipeline, 2, 0, {0: Load(saved=10, forward=12, backward=5, first_backward=9, gradients=4)})
    49
    """
    held = peak = last_sent_back = 0
    begun: set[int] = set()
    for turn in turns(pipeline, ranks, rank):
        load, first = loads[turn.stage], turn.stage not in begun
        highest = load.forward if turn.forward else load.first_backward if first else load.backward
        peak = max(peak, held + last_sent_back + highest)
        if turn.forward:
            held += load.saved
        else:
            held += (load.gradients if first else 0) - load.saved + _kept(turn, pipeline, ranks, rank, load)
            last_sent_back = load.sent_back if pipeline.schedule == "1f1b" else 0
            begun.add(turn.stage)
    return peak


def _kept(turn: Turn, pipeline: Pipeline, ranks: int, rank: int, load: Load) -> int:
    """What stays of a micro-batch after its backward, until the step ends.

    The last stage keeps its losses. GPipe keeps the works of all sends in lists, and so does the interleaved schedule's
    `_PipelineScheduleRuntime`; a work keeps its tensor. 1F1B keeps in `send_work` the last one that it fired in warm-up, and
    besides the last gradient that it sent back, in `bwd_sends`.
    """
    if turn.stage == len(pipeline.stages) - 1:
        return load.sent + (load.sent_back if pipeline.schedule != "1f1b" else 0)
    if pipeline.schedule == "1f1b":
        fired = min(pipeline.microbatches, ranks - rank) - 2
        return load.sent if turn.microbatch == fired else 0
    return load.sent + load.sent_back


def receive_buffers(stage: int, stages: int, microbatches: int, received: int, sent: int) -> int:
    """The buffers into which a stage receives: a micro-batch takes `received` bytes of input and `sent` bytes of output.

    torch's `PipelineStage` makes one for every micro-batch's input, and one for the gradient of its output, before the first
    step, and keeps them all (`_setup_forward_recv_info`, `_create_grad_recv_info` in torch/distributed/pipelining/stage.py);
    an engine that reuses them needs one of each, `2 s b h b_c`. The first stage receives no input, the last no gradients.

    >>> [receive_buffers(stage, 3, 4, 10, 10) for stage in range(3)]
    [40, 80, 40]
    """
    return microbatches * ((received if stage > 0 else 0) + (sent if stage < stages - 1 else 0))
