"""Random constructors: a program is a list of small integers, which an interpreter turns into what constructors do in the wild.

Every choice is taken modulo what there is to choose from, so that any list is a program, and a failing one shrinks well.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

Step = tuple[int, int, int, int]
Program = list[Step]

FLOATS = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
SHAPES = [(4, 4), (16,), (3, 5), (2, 3, 4), (1,), (), (0, 3), (33,), (5, 7), (8, 2)]
LARGE = (520, 512)


class Constructed(nn.Module):
    """The module that a program builds."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.values: list[float] = []
        run = _Run(self)
        for step in program:
            run.step(step)
        for index, tensor in enumerate(run.tensors[-6:]):
            setattr(self, f"left{index}", tensor)


class _Run:
    """The interpreter: `tensors` is what the constructor has in its hands."""

    def __init__(self, module: Constructed) -> None:
        self.module = module
        self.tensors: list[torch.Tensor] = [torch.ones(3, 5)]
        self.generator = torch.Generator().manual_seed(17)
        self.state: torch.Tensor | None = None
        self.count = 0

    def step(self, step: Step) -> None:
        kind, a, b, c = step
        ACTIONS[kind % len(ACTIONS)](self, a, b, c)

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def tensor(self, a: int) -> torch.Tensor:
        return self.tensors[a % len(self.tensors)]

    def floating(self, a: int) -> torch.Tensor:
        found = [each for each in self.tensors if each.is_floating_point() and each.numel()]
        return found[a % len(found)] if found else self.make(torch.zeros(4, 4))

    def make(self, tensor: torch.Tensor) -> torch.Tensor:
        self.tensors.append(tensor)
        return tensor

    def parameter(self, a: int) -> nn.Parameter:
        found = list(self.module.parameters())
        if found:
            return found[a % len(found)]
        parameter = nn.Parameter(torch.ones(4, 4))
        self.module.register_parameter(self.name("p"), parameter)
        return parameter


# -- creation -----------------------------------------------------------------------------------------------------------


def _create(run: _Run, a: int, b: int, c: int) -> None:
    dtype, shape = DTYPES[b % len(DTYPES)], SHAPES[c % len(SHAPES)]
    floating = FLOATS[b % len(FLOATS)]
    kinds: list[Callable[[], torch.Tensor]] = [
        lambda: torch.zeros(shape, dtype=dtype),
        lambda: torch.ones(shape, dtype=dtype),
        lambda: torch.full(shape, b % 7, dtype=dtype),
        lambda: torch.rand(shape, dtype=floating),
        lambda: torch.randn(shape, dtype=floating),
        lambda: torch.randn(shape, generator=run.generator),
        lambda: torch.randint(0, 9, shape),
        lambda: torch.randperm(b % 12),
        lambda: torch.arange(c % 13, dtype=dtype if dtype is not torch.bool else torch.int64),
        lambda: torch.linspace(-1, 1, c % 9 + 1),
        lambda: torch.eye(c % 5 + 1, dtype=floating),
        lambda: torch.tensor([[1, 2, 3], [4, 5, b]], dtype=dtype),
        lambda: torch.from_numpy(np.arange(6, dtype="float32").reshape(2, 3)),
        lambda: torch.normal(0.0, 2.0, size=shape),
        lambda: torch.Tensor(3, 4).fill_(b),
        lambda: torch.empty(shape, dtype=floating).uniform_(-1, 1),
        lambda: torch.empty(shape[::-1], dtype=floating).normal_().permute(*reversed(range(len(shape)))),
        lambda: torch.zeros_like(run.tensor(c)),
        lambda: run.tensor(c).new_full((3, 2), 1),
        lambda: torch.empty(LARGE).normal_(std=0.02),
    ]
    run.make(kinds[a % len(kinds)]())


# -- views, fills, arithmetic -------------------------------------------------------------------------------------------


