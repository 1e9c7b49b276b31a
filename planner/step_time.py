"""How long a training step of a rank takes, predicted in closed form: what a search over plans minimizes.

    step = accumulate x (sum over blocks of times x block, and the edges) + optimizer

A profile gives the blocks, with the operations and bytes of the ops in each (`work.py`); `block_time.py` says what one takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..tracer.errors import DecisionError
from .block_time import BlockTime, Talking, block_time, edges
from .fsdp_form import Fsdp
from .optimizer import Trained
from .optimizer_work import optimizer_seconds
from .profile import Profile, Stretch
from .sharding import Sharding
from .speeds import Speeds
from .workload import Training

_NOT_TIMED = {"pipeline": "a pipeline", "context": "a context axis", "expert": "an expert axis"}


@dataclass(frozen=True)
class StepTime:
    """The seconds of one training step of each rank, and what they consist of.

    `compute` is forward and backward, copies into and out of communication buffers included; `recompute` is what activation
    checkpointing runs a second time. `exposed` is communication that is waited for, by collective, with `transfer` for what goes
    between device and host; `hidden` goes on beside the computation, and counts for nothing. `flops` are the operations of the
    rank's step, those of `recompute` included. `notes` say what was taken for granted.

    >>> time = StepTime(compute=0.75, recompute=0.25, exposed={"all-gather": 0.125}, optimizer=0.0625)
    >>> time.total
    1.1875
    >>> print(time)
    1.19 s a step: compute 750 ms, recompute 250 ms, all-gather 125 ms, optimizer 62.5 ms
    """

    compute: float
    recompute: float = 0.0
    exposed: Mapping[str, float] = field(default_factory=dict)
    optimizer: float = 0.0
    hidden: float = 0.0
    flops: int = 0
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.recompute + sum(self.exposed.values()) + self.optimizer

    def to_json(self) -> dict[str, object]:
        """The same as plain JSON data, in seconds."""
        return {
            "total": self.total,
            "compute": self.compute,
            "recompute": self.recompute,
            "exposed": dict(self.exposed),
            "optimizer": self.optimizer,
            "hidden": self.hidden,
            "flops": self.flops,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        parts = [("compute", self.compute), ("recompute", self.recompute), *self.exposed.items(), ("optimizer", self.optimizer)]
        shown = ", ".join(f"{name} {human_seconds(seconds)}" for name, seconds in parts if seconds)
        hidden = f"; {human_seconds(self.hidden)} of communication hidden" if self.hidden else ""
        return f"{human_seconds(self.total)} a step: {shown or 'nothing'}{hidden}"


def human_seconds(seconds: float) -> str:
    """Seconds in three digits.

    >>> human_seconds(1.2345), human_seconds(0.0123), human_seconds(0.0000042)
    ('1.23 s', '12.3 ms', '4.2 us')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def step_time(
    profile: Profile,
    sharding: Sharding | None,
    fsdp: Fsdp | None,
    parameters: Sequence[Trained],
    workload: Training,
    speeds: Speeds,
) -> StepTime:
    """The time of a step of one rank, which holds and steps `parameters`.

    `fsdp` says how FSDP2 is applied (`fsdp_units.fsdp_of`). Raises `DecisionError` for axes whose time is not known.
    """
    check_timed(sharding)
    talking_to = Talking.of(sharding, fsdp)
    blocks = [(block, block_time(block, profile, talking_to, speeds)) for block in profile.blocks]
    offload = fsdp is not None and fsdp.offload
    stepped = optimizer_seconds(
        workload.optimizer, workload.implementation, parameters, workload.clip_grad_norm is not None, speeds, offload
    )
    found = summed((block.times * workload.accumulate, time) for block, time in blocks)
    late = workload.accumulate * edges(blocks)
    return StepTime(
        compute=found.compute + found.copies,
        recompute=found.again,
        exposed=_exposed(found, late),
        optimizer=stepped,
        hidden=found.hidden - late,
        flops=workload.accumulate * flops_of(profile),
        notes=(*speeds.notes, *_notes(sharding, speeds)),
    )


def samples_of(sharding: Sharding | None, workload: Training) -> int:
    """The samples that all ranks go through in one step: ranks along the replicate and shard axes have their own."""
    copies = 1 if sharding is None else sharding.size("replicate") * sharding.size("shard")
    return copies * workload.batch_size * workload.accumulate


def check_timed(sharding: Sharding | None) -> None:
    """Raise `DecisionError` for what the time of a step is not known of."""
    found = [what for role, what in _NOT_TIMED.items() if sharding is not None and sharding.size(role) > 1]  # type: ignore[arg-type]
    if found:
        raise DecisionError(
            f"the plan has {' and '.join(found)}, and the time of a step is known for replicate, shard and tensor axes only; ask "
            "for one that has no others"
        )


def summed(times: Iterator[tuple[int, BlockTime]]) -> BlockTime:
    """Blocks, each so many times, as one."""
    compute = again = copies = hidden = 0.0
    waited: dict[str, float] = {}
    beside: dict[str, float] = {}
    for count, each in times:
        compute, again = compute + count * each.compute, again + count * each.again
        copies, hidden = copies + count * each.copies, hidden + count * each.hidden
        for into, found in ((waited, each.waited), (beside, each.beside)):
            for kind, seconds in found.items():
                into[kind] = into.get(kind, 0.0) + count * seconds
    return BlockTime(compute, again, copies, waited, beside, hidden)


def _exposed(found: BlockTime, late: float) -> dict[str, float]:
    """By collective; of what goes on beside the computation each bears its share of what is not hidden."""
    beside = sum(found.beside.values())
    share = (beside - found.hidden + late) / beside if beside else 0.0
    exposed = dict(found.waited)
    for kind, seconds in found.beside.items():
        exposed[kind] = exposed.get(kind, 0.0) + share * seconds
    return {kind: seconds for kind, seconds in exposed.items() if seconds}


def flops_of(profile: Profile) -> int:
    """The operations of forward and backward of a profile on one rank."""
    return sum(block.times * part.work.flops for block in profile.blocks for part in block.parts if isinstance(part, Stretch))


def _notes(sharding: Sharding | None, speeds: Speeds) -> Iterator[str]:
    yield "kernels run one after the other, as in eager mode: torch.compile, which fuses them, takes less"
    if sharding is not None and sharding.ranks > 1 and not speeds.talks:
        yield "collectives are rings at the speed of the slowest link, whole nodes apart from each other"
