"""The speeds of a cluster by the catalog of devices: vendors' peaks, and the share of each that is reached, as published.

What a share is of, and who measured it, stands beside it. They are of large ops on healthy machines: nothing is fitted to a
published run of training. `gp.measure_speeds()` replaces all of them by what a machine does.
"""

from __future__ import annotations

from collections.abc import Iterator

from .catalog import Device, catalog, key
from .cluster import Cluster
from .speeds import Link, Rate, Speeds

MATMUL = 0.80
"""Of dense peaks, in products of large matrices. bfloat16 with torch 2.6 to 2.7: A100 86.9 %, H100 80.3 %, B200 77.6 %
(github.com/stas00/ml-engineering, compute/accelerator, "Maximum Achievable Matmul FLOPS")."""

ATTENTION, ATTENTION_OF_HOPPER = 0.50, 0.35
"""FlashAttention 2, which torch has: 50 to 73 % of an A100's peak (Dao 2023, arXiv:2307.08691), 35 % of an H100's (Shah et al.
2024, arXiv:2407.08608), whose tensor cores it does not feed; devices after Hopper are taken to be like it."""

MEMORY = 0.80
"""Of the memory's bandwidth: BabelStream on an H100 NVL of 3.9 TB/s 3.0 (copy) to 3.3 TB/s (triad); bandwidthTest on a T4 of 300
GB/s 239.6."""

LINK = 0.80
"""Of NVLink in one direction: "360 GB/s is exactly what we'd expect on H100" of 450 (github.com/NVIDIA/nccl-tests, issue 326),
235 of an A100's 300 (github.com/stas00/ml-engineering, network)."""

NETWORK = 0.92
"""Of a network card: "you should see 46-48GB/s per NIC" of 50 (github.com/NVIDIA/nccl-tests, issue 290)."""

PCIE = 0.81
"""Of PCIe in one direction: 26.0 GB/s of 32 (github.com/NVIDIA/nvbandwidth, README)."""

LATENCY, NVLINK_STEP, PCIE_STEP, NETWORK_STEP = 8.4e-6, 3.4e-6, 5.7e-6, 9.6e-6
"""Seconds of a ring's collective and of each of its steps, as NCCL itself reckons (github.com/NVIDIA/nccl, src/graph/tuning.cc:
`baseLat` and `hwLat` of ring and simple)."""

LAUNCH, VIEW = 1e-5, 2e-6
"""Seconds of the host for an op in eager mode, autograd and Python included, and for a view. Stand-ins without a source: they
count only where ops are so small that a device waits for the host."""

HOST_MEMORY = 330e9
"""Bytes a second of a node's memory: STREAM triad on two AMD EPYC of the third generation, 330 to 350 GB/s
(learn.microsoft.com, azure/high-performance-computing, "STREAM benchmark", HBv3)."""

HOST_FLOPS = 1e12
"""Operations a second of a node that has a CPU only: a stand-in, as nothing is known of it."""

_STAND_IN = "A10G-24GB"
_NAMES = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16", "fp16": "float16", "fp8": "float8"}
_AFTER_AMPERE = 9


def speeds_of(cluster: Cluster) -> Speeds:
    """The speeds of each rank of a cluster, by its slowest device; `notes` say what is not known, and what stands in for it.

    >>> round(speeds_of(Cluster.parse("8xH100-80GB")).flops_of("bfloat16").at(1e12) / 1e12)
    792
    """
    if not cluster.devices:
        return _of_cpu(cluster)
    device, notes = _slowest(cluster)
    peaks = {name: peak for short, name in _NAMES.items() if (peak := getattr(device.flops, short)) is not None}
    peaks.setdefault("float32", min(peaks.values()))
    share = ATTENTION_OF_HOPPER if device.capability and device.capability[0] >= _AFTER_AMPERE else ATTENTION
    assert device.bandwidth is not None
    return Speeds(
        device=str(cluster),
        flops=tuple((name, Rate.of(MATMUL * peak)) for name, peak in peaks.items()),
        attention=tuple((name, Rate.of(share * peak)) for name, peak in peaks.items()),
        memory=Rate.of(MEMORY * device.bandwidth),
        launch=LAUNCH,
        view=VIEW,
        node=len(cluster.devices),
        within=_within(device, cluster),
        between=_between(device, cluster),
        host=PCIE * (device.pcie or _stand_in().pcie or 0.0),
        host_memory=HOST_MEMORY / len(cluster.devices),
        notes=(*notes, *_link_notes(device, cluster)),
    )


def _of_cpu(cluster: Cluster) -> Speeds:
    return Speeds(
        device=str(cluster),
        flops=(("float32", Rate.of(HOST_FLOPS)),),
        memory=Rate.of(HOST_MEMORY),
        launch=LAUNCH,
        view=VIEW,
        ahead=False,
        within=Link(bandwidth=HOST_MEMORY),
        between=Link(bandwidth=cluster.network or 1e9),
        host_memory=HOST_MEMORY,
        overlap=0.0,
        notes=("the speeds of a CPU are not known: 1 TFLOP/s stand in; measure them with gp.measure_speeds()",),
    )


def _slowest(cluster: Cluster) -> tuple[Device, list[str]]:
    """The device that all others wait for, with a note where one of which nothing is known is among them."""
    known = [device for device in cluster.devices if device.bandwidth and (device.flops.fp32 or device.flops.bf16)]
    if len(known) < len(cluster.devices):
        unknown = next(device.name for device in cluster.devices if device not in known)
        return _stand_in(), [
            f"the speeds of {unknown} are not known: those of {_STAND_IN} stand in, which is right for comparisons"
        ]
    slowest = min(known, key=lambda device: device.flops.bf16 or device.flops.fp16 or device.flops.fp32 or 0.0)
    mixed = len({device.name for device in known}) > 1
    return slowest, [f"every rank is taken to be as slow as {slowest.name}"] if mixed else []


def _stand_in() -> Device:
    return catalog()[key(_STAND_IN)]


def _within(device: Device, cluster: Cluster) -> Link | None:
    if len(cluster.devices) < 2:
        return None
    if device.link is not None:
        return Link(bandwidth=LINK * (cluster.link or device.link), latency=LATENCY, step=NVLINK_STEP)
    return Link(bandwidth=PCIE * (cluster.link or device.pcie or _stand_in().pcie or 0.0), latency=LATENCY, step=PCIE_STEP)


def _between(device: Device, cluster: Cluster) -> Link | None:
    if cluster.nodes < 2:
        return None
    return Link(
        bandwidth=NETWORK * (cluster.network or device.network or _NETWORK_OF_UNKNOWN), latency=LATENCY, step=NETWORK_STEP
    )


_NETWORK_OF_UNKNOWN = 12.5e9  # 100 Gbit/s


def _link_notes(device: Device, cluster: Cluster) -> Iterator[str]:
    if cluster.nodes > 1 and not (cluster.network or device.network):
        yield "the network between the nodes is not known: 100 Gbit/s for each device stand in; say Cluster(network=...)"
    if len(cluster.devices) > 1 and not (device.link or device.pcie):
        yield "the link between the devices of a node is not known: PCIe of the fourth generation stands in"
