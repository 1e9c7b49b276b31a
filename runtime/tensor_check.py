"""Whether a module that torch divides by given rules computes what the undivided one does: run as one rank of many, and compared.

`parallelize_module` divides the layers in a process group that talks to nobody, and forward, loss and backward run on fake
tensors. DTensor propagates the placements within the layers; between them the module's own code works on a rank's parts. It must
run the same ops, with the same settings, on parts of the shapes that a trace of the undivided module foretells
(`tensor_flow.py`): code that counts heads by a plain number does not, be it that it raises, or that it goes on with heads of
another size. In the end all outputs and gradients have the undivided module's shapes, and no gradient is left to be summed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from ..planner.sharding import Axis, Sharding, TensorRule
from ..planner.tensor_groups import part_shape
from ..planner.workload import Training
from ..tracer.graph import ParamGraph
from .allocations import Allocations
from .fake_ranks import propagation_apart
from .fake_step import imagined
from .fake_world import fake_world
from .parallel import apply_sharding, mesh_of
from .tensor_flow import (
    Flow,
    Names,
    Ops,
    Result,
    Step,
    gradients_of,
    name_of,
    run,
    settings_of,
    tensors_in,
    watched_layers,
    watching,
)


@dataclass(frozen=True, slots=True)
class Differs:
    """What a divided module does otherwise, and the layers that it comes from, as far as is known."""

    why: str
    sources: Names = frozenset()


def difference(
    module: nn.Module,
    graph: ParamGraph,
    inputs: Any,
    training: Training,
    flow: Flow,
    styles: Mapping[str, str],
    divided: Names,
    ranks: int,
) -> Differs | None:
    """What `module`, of meta tensors, does otherwise when its layers are divided by `styles` between `ranks`; None if nothing.

    `flow` is the undivided module's; of `divided` layers each rank has some columns.
    """
    rules = tuple(TensorRule(pattern=name, style=style) for name, style in styles.items())
    sharding = Sharding(axes=(Axis(name="tp", size=ranks),), tensor=rules)
    with fake_world(ranks, 0):
        apply_sharding(module, sharding, graph, mesh_of(sharding, "cpu"))
        with imagined(Allocations(True), module, inputs, "cpu", around=propagation_apart()) as faked:
            ops = _Comparing(module, flow, divided, ranks)
            try:
                with watching(ops):
                    run(module, faked, training)
            except _Other as other:
                return other.found
            except Exception as error:  # the module's own code, or DTensor's, that cannot do with parts
                return ops.after(error)
        return ops.left() or _other_gradients(module, flow.gradients)


class _Other(Exception):
    def __init__(self, found: Differs) -> None:
        super().__init__(found.why)
        self.found = found


class _Comparing(Ops):
    """Raises `_Other` at the first op that is not the one foretold."""

    def __init__(self, module: nn.Module, flow: Flow, divided: Names, ranks: int) -> None:
        super().__init__(module, watched_layers(module))
        self._steps: Sequence[Step] = [step for step in flow.steps if step.op]
        self._outputs, self._divided, self._ranks, self._place = flow.outputs, divided, ranks, 0

    def seen(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = name_of(func)
        if not name:
            return
        step = self._next
        if step is None or name != step.op:
            raise self._other(f"runs {name} where the undivided module {f'runs {step.op}' if step else 'has ended'}")
        got = [tuple(each.shape) for each in tensors_in(out)]
        want = [self._part(each) for each in step.results]
        if got != want:
            raise self._other(f"gives {_shapes(got)} and not {_shapes(want)}, the rank's part: {_COUNTS}")
        if settings_of(func, args, kwargs) != step.settings:
            raise self._other(f"is told {settings_of(func, args, kwargs)} and not {step.settings}: {_COUNTS}")
        self._place += 1

    def ended(self, out: Any) -> None:
        found = tensors_in(out)
        if [tuple(each.shape) for each in found] != self._outputs or any(isinstance(each, DTensor) for each in found):
            raise _Other(Differs(f"the module gives {_shapes([tuple(each.shape) for each in found])}, not the whole"))

    def after(self, error: Exception) -> Differs:
        """What an error says: in the forward, of the op that would have been next."""
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        step = self._next
        if step is None or self._over:
            return Differs(f"the divided module raises {message}")
        return Differs(f"{step.describe()} raises {message}: {_COUNTS}", step.sources & self._divided)

    def left(self) -> Differs | None:
        """What should have run, and has not."""
        step = self._next
        return None if step is None else Differs(f"{step.describe()} is not run", step.sources & self._divided)

    @property
    def _next(self) -> Step | None:
        return self._steps[self._place] if self._place < len(self._steps) else None

    def _part(self, result: Result) -> tuple[int, ...]:
        cut = result.cut if result.sources & self._divided else None
        return part_shape(result.shape, cut, self._ranks)

    def _other(self, why: str) -> _Other:
        step = self._next
        if step is None:
            return _Other(Differs(f"the divided module {why}"))
        return _Other(Differs(f"{step.describe()} {why}", step.sources & self._divided))


_COUNTS = "the module's code goes by a whole size or number of heads (view(..., -1, head_dim) takes those that a rank has)"


def _other_gradients(module: nn.Module, gradients: Mapping[str, tuple[int, ...]]) -> Differs | None:
    found = gradients_of(module)
    if found != gradients:
        other = next(name for name in sorted({*found, *gradients}) if found.get(name) != gradients.get(name))
        return Differs(f"the gradient of {other} has the shape {found.get(other)}, and {gradients.get(other)} undivided")
    for name, parameter in module.named_parameters():
        if isinstance(parameter.grad, DTensor) and any(each.is_partial() for each in parameter.grad.placements):
            return Differs(f"the gradient of {name} is each rank's own, and never summed")
        if isinstance(parameter.grad, DTensor) != (isinstance(parameter, DTensor) and parameter.grad is not None):
            return Differs(f"the gradient of {name} is divided otherwise than the parameter")
    return None


def _shapes(found: Sequence[tuple[int, ...]]) -> str:
    return ", ".join(str(list(shape)) for shape in found)
