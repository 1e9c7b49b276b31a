"""Adam and AdamW: torch.optim's, and torchao's with its state in 8 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .optimizer import Implementation, Locals, Optimizer, Trained, groups


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
            for group in groups(parameters):
                held.take("exp_avg_sq_sqrt", *((position, parameters[position].nbytes) for position in group))
        elif implementation == "for-loop":
            for position, each in enumerate(parameters):
                held.take("root", (position, each.nbytes))
                held.take("denom", (position, each.nbytes))
                held.drop("root")


class AdamW(Adam):
    """The same, with weight decay in place."""

    name, source = "adamw", "torch.optim.AdamW"


# -- in 8 bits -----------------------------------------------------------------------------------------------------------


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

    @property
    def note(self) -> str:
        return "gradients have the parameters' dtype, state is in 8 bits; its compiled step holds one parameter's in float32"

    def state(self, parameter: Trained) -> int:
        if not is_quantized(parameter.numel):
            return 2 * parameter.nbytes
        return 2 * (parameter.numel + 4 * (parameter.numel // BLOCK) + QMAP_BYTES)

    def counts(self, parameter: Trained) -> bool:
        return True

    def step(self, parameters: Sequence[Trained], implementation: Implementation, held: Locals) -> None:
        for position, each in enumerate(parameters):
            held.together([(position, compiled_bytes(each.shape, each.device.startswith("cuda")))])


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
