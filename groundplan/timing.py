"""The verb behind `Plan.step_time`: what a step does, from a profile, at the speeds of a cluster or of a machine."""

from __future__ import annotations

from .planner.changes import HOST
from .planner.cluster import Cluster, cluster_of
from .planner.decisions import Decisions
from .planner.held import computing_device
from .planner.profile import NoProfile
from .planner.rank_memory import rank_parts
from .planner.speeds import Speeds
from .planner.step_time import StepTime, check_timed, step_time
from .planner.workload import Training
from .runtime import Build
from .tracer.errors import DecisionError


def step_time_of(
    build: Build, decisions: Decisions, workload: Training, cluster: Cluster | str | None, speeds: Speeds | None
) -> StepTime:
    """The time of a step; `Plan.step_time` says what the others mean, and what is raised."""
    from .runtime.profiles import profile_of

    if not isinstance(workload, Training):
        raise DecisionError(f"the time of a step is that of training, not of {workload!r}; say gp.Training(...)")
    chosen = _speeds(build, decisions, cluster, speeds)
    check_timed(decisions.sharding)
    profile = profile_of(build, decisions, workload)
    if isinstance(profile, NoProfile):
        raise DecisionError(f"the time of a step is not known: {profile.reason}")
    fsdp, parameters = rank_parts(build.graph, decisions, workload)
    return step_time(profile, decisions.sharding, fsdp, parameters.each, workload, chosen)


def _speeds(build: Build, decisions: Decisions, cluster: Cluster | str | None, speeds: Speeds | None) -> Speeds:
    if cluster is None:
        if speeds is None:
            raise DecisionError(
                'how fast? say on which devices, step_time(workload, "8xH100-80GB"), or speeds=gp.measure_speeds()'
            )
        return speeds
    machine = cluster_of(cluster)
    ranks = 1 if decisions.sharding is None else decisions.sharding.ranks
    if ranks > machine.ranks:
        raise DecisionError(f"the plan has {ranks} ranks, and {machine} has {machine.ranks}")
    on_cpu = computing_device(build.graph, decisions) == HOST
    if on_cpu and machine.devices:
        raise DecisionError(f'the plan is for the CPU, and {machine} has devices; say plan.to("cuda") first')
    if not on_cpu and not machine.devices:
        raise DecisionError(f'the plan is for CUDA, and {machine} has no devices; say plan.to("cpu") first')
    return speeds or Speeds.of(machine)


def measure_speeds(device: str | None = None) -> Speeds:
    """Measure this machine for `plan.step_time(workload, speeds=...)`: some seconds on every rank.

    With a process group (`torchrun`) every rank makes the same call, and all of them get the same figures, which hold for as many
    ranks: of each collective, too. Without one it is this process alone. `device` is `"cuda"` or `"cpu"`; None is CUDA, where
    there is one. Nothing else should run meanwhile but what runs in training. Random generators are left alone.

    Raises `DecisionError` for another device.

    >>> speeds = measure_speeds("cpu")
    >>> speeds.flops_of("float32").at(1e6) > 0
    True
    """
    from .runtime.measured_speeds import measure_speeds as measured

    return measured(device)
