"""Parts of what a CUDA kernel fills: against a model of Philox on the CPU, and against real kernels where there is a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import groundplan as gp
from groundplan.runtime import cuda
from groundplan.runtime.boxes import cut_rows
from groundplan.runtime.cuda import CudaFill, check_pieces
from groundplan.tracer.philox import Grid, increment, offset_of, placed

from . import philox_model

aten = torch.ops.aten
SMALL = Grid(multiprocessors=1, threads_per_multiprocessor=512)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Modeled(CudaFill):
    """A `uniform_` whose kernel is the model."""

    def draw(self, out: torch.Tensor, offset: int) -> None:
        model = philox_model.Fill(len(out), out.dtype, self.grid, 0, offset_of(self.start) + offset)
        out.copy_(torch.from_numpy(model.uniform(model.everything)))


def modeled(numel: int, start: torch.Tensor) -> Modeled:
    return Modeled(aten.uniform_.default, (), torch.float32, numel, start, SMALL, torch.device("cpu"))


def part(one: int, other: int, step: int) -> range:
    return range(min(one, other), max(one, other) + 1, step)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 300)),
    offset=st.integers(0, 100).map(lambda count: 4 * count),
    scratch=st.sampled_from([1 << 11, 1 << 12, 1 << 22]),
    data=st.data(),
)
def test_boxes_of_a_modeled_fill(shape: tuple[int, int], offset: int, scratch: int, data: Any) -> None:
    start = placed(torch.zeros(16, dtype=torch.uint8), offset)
    fill = modeled(shape[0] * shape[1], start)
    whole = torch.empty(fill.numel)
    fill.draw(whole, 0)
    box = tuple(
        data.draw(st.builds(part, st.integers(0, size - 1), st.integers(0, size - 1), st.integers(1, 3))) for size in shape
    )
    out = torch.empty([len(each) for each in box])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cuda, "SCRATCH", scratch)
        cut_rows(shape, box, out, fill.pen().write_at, torch.float32, scratch)
    expected = whole.view(shape)[tuple(slice(each.start, each.stop, each.step) for each in box)]
    assert torch.equal(out, expected)


def test_the_end_of_a_fill() -> None:
    fill = modeled(5000, placed(torch.zeros(16, dtype=torch.uint8), 8))
    assert offset_of(fill.end) == 8 + (increment(aten.uniform_.default, torch.float32, 5000, SMALL) or 0)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("func", [aten.uniform_.default, aten.normal_.default, aten.exponential_.default])
def test_this_device_draws_as_is_said(func: Any, dtype: torch.dtype) -> None:
    assert check_pieces(func, (), dtype, torch.device("cuda", 0))


class OnCuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.device("cuda"):
            self.first = nn.Linear(2000, 3000)
            self.second = nn.Linear(3000, 1000)
            nn.init.normal_(self.second.weight, std=0.02)
            self.third = nn.Parameter(torch.randn(700, 900))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rng", ["eager", "keyed"])
def test_parts_on_cuda(rng: str) -> None:
    torch.manual_seed(4)
    plan = gp.trace(OnCuda)
    whole = OnCuda() if rng == "eager" else plan.materialize(seed=4, rng="keyed")
    for name, parameter in whole.named_parameters():
        index: Any = slice(100, 351) if parameter.dim() == 1 else (slice(100, 351), slice(17, 600, 3))
        found = plan.materialize_state({name: index}, seed=4, rng=rng)[name]
        assert found.device == parameter.device
        assert torch.equal(found, parameter[index]), name


@pytest.mark.gpu
@needs_gpu
def test_a_whole_module_on_cuda() -> None:
    torch.manual_seed(4)
    expected = OnCuda()
    after = torch.cuda.get_rng_state()
    built = gp.trace(OnCuda).materialize(seed=4)
    assert all(torch.equal(one, other) for one, other in zip(expected.parameters(), built.parameters(), strict=True))
    assert torch.equal(torch.cuda.get_rng_state(), after)
