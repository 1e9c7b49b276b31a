"""What an optimizer takes: bytes of state per parameter, and what its step allocates and frees meanwhile.

In closed form, by shape and dtype of what one rank holds of a parameter. Each optimizer is the library's own at its default
settings, and says where in its source the figures come from; `tests/test_optimizers.py` holds them against the real ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..tracer.errors import DecisionError

Implementation = Literal["foreach", "fused", "for-loop"]

Piece = tuple[int, int]
"""Bytes that are there because of a parameter: its position, and how many."""

STEP_BYTES = 4
"""A count of steps: a float32 scalar (torch/optim/optimizer.py `_get_scalar_dtype`)."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A parameter that an optimizer steps: what one rank holds of it, on `device`.

    `whole` is the shape that all ranks hold together, None for one that is not divided. `hidden` says that it is a matrix inside
    the model (`hidden_matrices`).
    """

    device: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    hidden: bool = False
    whole: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def divided(self) -> bool:
        return self.whole is not None and self.whole != self.shape


class Locals:
    """What the local variables of a step hold: a variable keeps its tensors until it gets others, which are made before.

    `worst` is what is held, besides the variables' first values, when it is most on each device.

    >>> step = Locals([Trained("cpu", (2,), torch.float32), Trained("cpu", (3,), torch.float32)])
    >>> step.take("denom", (0, 8))
    >>> step.take("denom", (1, 12))
    >>> step.worst
    [(0, 8), (1, 12)]
    """

    def __init__(self, parameters: Sequence[Trained]) -> None:
        self._devices = [each.device for each in parameters]
        self._held: dict[str, tuple[Piece, ...]] = {}
        self._sums: dict[str, int] = {}
        self._worst: dict[str, tuple[int, list[Piece]]] = {}

    def take(self, name: str, *pieces: Piece) -> None:
        """`name = ...`: new tensors, after which the old ones go."""
        made = [piece for piece in pieces if piece[1]]
        for position, nbytes in made:
            device = self._devices[position]
            self._sums[device] = self._sums.get(device, 0) + nbytes
        for device in {self._devices[position] for position, _ in made}:
            if self._sums[device] > self._worst.get(device, (0, []))[0]:
                there = [piece for held in (*self._held.values(), made) for piece in held]
                self._worst[device] = (self._sums[device], [each for each in there if self._devices[each[0]] == device])
        self.drop(name)
        self._held[name] = tuple(made)

    def rename(self, old: str, new: str) -> None:
        """`new = old`, which the old name is not used for any more."""
        self.drop(new)
        self._held[new] = self._held.pop(old, ())

    def drop(self, *names: str) -> None:
        for name in names:
            for position, nbytes in self._held.pop(name, ()):
                self._sums[self._devices[position]] -= nbytes

    @property
    def worst(self) -> list[Piece]:
        return [piece for _, pieces in self._worst.values() for piece in pieces]


class Optimizer(ABC):
    """One of the optimizers that `gp.Training` names."""

    name: ClassVar[str]
    source: ClassVar[str]
    implementations: ClassVar[tuple[Implementation, ...]] = ("foreach", "fused", "for-loop")
    note: ClassVar[str] = "so has the optimizer's state, as torch.optim's defaults have it"
    group_bytes: ClassVar[int] = 0
    """Bytes in host memory that it holds besides, however many parameters there are."""

    def default(self, parameters: Sequence[Trained]) -> Implementation:
        """What it takes where nobody says: foreach where every parameter is on CUDA, else the loop.

        torch/optim/optimizer.py `_default_to_fused_or_foreach`.
        """
        on_cuda = all(each.device.startswith("cuda") for each in parameters)
        return "foreach" if on_cuda and "foreach" in self.implementations else "for-loop"

    def check(self, parameters: Iterable[Trained]) -> None:
        """Raises `DecisionError` for parameters that it cannot step."""

    @abstractmethod
    def state(self, parameter: Trained) -> int:
        """Bytes of state on the parameter's device, its step count left out."""

    def counts(self, parameter: Trained) -> bool:
        """Whether a count of its steps is kept with each parameter."""
        return False

    @abstractmethod
    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        """Take what `step()` takes while it runs, in order."""


# -- torch.optim --------------------------------------------------------------------------------------------------------


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


class Adam(Optimizer):
    """torch/optim/adam.py: `exp_avg` and `exp_avg_sq` are `zeros_like(p)` (`_init_group`).

    Foreach (`_multi_tensor_adam`) holds the square roots of all `exp_avg_sq` of one device and dtype at once, while those of the
    group before still have the name. The loop (`_single_tensor_adam`) holds one parameter's square root and the quotient made of
    it, besides the previous parameter's quotient, whose name `denom` is still bound. The fused kernels hold nothing.
    """

    name, source = "adam", "torch.optim.Adam"

    def state(self, parameter: Trained) -> int:
        return 2 * parameter.nbytes

    def counts(self, parameter: Trained) -> bool:
        return True

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        if implementation == "foreach":
            for group in _groups(parameters):
                held.take("exp_avg_sq_sqrt", *((position, parameters[position].nbytes) for position in group))
        elif implementation == "for-loop":
            for position, each in enumerate(parameters):
                held.take("root", (position, each.nbytes))
                held.take("denom", (position, each.nbytes))
                held.drop("root")


