"""What `plan.fit` found, as data that is saved with the plan: for which cluster and workload, why so, and what else there was."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .inference import Cache, Inference
from .records import Record, dtype_name, dtype_named
from .tiers import Word
from .workload import Checkpointing, Training


class Given(Record):
    """An option that the user gave `plan.fit`, and its value in words."""

    name: str
    value: str

    def describe(self) -> str:
        """`compute_dtype=bfloat16`."""
        return f"{self.name}={self.value}"


class Reason(Record):
    """A decision and why it was taken."""

    what: str
    why: str


class Candidate(Record):
    """A layout that was tried, with the best that layers can do in it: seconds for a sample, bytes at the peak of a rank.

    One that does not fit has no time; `short` says where it lacks how much, `missing` how many bytes.
    """

    layout: str
    seconds: float | None = None
    peak: int
    verdict: Word
    short: str = ""
    missing: int | None = None


class _Workload(Record):
    """What the workloads have in common."""

    batch_size: Annotated[int, Field(ge=1)]

    def _told(self, default: Record) -> str:
        """The size of a batch, and what is not as it is in `default`."""
        given = {name: value for name, value in self.model_dump().items() if value != getattr(default, name)}
        return ", ".join(f"{name}={value!r}" for name, value in ({"batch_size": self.batch_size} | given).items())


class TrainingRecord(_Workload):
    """The workload of training, without example inputs and the loss, which are no data."""

    optimizer: str
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
        return f'Training("{self.optimizer}", {self._told(default)})'


class InferenceRecord(_Workload):
    """The workload of serving, without example inputs, which are no data."""

    seq_len: int | None = None
    new_tokens: Annotated[int, Field(ge=1)] = 1
    autocast: str | None = None
    cache: Cache = "dynamic"

    @classmethod
    def of(cls, workload: Inference) -> InferenceRecord:
        """The data of a workload."""
        return cls(
            batch_size=workload.batch_size,
            seq_len=workload.seq_len,
            new_tokens=workload.new_tokens,
            autocast=None if workload.autocast is None else dtype_name(workload.autocast),
            cache=workload.cache,
        )

    def to_inference(self) -> Inference:
        """The workload again; its inputs are made from the module's signature."""
        autocast = None if self.autocast is None else dtype_named(self.autocast)
        return Inference(**{**self.model_dump(), "autocast": autocast})

    def describe(self) -> str:
        """`Inference(batch_size=1, seq_len=8192)`, with what is not as it is by default."""
        return f"Inference({self._told(InferenceRecord(batch_size=self.batch_size))})"


class _Found(Record):
    """What is known of every search: of a rank's peak, the tier that it was checked by, and the place with least to spare.

    `options` are what the user said. `steps` are the places of the plan's steps that the search decided; those before are the
    user's, and those after. `changed` names what was decided since: then the figures are those of the plan before.
    """

    cluster: str
    verdict: Word
    tier: str
    peak: int
    binding: str
    reasons: tuple[Reason, ...]
    options: tuple[Given, ...] = ()
    steps: tuple[int, ...] = ()
    changed: tuple[str, ...] = ()


class Fitted(_Found):
    """What a search decided for training: `seconds` of a step in which all ranks go through `samples`, on `cluster`.

    `candidates` begin with what was chosen. `would_help` is what the runtime does not carry out yet. Where `proven` is false, the
    time for the search was over.
    """

    workload: TrainingRecord
    seconds: float
    samples: int
    candidates: tuple[Candidate, ...] = ()
    would_help: tuple[str, ...] = ()
    proven: bool = True

    @property
    def samples_per_second(self) -> float:
        """Of all ranks together."""
        return self.samples / self.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together; None where samples are not counted in tokens."""
        return None if self.workload.seq_len is None else self.samples_per_second * self.workload.seq_len


class FittedServing(_Found):
    """What a search decided for serving on the devices of one node."""

    workload: InferenceRecord


AnyFitted = Fitted | FittedServing


def workload_of(fitted: AnyFitted) -> Training | Inference:
    """The workload that a plan was fitted to, as far as it is data."""
    return fitted.workload.to_training() if isinstance(fitted, Fitted) else fitted.workload.to_inference()


def changed(fitted: AnyFitted | None, name: str) -> AnyFitted | None:
    """The record once something that it has figures for is decided anew."""
    if fitted is None or name in fitted.changed:
        return fitted
    return fitted.model_copy(update={"changed": (*fitted.changed, name)})
