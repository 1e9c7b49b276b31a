"""What a plan takes: by a tier and a workload, the closed form, runs on fake tensors, and the caching allocator's rules.

What runs a step is imported where it is run: torch.distributed, which that needs, takes a second.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from .planner.allocator_config import AllocatorConfig
from .planner.checkpointing import check_said_once
from .planner.cluster import Cluster
from .planner.decisions import Decisions
from .planner.estimate import memory, memory_of_run
from .planner.inference import Inference
from .planner.inference_memory import by_rule, inference_memory, weights_alone
from .planner.memory import Memory
from .planner.rank_runs import memory_of_ranks
from .planner.replayed_run import Allocator
from .planner.reserved import with_reserved
from .planner.tiers import Tier, check_tier
from .planner.workload import Training
from .runtime import Build
from .tracer.errors import DecisionError, MemoryRunError

Workload = Training | Inference


def forecast(
    build: Build,
    decisions: Decisions,
    workload: Workload | None,
    tier: Tier,
    allocator: AllocatorConfig | str | None,
    cluster: Cluster | str | None,
) -> Memory:
    """The memory of what `build` makes by `decisions`; `Plan.memory` says what the others mean, and what is raised."""
    check_tier(tier, workload, allocator)
    check_said_once(decisions.checkpointing, workload)
    used = Allocator.of(allocator, cluster)
    if isinstance(workload, Inference):
        return _serving(build, decisions, workload, tier, used)
    found = memory(build.graph, decisions) if workload is None else _training(build, decisions, workload, tier)
    return found if tier != "T2" and allocator is None else with_reserved(found, used)


def _training(build: Build, decisions: Decisions, workload: Training, tier: Tier) -> Memory:
    """The memory of training: in closed form, or from runs of the step."""
    from .runtime.profiles import profile_of

    profile = profile_of(build, decisions, workload)
    if tier == "T0":
        return memory(build.graph, decisions, workload, profile)
    if decisions.sharding is not None:
        from .runtime.fake_ranks import fake_rank_step

        return memory_of_ranks(build.graph, decisions, workload, partial(fake_rank_step, build, decisions, workload), profile)
    from .runtime.fake_step import fake_step

    return memory_of_run(build.graph, decisions, workload, fake_step(build, decisions, workload), profile)


def _serving(build: Build, decisions: Decisions, workload: Inference, tier: Tier, allocator: Allocator) -> Memory:
    """The memory of serving, from a run of it: in T0 of the module whole, and by rule; else of each rank as it is."""
    from .runtime.fake_inference import fake_inference, fake_rank_inference
    from .runtime.fake_step import check_one_device

    if tier == "T0":
        try:
            run = fake_inference(build, decisions, workload)
        except MemoryRunError as error:
            return weights_alone(build.graph, decisions, str(error))
        return replace(by_rule(build.graph, decisions, workload, run, allocator), tier=tier)
    check_one_device(decisions)
    if decisions.sharding is not None:
        from .runtime.parallel import not_run

        if given := not_run(decisions.sharding):
            raise DecisionError(
                f'tier="{tier}" runs what the runtime carries out, and not {" and ".join(given)}; ask for tier="T0"'
            )
    runs = partial(fake_rank_inference, build, decisions, workload)
    return replace(inference_memory(build.graph, decisions, workload, runs, allocator), tier=tier)
