"""What of a plan's module can be divided along a tensor axis, as a trace of the undivided module shows it.

The module runs forward and backward on fake tensors, and what its linear layers give is followed (`tensor_flow.py`). Layers
become groups, columns and the row that they reach; the embedding of the vocabulary, and the linear layer that gives as many
outputs as it has words, stand alone. Of layers that repeat only the first three and the last run (`skipped_layers.py`), if all of
these are divided alike, and no group goes from one into the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from ..planner.decisions import Decisions
from ..planner.inference import Inference
from ..planner.tensor_groups import Alone, Group, groups_of
from ..planner.workload import Training
from ..tracer.errors import DecisionError, GroundplanError
from ..tracer.graph import ParamGraph
from .allocations import Allocations
from .build import Build
from .example_inputs import Workload, example_inputs
from .fake_step import imagined, step_module
from .profiles import quiet
from .skipped_layers import CannotSkip, Run, Skipping, runs_of
from .tensor_flow import Flow, Following, gradients_of, run, watched_layers, watching

SHORT = Training(batch_size=2, seq_len=8)
"""What a forward is traced with: the rules do not depend on how much there is of it."""

Part = Group | Alone


@dataclass(frozen=True, slots=True)
class Divisible:
    """The parts of a module that can be divided each by itself, and why other layers are in none, by their names."""

    parts: tuple[Part, ...]
    left_out: Mapping[str, str]

    @property
    def largest(self) -> int:
        """The most ranks that all of it can be divided between; 1 where there is nothing."""
        return math.gcd(*(part.largest for part in self.parts)) if self.parts else 1

    def sizes(self, most: int) -> tuple[int, ...]:
        """Every number of ranks, from 2 to `most`, that some of it can be divided between."""
        return tuple(size for size in range(2, most + 1) if any(part.largest % size == 0 for part in self.parts))


@dataclass(frozen=True, slots=True)
class TensorTrace:
    """A module's flow, and how it is made and run once more."""

    build: Build
    decisions: Decisions
    workload: Workload
    runs: Sequence[Run]
    flow: Flow
    divisible: Divisible

    def module(self) -> tuple[nn.Module, Any]:
        """The module of meta tensors as it was traced, and its inputs."""
        module = step_module(self.build, self.decisions)
        return module, _prepare(module, self.workload, self.runs)

    @property
    def training(self) -> Training:
        """How it was run."""
        return _training(self.workload)

    def with_skipped(self, styles: Mapping[str, str]) -> dict[str, str]:
        """The styles of the layers that were not run besides: those of the layers that they are like."""
        found = dict(styles)
        for each in self.runs:
            for position, name in enumerate(each.layers):
                if each.round_of(position) is None:
                    like = each.layers[each.period + position % each.period]
                    found |= {f"{name}{inner}": style for inner, style in _inside(styles, like).items()}
        return found


@torch.inference_mode(False)  # grad mode is on, whatever it is around the question
def trace_tensor_flow(build: Build, decisions: Decisions, workload: Workload) -> TensorTrace:
    """The trace of a plan's module; with few and short samples, if the workload has no inputs of its own.

    Raises as a run on fake tensors does.
    """
    if workload.inputs is None:
        short = None if workload.seq_len is None else SHORT.seq_len
        workload = replace(workload, batch_size=SHORT.batch_size, seq_len=short)
    with quiet():
        module = step_module(build, decisions)
        if runs := runs_of(module):
            try:
                return _traced(build, decisions, workload, runs, module)
            except CannotSkip:
                module = step_module(build, decisions)
        return _traced(build, decisions, workload, [], module)


def _traced(build: Build, decisions: Decisions, workload: Workload, runs: Sequence[Run], module: nn.Module) -> TensorTrace:
    inputs = _prepare(module, workload, runs)
    layers = watched_layers(module)
    with imagined(Allocations(True), module, inputs, "cpu") as faked:
        ops = Following(module, layers, faked)
        with _told(skipping=bool(runs)), watching(ops):
            run(module, faked, _training(workload))
    ops.flow.gradients |= gradients_of(module)
    found = _divisible(ops.flow, layers, build.graph)
    if not _same_in_rounds(found.parts, runs):
        raise CannotSkip("layers that repeat are not divided alike, or not each by itself")
    return TensorTrace(build, decisions, workload, runs, ops.flow, found)


