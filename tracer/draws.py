"""How many numbers each call takes from the CPU's generator (mt19937, 32-bit words), from its arguments and geometry alone.

What is not certain has no `Draw`, and is run whole, where its turn comes. The figures are not believed but tried: the first call
of each operator and dtype is compared with what torch really draws on this machine (`check_draws`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .graph import Op, View
from .places import Draw, Place
from .schema import FILLS, aten

BLOCK = 16  # normal_ works in blocks of 16 elements where it is vectorized
HALF = (torch.float16, torch.bfloat16)
ROUNDS_UP = torch.__version__ >= "2.12"  # an odd tail of half precision; earlier ones draw it as every other dtype's
REDRAWS = torch.__version__ >= "2.12"  # trunc_normal_ draws until all is within its bounds; earlier ones invert the distribution
_REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
_DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}  # of the significand

Figures = Callable[[tuple[Any, ...], torch.dtype, int, bool], "Draw | None"]


def draw_of(op: Op) -> Draw | None:
    """What a recorded op takes from the CPU's generator, where that is certain."""
    target = op.targets[0] if op.targets else None
    return None if target is None else draw_of_call(op.func, op.args, target.dtype, target.numel, target.is_contiguous)


def draw_of_call(func: Any, args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """The same for a call, by what it fills: its elements' dtype and number, and whether they lie side by side in index order."""
    if is_trunc_normal(func):
        return _truncated(args[1:], dtype, numel, contiguous)
    figures = FIGURES.get(func)
    if figures is None:
        return None
    draw = figures(args, dtype, numel, contiguous)
    return draw if draw is None or check_draws(func, dtype, _words_each(draw, numel)) else None


def is_trunc_normal(func: Any) -> bool:
    """Whether it is torch.nn.init's function behind `trunc_normal_`, one op on the tape."""
    return getattr(func, "__name__", "") == "_no_grad_trunc_normal_"


def is_counted_fill(op: Op) -> bool:
    """Whether it is a fill that can be put off: it reads nothing, and what it draws is known beforehand."""
    if not (op.func in FILLS or is_trunc_normal(op.func)) or any(name != "generator" for name, _ in op.kwargs):
        return False
    return not op.random or draw_of(op) is not None


def is_random_fill(func: Any) -> bool:
    """Whether it overwrites its target in place with numbers drawn for each element by itself."""
    return func in _IN_PLACE


# -- one operator after the other ---------------------------------------------------------------------------------------


def _uniform(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """One word an element, two where the result has 53 bits; a complex number is two."""
    if dtype in _REAL:
        return _uniform(args, _REAL[dtype], 2 * numel, contiguous)
    if dtype == torch.float64:
        return Draw(2 * numel)
    return Draw(numel) if dtype == torch.float32 or dtype in HALF else None


def _normal(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """Blocks of 16 where the elements lie side by side, the last 16 of an odd number drawn anew; single ones otherwise."""
    if dtype in _REAL:
        return _normal(args, _REAL[dtype], 2 * numel, contiguous)
    if dtype not in _DIGITS:
        return None
    if numel < BLOCK or not contiguous:
        return Draw(0, numel)
    if dtype in HALF and ROUNDS_UP:
        return Draw(BLOCK * -(-numel // BLOCK))
    return Draw((numel + BLOCK * (numel % BLOCK > 0)) * (2 if dtype == torch.float64 else 1))


def _new_normal(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """`torch.randn` and `torch.normal` fill a new, contiguous tensor."""
    return _normal(args, dtype, numel, True)


def _singles(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """`log_normal_`: the exponentials of normal samples drawn one by one."""
    return Draw(0, numel) if dtype in _DIGITS else None


def _doubles(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """A uniform number of 53 bits an element, whatever its dtype."""
    return Draw(2 * numel)


def _dropout(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    return Draw(2 * numel if len(args) < 3 or args[2] is not False else 0)


def _bernoulli(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """With a tensor of probabilities: as many bits as these have."""
    probabilities = next((each for each in reversed(args) if isinstance(each, View)), None)
    return _uniform((), dtype if probabilities is None else probabilities.dtype, numel, contiguous)


def _whole_range(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """`random_()`: as many bits as the dtype has."""
    return Draw(2 * numel if dtype in (torch.int64, torch.float64) else numel)


def _below(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """`random_(to)`, `randint(high)`."""
    bound = next((each for each in args if isinstance(each, int)), None)
    return None if bound is None else _within(0, bound, dtype, numel)


def _between(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """`random_(from, to)`, `randint(low, high)`."""
    low, high = [*(each for each in args if isinstance(each, int)), None, None][:2]
    return None if low is None or high is None else _within(low, high, dtype, numel)


def _within(low: int, high: int, dtype: torch.dtype, numel: int) -> Draw | None:
    """Two words an element where one would not be even enough: from 2^28 values on."""
    if dtype.is_floating_point and max(abs(low), abs(high)) > 2 ** _DIGITS.get(dtype, 0):
        return None  # torch moves the bounds to what the dtype can tell apart
    return Draw(numel if high - low < 2**28 else 2 * numel)


def _permutation(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    return Draw(max(0, numel - 1))


def _multinomial(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """A double a sample with replacement, one a category without, or where a single sample is taken."""
    probabilities, samples = args[0], args[1]
    replaced = len(args) > 2 and args[2]
    return Draw(2 * numel if replaced and samples > 1 else 2 * probabilities.numel)


_IN_PLACE: dict[Any, Figures] = {
    aten.uniform_.default: _uniform,
    aten.normal_.default: _normal,
    aten.log_normal_.default: _singles,
    aten.cauchy_.default: _doubles,
    aten.geometric_.default: _doubles,
    aten.exponential_.default: _doubles,
    aten.bernoulli_.float: _doubles,
    aten.random_.default: _whole_range,
    aten.random_.to: _below,
    getattr(aten.random_, "from"): _between,
}
FIGURES: dict[Any, Figures] = {
    **_IN_PLACE,
    aten.rand.default: _uniform,
    aten.rand.generator: _uniform,
    aten.rand_like.default: _uniform,
    aten.randn.default: _new_normal,
    aten.randn.generator: _new_normal,
    aten.randn_like.default: _normal,
    aten.normal.float_float: _new_normal,
    aten.normal.Tensor_float: _new_normal,
    aten.normal.float_Tensor: _new_normal,
    aten.normal.Tensor_Tensor: _new_normal,
    aten.native_dropout.default: _dropout,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli_.Tensor: _bernoulli,
    aten.bernoulli.p: _doubles,
    aten.randint.default: _below,
    aten.randint.generator: _below,
    aten.randint.low: _between,
    aten.randint.low_generator: _between,
    aten.randperm.default: _permutation,
    aten.randperm.generator: _permutation,
    aten.multinomial.default: _multinomial,
}


# -- trunc_normal_ ------------------------------------------------------------------------------------------------------

_REACH = {torch.float32: 5.78, torch.float16: 5.79, torch.bfloat16: 5.79}  # no contiguous normal sample is farther out
_FAR = 8.58  # and no double


def _truncated(args: tuple[Any, ...], dtype: torch.dtype, numel: int, contiguous: bool) -> Draw | None:
    """Certain where one round is enough: because nothing can be out of bounds, or because torch does not draw again."""
    if not REDRAWS:
        return draw_of_call(aten.uniform_.default, (), dtype, numel, contiguous)
    mean, std, low, high = args
    reach = _REACH.get(dtype, _FAR) if contiguous and numel >= BLOCK else _FAR
    if not (std > 0 and low <= mean - reach * std and mean + reach * std <= high):
        return None
    return draw_of_call(aten.normal_.default, (), dtype, numel, contiguous)


def is_static(op: Op) -> bool:
    """Whether a `trunc_normal_` on the CPU is a `normal_` whose numbers are all within the bounds (CUDA's reach farther)."""
    return REDRAWS and op.position is not None and op.position.device == "cpu" and draw_of(op) is not None


def is_redrawn(args: tuple[Any, ...]) -> bool:
    """Whether `trunc_normal_` with these (mean, std, a, b) redraws what is out of bounds until nothing is.

    Otherwise it draws candidates within the bounds and accepts some, which is not taken apart here.
    """
    mean, std, low, high = args
    if not REDRAWS or not std > 0 or mean < low - 2 * std or mean > high + 2 * std:
        return False  # the last two make torch warn: let it
    return _below_in_normal((high - mean) / std) - _below_in_normal((low - mean) / std) > 0.3


def _below_in_normal(x: float) -> float:
    """The share of a normal distribution that is below `x`, as torch.nn.init computes it."""
    return (1.0 + math.erf(x / math.sqrt(2.0))) / 2.0


# -- the figures tried --------------------------------------------------------------------------------------------------


def _words_each(draw: Draw, numel: int) -> int:
    return 0 if draw.normals or not numel else round(draw.words / numel)


_SIZES = (1, 3, 15, 16, 17, 33, 100)


@cache
def check_draws(func: Any, dtype: torch.dtype, words_each: int) -> bool:
    """Whether the figures for an operator and a dtype are what torch draws here, tried on small tensors in two layouts.

    `words_each` tells apart the cases that one operator and dtype may have: a range of 2^28 values takes more than a small one.
    """
    with _disable_current_modes(), torch.no_grad(), _default_generator_kept():
        try:
            return all(_same_draws(func, dtype, words_each > 1, numel, step) for numel in _SIZES for step in (1, 2))
        except (RuntimeError, NotImplementedError, TypeError):
            return False


@contextmanager
def _default_generator_kept() -> Iterator[None]:
    state = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def _same_draws(func: Any, dtype: torch.dtype, wide: bool, numel: int, step: int) -> bool:
    torch.default_generator.manual_seed(5 + numel)
    torch.empty(numel % 7, dtype=torch.float64, device="cpu").normal_()  # may leave a kept sample
    place = Place.at(torch.default_generator.get_state())
    args = _TRIALS[func](torch.zeros(numel * step, dtype=dtype, device="cpu")[::step], wide)
    typed = any(isinstance(each, torch.Tensor) for each in args) or func._schema.name == "aten::randperm"
    kwargs: dict[str, Any] = {} if typed else {"dtype": dtype}
    kwargs |= {"generator": torch.default_generator} if "generator" in func._overloadname else {}
    result = func(*args, **kwargs)
    target = result[0] if isinstance(result, tuple) else result
    noted = tuple(_noted(each) if isinstance(each, torch.Tensor) else each for each in args)
    draw = FIGURES[func](noted, target.dtype, target.numel(), target.is_contiguous())
    return draw is not None and torch.equal(place.after(draw).state(), torch.default_generator.get_state())


def _noted(tensor: torch.Tensor) -> View:
    return View(0, tensor.dtype, tuple(tensor.shape), tensor.stride())


def _bound(tensor: torch.Tensor, wide: bool) -> int:
    return 2**30 if wide else 100 if tensor.dtype != torch.bool else 2


# A small call of every operator: the arguments for a tensor, and whether the range is to be wide.
_TRIALS: dict[Any, Callable[[torch.Tensor, bool], tuple[Any, ...]]] = {
    aten.uniform_.default: lambda tensor, _: (tensor, -1.0, 2.0),
    aten.normal_.default: lambda tensor, _: (tensor, 0.5, 2.0),
    aten.log_normal_.default: lambda tensor, _: (tensor,),
    aten.cauchy_.default: lambda tensor, _: (tensor,),
    aten.geometric_.default: lambda tensor, _: (tensor, 0.3),
    aten.exponential_.default: lambda tensor, _: (tensor,),
    aten.bernoulli_.float: lambda tensor, _: (tensor, 0.3),
    aten.random_.default: lambda tensor, _: (tensor,),
    aten.random_.to: lambda tensor, wide: (tensor, _bound(tensor, wide)),
    getattr(aten.random_, "from"): lambda tensor, wide: (tensor, 1, _bound(tensor, wide)),
    aten.rand.default: lambda tensor, _: ([tensor.numel()],),
    aten.rand_like.default: lambda tensor, _: (tensor,),
    aten.randn.default: lambda tensor, _: ([tensor.numel()],),
    aten.randn_like.default: lambda tensor, _: (tensor,),
    aten.normal.float_float: lambda tensor, _: (0.5, 2.0, [tensor.numel()]),
    aten.normal.Tensor_float: lambda tensor, _: (tensor, 2.0),
    aten.normal.float_Tensor: lambda tensor, _: (0.5, tensor + 1),
    aten.normal.Tensor_Tensor: lambda tensor, _: (tensor, tensor + 1),
    aten.native_dropout.default: lambda tensor, _: (tensor, 0.3, True),
    aten.bernoulli.default: lambda tensor, _: (tensor + 0.5,),
    aten.bernoulli_.Tensor: lambda tensor, _: (tensor, (tensor + 0.5).clamp(0, 1)),
    aten.bernoulli.p: lambda tensor, _: (tensor, 0.3),
    aten.randint.default: lambda tensor, wide: (_bound(tensor, wide), [tensor.numel()]),
    aten.randint.low: lambda tensor, wide: (1, _bound(tensor, wide), [tensor.numel()]),
    aten.randperm.default: lambda tensor, _: (tensor.numel(),),
    aten.multinomial.default: lambda tensor, wide: (tensor + 1, 2, True) if wide else (tensor + 1, 1, False),
}
for _name in ("rand", "randn", "randperm"):
    _TRIALS[getattr(aten, _name).generator] = _TRIALS[getattr(aten, _name).default]
_TRIALS |= {aten.randint.generator: _TRIALS[aten.randint.default], aten.randint.low_generator: _TRIALS[aten.randint.low]}
