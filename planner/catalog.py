"""What is known of devices: memory, speeds and links, each with its source: `devices.toml`, and files of your own beside it."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from ..tracer.errors import DecisionError, nearest
from .records import Record

OWN_FILE = "GROUNDPLAN_DEVICES"
"""The environment variable that names a file of devices of your own, where no `catalog=` is given."""

_BUILT_IN = Path(__file__).with_name("devices.toml")

_Speed = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]*$")]
PathLike = str | os.PathLike[str]


class Source(Record):
    """Where numbers come from: a vendor's `datasheet`, what a user `published`, what was `measured`, or is `computed`."""

    kind: Literal["datasheet", "published", "measured", "computed"]
    url: Annotated[str, Field(min_length=1)]
    says: Annotated[str, Field(min_length=1)]


class Flops(Record):
    """Dense peaks by dtype in operations per second, a multiply-add counting two; None where the device has no such units."""

    fp32: _Speed | None = None
    tf32: _Speed | None = None
    bf16: _Speed | None = None
    fp16: _Speed | None = None
    fp8: _Speed | None = None
    int8: _Speed | None = None


class Device(Record):
    """One kind of device. `memory` is usable bytes, speeds are bytes per second; links count one direction; None is unknown.

    `capability` is CUDA's compute capability, (9, 0) for Hopper; None is unknown, or no CUDA device.
    `link` leads to other devices of the node (without one they talk over PCIe), `network` to other nodes, for each device.
    """

    name: _Name
    aliases: tuple[_Name, ...] = ()
    memory: Annotated[int, Field(ge=0)]
    capability: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0)]] | None = None
    bandwidth: _Speed | None = None
    flops: Flops = Flops()
    link: _Speed | None = None
    pcie: _Speed | None = None
    network: _Speed | None = None
    sources: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _has_sources(self) -> Device:
        if not self.sources and (self.bandwidth or self.link or self.pcie or self.network or self.flops != Flops()):
            raise ValueError("its speeds have no source; say under `sources` where they come from (kind, url, says)")
        return self


Catalog = Mapping[str, Device]
"""Devices by their names and aliases, both as `key` writes them."""

_DEVICES = TypeAdapter(dict[str, Device])


def catalog(path: PathLike | None = None) -> Catalog:
    """The devices that groundplan knows and those of your file: `path`, else the one that `GROUNDPLAN_DEVICES` names.

    The file is TOML, or JSON where its name ends so, in the form of `planner/devices.toml`; a device in it replaces one of the
    same name. Raises `DecisionError` naming the file, the device, the field and the value.

    >>> catalog()["h10080gb"].memory
    80000000000
    """
    own = path if path is not None else os.environ.get(OWN_FILE) or None
    return _indexed(_built_in() + (read_devices(own) if own is not None else ()))


def key(name: str) -> str:
    """How names are compared: without case, hyphens, blanks and underscores.

    >>> key("RTX 4090") == key("rtx-4090")
    True
    """
    return "".join(letter for letter in name.lower() if letter not in " -_")


def device_named(name: str, known: Catalog) -> Device:
    """The device of a name or an alias; raises `DecisionError` with the nearest names.

    >>> device_named("h100", catalog()).name
    'H100-80GB'
    """
    found = known.get(key(name))
    if found is None:
        names = sorted({each for device in known.values() for each in (device.name, *device.aliases)})
        hint = nearest(name.upper(), names) or f"; known: {', '.join(sorted({device.name for device in known.values()}))}"
        raise DecisionError(f"no device is called {name!r}{hint}")
    return found


def read_devices(path: PathLike) -> tuple[Device, ...]:
    """The devices of a file; raises `DecisionError` for one that cannot be read, naming device, field and value."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise DecisionError(f"the catalog of devices {os.fspath(path)} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise DecisionError(f"the catalog of devices {os.fspath(path)} is no table of devices by name but {data!r}")
    named = {name: {"name": name, **fields} if isinstance(fields, dict) else fields for name, fields in data.items()}
    try:
        return tuple(_DEVICES.validate_json(json.dumps(named, default=str)).values())
    except ValidationError as error:
        raise DecisionError(f"the catalog of devices {os.fspath(path)} is wrong: {problems(error)}") from error


def problems(error: ValidationError) -> str:
    """Every problem that pydantic found: the field, the value, and what is wrong with it."""
    return "; ".join(
        f"{'.'.join(map(str, each['loc'])) or 'it'} is {_short(each['input'])}: {each['msg'].removeprefix('Value error, ')}"
        for each in error.errors(include_url=False)
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


@cache
def _built_in() -> tuple[Device, ...]:
    return read_devices(_BUILT_IN)


def _indexed(devices: Iterable[Device]) -> Catalog:
    """By name and alias; a later device goes before an earlier one, and a name before an alias."""
    every = tuple(devices)
    found = {key(alias): device for device in every for alias in device.aliases}
    return found | {key(device.name): device for device in every}
