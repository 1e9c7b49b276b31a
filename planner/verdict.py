"""Whether a plan fits a cluster: tensors, what CUDA and the libraries take besides, and a margin, against usable bytes.

A wrong "fits" is the worst error. What comes on top of tensors is therefore taken at the upper end of what has been reported, a
margin covers what the closed form cannot know, and where the prediction leaves something out, "fits" is never said. Of serving
the weights need no margin (docs/decisions/023-serving.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ..tracer.errors import DecisionError
from .allocations import FIRST_OPTIMIZER, FIRST_STEP, OPTIMIZER, STEP
from .allocator_driver import Device
from .allocator_events import Usage
from .calibrated import calibrated, check_calibration, is_for, outside_measured
from .calibration import Calibration, Correction
from .changes import HOST
from .cluster import Cluster
from .overheads import CUBLAS_WORKSPACE_HOPPER, OVERHEADS
from .replayed_run import replay_run
from .tiers import Tier, Word

if TYPE_CHECKING:
    from .memory import Memory

MARGIN = 0.2
"""The share of everything that is added where nothing has been measured: fragmentation, rounding, temporaries inside ops."""

CONTEXT_BYTES = OVERHEADS["cuda context"].high
COMMUNICATOR_BYTES = OVERHEADS["nccl communicator"].high
PROCESS_BYTES = OVERHEADS["host process"].high
CUDA_PROCESS_BYTES = OVERHEADS["host process with cuda"].high
WORKSPACE_BYTES = 2 * 2 * CUBLAS_WORKSPACE_HOPPER
"""Of two threads, forward's and backward's: cuBLAS's workspace, and one of that size for cuBLASLt (pytorch/pytorch#120925)."""

_GB = 10**9
_HOST_PLACE = "host memory"
_ORDER: tuple[Word, ...] = ("fits", "tight", "does not fit")


@dataclass(frozen=True, slots=True)
class Room:
    """One place, a device of a rank or the host memory of a node: what is needed there and what it has; all sizes are bytes.

    `tensors` is the peak of `phase`; `added` is what comes on top of it, by name; `margin` is kept free besides for "fits".
    Where it is known what the caching allocator reserves, that counts, and what it takes beyond the tensors is among `added`. If
    that is more than there is, the allocator frees what it has cached, as often as `retries` says. `calibrated` is what a
    calibration says of the phase; the margin is then its error bar.
    """

    place: str
    phase: str
    tensors: int
    added: Mapping[str, int]
    margin: int
    usable: int
    left_out: tuple[str, ...] = ()
    retries: int = 0
    calibrated: Correction | None = None

    @property
    def on_host(self) -> bool:
        """Whether it is the host memory of a node, which its ranks share."""
        return self.place.startswith(_HOST_PLACE)

    @property
    def needed(self) -> int:
        """Bytes that are needed, without the margin."""
        return self.tensors + sum(self.added.values())

    @property
    def left(self) -> int:
        """Bytes that stay free, without the margin; negative where they are missing."""
        return self.usable - self.needed

    @property
    def percent(self) -> float:
        """The same in percent of what is usable."""
        return 100 * self.left / self.usable

    @property
    def verdict(self) -> Word:
        """The word for this place; "tight" also where something is left out of the prediction, or the cache has to be freed."""
        if self.left < 0:
            return "does not fit"
        return "fits" if self.left >= self.margin and not self.left_out and not self.retries else "tight"

    def describe(self) -> str:
        """All that in one line."""
        from .memory import human_bytes

        added = "".join(f", {name} {human_bytes(nbytes)}" for name, nbytes in self.added.items())
        left = f"{human_bytes(self.left)} left" if self.left >= 0 else f"{human_bytes(-self.left)} missing"
        of = f"{human_bytes(self.needed)} of {human_bytes(self.usable)}"
        parts = f"{human_bytes(self.tensors)} in {self.phase}{added}"
        freed = f"; cached memory is freed {_times(self.retries)} for want of more" if self.retries else ""
        bar = (
            ""
            if self.calibrated is None
            else f"; calibrated by {_verifications(self.calibrated)}, error {self.calibrated.error:.1%}"
        )
        return f"{self.place}: {self.verdict}, {of} ({parts}); {left}, {self.percent:.1f} %{freed}{bar}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data."""
        return {
            "place": self.place,
            "verdict": self.verdict,
            "phase": self.phase,
            "tensors": self.tensors,
            "added": dict(self.added),
            "needed": self.needed,
            "margin": self.margin,
            "usable": self.usable,
            "left": self.left,
            "percent": round(self.percent, 2),
            "retries": self.retries,
            "left_out": list(self.left_out),
            "calibrated": None
            if self.calibrated is None
            else {**asdict(self.calibrated), "included": sorted(self.calibrated.included)},
        }


