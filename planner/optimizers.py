"""The optimizers that `gp.Training` names, and what a plan asks of them, in closed form.

By shape and dtype of what one rank holds of a parameter. Each optimizer is the library's own at its default settings, and says
where in its source the figures come from; `tests/test_optimizers.py` holds them against the real ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from ..tracer.errors import DecisionError
from .adam import Adam, AdamW, AdamW8bit
from .alike import Alike
from .muon import Muon
from .optimizer import STEP_BYTES, Implementation, Locals, Optimizer, Piece, Trained, groups


class SGD(Optimizer):
    """torch/optim/sgd.py: in place throughout."""

    name, source = "sgd", "torch.optim.SGD"

    def state(self, parameter: Trained) -> int:
        return 0

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        pass


class SGDMomentum(SGD):
    """The same with `momentum_buffer`, a clone of the gradient (`_single_tensor_sgd`)."""

    name, source = "sgd-momentum", "torch.optim.SGD"

    def state(self, parameter: Trained) -> int:
        return parameter.nbytes


class Adafactor(Optimizer):
    """torch/optim/_adafactor.py (Shazeer and Stern 2018, arXiv 1804.04235): variances of rows and columns alone.

    Of two dimensions and more, `row_var` has the gradient's shape with 1 for the last, `col_var` with 1 for the last but one; of
    fewer, `variance` has its shape. The loop is the default on every device; there is no fused one. Names keep what the parameter
    before left: `row_mean`, `col_mean`, `grad_squared`, `update` (which is `var_estimate`, too).

    A DTensor cannot be stepped: the norms over its rows or columns are partial, and squaring them in place raises
    (torch/distributed/tensor, `_NormPartial`; torch 2.13).
    """

    name, source = "adafactor", "torch.optim.Adafactor"
    implementations = ("foreach", "for-loop")

    def default(self, parameters: Sequence[Trained]) -> Implementation:
        return "for-loop"

    @property
    def note(self) -> str:
        return "gradients have the parameters' dtype, and so have adafactor's variances of their rows and columns"

    def check(self, parameters: Iterable[Trained]) -> None:
        divided = next((each for each in parameters if each.whole is not None and len(each.whole) > 1), None)
        if divided is not None:
            raise DecisionError(
                f"torch.optim.Adafactor cannot step parameters that are DTensors, such as one of {list(divided.whole or ())}: "
                f'squaring the norms of its rows in place raises; take optimizer="adamw-8bit", or replicate with {{"ddp": ...}}'
            )

    def state(self, parameter: Trained) -> int:
        shape, size = parameter.shape, parameter.dtype.itemsize
        return (_rows(shape) + _columns(shape)) * size if len(shape) > 1 else parameter.nbytes

    def counts(self, parameter: Trained) -> bool:
        return True

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        turns = groups(parameters, by_dim=True) if implementation == "foreach" else [[each] for each in range(len(parameters))]
        for turn in turns:
            self._turn([(position, parameters[position]) for position in turn], implementation, held)

    def _turn(self, group: Sequence[tuple[int, Trained]], implementation: Implementation, held: Locals) -> None:
        """One parameter, or in foreach all of one device and dtype that are matrices, or all that are not."""
        whole = [(position, each.nbytes) for position, each in group]
        for position, each in group:
            held.take("norm", (position, each.dtype.itemsize))
        held.drop("norm")
        if len(group[0][1].shape) > 1:
            held.take("row_mean", *((position, _rows(each.shape) * each.dtype.itemsize) for position, each in group))
            held.drop(*["row_mean"] * (implementation == "foreach"))
            held.take("col_mean", *((position, _columns(each.shape) * each.dtype.itemsize) for position, each in group))
            held.drop(*["col_mean"] * (implementation == "foreach"))
            held.take("var_estimate", *whole)
            means = (
                (position, _rows(each.shape) // each.shape[-2] * each.dtype.itemsize) for position, each in group if each.numel
            )
            held.take("row_var_mean", *means)
            held.drop("row_var_mean")
        else:
            held.take("grad_squared", *whole)
            held.drop(*["grad_squared"] * (implementation == "foreach"))
            held.take("var_estimate", *whole)
        held.rename("var_estimate", "update")
        held.take("norm", (group[0][0], group[0][1].dtype.itemsize))
        held.drop("norm")


def _rows(shape: Sequence[int]) -> int:
    """Elements of a shape with 1 for its last dimension."""
    return math.prod(shape[:-1])


def _columns(shape: Sequence[int]) -> int:
    """Elements of a shape with 1 for its last dimension but one."""
    return math.prod(shape[:-2]) * shape[-1]


OPTIMIZERS: Mapping[str, Optimizer] = {
    each.name: each for each in (SGD(), SGDMomentum(), Adam(), AdamW(), Adafactor(), AdamW8bit(), Muon())
}
"""What `gp.Training(optimizer=...)` takes."""


# -- what a plan asks ---------------------------------------------------------------------------------------------------


def check_implementation(optimizer: str, implementation: Implementation | None) -> None:
    """Raises `DecisionError` where the optimizer has no such implementation."""
    known = OPTIMIZERS[optimizer]
    if implementation is not None and implementation not in known.implementations:
        has = ", ".join(known.implementations)
        raise DecisionError(f'{known.source} has no implementation "{implementation}" (it has: {has}); leave implementation out')


def state_pieces(
    optimizer: str, implementation: Implementation | None, parameters: Alike[Trained]
) -> tuple[list[Piece], list[Piece]]:
    """The optimizer's state after a step: what is on each parameter's device, and what is in host memory.

    Step counts are in host memory, except those of fused kernels (torch/optim/adam.py `_init_group`, "special device hosting for
    step"). Raises `DecisionError` for parameters that the optimizer cannot step.

    >>> import torch
    >>> from .alike import alike
    >>> state_pieces("adamw", None, alike([("weight", Trained("cuda:0", (4, 8), torch.float32))]))
    ([(0, 256)], [(0, 4)])
    """
    known = OPTIMIZERS[optimizer]
    known.check(parameters.kinds)
    fused = (implementation or known.default(parameters.kinds)) == "fused"
    state = list(enumerate(parameters.column(known.state).tolist()))
    counts = [(position, STEP_BYTES) for position, counts in enumerate(parameters.column(known.counts).tolist()) if counts]
    on_host = [(0, known.group_bytes)] if known.group_bytes and len(parameters) else []
    return [*state, *(counts if fused else [])], [*on_host, *([] if fused else counts)]


def working_pieces(optimizer: str, implementation: Implementation | None, parameters: Sequence[Trained]) -> list[Piece]:
    """What is there while `step()` runs, when it is most on each device, besides parameters, gradients and state.

    >>> import torch
    >>> working_pieces("adam", "for-loop", [Trained("cpu", (4, 8), torch.float32)])
    [(0, 128), (0, 128)]
    """
    known, held = OPTIMIZERS[optimizer], Locals(parameters)
    known.step(parameters, implementation or known.default(parameters), held)
    return held.worst


def clipping_pieces(parameters: Sequence[Trained]) -> list[Piece]:
    """What `torch.nn.utils.clip_grad_norm_` takes at its most: every gradient's norm, and what its kernel needs.

    torch/nn/utils/clip_grad.py `_get_total_norm` takes the norms of one device and dtype together (`_foreach_norm`). On CUDA its
    kernel leaves a float32 per chunk of 65,536 elements, in as many places for every tensor as the largest has chunks
    (aten/src/ATen/native/cuda/ForeachReduceOp.cu `_foreach_tensor_norm_cuda_impl`, `output_per_tensor`). Then the norms are
    stacked, and their norm is taken.
    """
    held = Locals(parameters)
    for number, group in enumerate(groups(parameters)):
        if parameters[group[0]].device.startswith("cuda"):
            chunks = max(-(-parameters[position].numel // CHUNK) for position in group)
            held.take("partial", *((position, 4 * chunks) for position in group))
        held.take(f"norms {number}", *((position, parameters[position].dtype.itemsize) for position in group))
        held.drop("partial")
    if parameters:
        held.take("stacked", *((0, each.dtype.itemsize) for each in parameters), (0, parameters[0].dtype.itemsize))
    return held.worst


CHUNK = 65536
"""Elements that one block of a foreach kernel takes (aten/src/ATen/native/cuda/MultiTensorApply.cuh `kChunkSize`)."""
