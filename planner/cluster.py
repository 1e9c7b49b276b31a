"""What a model is built on: nodes of devices with their memory and links, from a short string, a file, or this machine."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError, model_validator

from ..tracer.errors import DecisionError, nearest
from .catalog import Catalog, Device, PathLike, device_named, problems
from .catalog import catalog as known_devices
from .records import Record

NODE = 8
"""Devices of a node where a string states only how many there are in all."""

_MOST = 1024  # devices of a node; more is a slip of the pen, and would take long to write down
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(MB|GB|TB|MiB|GiB|TiB)", re.IGNORECASE)
_COUNTED = re.compile(r"(?:(\d+) ?x ?)?(?:(\d+) ?x ?)?(\S.*)", re.IGNORECASE)
_GROUPED = re.compile(r"(\d+) ?x ?\((.+)\)((?:\+[^+()]+-cpu)?)", re.IGNORECASE)
_HOST = re.compile(r"(.+)-cpu", re.IGNORECASE)
_FORMS = 'write "8xH100-80GB", "2x8xH100-80GB" (two nodes), "2x24GB", "1x24GB+64GB-cpu" (with host memory) or "16GB+8GB"'


class Cluster(Record):
    """Nodes that are alike, each with `devices` (which may differ) and `host_memory`; sizes are bytes, GB is 10^9.

    `host_memory` counts one node; None is unknown, and then nothing is said about it. `network` is what each device gets to other
    nodes, bytes per second in one direction; None is unknown. Without devices it is a machine that has a CPU only.

    >>> str(Cluster.parse("16xH100-80GB")), Cluster.parse("1x24GB+64GB-cpu").host_memory
    ('2x8xH100-80GB', 64000000000)
    """

    nodes: Annotated[int, Field(ge=1)] = 1
    devices: Annotated[tuple[Device, ...], Field(max_length=_MOST)] = ()
    host_memory: Annotated[int, Field(gt=0)] | None = None
    network: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _has_memory(self) -> Cluster:
        empty = next((device for device in self.devices if not device.memory), None)
        if empty is not None:
            raise ValueError(f'{empty.name} has no memory of its own; host memory is written "64GB-cpu"')
        if not self.devices and self.host_memory is None:
            raise ValueError("it has neither devices nor host memory")
        return self

    # -- where it comes from --------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str, catalog: PathLike | None = None) -> Cluster:
        """The cluster that a short string says.

        * `8xH100-80GB`: eight devices of the catalog in one node, `2x8xH100-80GB` two such nodes; `512xH100-80GB` is 64 nodes of
          eight (`NODE`);
        * `24GB`, `2x24GB`: devices of which only the usable bytes are known;
        * `16GB+8GB`: unequal devices in one node, `2x(16GB+8GB)` two such nodes;
        * `+64GB-cpu` at the end: that much host memory in each node; `64GB-cpu` alone: no devices.

        `catalog` is a file of devices of your own. Raises `DecisionError`, quoting the string and its part that cannot be.

        >>> Cluster.parse("2xRTX-4090+128GB-cpu").devices[1].memory
        24000000000
        """
        return _parsed(text, known_devices(catalog))

    @classmethod
    def read(cls, path: PathLike, catalog: PathLike | None = None) -> Cluster:
        """The cluster of a JSON file: what `to_json` gives, where devices may be strings as `parse` takes them, sizes too.

        `{"nodes": 2, "devices": ["4xA100-80GB"], "host_memory": "1TB"}`. Raises `DecisionError` naming the file, field and value.
        """
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DecisionError(f"the cluster {name} cannot be read: {error}") from error
        if not isinstance(data, dict):
            raise DecisionError(f"the cluster {name} is no JSON object with nodes, devices and host_memory, but {data!r}")
        try:
            return cls.model_validate_json(json.dumps(_spelled_out(data, known_devices(catalog))))
        except ValidationError as error:
            raise DecisionError(f"the cluster {name} is wrong: {problems(error)}") from error
        except DecisionError as error:
            raise DecisionError(f"the cluster {name} is wrong: {error}") from error

    @classmethod
    def here(cls) -> Cluster:
        """This machine: its CUDA devices, if there are any, with what is free on each now, and the host memory that is free now.

        >>> Cluster.here().nodes
        1
        """
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = tuple(_device_here(index) for index in range(count))
        return cls(devices=devices, host_memory=_host_memory_here())

    # -- what it has ----------------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> int:
        """Devices in all nodes; where there are none, the nodes."""
        return self.nodes * max(len(self.devices), 1)

    @property
    def is_mixed(self) -> bool:
        """Whether the devices of a node differ in memory."""
        return len({device.memory for device in self.devices}) > 1

    @property
    def link(self) -> float | None:
        """Bytes per second between two devices of a node, in one direction, at the slowest; None where unknown, or alone."""
        speeds = [device.link or device.pcie for device in self.devices]
        return _slowest(speeds) if len(speeds) > 1 else None

    @property
    def pcie(self) -> float | None:
        """Bytes per second between a device and the host, in one direction, at the slowest; None where unknown."""
        return _slowest([device.pcie for device in self.devices])

    def device_of(self, rank: int) -> Device | None:
        """The device of a rank, ranks filling one node after the other; None where a node has a CPU only."""
        return self.devices[rank % len(self.devices)] if self.devices else None

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data, as `read` takes it."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        body = "+".join(_counted(name, len(list(same))) for name, same in itertools.groupby(each.name for each in self.devices))
        host = f"{_size_text(self.host_memory)}-cpu" if self.host_memory is not None else ""
        single = len({device.name for device in self.devices}) == 1
        if self.nodes > 1 or (single and len(self.devices) > NODE):
            body = f"{self.nodes}x{len(self.devices)}x{self.devices[0].name}" if single else f"{self.nodes}x({body})" * bool(body)
        text = "+".join(filter(None, [body, host]))
        return text if body or self.nodes == 1 else f"{self.nodes}x({text})"

    def __repr__(self) -> str:
        """`Cluster.parse(...)` where the string says all there is, else every field."""
        try:
            same = Cluster.parse(str(self)) == self
        except DecisionError:
            same = False
        return f"Cluster.parse({str(self)!r})" if same else super().__repr__()


def cluster_of(value: Cluster | str) -> Cluster:
    """A cluster, or the one that a string says: a short string, or the path of a `.json` file. Raises `DecisionError`.

    >>> cluster_of("2x24GB").ranks
    2
    """
    if isinstance(value, Cluster):
        return value
    if not isinstance(value, str):
        raise DecisionError(f"a cluster is a gp.Cluster or a string, not {value!r}; {_FORMS}")
    return Cluster.read(value) if value.endswith(".json") else Cluster.parse(value)


def size_of(text: str) -> int:
    """The bytes of a size; raises `DecisionError`, quoting it.

    >>> size_of("2GB"), size_of("512 MiB")
    (2000000000, 536870912)
    """
    try:
        return _bytes_of(text, text)
    except _BadPart as bad:
        raise DecisionError(f"{bad.part!r} {bad.why}") from None


# -- short strings ------------------------------------------------------------------------------------------------------


class _BadPart(Exception):
    """A part of the string that cannot be, and why."""

    def __init__(self, part: str, why: str) -> None:
        super().__init__(part, why)
        self.part, self.why = part, why


def _parsed(text: str, known: Catalog) -> Cluster:
    if not isinstance(text, str):
        raise DecisionError(f"a cluster is written as a string, not {text!r}; {_FORMS}")
    try:
        return _whole(text.strip(), known)
    except _BadPart as bad:
        raise DecisionError(f"the cluster {text!r} cannot be: {bad.part!r} {bad.why}") from None


def _whole(text: str, known: Catalog) -> Cluster:
    grouped = _GROUPED.fullmatch(text)
    if grouped is None:
        return _nodes(text.split("+"), None, known)
    inner, host = grouped[2].split("+"), grouped[3].removeprefix("+")
    return _nodes([*inner, *([host] if host else [])], _count(grouped[1], text), known)


def _nodes(parts: Sequence[str], nodes: int | None, known: Catalog) -> Cluster:
    """The cluster of parts joined by `+`; `nodes` is how many there are of the whole, where that is said around it."""
    hosts = [part for part in parts if _HOST.fullmatch(part.strip())]
    bodies = [part for part in parts if part not in hosts]
    if len(hosts) > 1:
        raise _BadPart(hosts[1], "is a second host memory; state that of one node, once")
    host = _bytes_of(_host_size(hosts[0]), hosts[0]) if hosts else None
    groups = [_group(part.strip(), known) for part in bodies]
    if len(groups) == 1 and nodes is None:
        of_group, count, device = groups[0]
        nodes, count = (of_group, count) if of_group is not None else _split(count, bodies[0])
        return _made(nodes, (device,) * _of_node(count, bodies[0]), host)
    for part, (of_group, _, _) in zip(bodies, groups, strict=True):
        if of_group is not None:
            raise _BadPart(part, 'counts nodes, and nodes are alike; write "2x(16GB+8GB)" for two of them')
    devices = [(device,) * _of_node(count, part) for part, (_, count, device) in zip(bodies, groups, strict=True)]
    return _made(nodes or 1, tuple(itertools.chain(*devices)), host)


def _made(nodes: int, devices: tuple[Device, ...], host: int | None) -> Cluster:
    speeds = [device.network for device in devices] if nodes > 1 else []
    return Cluster(nodes=nodes, devices=devices, host_memory=host, network=_slowest(speeds))


def _group(part: str, known: Catalog) -> tuple[int | None, int, Device]:
    """The nodes (if stated), the devices and the kind that one part says."""
    found = _COUNTED.fullmatch(part)
    if found is None:
        raise _BadPart(part, f"is empty; {_FORMS}")
    first, second, name = found[1], found[2], found[3]
    nodes = _count(first, part) if second is not None else None
    count = second if second is not None else first
    return nodes, _count(count, part) if count is not None else 1, _device(name, part, known)


def _of_node(count: int, part: str) -> int:
    if count > _MOST:
        raise _BadPart(part, f"puts {count:,} devices into one node; {_MOST:,} are the most")
    return count


def _device(name: str, part: str, known: Catalog) -> Device:
    if _SIZE.fullmatch(name):
        nbytes = _bytes_of(name, part)
        return Device(name=_size_text(nbytes), memory=nbytes)
    try:
        device = device_named(name, known)
    except DecisionError as error:
        raise _BadPart(part, f"is neither a size nor a device: {error}") from None
    if not device.memory:
        raise _BadPart(part, 'has no memory of its own; state that of a node, as in "64GB-cpu"')
    return device


def _count(digits: str, part: str) -> int:
    if int(digits) < 1:
        raise _BadPart(part, "counts nothing; counts start at 1")
    return int(digits)


def _split(count: int, part: str) -> tuple[int, int]:
    """Nodes, and devices of each, for a number of devices in all."""
    if count <= NODE:
        return 1, count
    if count % NODE:
        raise _BadPart(part, f'is no whole number of nodes of {NODE}; say how many a node has, as in "3x4xA100-80GB"')
    return count // NODE, NODE


def _host_size(part: str) -> str:
    found = _HOST.fullmatch(part.strip())
    return found[1] if found else part


def _bytes_of(text: str, part: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    nbytes = round(float(found[1]) * units[found[2].lower()]) if found else 0
    if nbytes < 1:
        raise _BadPart(part, f'is no size; write "64GB" (10^9 bytes) or "64GiB"{nearest(text, _UNITS)}')
    return nbytes


def _size_text(nbytes: int) -> str:
    """The shortest text that stands for exactly so many bytes.

    >>> _size_text(24_000_000_000), _size_text(24 * 2**30), _size_text(1_500_000_001)
    ('24GB', '24GiB', '1500.000001MB')
    """
    for unit in ("TB", "GB", "TiB", "GiB", "MB", "MiB"):
        if nbytes % _UNITS[unit] == 0:
            return f"{nbytes // _UNITS[unit]}{unit}"
    return f"{nbytes // 10**6}.{nbytes % 10**6:06d}".rstrip("0") + "MB"


def _counted(name: str, count: int) -> str:
    return f"{count}x{name}" if count > 1 else name


def _slowest(speeds: Sequence[float | None]) -> float | None:
    known = [speed for speed in speeds if speed is not None]
    return min(known) if known and len(known) == len(speeds) else None


# -- files --------------------------------------------------------------------------------------------------------------


def _spelled_out(data: Mapping[str, Any], known: Catalog) -> dict[str, Any]:
    """What a file says, with strings for devices and sizes replaced by what they stand for."""
    found = dict(data)
    if isinstance(found.get("devices"), list):
        found["devices"] = [each for entry in found["devices"] for each in _entries(entry, known)]
    if isinstance(found.get("host_memory"), str):
        try:
            found["host_memory"] = _bytes_of(found["host_memory"], found["host_memory"])
        except _BadPart as bad:
            raise DecisionError(f"host_memory is {bad.part!r}, which {bad.why}") from None
    return found


def _entries(entry: Any, known: Catalog) -> Iterator[Any]:
    if not isinstance(entry, str):
        yield entry
        return
    try:
        nodes, count, device = _group(entry.strip(), known)
        if nodes is not None:
            raise _BadPart(entry, "counts nodes; say nodes= instead")
    except _BadPart as bad:
        raise DecisionError(f"devices has {bad.part!r}, which {bad.why}") from None
    yield from [device.model_dump(mode="json")] * min(count, _MOST + 1)


# -- this machine -------------------------------------------------------------------------------------------------------


def _device_here(index: int) -> Device:
    """A CUDA device of this machine: what is free now, and the speeds of the catalog's device that has its name, if one has."""
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    found = catalogued(name, total, known_devices())
    usable = min(free, found.memory) if found is not None else free
    return found.model_copy(update={"memory": usable}) if found is not None else Device(name=_plain(name), memory=usable)


