"""A training step on one rank of a pipeline, in closed form: a profile of one micro-batch, cut into the pipeline's stages.

The profile is of the whole module; its marks say which stage's modules are at work, so that every stretch is one stage's. What
that adds up to for a micro-batch is the stage's `Load`, and the schedule says how many of them are there at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .changes import Change, Changes
from .exchanges import fsdp_in_pipeline
from .fsdp_form import Fsdp
from .kept import kept
from .profile import Mark, Profile, Stretch, Sums
from .schedules import Load, in_flight, peak_of_rank, receive_buffers
from .sharding import Pipeline
from .stages import is_under


class Step(NamedTuple):
    """A stretch of one stage's forward or backward."""

    stage: int
    forward: bool
    stretch: Stretch


def pipeline_activity(
    profile: Profile, pipeline: Pipeline, ranks: int, rank: int, gradients: Changes, device: str, fsdp: Fsdp | None
) -> Changes:
    """What the rank's stages hold while a step goes on: receive buffers, micro-batches in flight, and gradients, which stay.

    `rank` is the one along the pipeline. Under FSDP whole parameters and gradients are there as well (`fsdp_in_pipeline`).
    """
    loads = stage_loads(profile, pipeline)
    own = range(rank, len(pipeline.stages), ranks)
    peak = peak_of_rank(pipeline, ranks, rank, {stage: loads[stage] for stage in own})
    made = sum(loads[stage].gradients for stage in own)
    count = in_flight(pipeline.schedule, ranks, rank, pipeline.microbatches, len(own))
    held = [(f"{count} micro-batches in flight", max(0, peak - made))]
    if fsdp is None:
        return _buffers(pipeline, own, profile.passed, device) + gradients + _passing(held, device)
    held.append(("whole parameters and gradients of the stages", _whole(fsdp)))
    return _buffers(pipeline, own, profile.passed, device) + _passing(held, device) + gradients


def pipeline_inputs(profile: Profile, pipeline: Pipeline, ranks: int, rank: int, device: str) -> Changes:
    """The inputs of a step: of all micro-batches on the ranks of the first and the last stage, which are given them as one batch.

    Other stages receive theirs; of what all of them are given besides, as positions are, one micro-batch is taken to be there.
    """
    own = range(rank, len(pipeline.stages), ranks)
    many = pipeline.microbatches if 0 in own or len(pipeline.stages) - 1 in own else 1
    return Changes.of(Change(device, name, many * nbytes) for name, nbytes in profile.inputs)


def _buffers(pipeline: Pipeline, own: Sequence[int], passed: int, device: str) -> Changes:
    many = (len(pipeline.stages), pipeline.microbatches, passed, passed)
    return Changes.of([Change(device, "receive buffers of the pipeline", sum(receive_buffers(stage, *many) for stage in own))])


def _whole(fsdp: Fsdp) -> int:
    parts = [part for unit in fsdp.units.values() for part in unit.parts]
    gathered = max((part.gathered_itemsize for part in parts), default=4)
    units = [fsdp.ranks_of(unit) * sum(part.numel for part in unit.parts) for unit in fsdp.units.values()]
    return fsdp_in_pipeline(units, gathered, fsdp.reduce_itemsize or gathered)


def _passing(held: Sequence[tuple[str, int]], device: str) -> Changes:
    """Come, and go."""
    found = Changes.of(Change(device, name, nbytes) for name, nbytes in held)
    return found + found.released()


# -- stages -------------------------------------------------------------------------------------------------------------


@kept
def stage_loads(profile: Profile, pipeline: Pipeline) -> Sequence[Load]:
    """What a micro-batch takes on each stage."""
    steps, last = list(steps_of(profile, pipeline)), len(pipeline.stages) - 1
    return [
        _load(steps, stage, sent=profile.passed if stage < last else 0, sent_back=profile.passed if stage else 0)
        for stage in range(last + 1)
    ]


def _load(steps: Sequence[Step], stage: int, sent: int, sent_back: int) -> Load:
    """The trace frees the gradient that comes from the next stage, which is a receive buffer here, and stays."""
    forward = [step.stretch.fresh for step in steps if step.stage == stage and step.forward]
    backward = [step.stretch for step in steps if step.stage == stage and not step.forward]
    (rise, saved), (first, fresh), (later, added) = (
        _rise_and_net(sums) for sums in (forward, [each.fresh for each in backward], [each.added for each in backward])
    )
    return Load(saved, rise, later + sent, first + sent, fresh - added, sent, sent_back)


def _rise_and_net(sums: Sequence[Sums]) -> tuple[int, int]:
    now = most = 0
    for each in sums:
        most = max(most, now + each.rise)
        now += each.net
    return most, now


def steps_of(profile: Profile, pipeline: Pipeline) -> Iterator[Step]:
    """All stretches of a profile, in order, each with the stage whose module was the last to begin."""
    names = {name: stage for stage, found in enumerate(pipeline.stages) for name in found}
    stage, forward = 0, True
    for block in profile.blocks:
        for time in range(block.times):
            for part in block.parts:
                if isinstance(part, Stretch):
                    yield Step(stage, forward, part)
                elif part.turn == "backward" and part.unit == "":
                    stage, forward = len(pipeline.stages) - 1, False
                elif part.turn in ("forward", "backward"):
                    forward = part.turn == "forward"
                    stage = _stage_of(part, time, block.times, profile, names, stage)


def _stage_of(mark: Mark, time: int, times: int, profile: Profile, names: Mapping[str, int], before: int) -> int:
    """The stage of the module at a mark; of one that stands for others, of the one whose turn it is."""
    stands_for = profile.names_of(f"{mark.unit}.")
    turn = time if mark.turn == "forward" else times - 1 - time
    name = stands_for[turn if len(stands_for) == times else 0].removesuffix(".")
    return next((stage for known, stage in names.items() if name == known or is_under(name, [known])), before)
