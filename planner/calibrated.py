"""A verdict's rooms with a calibration: what was measured in place of named constants, its error bar in place of the margin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ..tracer.errors import CalibrationError
from .allocations import FIRST_STEP, OPTIMIZER, STEP
from .calibration import Calibration, Correction
from .catalog import Device
from .cluster import Cluster, catalogued
from .tiers import Tier

if TYPE_CHECKING:
    from .verdict import Room

_ANY = 2**60


def is_for(calibration: Calibration, device: Device) -> bool:
    """Whether a calibration was made on a kind of device: by its name, or what its driver calls it."""
    name = device.name
    return calibration.machine == name or catalogued(calibration.machine, _ANY, {name: device}) is not None


def check_calibration(calibration: Calibration, cluster: Cluster, uses_devices: bool) -> None:
    """Raise `CalibrationError` where a calibration is of another version of torch, or of no device that the plan uses."""
    calibration.check_torch()
    if not uses_devices and calibration.on_host:
        return
    if not uses_devices or not any(is_for(calibration, device) for device in cluster.devices):
        has = ", ".join(dict.fromkeys(device.name for device in cluster.devices)) if uses_devices else "the CPU alone"
        raise CalibrationError(
            f"the calibration is of {calibration}, and the plan uses {has} of {cluster}: verify a plan on such a device, name "
            "the device in the cluster (8xH100-80GB), or predict without calibration="
        )


def calibrated(
    room: Room,
    predicted: Mapping[str, int],
    tensors: Mapping[str, int],
    tiers: Mapping[str, Tier | None],
    calibration: Calibration,
    margin: float,
    outside: Mapping[str, int],
) -> Room:
    """The same room in the phase that takes most when corrected; `predicted` and `tensors` are bytes by phase,
    `tiers` says by which tier they are.

    `outside` is what comes on top, with the calibration's own figures. A phase that was not measured, or nothing near its size,
    keeps `margin` and the constants. What is left out of a step stays so unless each of its phases was measured with it.
    """
    corrections = {phase: calibration.correction(phase, tiers[phase], nbytes) for phase, nbytes in predicted.items()}
    phase = max(predicted, key=lambda each: _with_margin(predicted[each], corrections[each], margin))
    correction = corrections[phase]
    if correction is None:
        return room
    held = tensors[phase]
    added = {"reserved beyond them": predicted[phase] - held, "as measured": correction.bias, **outside}
    added = {name: nbytes for name, nbytes in added.items() if nbytes or name in outside}
    kept = correction.error * predicted[phase] + correction.least * sum(outside.values(), start=correction.bias)
    left_out = tuple(each for each in room.left_out if not _was_measured(each, corrections))
    return replace(room, phase=phase, tensors=held, added=added, margin=math.ceil(kept), left_out=left_out, calibrated=correction)


def _was_measured(what: str, corrections: Mapping[str, Correction | None]) -> bool:
    """Whether every phase of a step was measured with what is left out: nobody knows which of them it is in."""
    of_step = [each for phase, each in corrections.items() if phase in (FIRST_STEP, STEP, OPTIMIZER)]
    return bool(of_step) and all(each is not None and what in each.included for each in of_step)


def _with_margin(predicted: int, correction: Correction | None, margin: float) -> float:
    return predicted * (1 + margin) if correction is None else (predicted + correction.bias) * (1 + correction.error)


def outside_measured(calibration: Calibration, communicators: int, each: int) -> dict[str, int]:
    """What a CUDA device holds outside torch's allocator, as measured; communicators that were not there then come on top."""
    more = max(0, communicators - calibration.communicators)
    return {"context and libraries, measured": calibration.taken} | ({"communicators": more * each} if more else {})