class AdamW(Adam):
    """The same, with weight decay in place."""

    name, source = "adamw", "torch.optim.AdamW"


def _groups(parameters: Sequence[Trained], *, by_dim: bool = False) -> list[list[int]]:
    """Positions by device and dtype, as `_group_tensors_by_device_and_dtype` has them; `by_dim` keeps matrices apart."""
    found: dict[object, list[int]] = {}
    for position, each in enumerate(parameters):
        found.setdefault((each.device, each.dtype, by_dim and len(each.shape) > 1), []).append(position)
    return list(found.values())


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
        turns = _groups(parameters, by_dim=True) if implementation == "foreach" else [[each] for each in range(len(parameters))]
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


class Muon(Optimizer):
    """torch.optim.Muon for the matrices inside the model, torch.optim.AdamW for all others.

    Muon (Jordan 2024, kellerjordan.github.io/posts/muon; Moonlight, arXiv 2502.16982) is for the matrices of hidden layers;
    embeddings, the head, norms, biases and what has other than two dimensions go to AdamW, in both recipes. Which is which
    is told by `hidden_matrices`. `implementation` is that of AdamW: Muon has a loop alone.

    torch/optim/_muon.py: `momentum_buffer` is `zeros_like(grad)`; there is no step count. `_zeropower_via_newtonschulz` makes a
    bfloat16 copy of the update and iterates five times with the smaller of the two Gram matrices, in bfloat16: of the iteration
    before, the names `gram_matrix`, `gram_update` and `ortho_grad` still hold theirs.
    """

    name, source = "muon", "torch.optim.Muon"
    _rest = AdamW()

    def state(self, parameter: Trained) -> int:
        return parameter.nbytes if parameter.hidden else self._rest.state(parameter)

    def counts(self, parameter: Trained) -> bool:
        return not parameter.hidden

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        for position, each in enumerate(parameters):
            if each.hidden:
                self._orthogonalize(position, each, held)
        held.drop("update")
        rest = [position for position, each in enumerate(parameters) if not each.hidden]
        found = Locals([parameters[position] for position in rest])
        self._rest.step([parameters[position] for position in rest], implementation, found)
        _take_together(held, [(rest[position], nbytes) for position, nbytes in found.worst])

    def _orthogonalize(self, position: int, matrix: Trained, held: Locals) -> None:
        half, gram = _HALF * matrix.numel, _HALF * min(matrix.whole or matrix.shape) ** 2 // _parts(matrix)
        held.take("lerped", (position, matrix.nbytes))
        held.drop("update")
        held.take("ortho_grad", (position, half if matrix.dtype != torch.bfloat16 else 0))
        held.take("norm", (position, _HALF), (position, _HALF))
        held.drop("norm")
        for _ in range(2):  # the third iteration is like the second
            for name, nbytes, gathered in (
                ("gram_matrix", gram, _gathered(matrix)),
                ("gram_update", gram, ()),
                ("ortho_grad", half, ()),
            ):
                held.take("gathered", *((position, each) for each in gathered))
                held.take(name, (position, nbytes))
                held.drop("gathered")
        held.drop("gram_matrix", "gram_update")
        held.rename("ortho_grad", "update")
        held.drop("lerped")


_HALF = 2
"""Bytes of an element in bfloat16, which Muon orthogonalizes in."""


