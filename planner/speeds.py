"""How fast the devices of a cluster are, for predicting how long a step takes: operations, memory, links, launches.

`catalog_speeds.py` makes a `Speeds` from the catalog of devices and published utilizations, `runtime/measured_speeds.py` measures
one. Rates are per second; bytes of collectives are those that a rank sends on a ring, the *bus bandwidth* of nccl-tests
(github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import bisect
import math
import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from ..tracer.errors import CalibrationError
from .catalog import problems
from .cluster import Cluster, cluster_of
from .plan_file import replace_file
from .records import Record
from .work import Collective

_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LARGEST_FILE = 2**20


class Rate(Record):
    """How much is done in a second, by how much there is to do at once: pairs of (size, per second), sizes rising.

    Between two sizes it lies on a straight line between their logarithms; beyond them it stays as it is.

    >>> round(Rate(points=((1e6, 1e9), (1e8, 4e9))).at(1e7))
    2000000000
    """

    points: Annotated[tuple[tuple[_Positive, _Positive], ...], Field(min_length=1)]

    @classmethod
    def of(cls, per_second: float) -> Rate:
        """One that does not depend on the size."""
        return cls(points=((1.0, per_second),))

    @model_validator(mode="after")
    def _rises(self) -> Rate:
        sizes = [size for size, _ in self.points]
        if sizes != sorted(set(sizes)):
            raise ValueError(f"sizes are {sizes}; they rise from each point to the next")
        return self

    def at(self, size: float) -> float:
        """What is done in a second."""
        if len(self.points) == 1:
            return self.points[0][1]
        place = bisect.bisect_right(self.points, (size, math.inf))
        if place in (0, len(self.points)):
            return self.points[max(place - 1, 0)][1]
        (low, slow), (high, fast) = self.points[place - 1 : place + 1]
        share = math.log(size / low) / math.log(high / low)
        between: float = slow * (fast / slow) ** share
        return between

    def seconds(self, size: float) -> float:
        """How long it takes to do so much at once."""
        return size / self.at(size) if size > 0 else 0.0


class Link(Record):
    """What ranks talk over: bus bandwidth, and seconds of a collective whatever its size, with `step` for each step of a ring."""

    bandwidth: _Positive
    latency: _Seconds = 0.0
    step: _Seconds = 0.0


class Talk(Record):
    """A collective as it was measured between so many ranks."""

    kind: Collective
    ranks: Annotated[int, Field(ge=2)]
    link: Link


class Speeds(Record):
    """What one rank gets done, and how fast it talks to others.

    * `flops`, `attention`: operations a second in products of matrices and in attention's kernels, by dtype (`float32`, `tf32`,
      `bfloat16`, `float16`, `float8`) and by the operations of one op; `memory`: bytes a second, by the bytes of one op;
    * `launch`, `view`: seconds of the host for each op, and for one that touches no memory. With `ahead` the host runs ahead of
      the device, so that the longer of both counts, else their sum;
    * `within`, `between`: links in a node and to other nodes; `node` ranks are in one. `talks` are measured ones, which go first;
    * `host`: bytes a second between device and host, `host_memory` those of host memory that a rank has to itself;
    * `overlap`: the share of the shorter of computation and communication that is hidden where both go on at once. FSDP's
      collectives are waited for without `ahead`.

    >>> Speeds(device="mine", flops=(("float32", Rate.of(1e12)),), memory=Rate.of(1e11)).flops_of("float64").at(1)
    1000000000000.0
    """

    format: Literal["groundplan.speeds"] = "groundplan.speeds"
    version: Literal[1] = 1
    device: Annotated[str, Field(min_length=1)]
    flops: Annotated[tuple[tuple[str, Rate], ...], Field(min_length=1)]
    attention: tuple[tuple[str, Rate], ...] = ()
    memory: Rate
    launch: _Seconds = 0.0
    view: _Seconds = 0.0
    ahead: bool = True
    node: Annotated[int, Field(ge=1)] = 1
    within: Link | None = None
    between: Link | None = None
    talks: tuple[Talk, ...] = ()
    host: _Positive | None = None
    host_memory: _Positive | None = None
    overlap: Annotated[float, Field(ge=0, le=1)] = 1.0
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, cluster: Cluster | str) -> Speeds:
        """Those of the catalog's devices, at the shares of their peaks that are published (`catalog_speeds.py`).

        What is not known has a stand-in, and a note that says so. Raises `DecisionError` for what is no cluster.

        >>> Speeds.of("2x8xH100-80GB").node
        8
        """
        from .catalog_speeds import speeds_of

        return speeds_of(cluster_of(cluster))

    def flops_of(self, dtype: str) -> Rate:
        """The rate of products of matrices; that of float32 for a dtype that is not there."""
        return _of_dtype(self.flops, dtype)

    def attention_of(self, dtype: str) -> Rate:
        """The rate of attention's kernels; that of products of matrices where it is not there."""
        return _of_dtype(self.attention, dtype) if self.attention else self.flops_of(dtype)

    def talk(self, kind: Collective, ranks: int) -> Link | None:
        """The collective as it was measured, between as many ranks as come nearest."""
        found = [each for each in self.talks if each.kind == kind]
        return min(found, key=lambda each: abs(math.log(each.ranks / ranks))).link if found else None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to `path` as JSON."""
        replace_file(Path(path), self.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Speeds:
        """Read what `save` wrote; raises `CalibrationError`, naming the file, field and value."""
        name = os.fspath(path)
        try:
            if Path(path).stat().st_size > LARGEST_FILE:
                raise CalibrationError(f"{name} is larger than speeds ever are; make them anew with gp.measure_speeds()")
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise CalibrationError(f"the speeds {name} cannot be read: {error}") from error
        except ValidationError as error:
            raise CalibrationError(
                f"the speeds {name} are wrong: {problems(error)}; make them anew with gp.measure_speeds()"
            ) from error


def _of_dtype(rates: tuple[tuple[str, Rate], ...], dtype: str) -> Rate:
    found = dict(rates)
    key = "float8" if dtype.startswith("float8") else dtype
    fallback = found.get("float32") or min(found.values(), key=lambda rate: rate.points[-1][1])
    return found.get(key) or fallback
