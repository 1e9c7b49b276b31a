"""The catalog of devices: what it states, where that comes from, and files of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from groundplan.planner.catalog import OWN_FILE, Device, Flops, catalog, device_named, key, read_devices
from groundplan.tracer.errors import DecisionError

EVERY = sorted({device.name for device in catalog().values()})
GB = 10**9

OWN = """
[Mine-10GB]
aliases = ["mine"]
memory = 10_000_000_000
"""


@pytest.fixture(autouse=True)
def no_file_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWN_FILE, raising=False)


def own_file(folder: Path, text: str, name: str = "devices.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


# -- what is in it ------------------------------------------------------------------------------------------------------


def test_the_devices_of_the_issue_are_there() -> None:
    wanted = (
        "A100-40GB A100-80GB H100-80GB H100-PCIe H100-96GB H200 B200 L4 L40S A10G T4 V100 RTX-3090 RTX-4090 RTX-5090 MI300X cpu"
    )
    for name in wanted.split():
        assert device_named(name, catalog())


@pytest.mark.parametrize("name", EVERY)
def test_a_device_is_what_its_name_says_and_has_sources(name: str) -> None:
    device = device_named(name, catalog())
    assert device.sources and all(source.url.startswith("https://") for source in device.sources)
    assert device.bandwidth and device.pcie and device.flops.fp32
    if name != "CPU":
        named = int(name.rpartition("-")[2].removesuffix("GB")) * GB
        assert 0.97 * named <= device.memory <= named, "a device has at most what its name says"
        less = device.memory < named
        assert not less or any(source.kind == "measured" for source in device.sources), "less than the name has to be measured"


@pytest.mark.parametrize("name", EVERY)
def test_peaks_grow_as_dtypes_shrink(name: str) -> None:
    flops = device_named(name, catalog()).flops
    known = [peak for peak in (flops.fp32, flops.tf32, flops.bf16, flops.fp8) if peak is not None]
    assert known == sorted(known)
    assert flops.bf16 is None or flops.fp16 in (None, flops.bf16)


def test_some_numbers_by_hand() -> None:
    h100, t4 = device_named("H100", catalog()), device_named("T4", catalog())
    assert h100.flops == Flops(fp32=67e12, tf32=494.7e12, bf16=989.4e12, fp16=989.4e12, fp8=1978.9e12, int8=1978.9e12)
    assert (h100.memory, h100.bandwidth, h100.link, h100.pcie) == (80 * GB, 3.35e12, 450e9, 64e9)
    assert t4.flops.bf16 is None and t4.link is None


def test_names_are_compared_loosely() -> None:
    for name in ("rtx 4090", "RTX_4090", "4090", "rtx-4090-24gb"):
        assert device_named(name, catalog()).name == "RTX-4090-24GB"
    keys = [key(each) for device in set(catalog().values()) for each in (device.name, *device.aliases)]
    assert len(keys) == len(set(keys)), "no alias may mean two devices"


def test_an_unknown_device_is_refused_with_the_nearest() -> None:
    with pytest.raises(DecisionError, match=r"no device is called 'H10O-80GB'; did you mean H100-80GB"):
        device_named("H10O-80GB", catalog())
    with pytest.raises(DecisionError, match=r"no device is called 'zzz'; known: A100-40GB, "):
        device_named("zzz", catalog())


# -- files of one's own -------------------------------------------------------------------------------------------------


def test_a_file_adds_devices(tmp_path: Path) -> None:
    found = catalog(own_file(tmp_path, OWN))
    assert device_named("mine", found).memory == 10 * GB
    assert device_named("H100", found).memory == 80 * GB
    assert "mine" not in catalog()


def test_a_name_goes_before_another_device_s_alias(tmp_path: Path) -> None:
    assert device_named("H100", catalog(own_file(tmp_path, "[H100]\nmemory = 5"))).memory == 5


def test_a_file_of_json_that_the_environment_names_replaces_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWN_FILE, str(own_file(tmp_path, json.dumps({"L4-24GB": {"memory": 22 * GB}}), "devices.json")))
    assert device_named("L4-24GB", catalog()) == Device(name="L4-24GB", memory=22 * GB)
    assert device_named("L4-24GB", catalog(own_file(tmp_path, OWN))).memory != 22 * GB, "an argument goes before the environment"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nmemory = -5", r"a\.memory is -5: Input should be greater than or equal to 0"),
        ('[a]\nmemory = "80GB"', r"a\.memory is '80GB': Input should be a valid integer"),
        ("[a]\nmemory = 5\nspeed = 3", r"a\.speed is 3: Extra inputs are not permitted"),
        ("[a]\nmemory = 5\nflops = { fp33 = 1e12 }", r"a\.flops\.fp33 is 1000000000000.0: Extra inputs"),
        ("[a]\nmemory = 5\nlink = inf", r"a\.link is inf|a\.link is Infinity|cannot be read"),
        ("[a]\nmemory = 5\nlink = 1e9", "its speeds have no source"),
        ("[a]\nbandwidth = 1.0", r"a\.memory is .*: Field required"),
        ("a = 5", "a is 5: Input should be"),
        ("[a", "cannot be read"),
    ],
)
def test_a_wrong_file_names_field_and_value(tmp_path: Path, text: str, message: str) -> None:
    path = own_file(tmp_path, text)
    with pytest.raises(DecisionError, match=message) as caught:
        read_devices(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match=r"none\.toml cannot be read: .*No such file"):
        catalog(tmp_path / "none.toml")