@contextmanager
def _told(skipping: bool) -> Iterator[None]:
    """With layers skipped, whatever the module's own code raises may come of that; else the user hears of it."""
    try:
        yield
    except Exception as error:
        if skipping:
            raise CannotSkip(str(error)) from error
        if isinstance(error, GroundplanError | DataDependentOutputException | DynamicOutputShapeException):
            raise
        raise DecisionError(
            f"a forward and backward on fake tensors, in which rules for the tensor axis are looked for, fails: "
            f"{type(error).__name__}: {error}; give inputs with which it runs (workload=gp.Training(inputs=...)), or the rules"
        ) from error


def _prepare(module: nn.Module, workload: Workload, runs: Sequence[Run]) -> Any:
    """Have a module run as the workload does, without the layers that others stand for; gives its inputs."""
    module.train(not isinstance(workload, Inference))
    inputs = example_inputs(module, workload)
    for each in runs:
        Skipping(module, each)
        for position, name in enumerate(each.layers):
            if each.round_of(position) is None:
                _emptied(module.get_submodule(name))
    return inputs


def _emptied(layer: nn.Module) -> None:
    """A layer that is not run needs no tensors; code that looks for them has the trace begin again with every layer run."""
    layer._modules.clear()
    layer._parameters.clear()
    layer._buffers.clear()


def _training(workload: Workload) -> Training:
    return workload if isinstance(workload, Training) else Training(autocast=workload.autocast)


# -- parts --------------------------------------------------------------------------------------------------------------


def _divisible(flow: Flow, layers: Mapping[str, nn.Module], graph: ParamGraph) -> Divisible:
    tied = _tied(graph)
    for name in layers:
        if name in tied:
            flow.paths.barred.setdefault(
                name, f"has a parameter tied with {', '.join(sorted(tied[name] - {name}) or ['itself'])}"
            )
    groups, left_out = groups_of(flow.paths)
    taken = frozenset[str]().union(*(group.names for group in groups))
    alone = list(_vocabulary(flow, {name: each for name, each in layers.items() if name not in taken}, tied))
    taken = taken.union(*(each.names for each in alone))
    return Divisible((*groups, *alone), {name: why for name, why in left_out.items() if name not in taken})


def _tied(graph: ParamGraph) -> dict[str, set[str]]:
    """The modules that share parameters, each with one of the next, for each of them."""
    found: dict[str, set[str]] = {}
    for tensor in graph.ties:
        owners = {name.rpartition(".")[0] for name in tensor.names}
        owners = owners.union(*(found.get(name, set()) for name in owners))
        found |= dict.fromkeys(owners, owners)
    return found


def _vocabulary(flow: Flow, layers: Mapping[str, nn.Module], tied: Mapping[str, set[str]]) -> Iterator[Alone]:
    """The largest embedding that reads what the module is given, and the linear layers that give one number for each word."""
    embeddings = {name: each for name, each in layers.items() if isinstance(each, nn.Embedding)}
    words = max((each.num_embeddings for name, each in embeddings.items() if name in flow.embedded), default=0)
    styles = {name: "embedding_rowwise" for name, each in embeddings.items() if each.num_embeddings == words and _is_plain(each)}
    for name, each in layers.items():
        if isinstance(each, nn.Linear) and each.out_features == words:
            styles[name] = "colwise_gather_output"
    seen: set[str] = set()
    for name in styles:
        together = tied.get(name, {name})
        read = any(other in flow.embedded or other in flow.paths.reads for other in together)
        if name not in seen and read and all(other in styles and other not in flow.read for other in together):
            yield Alone({other: styles[other] for other in styles if other in together}, words)
        seen |= together


def _is_plain(embedding: nn.Embedding) -> bool:
    """Whether torch divides an embedding and computes the same: no row is scaled by what is looked up."""
    return embedding.max_norm is None and not embedding.sparse and not embedding.scale_grad_by_freq


# -- layers that repeat -------------------------------------------------------------------------------------------------


def _same_in_rounds(parts: Sequence[Part], runs: Sequence[Run]) -> bool:
    """Whether every layer that stands for others is divided by itself, and as all that were run are."""
    layers = {name for each in runs for name in each.layers}
    for part in parts:
        homes = {next((layer for layer in layers if f"{name}.".startswith(f"{layer}.")), None) for name in part.names}
        if len(homes) > 1:
            return False
    styles = {name: style for part in parts for name, style in part.styles.items()}
    for each in runs:
        for position, name in enumerate(each.layers):
            like = each.layers[each.period + position % each.period]
            if each.round_of(position) is not None and _inside(styles, name) != _inside(styles, like):
                return False
    return True


def _inside(styles: Mapping[str, str], layer: str) -> dict[str, str]:
    """The styles within a layer, by what comes after its name."""
    return {name[len(layer) :]: style for name, style in styles.items() if f"{name}.".startswith(f"{layer}.")}
