"""What `plan.fit` found, as data that is saved with the plan: for which cluster and workload, why so, and what else there was."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .records import Record, dtype_name, dtype_named
from .tiers import Word
from .workload import Checkpointing, Training


class Reason(Record):
    """A decision and why it was taken."""

    what: str
    why: str


class Candidate(Record):
    """A layout that was tried, with the best that layers can do in it: seconds for a sample, bytes at the peak of a rank.

    One that does not fit has no time; `short` says where it lacks how much.
    """

    layout: str
    seconds: float | None = None
    peak: int
    verdict: Word
    short: str = ""


class TrainingRecord(Record):
    """The workload of training, without example inputs and the loss, which are no data."""

    optimizer: str
    batch_size: Annotated[int, Field(ge=1)]
    seq_len: int | None = None
    implementation: str | None = None
    autocast: str | None = None
    checkpointing: Checkpointing = "none"
    clip_grad_norm: float | None = None
    accumulate: Annotated[int, Field(ge=1)] = 1

    @classmethod
    def of(cls, workload: Training) -> TrainingRecord:
        """The data of a workload."""
        return cls(
            optimizer=workload.optimizer,
            batch_size=workload.batch_size,
            seq_len=workload.seq_len,
            implementation=workload.implementation,
            autocast=None if workload.autocast is None else dtype_name(workload.autocast),
            checkpointing=workload.checkpointing,
            clip_grad_norm=workload.clip_grad_norm,
            accumulate=workload.accumulate,
        )

    def to_training(self) -> Training:
        """The workload again; its inputs are made from the module's signature, its loss is the module's own."""
        autocast = None if self.autocast is None else dtype_named(self.autocast)
        return Training(**{**self.model_dump(), "autocast": autocast})

    def describe(self) -> str:
        """`Training("adamw", batch_size=1, seq_len=8192)`, with what is not as it is by default."""
        default = TrainingRecord(optimizer=self.optimizer, batch_size=self.batch_size)
        given = {name: value for name, value in self.model_dump().items() if value != getattr(default, name)}
        told = {"batch_size": self.batch_size, **given}
        return f'Training("{self.optimizer}", {", ".join(f"{name}={value!r}" for name, value in told.items())})'


class Fitted(Record):
    """What a search decided for training: `seconds` of a step in which all ranks go through `samples`, on `cluster`.

    `tier` is the one that the peak was checked by. `binding` is the place with least to spare. `candidates` begin with what was
    chosen. `would_help` is what the runtime does not carry out yet. Where `proven` is false, the time for the search was over.
    """

    cluster: str
    workload: TrainingRecord
    verdict: Word
    tier: str
    peak: int
    binding: str
    seconds: float
    samples: int
    reasons: tuple[Reason, ...]
    candidates: tuple[Candidate, ...] = ()
    would_help: tuple[str, ...] = ()
    proven: bool = True