def _parts(matrix: Trained) -> int:
    """How many ranks divide a matrix, about."""
    return max(1, math.prod(matrix.whole or ()) // max(1, matrix.numel)) if matrix.divided else 1


def _gathered(matrix: Trained) -> tuple[int, ...]:
    """What a matrix whose rows are divided is gathered into, if there are no more rows than columns.

    DTensor's matmul of a part by the transposed one gathers the latter: what the ranks send, in order, and the same put together
    by columns, both whole (torch/distributed/_functional_collectives.py `all_gather_tensor`). With more rows than columns the
    ranks' Gram matrices are summed instead.
    """
    if matrix.whole is None or not matrix.divided or matrix.whole[0] > matrix.whole[1]:
        return ()
    return (_HALF * math.prod(matrix.whole),) * 2


def _take_together(held: Locals, pieces: Sequence[Piece]) -> None:
    held.take("together", *pieces)
    held.drop("together")


# -- torchao ------------------------------------------------------------------------------------------------------------


class AdamW8bit(Optimizer):
    """torchao.optim.AdamW8bit (Dettmers et al. 2021, arXiv 2110.02861): moments as 8-bit codes, with a scale per block of 256.

    torchao/optim/adam.py `_new_buffer` quantizes what has at least 4,096 elements and is divisible by 256, of a DTensor its local
    part; the rest has the parameter's dtype. torchao/optim/subclass_8bit.py `OptimState8bit`: `codes` is uint8, `scale` float32,
    `qmap` a float32 table of 256 for each moment of each parameter. The learning rate is a tensor in host memory.

    The step compiles a function of one parameter (`single_param_adam`), so there is one implementation. `compiled_bytes` is what
    the compiled one allocates; run as it is written, it would take about twenty times the parameter.
    """

    name, source = "adamw-8bit", "torchao.optim.AdamW8bit"
    implementations = ("for-loop",)
    group_bytes = 4

    def state(self, parameter: Trained) -> int:
        if not is_quantized(parameter.numel):
            return 2 * parameter.nbytes
        return 2 * (parameter.numel + 4 * (parameter.numel // BLOCK) + QMAP_BYTES)

    def counts(self, parameter: Trained) -> bool:
        return True

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        for position, each in enumerate(parameters):
            _take_together(held, [(position, compiled_bytes(each.shape, each.device.startswith("cuda")))])


BLOCK = 256
QMAP_BYTES = 4 * 256
_SMALLEST = 4096


def is_quantized(numel: int) -> bool:
    """Whether torchao keeps the moments of so many elements in 8 bits."""
    return numel >= _SMALLEST and numel % BLOCK == 0


def compiled_bytes(shape: Sequence[int], on_cuda: bool) -> int:
    """What torchao's compiled step of one parameter allocates: both moments in float32, and the new scales.

    Quantizing needs a block's largest value, and then the values again: Inductor writes them down in between. On CUDA it keeps
    them in registers where the blocks are the rows, or there are none. Read off the code that torch 2.13's Inductor generates of
    `single_param_adam` for the CPU and, with Triton, for an H100. Moments that are not quantized need nothing.
    """
    numel, sizes = math.prod(shape), [size for size in shape if size != 1]
    if not is_quantized(numel) or (on_cuda and (len(sizes) < 2 or sizes[-1] == BLOCK)):
        return 0
    return 2 * 4 * (numel + numel // BLOCK)


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
    optimizer: str, implementation: Implementation | None, parameters: Sequence[Trained]
) -> tuple[list[Piece], list[Piece]]:
    """The optimizer's state after a step: what is on each parameter's device, and what is in host memory.

    Step counts are in host memory, except those of fused kernels (torch/optim/adam.py `_init_group`, "special device hosting for
    step"). Raises `DecisionError` for parameters that the optimizer cannot step.

    >>> state_pieces("adamw", None, [Trained("cuda:0", (4, 8), torch.float32)])
    ([(0, 256)], [(0, 4)])
    """
    known = OPTIMIZERS[optimizer]
    known.check(parameters)
    fused = (implementation or known.default(parameters)) == "fused"
    state = [(position, known.state(each)) for position, each in enumerate(parameters)]
    counts = [(position, STEP_BYTES) for position, each in enumerate(parameters) if known.counts(each)]
    on_host = [(0, known.group_bytes)] if known.group_bytes and parameters else []
    return [*state, *(counts if fused else [])], [*on_host, *([] if fused else counts)]


def working_pieces(optimizer: str, implementation: Implementation | None, parameters: Sequence[Trained]) -> list[Piece]:
    """What is there while `step()` runs, when it is most on each device, besides parameters, gradients and state.

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
    for number, group in enumerate(_groups(parameters)):
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


# -- which matrices are hidden ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Slot:
    """A place of a parameter in a module: which parameter, its name there, its dimensions, and the class of that module."""

    parameter: int
    name: str
    ndim: int
    owner: str


def hidden_matrices(slots: Iterable[Slot]) -> set[int]:
    """The parameters that Muon is for, told without names of architectures: the weights of layers inside the model.

    A parameter is one if it has two dimensions, is called `weight` wherever it is, is in no embedding (`nn.Embedding`,
    `nn.EmbeddingBag`, or a class that has it in its name; so a head that is tied to one is none), and is not in the last such
    place in the module's order, which is the head's.

    >>> slots = [Slot(0, "embed.weight", 2, "Embedding"), Slot(1, "up.weight", 2, "Linear"), Slot(2, "up.bias", 1, "Linear")]
    >>> hidden_matrices([*slots, Slot(3, "head.weight", 2, "Linear")]), hidden_matrices([*slots, Slot(0, "head.weight", 2, "Linear")])
    ({1}, {1})
    """
    last, found, others = -1, set(), set()
    for each in slots:
        matrix = each.ndim == 2 and each.name.rpartition(".")[2] == "weight"
        last = each.parameter if matrix else last
        (found if matrix and "Embedding" not in each.owner else others).add(each.parameter)
    return found - others - {last}
