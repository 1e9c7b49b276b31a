"""What verifications have measured on one kind of device, to predict with: how far off phases were, and what comes on top.

`error` of a phase is the share that has to be kept free for what was not predicted, `bias` the share by which too little was
predicted each time:

* `bias` is the largest of measured / predicted - 1 over all verifications, and never below zero: a prediction that was too high is
  not lowered;
* `error` is three standard deviations of measured / predicted over all steps of all verifications, and never below
  `LEAST` (2 %), or `LEAST_OF_FEW` (5 %) while there are fewer than `ENOUGH` (3) verifications, whose spread says little.

Predictions of more than `REACH` (10) times the largest bytes that were verified are not calibrated: there the uncalibrated margin
stays. *Measured* are the bytes that the device had to give: reserved by torch's allocator on CUDA, handed out on the CPU.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, ValidationError

from ..tracer.errors import CalibrationError
from .catalog import problems
from .plan_file import replace_file
from .rank_memory import HOST
from .records import Record
from .verification import Check, RankChecks

SIGMAS = 3
LEAST, LEAST_OF_FEW, ENOUGH = 0.02, 0.05, 3
REACH = 10
LARGEST_FILE = 64 * 2**20

_Bytes = Annotated[int, Field(ge=0)]
_WAY_OUT = "make it anew with verification.save_calibration(path)"


class Measured(Record):
    """One phase of one verification: what `tier` predicted, and what each of its steps took."""

    phase: str
    tier: Literal["T0", "T1"]
    predicted: Annotated[int, Field(gt=0)]
    measured: Annotated[tuple[_Bytes, ...], Field(min_length=1)]
    taken: _Bytes

    @property
    def ratios(self) -> list[float]:
        """Measured by predicted, of every step."""
        return [each / self.predicted for each in self.measured]


class Correction(Record):
    """What a calibration says of one phase: shares of its predicted bytes, and from how many verifications they are."""

    bias: float
    error: float
    verifications: int


class Calibration(Record):
    """What verifications measured on `machine` (a kind of device, or "cpu") with one version of torch.

    >>> once = Measured(phase="step", tier="T1", predicted=1000, measured=(1010, 1010), taken=300)
    >>> found = Calibration(machine="cpu", torch="2.13.0", records=(once,))
    >>> found.correction("step", "T1", 5000)
    Correction(bias=0.01, error=0.05, verifications=1)
    >>> found.correction("step", "T1", 50_000) is None
    True
    """

    format: Literal["groundplan.calibration"] = "groundplan.calibration"
    version: Literal[1] = 1
    machine: Annotated[str, Field(min_length=1)]
    torch: Annotated[str, Field(min_length=1)]
    records: tuple[Measured, ...]

    @property
    def on_host(self) -> bool:
        """Whether it is one of processes without a CUDA device."""
        return self.machine == HOST

    @property
    def taken(self) -> int:
        """The most bytes that were taken outside torch's allocator: CUDA's context and libraries, or the process itself."""
        return max((each.taken for each in self.records), default=0)

    def correction(self, phase: str, tier: str, predicted: int) -> Correction | None:
        """How a prediction is corrected; None where nothing like it was measured."""
        records = [each for each in self.records if each.phase == phase and each.tier == tier]
        if not records or predicted > REACH * max(each.predicted for each in records):
            return None
        ratios = [ratio for each in records for ratio in each.ratios]
        spread = SIGMAS * statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        least = LEAST if len(records) >= ENOUGH else LEAST_OF_FEW
        return Correction(
            bias=round(max(0.0, max(ratios) - 1), 9), error=round(max(least, spread), 9), verifications=len(records)
        )

    def __add__(self, other: Calibration) -> Calibration:
        """Both together; raises `CalibrationError` where they are of two kinds of device or two versions of torch."""
        if (self.machine, self.torch) != (other.machine, other.torch):
            raise CalibrationError(
                f"one calibration is of {self}, the other of {other}, which do not go together: save them to files of their own"
            )
        return self.model_copy(update={"records": (*self.records, *other.records)})

    def check_torch(self) -> None:
        """Raise `CalibrationError` where it was made with another version of torch than this one."""
        if self.torch != torch_version():
            raise CalibrationError(
                f"the calibration is of torch {self.torch}, and this is {torch_version()}, whose kernels may take something else: "
                "verify a plan with this version, or predict without calibration="
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path` as JSON, whole or not at all; raises `CalibrationError` where that cannot be done."""
        try:
            replace_file(Path(os.path.realpath(path)), (self.model_dump_json(indent=2) + "\n").encode())
        except OSError as error:
            raise CalibrationError(
                f"cannot write the calibration {os.fspath(path)}: {error.strerror or error}; give a path in a folder that exists "
                "and is writable"
            ) from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote; raises `CalibrationError`, naming the file and the field, for anything else."""
        return _read(path)

    def __str__(self) -> str:
        return f"{self.machine} with torch {self.torch}"


def torch_version() -> str:
    """The version of torch without the build's label, as a plan for CUDA may be made where torch is built for the CPU."""
    return torch.__version__.partition("+")[0]


def calibration_of(machine: str, ranks: Iterable[RankChecks]) -> Calibration:
    """The calibration that one verification makes, of all its ranks; on a machine with CUDA of its devices alone."""
    records = tuple(
        _record(check) for each in ranks for check in each.checks if check.predicted and (check.device == HOST) == (machine == HOST)
    )
    return Calibration(machine=machine, torch=torch_version(), records=records)


def _record(check: Check) -> Measured:
    kept = check.whole - check.taken - check.measured if check.device != HOST else 0  # what the allocator keeps beside it
    return Measured(
        phase=check.phase,
        tier="T0" if check.run is None else "T1",
        predicted=check.predicted,
        measured=tuple(each + max(0, kept) for each in check.repeats),
        taken=check.taken,
    )


def _read(path: str | os.PathLike[str]) -> Calibration:
    name = os.fspath(path)
    try:
        data = _bytes(Path(path))
        return Calibration.model_validate_json(data)
    except OSError as error:
        raise CalibrationError(f"cannot read the calibration {name}: {error.strerror or error}; {_WAY_OUT}") from error
    except ValidationError as error:
        raise CalibrationError(f"{name} is no calibration that groundplan wrote: {problems(error)}; {_WAY_OUT}") from error


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > LARGEST_FILE:
        raise CalibrationError(f"{path} has more than {LARGEST_FILE:,} bytes, so it is no calibration; {_WAY_OUT}")
    return path.read_bytes()
