"""What verifications have measured on one kind of device, to predict with: how far off phases were, and what comes on top.

A phase that is predicted to take P bytes is corrected by two things:

* `bias`, the bytes by which too little was predicted: over all verifications of the phase the largest excess E, as it is and in
  proportion to P, whichever is more (workspaces stay as they are, activations grow). Where too much was predicted, it stays so;
* `error`, the share of P that is to stay free besides: three standard deviations of measured / predicted over all steps of all
  verifications, but not below `LEAST` (2 %), or `LEAST_OF_FEW` (5 %) while there are fewer than `ENOUGH` (3) verifications of
  different sizes: the spread of few, or of one plan over and over, says little. Of what comes on top of P, which was measured as
  it is, this least share stays free.

Where P is more than `REACH` (10) times the largest that was verified, nothing is corrected, and the uncalibrated margin stays.
*Measured* are the bytes that a device had to give: those reserved by torch's allocator on CUDA, and on the CPU those by which the
process grew.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, ValidationError

from ..tracer.errors import CalibrationError
from .catalog import problems
from .changes import HOST
from .plan_file import replace_file
from .records import Record
from .tiers import Tier
from .verification import Check, RankChecks

SIGMAS = 3
LEAST, LEAST_OF_FEW, ENOUGH = 0.02, 0.05, 3
REACH = 10
LARGEST_FILE = 64 * 2**20

_Bytes = Annotated[int, Field(ge=0)]
_WAY_OUT = "make it anew with verification.save_calibration(path)"


class Measured(Record):
    """One phase of one verification: what `tier` predicted, and what each of its steps took.

    `taken` is what was held outside torch's allocator, on CUDA with so many `communicators`. `left_out` is what the prediction
    had left out of its bytes, and was measured with them.
    """

    phase: str
    tier: Tier
    predicted: Annotated[int, Field(gt=0)]
    measured: Annotated[tuple[_Bytes, ...], Field(min_length=1)]
    taken: _Bytes
    communicators: Annotated[int, Field(ge=0)] = 0
    left_out: tuple[str, ...] = ()

    @property
    def excess(self) -> int:
        """By how many bytes too little was predicted."""
        return max(0, max(self.measured) - self.predicted)

    @property
    def ratios(self) -> list[float]:
        """Measured by predicted, of every step."""
        return [each / self.predicted for each in self.measured]


@dataclass(frozen=True, slots=True)
class Correction:
    """What a calibration says of one phase: bytes that come on top, a share kept free, and how many sizes were verified.

    `included` is what predictions leave out and `ENOUGH` of these sizes were measured with.
    """

    bias: int
    error: float
    least: float
    verifications: int
    included: frozenset[str] = frozenset()


class Calibration(Record):
    """What verifications measured on `machine` (a kind of device, or "cpu") with one version of torch.

    >>> once = Measured(phase="step", tier="T1", predicted=1000, measured=(1010, 1010), taken=300)
    >>> found = Calibration(machine="cpu", torch="2.13.0", records=(once,))
    >>> found.correction("step", "T1", 5000), found.correction("step", "T1", 50).bias
    (Correction(bias=50, error=0.05, least=0.05, verifications=1, included=frozenset()), 10)
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

    @property
    def communicators(self) -> int:
        """How many communicators these include."""
        return min((each.communicators for each in self.records if each.taken == self.taken), default=0)

    def correction(self, phase: str, tier: Tier | None, predicted: int) -> Correction | None:
        """How a prediction is corrected; None where nothing like it was measured, nor is by any tier."""
        records = [each for each in self.records if each.phase == phase and each.tier == tier]
        if not records or predicted > REACH * max(each.predicted for each in records):
            return None
        ratios = [ratio for each in records for ratio in each.ratios]
        spread = SIGMAS * statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        different = len({each.predicted for each in records})
        least = LEAST if different >= ENOUGH else LEAST_OF_FEW
        bias = max(max(each.excess, -(-each.excess * predicted // each.predicted)) for each in records)
        return Correction(bias, max(least, spread), least, different, frozenset(_included(records)))

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
                f"the calibration is of torch {self.torch}, and this is {torch_version()}, whose kernels may take something "
                "else: verify a plan with this version, or predict without calibration="
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


def _included(records: Iterable[Measured]) -> Iterator[str]:
    """What was left out of predictions of enough different sizes."""
    sizes: dict[str, set[int]] = {}
    for record in records:
        for name in record.left_out:
            sizes.setdefault(name, set()).add(record.predicted)
    yield from (name for name, found in sizes.items() if len(found) >= ENOUGH)


def calibration_of(
    machine: str, ranks: Iterable[RankChecks], communicators: int = 0, left_out: tuple[str, ...] = ()
) -> Calibration:
    """The calibration that one verification makes: of its ranks, and devices, the one that took most in proportion.

    `left_out` is what the verified prediction left out, of which nobody could know the bytes beforehand.
    On a machine with CUDA it is of its devices alone.
    """
    worst: dict[tuple[str, Tier], Measured] = {}
    for check in (check for each in ranks for check in each.checks if (check.device == HOST) == (machine == HOST)):
        for record in _records(check, communicators, left_out):
            place = record.phase, record.tier
            worst[place] = max(worst.get(place, record), record, key=lambda each: max(each.ratios))
    return Calibration(machine=machine, torch=torch_version(), records=tuple(worst.values()))


def _records(check: Check, communicators: int, left_out: tuple[str, ...]) -> Iterator[Measured]:
    """One for each tier that predicted the phase."""
    outside = check.taken if check.device != HOST else 0
    besides = max(0, check.whole - outside - check.measured)  # what the allocator keeps, or the process grew by
    measured = tuple(each + besides for each in check.repeats)
    for tier, predicted in check.tiers.items():
        if predicted:
            yield Measured(
                phase=check.phase,
                tier=tier,
                predicted=predicted,
                measured=measured,
                taken=check.taken,
                communicators=communicators,
                left_out=left_out,
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