def _view(tensor: torch.Tensor, kind: int) -> torch.Tensor:
    if not tensor.dim() or not tensor.numel():
        return tensor
    last = tensor.shape[-1]
    views: list[Callable[[], torch.Tensor]] = [
        lambda: tensor,
        lambda: tensor[: (tensor.shape[0] + 1) // 2],
        lambda: tensor[..., ::2],
        lambda: tensor.transpose(0, -1),
        lambda: tensor.select(-1, kind % last),
        lambda: tensor.detach(),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.narrow(-1, 0, last // 2 + 1),
        lambda: tensor.flatten() if tensor.is_contiguous() else tensor.t() if tensor.dim() == 2 else tensor,
        lambda: tensor.chunk(2, -1)[0],
        lambda: tensor[-1:],
    ]
    return views[kind % len(views)]()


def _take_view(run: _Run, a: int, b: int, c: int) -> None:
    run.make(_view(run.tensor(a), b))


def _fill(run: _Run, a: int, b: int, c: int) -> None:
    fills: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.normal_(),
        lambda t: t.uniform_(-2, 3),
        lambda t: t.zero_(),
        lambda t: t.fill_(c),
        lambda t: t.exponential_(),
        lambda t: t.bernoulli_(0.3),
        lambda t: t.random_(),
        lambda t: t.cauchy_(),
        lambda t: t.normal_(1, 2, generator=run.generator),
        lambda t: nn.init.trunc_normal_(t, std=0.02),
        lambda t: nn.init.trunc_normal_(t, std=1.0, a=-0.5, b=1.0),
        lambda t: t.geometric_(0.5),
        lambda t: t.log_normal_(),
    ]
    with torch.no_grad():
        fills[b % len(fills)](_view(run.floating(a), c))


def _initialize(run: _Run, a: int, b: int, c: int) -> None:
    matrices = [each for each in run.module.parameters() if each.dim() == 2 and each.is_floating_point() and each.numel()]
    if not matrices:
        return
    weight = matrices[a % len(matrices)]
    inits: list[Callable[[torch.Tensor], Any]] = [
        nn.init.normal_,
        nn.init.xavier_uniform_,
        nn.init.kaiming_normal_,
        nn.init.zeros_,
        nn.init.eye_,
        lambda t: nn.init.orthogonal_(t) if t.dtype in (torch.float32, torch.float64) else t,
        lambda t: nn.init.sparse_(t, 0.4),
        lambda t: nn.init.uniform_(t, generator=run.generator),
    ]
    inits[b % len(inits)](weight)


def _compute(run: _Run, a: int, b: int, c: int) -> None:
    x, y = run.tensor(a), run.tensor(c)
    numeric = x if x.dtype is not torch.bool else x.int()
    ops: list[Callable[[], torch.Tensor]] = [
        lambda: numeric + 1,
        lambda: numeric * numeric,
        lambda: x.clone(),
        lambda: torch.cat([x.flatten(), y.flatten().to(x.dtype)]),
        lambda: x.float().softmax(0) if not x.is_complex() and x.dim() else numeric + 2,
        lambda: numeric.flatten().cumsum(0),
        lambda: numeric.flatten().sort().values if not x.is_complex() else numeric - 1,
        lambda: torch.where(numeric.real > 0, numeric, -numeric) if x.dtype is not torch.uint8 else numeric,
        lambda: x.to(FLOATS[c % len(FLOATS)]) if not x.is_complex() else x,
        lambda: numeric.sum(),
        lambda: x.float() @ x.float().t() if x.dim() == 2 and not x.is_complex() else numeric + 3,
        lambda: torch.dropout(x.float(), 0.5, True) if not x.is_complex() else x,
        lambda: torch.nonzero(x),
        lambda: x[x != 0] if x.numel() < 100 else x,
        lambda: torch.unique(x.flatten()) if not x.is_complex() and x.dtype is not torch.bool else x,
        lambda: torch.outer(x.flatten()[:5], x.flatten()[:5]),
        lambda: numeric / 3,
        lambda: torch.bernoulli(torch.full((5,), 0.5)),
        lambda: torch.multinomial(torch.ones(6), 3),
        lambda: x.contiguous(),
        lambda: x.conj() if x.is_complex() else torch.polar(x.float().flatten()[:4].abs(), torch.ones(min(4, x.numel()))),
    ]
    if x.numel() < 10_000 and y.numel() < 10_000:
        run.make(ops[b % len(ops)]())


def _change(run: _Run, a: int, b: int, c: int) -> None:
    x = run.floating(a)
    changes: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.add_(1),
        lambda t: t.mul_(0.5),
        lambda t: t.clamp_(-1, 1),
        lambda t: t.copy_(torch.arange(float(t.numel())).reshape(t.shape)),
        lambda t: t.masked_fill_(t > 0, 2),
        lambda t: t.sub_(t.clone()),
        lambda t: t.copy_(run.floating(c).flatten()[:1].clone()),
        lambda t: t.index_fill_(-1, torch.tensor([0]), 3) if t.dim() else t.neg_(),
        lambda t: torch.add(t.clone(), 1, out=t) if t.is_contiguous() else t.neg_(),
    ]
    with torch.no_grad():
        changes[b % len(changes)](_view(x, c))


# -- registration -------------------------------------------------------------------------------------------------------


