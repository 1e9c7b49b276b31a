"""What verifications measured, used to predict with: kept, believed no further than it goes, and of its own device alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.planner.calibration import LEAST, LEAST_OF_FEW, REACH, Measured, calibration_of, torch_version
from groundplan.planner.memory import Binding, Memory
from groundplan.planner.tiers import Tier
from groundplan.planner.verdict import COMMUNICATOR_BYTES, MARGIN
from groundplan.planner.verification import Check, RankChecks

GB = 10**9
H100 = "NVIDIA H100 80GB HBM3"


def once(predicted: int = 10 * GB, *measured: int, **fields: Any) -> Measured:
    known = {"phase": "load", "tier": "T0", "taken": GB // 2, **fields}
    return Measured(predicted=predicted, measured=measured or (predicted,), **known)


def calibration(*records: Measured, machine: str = H100) -> gp.Calibration:
    return gp.Calibration(machine=machine, torch=torch_version(), records=records)


def memory(nbytes: int, device: str = "cuda:0", **fields: Any) -> Memory:
    return Memory({"load": {device: nbytes}}, Binding("load", device, nbytes, ()), (), **fields)


# -- files --------------------------------------------------------------------------------------------------------------


def test_a_verification_s_calibration_comes_back(tmp_path: Path) -> None:
    plan, path = gp.trace(nn.Linear, 300, 400), tmp_path / "cpu.json"
    found = plan.verify(gp.Training("sgd", batch_size=2), seed=0)
    saved = found.save_calibration(path)
    assert gp.Calibration.load(path) == saved == found.calibration() and saved.machine == "cpu"
    tiers = {(each.phase, each.tier) for each in saved.records}
    assert {("construct", "T0"), ("step", "T0"), ("step", "T1")} <= tiers
    again = plan.verify(seed=0).save_calibration(path)
    assert again == gp.Calibration.load(path) and len(again.records) == len(saved.records) + 2
    verdict = plan.memory(gp.Training("sgd", batch_size=2), tier="T1").fits("16GB-cpu", calibration=path)
    assert verdict.verdict == "fits" and verdict.binding.calibrated is not None
    assert "processes, measured" in verdict.binding.added and "calibrated by" in str(verdict)


BROKEN: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: None, "cannot read the calibration .*No such file"),
    (lambda path: path.mkdir(), "cannot read the calibration"),
    (lambda path: path.write_bytes(b""), "is no calibration that groundplan wrote"),
    (lambda path: path.write_bytes(b"\x80\x02}q."), "is no calibration that groundplan wrote"),
    (lambda path: path.write_text(calibration(once()).model_dump_json()[:-9]), "is no calibration"),
    (lambda path: path.write_text(json.dumps({**calibration(once()).model_dump(), "format": "other"})), "format is 'other'"),
    (lambda path: path.write_text(json.dumps({**calibration(once()).model_dump(), "version": 2})), "version is 2"),
    (lambda path: path.write_text(calibration(once()).model_dump_json().replace("10000000000", "0", 1)), "predicted is 0"),
    (lambda path: path.write_text(calibration(once()).model_dump_json().replace("[10000000000]", "[]")), "measured is"),
    (lambda path: path.write_text(calibration(once()).model_dump_json().replace('"taken"', '"token"')), "taken is|token is"),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_file_that_is_none_is_refused(number: int, tmp_path: Path) -> None:
    make, message = BROKEN[number]
    make(tmp_path / "it.json")
    with pytest.raises(gp.CalibrationError, match=message) as raised:
        gp.Calibration.load(tmp_path / "it.json")
    assert "it.json" in str(raised.value) and "save_calibration" in str(raised.value)


def test_a_calibration_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(gp.CalibrationError, match=r"cannot write the calibration .*a folder that exists"):
        calibration(once()).save(tmp_path / "nowhere" / "it.json")


def test_calibrations_of_two_devices_do_not_go_together(tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    calibration(once()).save(path)
    with pytest.raises(gp.CalibrationError, match="files of their own"):
        gp.trace(nn.Linear, 30, 40).verify(saving=False).save_calibration(path)
    assert gp.Calibration.load(path) == calibration(once()), "what was there stays"


# -- whose it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "cluster", "message"),
    [
        (calibration(once(), machine="NVIDIA A100-SXM4-80GB"), "H100-80GB", "of NVIDIA A100.*the plan uses H100-80GB"),
        (calibration(once()), "24GB", "name the device in the cluster"),
        (calibration(once(), machine="cpu"), "H100-80GB", "the calibration is of cpu"),
        (gp.Calibration(machine=H100, torch="2.0.1", records=(once(),)), "H100-80GB", r"of torch 2\.0\.1, and this is"),
    ],
)
def test_another_device_s_or_torch_s_is_refused(found: gp.Calibration, cluster: str, message: str) -> None:
    with pytest.raises(gp.CalibrationError, match=message):
        memory(GB).fits(cluster, calibration=found)


def test_a_device_s_is_refused_for_a_plan_on_the_cpu() -> None:
    with pytest.raises(gp.CalibrationError, match="the plan uses the CPU alone"):
        memory(GB, "cpu").fits("64GB-cpu", calibration=calibration(once()))


def test_the_driver_s_name_is_the_catalog_s() -> None:
    assert memory(GB).fits("H100-80GB", calibration=calibration(once())).binding.calibrated is not None
    with pytest.raises(gp.CalibrationError):
        memory(GB).fits("H200", calibration=calibration(once()))


# -- what it says -------------------------------------------------------------------------------------------------------


def test_the_error_bar_takes_the_margin_s_place() -> None:
    known = calibration(once(60 * GB), once(50 * GB), once(40 * GB))
    tight, found = memory(70 * GB).fits("H100-80GB"), memory(70 * GB).fits("H100-80GB", calibration=known)
    assert tight.verdict == "tight" and found.verdict == "fits"
    room = found.binding
    assert room.added == {"context and libraries, measured": GB // 2}
    assert room.margin == pytest.approx(LEAST * room.needed, abs=1) and room.needed == 70 * GB + GB // 2
    assert f"calibrated on {H100}" in str(found) and "calibrated by 3 verifications, error 2.0%" in str(found)
    assert "20%" not in " ".join(found.notes) and found.to_json()["rooms"][0]["calibrated"]["verifications"] == 3


def test_too_little_predicted_comes_on_top() -> None:
    known = calibration(once(60 * GB, 66 * GB))
    found = memory(70 * GB).fits("H100-80GB", calibration=known)
    assert found.binding.added["as measured"] == 7 * GB and found.binding.needed == 77 * GB + GB // 2
    assert found.verdict == "tight" and memory(75 * GB).fits("H100-80GB", calibration=known).verdict == "does not fit"


def test_too_much_predicted_stays() -> None:
    known = calibration(once(60 * GB, 30 * GB))
    assert memory(70 * GB).fits("H100-80GB", calibration=known).binding.needed == 70 * GB + GB // 2


def test_few_verifications_say_little() -> None:
    assert calibration(*[once()] * 3).correction("load", "T0", GB).error == LEAST_OF_FEW  # type: ignore[union-attr]
    different = calibration(once(GB), once(2 * GB), once(3 * GB))
    assert different.correction("load", "T0", GB).error == LEAST  # type: ignore[union-attr]
    spread = calibration(once(100, 100, 110), once(100, 120), once(100, 90)).correction("load", "T0", 100)
    assert spread is not None and spread.error == pytest.approx(3 * 0.129, abs=1e-3) and spread.bias == 20


def test_what_is_far_larger_or_was_not_measured_keeps_the_margin() -> None:
    known = calibration(once(GB))
    for nbytes in (REACH * GB + 1, GB):
        found = memory(nbytes).fits("H100-80GB", calibration=known)
        expected = found.rooms[0].tensors > REACH * GB
        assert (found.binding.calibrated is None) is expected
        assert any("is not calibrated" in note for note in found.notes) is expected
        assert not expected or found.binding.margin == pytest.approx(MARGIN * found.binding.needed, abs=1)


def test_communicators_that_were_not_there_come_on_top() -> None:
    def of_rank(_: int) -> Memory:
        return memory(GB, communicators=3, ranks=2, of_rank=of_rank)

    alone = of_rank(0).fits("2xH100-80GB", calibration=calibration(once()))
    assert alone.binding.added["communicators"] == 3 * COMMUNICATOR_BYTES
    with_them = of_rank(0).fits("2xH100-80GB", calibration=calibration(once(communicators=3)))
    assert "communicators" not in with_them.binding.added


def test_what_is_left_out_was_measured_only_by_several() -> None:
    plan, workload = gp.trace(nn.Conv1d, 64, 64, 3).to("cuda"), gp.Training("sgd", inputs=(torch.ones(2, 64, 8),))
    found = plan.memory(workload, tier="T2")
    assert found.left_out, "or the next lines say nothing"
    phases = {phase: usages["cuda:0"].reserved for phase, usages in found.reserved.items()}
    tiers = {phase: "T2" if phase in ("first_step", "step", "optimizer") else "T0" for phase in phases}
    records = [
        [once(times * nbytes, phase=phase, tier=tiers[phase], left_out=found.left_out) for phase, nbytes in phases.items()]
        for times in (1, 2, 3)
    ]
    assert found.fits("H100", calibration=calibration(*records[0] * 3)).verdict == "tight"
    assert found.fits("H100", calibration=calibration(*records[0], *records[1], *records[2])).verdict == "fits"
    others = [[record.model_copy(update={"left_out": ()}) for record in each] for each in records]
    linear = calibration(*others[0], *others[1], *others[2])
    assert found.fits("H100", calibration=linear).verdict == "tight", "verified models had no such kernels"
    several = calibration(once(GB), once(2 * GB), once(3 * GB))
    assert memory(GB, left_out=("activations",)).fits("H100", calibration=several).verdict == "tight"


def test_what_is_left_out_was_measured_in_every_phase_of_a_step() -> None:
    """The phase that needs most says nothing of workspaces that another takes, which is too large to be known."""
    workspaces = ("workspaces of cuDNN's convolutions",)
    known = calibration(
        *(once(size * GB, phase="optimizer", left_out=workspaces) for size in (4, 5, 6)),
        *(once(size * GB, phase=phase, left_out=workspaces) for size in (1, 2, 3) for phase in ("first_step", "step")),
    )

    def training(step: int) -> gp.Verdict:
        phases = {"first_step": {"cuda:0": GB}, "step": {"cuda:0": step}, "optimizer": {"cuda:0": 50 * GB}}
        return Memory(phases, Binding("optimizer", "cuda:0", 50 * GB, ()), (), left_out=workspaces).fits(
            "H100", calibration=known
        )

    assert training(30 * GB).verdict == "fits" and training(30 * GB).binding.calibrated is not None
    beyond = training(3 * REACH * GB + 1)
    assert beyond.binding.phase == "optimizer" and beyond.binding.calibrated is not None and beyond.verdict == "tight"


@pytest.mark.parametrize("tier", ["T0", "T1"])
def test_serving_is_not_calibrated_by_training(tier: Tier) -> None:
    """Its phases have the same names, and other kernels."""
    plan, workload = gp.trace(nn.Linear, 64, 64), gp.Inference(inputs=(torch.ones(2, 64),))
    found = plan.memory(workload, tier=tier)
    known = [once(each, phase=phase, tier=by) for phase, each in found.phases.items() for by in ("T0", "T1", "T2")]
    said = found.fits("16GB-cpu", calibration=calibration(*known, machine="cpu"))
    assert said.binding.phase in ("first_step", "step") and said.binding.calibrated is None


def test_without_cuda_the_allocators_tier_is_the_runs() -> None:
    plan, workload = gp.trace(nn.Linear, 64, 64), gp.Training("sgd", batch_size=2)
    phases = plan.memory(workload, tier="T1").phases
    known = calibration(*(once(nbytes, phase=phase, tier="T1") for phase, nbytes in phases.items()), machine="cpu")
    one, other = (plan.memory(workload, tier=tier).fits("16GB-cpu", calibration=known) for tier in ("T1", "T2"))
    assert one.rooms == other.rooms and one.binding.calibrated is not None


def test_a_calibrated_verdict_is_plain_data() -> None:
    left_out = ("what cuDNN keeps of a batch norm",)
    found = (
        memory(GB).fits("H100", calibration=calibration(*(once(size * GB, left_out=left_out) for size in (1, 2, 3)))).to_json()
    )
    assert json.loads(json.dumps(found)) == found
    assert found["binding"]["calibrated"]["included"] == list(left_out) and found["binding"]["left_out"] == []


RATIOS = st.lists(st.floats(0.5, 2), min_size=1, max_size=5)


@given(st.integers(1, 10**9), RATIOS, st.integers(1, 10**9))
def test_what_was_measured_always_fits_in_what_is_said(predicted: int, ratios: list[float], wanted: int) -> None:
    """For the very bytes that were verified, needed and margin cover each step that was measured."""
    measured = tuple(round(predicted * ratio) for ratio in ratios)
    found = calibration(once(predicted, *measured))
    said = found.correction("load", "T0", predicted)
    assert said is not None and predicted + said.bias >= max(measured)
    other = found.correction("load", "T0", wanted)
    assert (other is None) == (wanted > REACH * predicted)
    assert other is None or other.bias >= max(0, max(measured) - predicted)


def test_ranks_that_took_more_than_they_were_handed_out() -> None:
    """What is measured of a device is what its allocator had reserved; of a process, what it grew by."""
    beyond = {"allocator's cache": 30, "CUDA context, libraries, other processes": 5}
    check = Check("step", "cuda:0", 90, 100, 104, (104, 103), (), 139, beyond, taken=5, replayed=120, reserved=134)
    host = Check("step", "cpu", 8, 8, 8, (8,), (), 900, {"process beyond tensors": 892}, taken=7)
    found = calibration_of(H100, [RankChecks(0, H100, (check, host))], communicators=2)
    assert [(each.tier, each.predicted, each.measured) for each in found.records] == [
        ("T0", 90, (134, 133)),
        ("T1", 100, (134, 133)),
        ("T2", 120, (134, 133)),
    ]
    assert found.taken == 5 and found.communicators == 2
    more = Check("step", "cuda:0", 90, 100, 150, (150,), (), 155, {}, taken=5)
    both = calibration_of(H100, [RankChecks(0, H100, (check,)), RankChecks(1, H100, (more,))])
    assert [(each.tier, each.measured) for each in both.records] == [("T0", (150,)), ("T1", (150,)), ("T2", (134, 133))]
    alone = calibration_of("cpu", [RankChecks(0, "cpu", (host,))])
    assert alone.records[0].measured == (900,) and alone.taken == 7 and torch.__version__.startswith(alone.torch)
