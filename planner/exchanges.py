"""What the axes inside a layer take beside the layer's own activations: buffers of ring attention, of experts' exchange, of FSDP
in a pipeline; and what tensor parallelism leaves of saved activations.

Functions of bytes on one rank, which a profile of a layer gives, never of a model's configuration. A context axis of `C` ranks
needs no function for the activations themselves: they are those of a sequence of `seq_len / C` tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .profile import Profile

Rotation = Literal["allgather", "alltoall"]
"""How ring attention passes keys and values on: torch's `set_rotate_method`, whose default is the first."""


class Peaks(NamedTuple):
    """The highest points within forward and within backward, in bytes above what was there."""

    forward: int
    backward: int


def ring_attention(key_value: int, output: int, itemsize: int, ranks: int, rotation: Rotation = "allgather") -> Peaks:
    """What one attention takes on a rank of the context axis while it runs, its output included.

    `key_value` are the bytes of the rank's keys and values together, `output` those of its output, as many as of its queries;
    `itemsize` is that of their elements. `allgather` holds everybody's keys and values (`ranks` times `key_value`), `alltoall`
    its neighbor's, for this turn and the next. Outputs and gradients are merged in float32.

    As `_templated_ring_attention` and its backward do
    (torch/distributed/tensor/experimental/_context_parallel/_attention.py; Liu et al. 2023, arXiv:2310.01889), for queries that
    are views of projections, `[batch, heads, tokens, size]`, so that keys and values are copied first. The attention kernel's
    workspace is not included.

    >>> ring_attention(key_value=2**20, output=2**19, itemsize=2, ranks=4).forward / 2**20
    8.5
    """
    if ranks == 1:
        return Peaks(output, output + key_value)
    wide = 4 * output // itemsize
    wide_key_value = 4 * key_value // itemsize
    narrow = output if itemsize < 4 else 0
    around = ranks if rotation == "allgather" else min(ranks - 1, 2)
    merged = 0 if ranks == 2 else output + (wide if narrow or rotation == "alltoall" else 0)  # there when keys are passed again
    passing = (around + 2) * key_value + merged
    merging = around * key_value + 4 * wide + narrow
    gradients = wide + wide_key_value + output + key_value
    return Peaks(max(passing, merging), (around + 2) * key_value + gradients + 3 * wide_key_value)


def attention_output(profile: Profile) -> int:
    """The bytes of the largest output of `scaled_dot_product_attention` in a profile; 0 where it is not called."""
    found = (each for each in profile.allocations if each.kind == "activation" and "scaled_dot_product" in each.op)
    return max((each.nbytes for each in found), default=0)


def expert_exchange(tokens: int, top_k: int, capacity: float = 1.0) -> int:
    """The buffers of dispatch and combine of one layer on a rank: `2 k cf` times the bytes of its tokens, `s b h b_c`.

    Each of a rank's tokens goes to `top_k` experts; `capacity` is how much more than its share the busiest rank receives. One
    buffer is what is received from (or goes to) the other ranks, the other its rows in the order of the experts
    (torchtitan/models/common/token_dispatcher.py, `AllToAllTokenDispatcher`: `_dispatch_token_exchange` and `_permute`).

    >>> expert_exchange(tokens=1000, top_k=8, capacity=1.25)
    20000
    """
    return -int(-2 * top_k * capacity * tokens // 1)


def tensor_parallel_saved(
    inside: int, gathered: int, outside: int, logits: int, ranks: int, sequence: bool = False, loss: bool = False
) -> int:
    """What a rank of the tensor axis saves for backward of what one rank alone would: all sizes are bytes.

    `inside` is what is saved between a layer that is divided by columns and the next divided by rows, `gathered` the inputs of
    those by columns, `outside` the residual stream and norms, `logits` the output of the head and what the loss keeps of it.
    Sequence parallelism divides `outside`; the inputs of layers by columns are gathered for them and saved whole by torch's
    `parallelize_module` (Megatron gathers them again in backward: Korthikanti et al. 2022, arXiv:2205.05198). `loss_parallel`
    divides `logits` (torch/distributed/tensor/parallel/loss.py).

    >>> tensor_parallel_saved(800, 100, 100, 400, 4), tensor_parallel_saved(800, 100, 100, 400, 4, sequence=True, loss=True)
    (800, 425)
    """
    divided = inside + (outside if sequence else 0) + (logits if loss else 0)
    whole = gathered + (0 if sequence else outside) + (0 if loss else logits)
    return -(-divided // ranks) + whole


def fsdp_in_pipeline(units: Sequence[int], compute_itemsize: int, reduce_itemsize: int) -> int:
    """What FSDP's whole parameters and gradients take on a rank of a pipeline; `units` are the elements of each of its units.

    torch's stages let FSDP neither free parameters after a backward nor reduce gradients before the last micro-batch
    (`backward_maybe_with_nosync` in torch/distributed/pipelining/stage.py): everything that the rank has is there whole, and its
    gradients too, added up in the dtype that they are reduced in. The first unit that is reduced is copied besides, and where the
    dtypes differ its last gradient is still there.

    >>> fsdp_in_pipeline([1000, 1000], compute_itemsize=2, reduce_itemsize=4)
    18000
    """
    whole, largest = sum(units), max(units, default=0)
    last = compute_itemsize if compute_itemsize != reduce_itemsize else 0
    return whole * (compute_itemsize + reduce_itemsize) + largest * (reduce_itemsize + last)