def _register(run: _Run, a: int, b: int, c: int) -> None:
    tensor, module = run.tensor(a), run.module
    kind = b % 8
    if kind in (0, 1) and (tensor.is_floating_point() or tensor.is_complex()):
        data = tensor.detach() if kind else _view(tensor.detach(), c)
        module.register_parameter(run.name("p"), nn.Parameter(data, requires_grad=bool(c % 3)))
    elif kind == 2:
        module.register_buffer(run.name("b"), tensor, persistent=bool(c % 2))
    elif kind == 3:
        setattr(module, run.name("a"), tensor)
    elif kind == 4:
        setattr(module, run.name("l"), [tensor, (run.tensor(c), c)])
    elif kind == 5:
        setattr(module, run.name("d"), {"k": tensor, c: c})
    elif kind == 6:
        module.register_parameter(run.name("tie"), run.parameter(a))
    else:
        run.make(run.parameter(a) * 2)


def _submodule(run: _Run, a: int, b: int, c: int) -> None:
    kinds: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(b % 6 + 1, c % 6 + 1),
        lambda: nn.Conv1d(2, 3, 3),
        lambda: nn.Embedding(7, 4, padding_idx=c % 7),
        lambda: nn.LayerNorm(5),
        lambda: nn.BatchNorm1d(4),
        lambda: nn.LSTM(3, 4, 2),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.Linear(4, 4, dtype=torch.bfloat16),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.1)).half(),
        lambda: nn.Linear(700, 400, bias=False),
    ]
    run.module.add_module(run.name("m"), kinds[a % len(kinds)]())


def _copy_submodule(run: _Run, a: int, b: int, c: int) -> None:
    children = list(run.module.children())
    if children:
        child = children[a % len(children)]
        run.module.add_module(run.name("c"), copy.deepcopy(child) if b % 3 else child)


def _on_parameter(run: _Run, a: int, b: int, c: int) -> None:
    parameter = run.parameter(a)
    kind = b % 7
    if kind == 0:
        parameter.requires_grad_(False)
    elif kind == 1:
        parameter.tag = {"c": c}  # type: ignore[attr-defined]
    elif kind == 2 and parameter.is_floating_point():
        parameter.data = run.floating(c).detach()
    elif kind == 3:
        parameter.data.fill_(c)
    elif kind == 4:
        run.make(parameter.data)
    elif kind == 5:
        run.make(copy.deepcopy(parameter))
    elif parameter.is_floating_point():
        parameter.data = parameter.data.to(torch.float32)


# -- values and randomness ----------------------------------------------------------------------------------------------


def _look(run: _Run, a: int, b: int, c: int) -> None:
    tensor = run.tensor(a)
    if not tensor.numel() or tensor.numel() > 1000:
        return
    kind = b % 6
    flat = tensor.detach().flatten()
    if kind == 0 and not tensor.is_complex():
        run.module.values.append(float(flat[c % len(flat)].item()))
    elif kind == 1 and bool((flat != 0).any()):
        run.make(torch.randn(3))
    elif kind == 2:
        run.module.values.append(len(flat.tolist()))
    elif kind == 3 and tensor.is_floating_point():
        run.module.values.append(float(flat.float().mean()))
    elif kind == 4 and tensor.dtype is torch.float32:
        run.module.values.append(float(tensor.detach().numpy().sum()))
    elif torch.equal(flat, flat.clone()):
        _create(run, c, b, a)


def _randomness(run: _Run, a: int, b: int, c: int) -> None:
    kind = a % 8
    if kind == 0:
        torch.manual_seed(b)
    elif kind == 1:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(c)
            run.make(torch.randn(5))
    elif kind == 2:
        with torch.random.fork_rng(devices=[]):
            run.make(torch.rand(40))
    elif kind == 3:
        run.state = torch.get_rng_state()
    elif kind == 4 and run.state is not None:
        torch.set_rng_state(run.state)
    elif kind == 5:
        run.make(torch.tensor(np.random.rand(3)))
    elif kind == 6:
        run.make(torch.full((2,), random.random()))
    else:
        run.generator.manual_seed(c)


def _drop(run: _Run, a: int, b: int, c: int) -> None:
    if len(run.tensors) > 1:
        del run.tensors[a % len(run.tensors)]


def _python_memory(run: _Run, a: int, b: int, c: int) -> None:
    array = np.ones(4, dtype="float32")
    tensor = run.make(torch.from_numpy(array))
    array[b % 4] = c
    if a % 2:
        tensor.mul_(2)
        run.module.values.append(float(array.sum()))


