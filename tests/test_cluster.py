"""Clusters: from strings, files and this machine, and what is said about those that cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import groundplan as gp
from groundplan.planner.catalog import OWN_FILE, Device, catalog
from groundplan.planner.cluster import Cluster, catalogued, cluster_of
from groundplan.tracer.errors import DecisionError

GB = 10**9
KINDS = sorted({device.name for device in catalog().values() if device.memory})


@pytest.fixture(autouse=True)
def no_file_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OWN_FILE, raising=False)


# -- short strings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "nodes", "memory", "host", "shown"),
    [
        ("8xH100-80GB", 1, [80] * 8, None, "8xH100-80GB"),
        ("H100", 1, [80], None, "H100-80GB"),
        ("2x8xH100-80GB", 2, [80] * 8, None, "2x8xH100-80GB"),
        ("512xH100-80GB", 64, [80] * 8, None, "64x8xH100-80GB"),
        ("3x4xA100-40GB", 3, [40] * 4, None, "3x4xA100-40GB"),
        ("2x1xA100-40GB", 2, [40], None, "2x1xA100-40GB"),
        ("24GB", 1, [24], None, "24GB"),
        ("2x24GB", 1, [24] * 2, None, "2x24GB"),
        ("1x24GB+64GB-cpu", 1, [24], 64, "24GB+64GB-cpu"),
        ("2x24GB+64GB-cpu", 1, [24] * 2, 64, "2x24GB+64GB-cpu"),
        ("16GB+8GB", 1, [16, 8], None, "16GB+8GB"),
        ("8gb + 2 x rtx 4090 + 1TB-CPU", 1, [8, 24, 24], 1000, "8GB+2xRTX-4090-24GB+1TB-cpu"),
        ("2x(16GB+8GB)+64GB-cpu", 2, [16, 8], 64, "2x(16GB+8GB)+64GB-cpu"),
        ("2x(16GB+8GB)", 2, [16, 8], None, "2x(16GB+8GB)"),
        ("64GB-cpu", 1, [], 64, "64GB-cpu"),
        ("4x(64GB-cpu)", 4, [], 64, "4x(64GB-cpu)"),
    ],
)
def test_a_string_and_back(text: str, nodes: int, memory: list[int], host: int | None, shown: str) -> None:
    found = gp.Cluster.parse(text)
    assert (found.nodes, [device.memory for device in found.devices]) == (nodes, [size * GB for size in memory])
    assert found.host_memory == (None if host is None else host * GB)
    assert str(found) == shown and repr(found) == f"Cluster.parse({shown!r})"
    assert gp.Cluster.parse(str(found)) == found == cluster_of(text)


def test_binary_units_and_odd_sizes_are_exact() -> None:
    assert Cluster.parse("24GiB").devices[0].memory == 24 * 2**30
    assert str(Cluster.parse("24GiB")) == "24GiB"
    assert str(Cluster.parse("1.5GB")) == "1500MB"
    odd = Cluster(host_memory=1_500_000_001)
    assert Cluster.parse(str(odd)) == odd


parts = st.tuples(st.integers(1, 9), st.sampled_from([*KINDS, "24GB", "7GiB"]))


@given(st.lists(parts, min_size=1, max_size=4), st.integers(1, 70), st.sampled_from(["", "+64GB-cpu", "+2TiB-cpu"]))
def test_every_cluster_of_the_grammar_comes_back(groups: list[tuple[int, str]], nodes: int, host: str) -> None:
    inner = "+".join(f"{count}x{kind}" for count, kind in groups)
    found = Cluster.parse(f"{nodes}x({inner}){host}")
    assert found.ranks == nodes * sum(count for count, _ in groups)
    assert Cluster.parse(str(found)) == found
    assert Cluster.model_validate_json(json.dumps(found.to_json())) == found


@pytest.mark.parametrize(
    ("text", "part", "message"),
    [
        ("8xH10O-80GB", "8xH10O-80GB", "no device is called 'H10O-80GB'; did you mean H100-80GB"),
        ("16GB+2xRXT-4090", "2xRXT-4090", "did you mean RTX-4090"),
        ("", "", 'is empty; write "8xH100-80GB"'),
        ("16GB+", "", "is empty"),
        ("0xH100", "0xH100", "counts start at 1"),
        ("0x(16GB+8GB)", "0x(16GB+8GB)", "counts start at 1"),
        ("12xH100", "12xH100", "is no whole number of nodes of 8"),
        ("24GB+2x8xH100", "2x8xH100", "nodes are alike"),
        ("24GB+5GB-cpu+6GB-cpu", "6GB-cpu", "is a second host memory"),
        ("1x24GB+64-cpu", "64-cpu", 'is no size; write "64GB"'),
        ("24GB+0GB-cpu", "0GB-cpu", "is no size"),
        ("8xcpu", "8xcpu", "has no memory of its own"),
        ("1x100000xH100", "1x100000xH100", "100,000 devices into one node"),
        ("eight H100", "eight H100", "is neither a size nor a device"),
    ],
)
def test_a_string_that_cannot_be(text: str, part: str, message: str) -> None:
    with pytest.raises(DecisionError) as caught:
        Cluster.parse(text)
    assert f"the cluster {text!r} cannot be: {part!r} " in str(caught.value) and message in str(caught.value)


def test_what_is_no_string() -> None:
    for value in (8, None, ["H100"]):
        with pytest.raises(DecisionError, match="not "):
            cluster_of(value)  # type: ignore[arg-type]


def test_a_file_of_devices_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "devices.toml"
    path.write_text("[Mine]\nmemory = 10_000_000_000\n")
    assert Cluster.parse("2xmine", catalog=path).devices[1].memory == 10 * GB
    with pytest.raises(DecisionError, match="no device is called 'mine'"):
        Cluster.parse("2xmine")


# -- what it has --------------------------------------------------------------------------------------------------------


def test_links_are_the_slowest() -> None:
    h100, mixed = Cluster.parse("2x8xH100"), Cluster.parse("H100+RTX-4090")
    assert (h100.link, h100.pcie, h100.network) == (450e9, 64e9, 50e9)
    assert (mixed.link, mixed.pcie, mixed.network) == (32e9, 32e9, None)
    assert Cluster.parse("H100").link is None and Cluster.parse("2xL4").link == 32e9
    assert Cluster.parse("H100+24GB").pcie is None, "a speed that is unknown is not taken for the others'"


def test_ranks_fill_one_node_after_the_other() -> None:
    found = Cluster.parse("2x(16GB+8GB)")
    assert [found.device_of(rank).memory // GB for rank in range(4)] == [16, 8, 16, 8]  # type: ignore[union-attr]
    assert (found.ranks, found.is_mixed, Cluster.parse("2x24GB").is_mixed) == (4, True, False)
    assert Cluster.parse("64GB-cpu").device_of(0) is None


def test_a_cluster_is_frozen_and_checked() -> None:
    found = Cluster.parse("24GB")
    with pytest.raises(ValidationError):
        found.nodes = 2
    with pytest.raises(ValidationError, match="neither devices nor host memory"):
        Cluster()
    with pytest.raises(ValidationError, match="has no memory of its own"):
        Cluster(devices=(Device(name="CPU", memory=0),))
    assert repr(Cluster(devices=(Device(name="24GB", memory=5),))).startswith("Cluster(nodes=1"), "no string says this"


# -- files --------------------------------------------------------------------------------------------------------------


def written(folder: Path, data: Any) -> str:
    path = folder / "cluster.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    wanted = Cluster.parse("2x(4xA100-80GB+24GB)+1TB-cpu")
    short = {"nodes": 2, "devices": ["4xA100-80GB", "24GB"], "host_memory": "1TB"}
    assert Cluster.read(written(tmp_path, short)) == wanted == cluster_of(written(tmp_path, wanted.to_json()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nodes": 0, "devices": ["24GB"]}, "nodes is 0: Input should be greater"),
        ({"devices": ["24GB"], "network": -1.0}, "network is -1.0"),
        ({"devices": ["24GB"], "hosts": 3}, "hosts is 3: Extra inputs"),
        ({"devices": ["2x8xH100"]}, "devices has '2x8xH100', which counts nodes"),
        ({"devices": ["H10"]}, "no device is called 'H10'; did you mean H100"),
        ({"devices": ["24GB"], "host_memory": "much"}, "host_memory is 'much', which is no size"),
        ({"devices": [{"name": "mine"}]}, r"devices\.0\.memory is .*Field required"),
        ({}, "neither devices nor host memory"),
        ("[1]", r"is no JSON object with nodes, devices and host_memory, but \[1\]"),
        ("{", "cannot be read"),
    ],
)
def test_a_wrong_file_names_field_and_value(tmp_path: Path, data: Any, message: str) -> None:
    path = written(tmp_path, data)
    with pytest.raises(DecisionError, match=message) as caught:
        Cluster.read(path)
    assert path in str(caught.value)


# -- this machine -------------------------------------------------------------------------------------------------------


def test_this_machine() -> None:
    found = Cluster.here()
    assert found.nodes == 1 and len(found.devices) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found.host_memory and found.host_memory > 10**8


def test_this_machine_with_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda index: ["NVIDIA H100 80GB HBM3", "NVIDIA Some (TM) Card"][index],
        mem_get_info=lambda index: [(84 * GB, 85 * GB), (9 * GB, 10 * GB)][index],
    )
    monkeypatch.setattr("groundplan.planner.cluster.torch", SimpleNamespace(cuda=fake))
    found = Cluster.here()
    assert [(device.name, device.memory // GB) for device in found.devices] == [("H100-80GB", 80), ("NVIDIA Some TM Card", 9)]
    assert found.devices[0].bandwidth == 3.35e12 and found.devices[1].bandwidth is None


@pytest.mark.parametrize(
    ("name", "total", "wanted"),
    [
        ("NVIDIA A100-SXM4-40GB", 42_000_000_000, "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", 85_000_000_000, "A100-80GB"),
        ("NVIDIA H100 PCIe", 84_900_000_000, "H100-PCIe-80GB"),
        ("NVIDIA H100", 102_000_000_000, "H100-96GB"),
        ("NVIDIA GeForce RTX 4090", 25_200_000_000, "RTX-4090-24GB"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 16_900_000_000, None),
        ("NVIDIA L40S", 47_670_000_000, "L40S-48GB"),
        ("Tesla T4", 15_800_000_000, "T4-16GB"),
        ("Tesla V100-SXM2-16GB", 16_900_000_000, "V100-16GB"),
        ("NVIDIA Unheard Of", 10**11, None),
    ],
)
def test_drivers_names_are_recognized(name: str, total: int, wanted: str | None) -> None:
    found = catalogued(name, total, catalog())
    assert (found and found.name) == wanted
