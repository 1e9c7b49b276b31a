"""Muon: which matrices it is for, and what orthogonalizing them takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .adam import AdamW
from .optimizer import Implementation, Locals, Optimizer, Trained


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
        held.together([(rest[position], nbytes) for position, nbytes in found.worst])

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
    >>> hidden_matrices([*slots, Slot(3, "head.weight", 2, "Linear")])
    {1}
    >>> hidden_matrices([*slots, Slot(0, "head.weight", 2, "Linear")])  # tied
    {1}
    """
    last = -1
    found: set[int] = set()
    others: set[int] = set()
    for each in slots:
        matrix = each.ndim == 2 and each.name.rpartition(".")[2] == "weight"
        last = each.parameter if matrix else last
        (found if matrix and "Embedding" not in each.owner else others).add(each.parameter)
    return found - others - {last}