def _verifications(correction: Correction) -> str:
    return f"{correction.verifications} verification{'s' * (correction.verifications != 1)}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a plan fits a cluster: `rooms` for every place that was looked at, `binding` the one with least to spare.

    True, as a condition, only where `verdict` is "fits".
    """

    cluster: Cluster
    rooms: tuple[Room, ...]
    notes: tuple[str, ...]

    @property
    def verdict(self) -> Word:
        """The worst of all places: "fits", "tight" or "does not fit"."""
        return max((room.verdict for room in self.rooms), key=_ORDER.index)

    @property
    def with_enough_host_memory(self) -> Cluster:
        """The cluster with as much host memory in a node as is needed with the margin, in whole GB."""
        room = next(room for room in self.rooms if room.on_host)
        return self.cluster.model_copy(update={"host_memory": -(-(room.needed + room.margin) // _GB) * _GB})

    @property
    def binding(self) -> Room:
        """The place with the worst verdict, and of those the one with the smallest share left."""
        return max(self.rooms, key=lambda room: (_ORDER.index(room.verdict), -room.percent))

    def __bool__(self) -> bool:
        return self.verdict == "fits"

    def to_json(self) -> dict[str, Any]:
        """The same as plain JSON data; all sizes in bytes."""
        return {
            "cluster": str(self.cluster),
            "verdict": self.verdict,
            "binding": self.binding.to_json(),
            "rooms": [room.to_json() for room in self.rooms],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.cluster}"]
        lines += [f"  {room.describe()}" for room in self.rooms]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def verdict(memory: Memory, cluster: Cluster, margin: float = MARGIN, calibration: Calibration | None = None) -> Verdict:
    """Whether what `memory` predicts fits `cluster`, with `margin` as a share of what is needed where `calibration` does not say.

    Rank i has the i-th device, nodes being filled one after the other; of a plan for one process, `cuda:i` is the i-th device of
    the first node. Where the devices of a node are alike only the ranks that hold most are looked at (`Memory.distinct`). Raises
    `DecisionError` where the plan needs more devices than there are, or others.
    """
    if not isinstance(margin, int | float) or isinstance(margin, bool) or not 0 <= margin < 10:
        raise DecisionError(f"margin is {margin!r}; it is a share of the bytes needed, such as 0.2")
    if memory.ranks > cluster.ranks:
        raise DecisionError(f"the plan has {memory.ranks} ranks, and {cluster} has room for {cluster.ranks}, one for each device")
    ranks = range(memory.ranks) if cluster.is_mixed and memory.ranks > 1 else memory.distinct
    found = [memory.rank(rank) for rank in ranks] if memory.ranks > 1 else [memory]
    if calibration is not None:
        check_calibration(calibration, cluster, any(_uses_devices(each) for each in found))
    pairs = zip(ranks, found, strict=True)
    rooms = [room for rank, each in pairs for room in _device_rooms(each, rank, memory, cluster, margin, calibration)]
    rooms += _host_rooms(found, memory, cluster, margin, calibration)
    if not rooms:
        raise DecisionError(
            f"the plan puts everything on the CPU, and {cluster} does not say how much host memory there is; move the plan with "
            f'plan.to("cuda"), or say the memory of a node: "{cluster}+64GB-cpu"'
        )
    return Verdict(cluster, tuple(rooms), tuple(_notes(memory, cluster, margin, calibration, rooms)))


# -- devices ------------------------------------------------------------------------------------------------------------


def _device_rooms(
    found: Memory, rank: int, whole: Memory, cluster: Cluster, margin: float, calibration: Calibration | None
) -> Iterator[Room]:
    for device, (phase, nbytes) in _peaks(found).items():
        if device != HOST:
            index = rank % max(len(cluster.devices), 1) if whole.ranks > 1 else _index(device)
            if index >= len(cluster.devices):
                raise DecisionError(f"the plan puts tensors on {device}, and a node of {cluster} has {_devices(cluster)}")
            kind, outside = cluster.devices[index], _outside(whole)
            place = f"{f'rank {rank}' if whole.ranks > 1 else device} on {kind.name}"
            if device in _reserved(found.reserved):
                room = _reserved_room(found, device, place, outside, kind.memory, margin, whole.left_out)
                room = _with_certain(room, found.certain.get(device, 0), margin)
            else:
                room = _room(place, phase, nbytes, _on_top(outside), kind.memory, margin, whole.left_out)
            yield (
                room
                if calibration is None or not is_for(calibration, kind)
                else _measured(room, found, device, calibration, margin)
            )


def _measured(room: Room, found: Memory, device: str, calibration: Calibration, margin: float) -> Room:
    """The same with what a calibration of such a device says."""
    tensors = {phase: devices[device] for phase, devices in found.by_device.items() if device in devices}
    reserved = {phase: usages[device].reserved for phase, usages in found.reserved.items() if device in usages}
    predicted = tensors | {phase: nbytes for phase, nbytes in reserved.items() if phase in tensors}
    if room.retries:  # the cache has to be freed: what it comes to then is known of this phase alone
        predicted = {room.phase: room.tensors + room.added["reserved beyond them"]}
    outside = outside_measured(calibration, found.communicators, COMMUNICATOR_BYTES)
    return calibrated(room, predicted, tensors, _tiers(found), calibration, margin, outside)


def _tiers(found: Memory) -> dict[str, Tier | None]:
    """Which tier the bytes of each phase are by: a run has those of a step, the others are in closed form.

    None for the steps of serving, which have the names of training's: verifications measure those alone.
    """
    of_run: Tier = "T2" if any(found.reserved.values()) else "T1"
    in_run = () if found.run is None else (*found.run.peaks, OPTIMIZER)
    serving = () if OPTIMIZER in found.by_device else (FIRST_STEP, STEP)
    return {phase: None if phase in serving else of_run if phase in in_run else "T0" for phase in found.by_device}


def _outside(memory: Memory) -> dict[str, int]:
    """What a device holds besides what the caching allocator hands out, by name."""
    communicators = {"communicators": memory.communicators * COMMUNICATOR_BYTES} if memory.communicators else {}
    return {"CUDA context": CONTEXT_BYTES} | communicators


def _on_top(outside: Mapping[str, int]) -> dict[str, int]:
    """The same, and the workspaces, which are not among what is known to be held."""
    return {"CUDA context": outside["CUDA context"], "workspaces": WORKSPACE_BYTES, **outside}


def _reserved(usages: Mapping[str, Mapping[str, Usage]]) -> dict[str, tuple[str, int]]:
    """For each device of which it is known, the phase that reserves most and its bytes."""
    return _highest({phase: {device: usage.reserved for device, usage in found.items()} for phase, found in usages.items()})


def _reserved_room(
    found: Memory, device: str, place: str, outside: Mapping[str, int], usable: int, margin: float, left_out: tuple[str, ...]
) -> Room:
    """A device of which it is known what is reserved; where that is too much, a device of its size may do with less."""
    phase, nbytes = _reserved(found.reserved)[device]
    retries, taken = 0, sum(outside.values())
    if nbytes + taken > usable >= taken and found.run is not None:
        limited = replay_run(found.run, found.allocator, Device(usable, taken))
        if limited.out_of_memory is None:
            of_run, nbytes = _reserved(limited.peaks)[device]
            phase, retries = OPTIMIZER if of_run == FIRST_OPTIMIZER else of_run, limited.retries
    tensors = found.by_device[phase].get(device, 0)
    besides = outside if found.run is not None else _on_top(outside)  # a run has its workspaces among what is reserved
    added = {"reserved beyond them": nbytes - tensors, **besides}
    return _room(place, phase, tensors, added, usable, margin, left_out, retries)


def _with_certain(room: Room, certain: int, margin: float) -> Room:
    """With a margin for what is not certain alone: what is reserved for weights is known."""
    return replace(room, margin=_share(room.needed - certain, margin))


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


def _devices(cluster: Cluster) -> str:
    count = len(cluster.devices)
    return f"{count} device{'s' * (count != 1)}" if count else "none"


# -- hosts --------------------------------------------------------------------------------------------------------------


def _host_rooms(
    found: Sequence[Memory], whole: Memory, cluster: Cluster, margin: float, calibration: Calibration | None
) -> Iterator[Room]:
    """The host memory of the node whose ranks, which share it, need most."""
    if cluster.host_memory is None:
        return
    ranks = min(whole.ranks, max(len(cluster.devices), 1))
    nodes = [found[first : first + ranks] for first in range(0, len(found), ranks)]
    if not cluster.is_mixed:
        nodes = [[each] * ranks for each in found]
    peaks = max(([_host_peak(each) for each in node] for node in nodes), key=lambda node: sum(nbytes for _, nbytes in node))
    on_devices = any(_uses_devices(each) for each in found)
    process = CUDA_PROCESS_BYTES if on_devices else PROCESS_BYTES
    room = _room(
        f"{_HOST_PLACE} of a node, {ranks} process{'es' * (ranks != 1)}",
        max(peaks, key=lambda peak: peak[1])[0],
        sum(nbytes for _, nbytes in peaks),
        {"processes": ranks * process},
        cluster.host_memory,
        margin,
        () if on_devices else whole.left_out,
    )
    if calibration is not None and calibration.on_host and not on_devices:
        room = _measured_hosts(room, peaks, found[0], calibration, margin)
    yield room


def _measured_hosts(
    room: Room, peaks: Sequence[tuple[str, int]], memory: Memory, calibration: Calibration, margin: float
) -> Room:
    """The same of processes without a device, each corrected as the one that holds most."""
    phase, most = max(peaks, key=lambda peak: peak[1])
    tensors = {phase: devices.get(HOST, 0) for phase, devices in memory.by_device.items()} | {phase: most}
    outside = {"processes, measured": calibration.taken}
    one = calibrated(replace(room, tensors=most, added={}), tensors, tensors, _tiers(memory), calibration, margin, outside)
    if one.calibrated is None:
        return room
    count = len(peaks)
    added = {name: count * nbytes for name, nbytes in one.added.items()}
    return replace(one, tensors=count * one.tensors, added=added, margin=count * one.margin)


def _host_peak(memory: Memory) -> tuple[str, int]:
    return _peaks(memory).get(HOST, (memory.binding.phase, 0))


def _uses_devices(memory: Memory) -> bool:
    return any(device != HOST for device in _peaks(memory))


# -- both ---------------------------------------------------------------------------------------------------------------


def _peaks(memory: Memory) -> dict[str, tuple[str, int]]:
    """For each device, the phase that takes most of it and its bytes."""
    return _highest(memory.by_device)


def _highest(phases: Mapping[str, Mapping[str, int]]) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for phase, devices in phases.items():
        for device, nbytes in devices.items():
            if device not in found or nbytes > found[device][1]:
                found[device] = (phase, nbytes)
    return found


def _room(
    place: str,
    phase: str,
    tensors: int,
    added: Mapping[str, int],
    usable: int,
    margin: float,
    left_out: tuple[str, ...],
    retries: int = 0,
) -> Room:
    needed = tensors + sum(added.values())
    return Room(place, phase, tensors, added, _share(needed, margin), usable, left_out, retries)


def _share(nbytes: int, margin: float) -> int:
    return -int(-nbytes * margin // 1)


def _notes(
    memory: Memory, cluster: Cluster, margin: float, calibration: Calibration | None, rooms: Sequence[Room]
) -> Iterator[str]:
    if calibration is not None:
        yield from _calibration_notes(calibration, rooms)
    beside = " beside the weights" if memory.certain else ""
    if not all(room.calibrated for room in rooms):
        yield f'"fits" keeps {margin:.0%} of what is needed{beside} free besides; "tight" does not'
    if "step" not in memory.by_device:
        phases = ", ".join(memory.by_device)
        yield f"without a workload only {phases} are looked at: running the model, its inputs and activations come on top"
    if memory.allocator is not None and any(memory.reserved.values()):
        yield f"on CUDA devices what the caching allocator reserves counts, by its rules ({memory.allocator.describe()})"
    left_out = dict.fromkeys(each for room in rooms for each in room.left_out)
    if left_out:
        yield f'{", ".join(left_out)} are not counted, so that nothing better than "tight" can be said'
    if memory.ranks > 1 and not cluster.is_mixed:
        holding = "rank 0, which holds most, speaks" if len(memory.distinct) == 1 else "the first rank of each stage speaks"
        yield f"the ranks have devices that are alike: {holding} for all"
    used = memory.ranks if memory.ranks > 1 else sum(device != HOST for device in _peaks(memory))
    if cluster.devices and used < cluster.ranks:
        yield f"the plan uses {used} of {cluster.ranks} devices"
    if cluster.host_memory is None:
        yield "the cluster does not say how much host memory there is, so that it was not looked at"


def _calibration_notes(calibration: Calibration, rooms: Sequence[Room]) -> Iterator[str]:
    if any(room.calibrated for room in rooms):
        yield f'calibrated on {calibration}: "fits" keeps the error of what was measured free there'
    for room in rooms:
        if room.calibrated is None:
            yield f"{room.place} is not calibrated: its phase {room.phase} was not measured, or nothing near its size"
