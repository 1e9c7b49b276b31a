"""What the ranks have to agree on before they build one module together."""

from __future__ import annotations

import hashlib

import torch

from ..planner.decisions import Decisions, groundplan_version
from ..tracer.streams import generator_states
from .build import Build, state_digest


def agreement(build: Build, decisions: Decisions, seed: int | None) -> dict[str, str]:
    """Everything that values depend on, by what it is called in the message about a difference."""
    said = {
        "constructor": f"{decisions.constructor} (fingerprint {_fingerprint(build)})",
        "decisions": _digest(decisions.model_dump_json(exclude={"fingerprint"})),
        "seed": str(seed) if seed is not None else f"none, and the generator state {state_digest(generator_states())[:16]}",
        "torch": str(torch.__version__),
        "groundplan": groundplan_version(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
    if build.graph.host_random:
        said["numpy's and Python's random numbers"] = _digest(_constants(build))
    if build.graph.reference == "cuda":
        properties = torch.cuda.get_device_properties()
        said["GPU"] = f"{properties.name} ({properties.multi_processor_count} multiprocessors)"
    return said


def _fingerprint(build: Build) -> str:
    """The graph's; where the constructor shards as it goes, each rank's is its own, and names and whole shapes have to do."""
    if not any(tensor.opaque for tensor in build.graph.tensors):
        return build.graph.fingerprint[:16]
    return _digest(repr([(each.names, each.kind, each.type if each.opaque else each.shape) for each in build.graph.tensors]))


def _constants(build: Build) -> str:
    return repr([storage.constant.digest for storage in build.graph.storages if storage.constant])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
