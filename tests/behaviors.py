"""One constructor for every thing that constructors in the wild do and that a recipe for meta tensors gets wrong."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

Build = Callable[[], nn.Module]
BEHAVIORS: dict[str, Build] = {}


def behavior(name: str) -> Callable[[Callable[[nn.Module], Any]], Any]:
    """Enter a function that fills a module, as what a constructor does."""

    def enter(fill: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                fill(self)

        Module.__name__ = Module.__qualname__ = fill.__name__
        BEHAVIORS[name] = Module
        return fill

    return enter


# -- what is read, and what is written in parts -------------------------------------------------------------------------


@behavior("a forward pass in the constructor")
def runs(self: Any) -> None:
    self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    width = self.body(torch.rand(2, 3, 8, 8)).shape[1]
    self.head = nn.Linear(width, 2)
    with torch.no_grad():
        self.register_buffer("seen", self.body(torch.ones(1, 3, 8, 8)))


@behavior("data is read and assigned")
def data(self: Any) -> None:
    self.linear = nn.Linear(3, 3)
    self.linear.weight.data = torch.eye(3) * 2
    self.linear.bias.data.mul_(3)
    self.linear.bias.data[0] = 7
    self.tied = nn.Linear(3, 3, bias=False)
    self.tied.weight.data = self.linear.weight.data


@behavior("writes to partial views")
def parts(self: Any) -> None:
    self.table = nn.Embedding(6, 4, padding_idx=2)
    self.gates = nn.Linear(4, 8)
    with torch.no_grad():
        self.gates.bias[2:4].fill_(1)
        self.gates.weight.view(2, 4, 4)[1].normal_(std=0.5)
        self.gates.weight[::2, 1::2].mul_(-1)
        self.gates.weight.t()[0].copy_(torch.arange(8.0))


@behavior("a module under two names")
def shared(self: Any) -> None:
    inner = nn.Linear(3, 3)
    self.first, self.second = inner, nn.Sequential(inner, nn.Linear(3, 3))


@behavior("one storage under several parameters")
def storages(self: Any) -> None:
    flat = torch.randn(12)
    self.flat = nn.Parameter(flat)
    self.left, self.right = nn.Parameter(flat[:6].view(2, 3)), nn.Parameter(flat[4:])
    with torch.no_grad():
        self.left.fill_(1)


@behavior("buffers that no state_dict has")
def passing(self: Any) -> None:
    self.register_buffer("frequencies", 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8), persistent=False)
    self.register_buffer("original", self.frequencies, persistent=False)
    self.register_buffer("none", None)
    self.register_buffer("steps", torch.tensor(0))


@behavior("tensors in lists, dicts and attributes")
def plain(self: Any) -> None:
    self.linear = nn.Linear(2, 2)
    self.table = torch.randn(3)
    self.tables = [torch.ones(2), {"deep": (torch.rand(2), self.linear.weight)}]
    self.by_name = {"a": self.table[1:], 3: torch.zeros(1)}


@behavior("Python attributes on parameters and buffers")
def marked(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(3))
    self.weight.no_decay = True
    self.weight.partner = ["a", {"b": 1}]
    self.register_buffer("scale", torch.ones(3))
    self.scale.group = "late"


@behavior("hooks")
def hooked(self: Any) -> None:
    self.linear = nn.Linear(3, 3)
    self.linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    self.linear.register_forward_hook(lambda module, args, result: result + 1)
    self.linear.weight.register_hook(lambda grad: grad * 2)
    self.register_state_dict_pre_hook(lambda *_: None)
    self.register_buffer("out", self.linear(torch.ones(1, 3)).detach())


# -- torch.nn.utils, copies, classes ------------------------------------------------------------------------------------


class Symmetric(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value.triu() + value.triu(1).transpose(-1, -2)

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value.triu()


@behavior("parametrizations")
def parametrized(self: Any) -> None:
    self.weight_norm = parametrizations.weight_norm(nn.Linear(4, 3))
    self.spectral_norm = parametrizations.spectral_norm(nn.Linear(4, 3))
    self.own = nn.Linear(3, 3)
    parametrize.register_parametrization(self.own, "weight", Symmetric())
    self.old = nn.utils.weight_norm(nn.Linear(3, 2))


@behavior("orthogonal parametrizations")
def orthogonal(self: Any) -> None:
    self.maps = nn.ModuleList(
        parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map=each) for each in ("matrix_exp", "cayley", "householder")
    )
    self.tall = parametrizations.orthogonal(nn.Linear(2, 5))


@behavior("pruning")
def pruned(self: Any) -> None:
    self.linear, self.conv = nn.Linear(4, 4), nn.Conv2d(2, 4, 2)
    prune.l1_unstructured(self.linear, "weight", amount=0.5)
    prune.random_unstructured(self.linear, "bias", amount=2)
    prune.ln_structured(self.conv, "weight", amount=0.5, n=2, dim=0)
    prune.remove(self.conv, "weight")


@behavior("deepcopy")
def copied(self: Any) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    layer.linear1.weight.mark = "kept"  # type: ignore[attr-defined]
    layer.register_buffer("table", torch.rand(6)[::2])
    self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
    self.weight = copy.deepcopy(layer.linear1.weight)
    nn.init.normal_(layer.linear1.weight)
    self.layer = layer


@behavior("frozen parameters")
def frozen(self: Any) -> None:
    self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
    self.body.requires_grad_(False)
    self.head.bias.requires_grad = False
    self.fixed = nn.Parameter(torch.randn(2), requires_grad=False)
    self.eval()


@behavior("lazy modules")
def lazy(self: Any) -> None:
    self.left = nn.LazyLinear(3)
    self.done = nn.LazyLinear(3)
    self.done(torch.ones(1, 5))
    self.norm = nn.LazyBatchNorm1d()
    self.norm(torch.rand(2, 5))


class Adds(nn.Module):
    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value + torch.tensor([1.0, 2.0, 3.0]).to(value.device) + torch.as_tensor(2)


@behavior("a scripted submodule")
def scripted(self: Any) -> None:
    self.inner = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Adds()))
    self.after = nn.Linear(3, 3)


@behavior("a quantized submodule")
def quantized(self: Any) -> None:
    self.inner = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
    self.codes = torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8)
    self.back = nn.Parameter(self.codes.dequantize())


@behavior("sparse and nested tensors")
def sparse(self: Any) -> None:
    dense = torch.rand(4, 4)
    self.register_buffer("graph", (dense * (dense > 0.5)).to_sparse())
    self.register_buffer("rows", torch.eye(3).to_sparse_csr())
    self.weight = nn.Parameter(torch.sparse.mm(self.graph, torch.rand(4, 2)))
    self.register_buffer("sum", torch.zeros(4, 4).add_(self.graph))
    self.ragged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    self.last = nn.Linear(2, 2)


# -- operators ----------------------------------------------------------------------------------------------------------


@behavior("FFT and complex numbers")
def spectrum(self: Any) -> None:
    self.register_buffer("window", torch.hann_window(8))
    self.register_buffer("filters", torch.fft.rfft(torch.randn(3, 8)))
    self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))
    self.weight = nn.Parameter(torch.view_as_real(torch.randn(3, dtype=torch.complex64)))
    self.register_buffer("conjugate", self.phases.conj())
    self.register_buffer("negative", self.phases.conj().imag)


@behavior("convolution, QR and matrix functions")
def kernels(self: Any) -> None:
    self.register_buffer("blurred", nn.functional.conv2d(torch.rand(1, 1, 6, 6), torch.ones(1, 1, 3, 3) / 9))
    q, r = torch.linalg.qr(torch.randn(4, 4))
    self.q, self.r = nn.Parameter(q * r.diagonal().sign()), r
    nn.init.orthogonal_(self.q)
    self.register_buffer("root", torch.matrix_exp(torch.eye(3)))


@behavior("results whose shape depends on values")
def unique(self: Any) -> None:
    groups, inverse = torch.unique(torch.tensor([3, 1, 3, 2]), return_inverse=True)
    self.register_buffer("groups", groups)
    self.register_buffer("inverse", inverse)
    self.register_buffer("where", torch.nonzero(torch.rand(8) > 0.5).flatten())
    self.linear = nn.Linear(len(groups), len(self.where) + 1)


@behavior("index_put_ and its like")
def indexed(self: Any) -> None:
    self.register_buffer("index", torch.arange(9).view(3, 3))
    self.index[0, torch.tensor([0, 2])] = 9
    self.index[self.index > 7] -= 1
    self.weight = nn.Parameter(torch.zeros(4, 4))
    with torch.no_grad():
        self.weight.index_put_((torch.tensor([0, 1]), torch.tensor([1, 2])), torch.rand(2))
        self.weight.scatter_(1, torch.tensor([[0], [1]]), 5.0)
        self.weight.masked_fill_(torch.eye(4, dtype=torch.bool), -1)


@behavior("set_ and resize_")
def reset(self: Any) -> None:
    source = torch.randn(6)
    self.weight = nn.Parameter(torch.empty(0))
    self.weight.data.set_(source)
    self.other = torch.rand(4).resize_(2, 2)
    self.register_buffer("out", torch.empty(0))
    torch.add(torch.ones(3), torch.ones(3), out=self.out)
    self.squeezed = torch.rand(1, 3).squeeze_()
    self.sized = nn.Linear(self.other.dim(), self.squeezed.dim() + len(self.out))


@behavior("legacy constructors")
def legacy(self: Any) -> None:
    self.one = nn.Parameter(torch.Tensor(3, 2))
    nn.init.xavier_uniform_(self.one)
    self.two = torch.FloatTensor(4).uniform_(-1, 1)
    self.three = torch.normal(0.0, 0.5, size=(3,))
    self.four = torch.normal(torch.zeros(3), torch.ones(3))
    self.five = torch.LongTensor([1, 2])
    self.six = self.one.new(2).zero_()


@behavior("dtype and device moves")
def moved(self: Any) -> None:
    self.half = nn.Linear(3, 3).half()
    self.double = nn.Linear(3, 3).to(torch.float64)
    self.cpu = nn.Linear(3, 3).to("cpu")
    self.brain = nn.Parameter(torch.randn(3).bfloat16())
    self.empty = nn.Linear(2, 2, device="meta").to_empty(device="cpu")
    self.empty.reset_parameters()


@behavior("float8 and integer tensors")
def narrow(self: Any) -> None:
    self.weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    self.register_buffer("codes", torch.randint(0, 255, (4,), dtype=torch.uint8))
    self.register_buffer("order", torch.randperm(5))
    self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
    self.register_buffer("signs", torch.randint(-8, 8, (3,), dtype=torch.int8))


# -- random streams -----------------------------------------------------------------------------------------------------


@behavior("a private generator")
def private(self: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    self.first = nn.Parameter(torch.empty(3).normal_(generator=generator))
    self.ambient = nn.Parameter(torch.randn(2))
    self.second = nn.Parameter(torch.rand(3, generator=generator))
    state = generator.get_state()
    self.third = torch.rand(2, generator=generator)
    self.again = torch.rand(2, generator=torch.Generator().set_state(state))


@behavior("reseeding and fork_rng")
def reseeded(self: Any) -> None:
    self.first = nn.Parameter(torch.randn(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        self.fixed = nn.Parameter(torch.randn(2))
    self.second = nn.Parameter(torch.randn(2))
    state = torch.get_rng_state()
    self.third = torch.rand(3)
    torch.set_rng_state(state)
    self.same = torch.rand(3)


@behavior("Python's and numpy's random numbers")
def host(self: Any) -> None:
    self.gain = random.random()
    self.weight = nn.Parameter(torch.tensor(np.random.randn(3)).float() * self.gain)
    self.own = torch.from_numpy(np.random.default_rng(3).normal(size=2))


@behavior("numpy and scipy")
def arrays(self: Any) -> None:
    self.register_buffer("dct", torch.from_numpy(scipy.linalg.hadamard(4)).float())
    values = np.zeros(4, dtype=np.float32)
    self.view = torch.from_numpy(values)
    values[1] = 3
    weight = torch.randn(3, 3)
    self.root = nn.Parameter(torch.from_numpy(scipy.linalg.expm(weight.numpy())))
    weight.numpy()[0] = 1
    self.weight = nn.Parameter(weight)


@behavior("control flow on random values")
def decided(self: Any) -> None:
    self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(int(torch.randint(1, 4, ()))))
    if torch.rand(()) > 0.5:
        self.extra = nn.Parameter(torch.randn(2))
    self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
    self.ends = nn.Linear(2, 2)


# -- the world outside --------------------------------------------------------------------------------------------------


@behavior("threads that read")
def threaded(self: Any) -> None:
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(lambda width: width * 2, (1, 2, 3)))
    self.layers = nn.ModuleList(nn.Linear(size, 2) for size in sizes)


@behavior("files that are read and written")
def filed(self: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights")
        np.save(path, np.arange(6, dtype=np.float32))
        self.table = nn.Parameter(torch.from_numpy(np.load(path + ".npy")))
        torch.save({"weight": torch.arange(4.0), "drawn": torch.rand(2)}, path)
        loaded = torch.load(path)
    self.loaded = nn.Parameter(loaded["weight"] + loaded["drawn"].sum())
    self.linear = nn.Linear(2, 2)
    self.linear.load_state_dict({"weight": torch.eye(2), "bias": torch.ones(2)})


_OUTSIDE = nn.Linear(3, 3)
_TABLE = torch.arange(4.0)


@behavior("a module and tensors from outside")
def outside(self: Any) -> None:
    self.module = _OUTSIDE
    self.weight = _OUTSIDE.weight
    self.register_buffer("table", _TABLE)
    self.own = nn.Parameter(_TABLE + torch.rand(4))


@behavior("autograd in the constructor")
def differentiated(self: Any) -> None:
    self.linear = nn.Linear(3, 1)
    self.linear(torch.ones(2, 3)).sum().backward()
    self.product = self.linear.weight * 2
    torch.optim.SGD(self.linear.parameters(), lr=0.1).step()