OPERATORS: list[Callable[[torch.Tensor, torch.Tensor, int], Any]] = [
    lambda x, y, c: torch.fft.rfft(x.float(), dim=-1),
    lambda x, y, c: torch.linalg.qr(x.float().reshape(-1, 1) @ x.float().reshape(1, -1)),
    lambda x, y, c: torch.unique(x, return_inverse=True),
    lambda x, y, c: torch.nonzero(x),
    lambda x, y, c: x.masked_select(x.abs() > c % 2),
    lambda x, y, c: torch.sort(x.flatten(), descending=bool(c % 2), stable=True),
    lambda x, y, c: x.cumsum(-1),
    lambda x, y, c: torch.where(x.bool(), x, x.new_full((), c % 3)),
    lambda x, y, c: torch.cat([x.flatten(), y.flatten().to(x.dtype)]),
    lambda x, y, c: torch.stack([x, x * 2], dim=c % (x.dim() + 1)),
    lambda x, y, c: x.flip(0).roll(c % 3, 0),
    lambda x, y, c: x.repeat_interleave(2, 0),
    lambda x, y, c: torch.kron(x.float(), torch.ones(2)),
    lambda x, y, c: torch.outer(x.float().flatten()[:5], y.float().flatten()[:5]).tril(c % 3 - 1),
    lambda x, y, c: torch.einsum("i,j->ij", x.float().flatten()[:3], y.float().flatten()[:3]),
    lambda x, y, c: x.float().softmax(-1).max(-1),
    lambda x, y, c: torch.polar(x.float().abs(), torch.ones_like(x, dtype=torch.float32)).conj(),
    lambda x, y, c: nn.functional.conv1d(x.float().reshape(1, 1, -1), torch.ones(1, 1, 1)),
    lambda x, y, c: torch.add(x.float(), 1, out=torch.empty(c % 2)),
    lambda x, y, c: x.float().to_sparse().coalesce().to_dense(),
    lambda x, y, c: torch.quantize_per_tensor(x.float(), 0.5, c % 4, torch.qint8).dequantize(),
    lambda x, y, c: torch.bincount(x.flatten().abs().long() % 5),
    lambda x, y, c: torch.multinomial(x.float().flatten().abs() + 1, 2, replacement=True),
    lambda x, y, c: torch.bernoulli(x.float().sigmoid()),
    lambda x, y, c: torch.poisson(x.float().abs()),
    lambda x, y, c: torch.normal(x.float(), 0.5),
    lambda x, y, c: nn.functional.dropout(x.float(), 0.5),
    lambda x, y, c: torch.take_along_dim(x, x.argsort(-1), -1),
]


def _operate(run: _Run, a: int, b: int, c: int) -> None:
    found = OPERATORS[a % len(OPERATORS)](run.tensor(b).detach(), run.tensor(c).detach(), c)
    for each in found if isinstance(found, tuple) else (found,):
        run.make(each)


def _put(run: _Run, a: int, b: int, c: int) -> None:
    """Writes that go through indices."""
    target = run.tensor(a).detach()
    changes: list[Callable[[], Any]] = [
        lambda: target.__setitem__(target.abs() > c % 2, c % 5),
        lambda: target.index_put_((torch.tensor([0]),), target[:1].clone(), accumulate=bool(c % 2)),
        lambda: target.masked_fill_(torch.ones(target.shape[-1:], dtype=torch.bool), c % 2),
        lambda: target.index_fill_(0, torch.tensor([0]), c % 3),
        lambda: target.scatter_(0, torch.zeros_like(target[:1], dtype=torch.int64), c % 4),
        lambda: target.flatten()[: c % 4].copy_(torch.arange(c % 4)),
        lambda: target.fill_diagonal_(c % 2),
        lambda: torch.sub(target, 1, out=target),
    ]
    changes[b % len(changes)]()


def _reshape_in_place(run: _Run, a: int, b: int, c: int) -> None:
    """Another geometry, or other memory, for a tensor that is there already."""
    target, other = run.tensor(a), run.tensor(b)
    changes: list[Callable[[], Any]] = [
        lambda: target.unsqueeze_(c % (target.dim() + 1)),
        lambda: target.squeeze_(),
        lambda: target.t_(),
        lambda: target.set_(other.detach()),  # type: ignore[call-overload]
        lambda: target.resize_(target.numel()),
        lambda: setattr(target, "data", other.detach().clone()),
        lambda: setattr(target, "data", other.data),
        lambda: target.transpose_(0, -1),
    ]
    changes[c % len(changes)]()


def _forward(run: _Run, a: int, b: int, c: int) -> None:
    """A linear child is called, with or without autograd."""
    linear = [child for child in run.module.children() if isinstance(child, nn.Linear) and child.weight.dtype == torch.float32]
    if linear:
        child = linear[a % len(linear)]
        with torch.set_grad_enabled(bool(c % 2)):
            run.make(child(run.tensor(b).float().flatten()[:1].expand(2, child.in_features)))


ACTIONS: list[Callable[[_Run, int, int, int], None]] = [
    *([_create] * 3),
    *([_fill] * 3),
    *([_compute] * 2),
    *([_register] * 4),
    _take_view,
    _initialize,
    _change,
    _submodule,
    _copy_submodule,
    _on_parameter,
    _look,
    _randomness,
    _drop,
    _python_memory,
    *([_operate] * 3),
    _put,
    _reshape_in_place,
    _forward,
]
