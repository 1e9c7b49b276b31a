"""What a prediction of memory takes for granted, in words: the notes that stand beside its figures."""

from __future__ import annotations

from collections.abc import Iterator

from .changes import HOST
from .decisions import Decisions
from .optimizers import OPTIMIZERS
from .profile import NoProfile, Profile
from .quantizing import Quantizing
from .rank_memory import LOAD_NOTE, is_ddp
from .sharding import Sharding
from .workload import Training


def closed_notes(
    decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None, device: str
) -> Iterator[str]:
    """What the closed form takes for granted of a plan for one device."""
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "construct leaves out what the constructor drops and no value depends on, and temporaries inside an op"
    if decisions.steps:
        yield "construct converts what is merely filled while it is drawn, other tensors one at a time, as nn.Module.to does"
        yield "construct may take more where _apply is overridden (nn.LSTM)"
    yield LOAD_NOTE
    if workload is not None:
        yield from _profile_notes(profile, workload, "activations", device)
        yield f"training: {OPTIMIZERS[workload.optimizer].note}"
        yield "training: checkpoint saves the weights and the optimizer state, after the gradients are freed"


def _profile_notes(profile: Profile | NoProfile | None, workload: Training, what: str, device: str) -> Iterator[str]:
    if isinstance(profile, Profile):
        kernels = "the CPU's kernels" if device == HOST else "CUDA's kernels where they keep otherwise than the CPU's"
        yield f"training: activations are those of one forward and backward, traced with {kernels}"
        if device != HOST:
            yield "what CUDA's caching allocator reserves beside is for the margin to cover; tiers T1 and T2 find it out"
        if workload.loss is None:
            yield "the loss is the output's own, or else the sum of the outputs"
    else:
        yield f"training: {what} are not included{f': {profile.reason}' if profile is not None else ''}"


def _axes_notes(sharding: Sharding) -> Iterator[str]:
    """What is taken for granted of the axes inside a layer, and of pipelines."""
    if sharding.size("tensor") > 1 and sharding.sequence_parallel:
        yield "what lies between divided layers is divided along the sequence, and gathered once for a module's layers by columns"
    if sharding.size("tensor") > 1 and sharding.loss_parallel:
        yield "logits stay divided along the vocabulary, and so does what the loss keeps (torch's loss_parallel)"
    if sharding.size("expert") > 1:
        yield "tokens are taken to be spread evenly over the experts: a rank that more of them are sent to takes more"
        yield "experts are units of FSDP by themselves; an exchange takes twice the rows that a rank sends, and their order"
    if sharding.pipeline is not None:
        yield "a pipeline's stages receive, keep and send as torch.distributed.pipelining does, without returning outputs"
    if sharding.size("context") > 1:
        yield "ring attention gathers keys and values (torch's default), as many heads as of queries, while most else is there"


def run_notes(decisions: Decisions, device: str, workload: Training) -> Iterator[str]:
    """What a run of the step takes for granted."""
    sharding = decisions.sharding
    if sharding is not None:
        yield f"of one rank of {sharding.ranks} ({sharding.describe()}), under torch's own sharding; like ranks share a run"
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "first_step, step and optimizer are from a run of the step on fake tensors; the other phases are in closed form"
    if device.startswith("cuda"):
        yield "kernels are those of CUDA where they keep otherwise than the CPU's; cuDNN's attention counts as the next in order"
    else:
        yield "workspaces of oneDNN are not included" + (", copies that gloo makes are" if sharding is not None else "")
    if is_ddp(decisions):
        yield "DDP's buckets are in closed form, as its reducer does not run without memory"
    if workload.loss is None:
        yield "the loss is the output's own, or else the sum of the outputs"


def _quantizing_notes(quantizing: Quantizing) -> Iterator[str]:
    unknown = [size for size in quantizing.sizes if size.nbytes is None]
    if unknown:
        shapes = ", ".join(f"{size.dtype}{list(size.shape)}" for size in unknown[:3])
        what = f"{quantizing.describe()} cannot be tried where the plan was made"
        yield f"{what}: weights of {shapes}{' and others' * (len(unknown) > 3)} count as not quantized"
    else:
        yield "construct quantizes a layer as soon as its last tensor is made; a layer is taken to have its weight last"


def rank_notes(
    decisions: Decisions, workload: Training | None, profile: Profile | NoProfile | None, rank: int, device: str
) -> Iterator[str]:
    """The same for one rank of a sharded plan, or the one process of a plan that places tensors or quantizes."""
    sharding = decisions.sharding
    if sharding is not None:
        yield f"of rank {rank} of {sharding.ranks} ({sharding.describe()})"
    yield "sizes are those of the tensors: the allocator's rounding, the CUDA context and Python itself come on top"
    yield "construct makes one part after the other; what is not made element by element is there whole meanwhile"
    for quantizing in decisions.quantizing:
        yield from _quantizing_notes(quantizing)
    yield LOAD_NOTE
    if workload is not None:
        yield from _profile_notes(profile, workload, "activations, gathered units and communication buffers", device)
        yield f"training: {OPTIMIZERS[workload.optimizer].note}"
        if sharding is not None and isinstance(profile, Profile):
            yield from _axes_notes(sharding)
        if is_ddp(decisions):
            yield "training: DDP's buckets hold every gradient once more"