def catalogued(name: str, total: int, known: Catalog) -> Device | None:
    """The device of the catalog that a driver calls `name` and gives `total` bytes: the nearest in size below it.

    >>> catalogued("NVIDIA H100 80GB HBM3", 84_900_000_000, known_devices()).name
    'H100-80GB'
    """
    words = {word.lower() for word in re.split(r"[^A-Za-z0-9]+", name)} | {word.lower() for word in name.split("-")}
    fitting = [device for device in set(known.values()) if 0 < device.memory <= total and _model(device) <= words]
    pcie = [device for device in fitting if ("pcie" in device.name.lower()) == ("pcie" in words)]
    return max(pcie, key=lambda device: device.memory, default=None)


def _model(device: Device) -> set[str]:
    """The words of a device's name but its size: {"rtx", "4090"}."""
    return {word.lower() for word in device.name.split("-")[:-1]} or {device.name.lower()}


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", " ", name).strip() or "CUDA"


def _host_memory_here() -> int | None:
    """Bytes of host memory that are free now and within this process's control group; None where the system does not say."""
    limits = [_available(), _group_limit()]
    return min((limit for limit in limits if limit), default=None)


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return _physical()


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _group_limit() -> int | None:
    """What the control group leaves (Linux, version 2); None without a limit."""
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        return max(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")), 1)
    except (OSError, ValueError):  # no control group, or "max"
        return None
