"""Buffers of context, expert and tensor axes: the formulas against torch's own code, run in jobs and in a group that is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.testing._internal.distributed.fake_pg import FakeStore

from groundplan.planner.exchanges import expert_exchange, fsdp_in_pipeline, ring_attention, tensor_parallel_saved

from .jobs import launch
from .pipeline_ranks import measured_parts

try:
    from torch.distributed.tensor.experimental._context_parallel import _attention as ring
except ImportError:  # torch 2.11 has it in one file
    from torch.distributed.tensor.experimental import _attention as ring  # type: ignore[no-redef]

aten: Any = torch.ops.aten


@contextmanager
def group_of(ranks: int, rank: int) -> Iterator[Any]:
    """A process group that talks to nobody: torch's collectives allocate as ever, and no backend besides."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def peak_of(run: Callable[[], Any]) -> int:
    """The highest point within `run`, the second time."""

    def step() -> Iterator[None]:
        run()
        yield

    begin, peak, _ = measured_parts(step, step)[2]
    return peak - begin


# -- context ------------------------------------------------------------------------------------------------------------


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, is_causal=options["is_causal"])


def flash_backward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, logsumexp, is_causal = options["out"], options["logsumexp"], options["is_causal"]
    return backward(options["grad_out"], query, key, value, out, logsumexp, 0.0, is_causal)


@pytest.mark.parametrize("rotation", ["allgather", "alltoall"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_attention_takes_what_is_reckoned(ranks: int, dtype: torch.dtype, rotation: Any, monkeypatch: Any) -> None:
    methods = {"allgather": ring._RotateMethod.ALL_GATHER, "alltoall": ring._RotateMethod.ALL_TO_ALL}
    monkeypatch.setattr(ring._cp_options, "rotate_method", methods[rotation])
    query, key, value = (torch.randn(1, 256, 4, 64, dtype=dtype).transpose(1, 2) for _ in range(3))
    measured = [ring_peaks(ranks, rank, query, key, value) for rank in {0, 1, ranks - 1}]
    reckoned = ring_attention(key.nbytes + value.nbytes, query.nbytes, dtype.itemsize, ranks, rotation)
    for found, wanted in zip(map(max, zip(*measured, strict=True)), reckoned, strict=True):
        assert found <= 1.02 * wanted <= 1.12 * found


def ring_peaks(ranks: int, rank: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int]:
    with group_of(ranks, rank) as group:

        def forward() -> Any:
            return ring._templated_ring_attention(group, 2, flash, query, key, value, is_causal=True)

        out, logsumexp = forward()[:2]

        def backward() -> Any:
            given: Any = (out, "grad_out", query, key, value, out, logsumexp, True)
            return ring._templated_ring_attention_backward(group, 2, flash_backward, *given)

        return peak_of(forward), peak_of(backward)


def test_one_rank_passes_nothing_on() -> None:
    assert ring_attention(100, 50, 2, 1).forward == 50
    more = [ring_attention(100, 50, 2, ranks).forward for ranks in (2, 4, 8)]
    assert more == sorted(more) and more[-1] - more[-2] == 400
    assert ring_attention(100, 50, 2, 8, "alltoall") == ring_attention(100, 50, 2, 3, "alltoall")


# -- experts ------------------------------------------------------------------------------------------------------------


def exchanged(tokens: torch.Tensor, top_k: int, group: Any, ranks: int, experts: int = 8) -> torch.Tensor:
    """Tokens, each for `top_k` experts in turn, to the experts' ranks and back: torchtitan's `AllToAllTokenDispatcher`."""
    chosen = (torch.arange(len(tokens) * top_k) % experts).argsort(stable=True) // top_k
    rows, each = tokens[chosen], [len(chosen) // ranks] * ranks
    by_expert = torch.arange(len(rows)).view(ranks, experts // ranks, -1).transpose(0, 1).flatten()
    rows = all_to_all_single_autograd(rows, each, each, group)
    rows = rows[by_expert]
    rows = rows[by_expert.argsort()]
    rows = all_to_all_single_autograd(rows, each, each, group)
    return torch.zeros_like(tokens).index_add(0, chosen, rows)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("top_k", [2, 4])
def test_an_exchange_of_experts_takes_what_is_reckoned(ranks: int, top_k: int) -> None:
    with group_of(ranks, 0) as group:
        tokens = torch.randn(256, 1024, requires_grad=True)
        measured = peak_of(lambda: exchanged(tokens, top_k, group, ranks))
    assert measured == pytest.approx(expert_exchange(tokens.nbytes, top_k), rel=0.05)


def test_uneven_experts_take_more() -> None:
    assert expert_exchange(10, 2) == 40 and expert_exchange(10, 2, capacity=1.5) == 60


# -- tensor, and FSDP in a pipeline --------------------------------------------------------------------------------------


def test_real_ranks_save_and_gather_what_is_reckoned(tmp_path: Path) -> None:
    """Four gloo ranks, all alike: the least of them, as gloo keeps memory of past collectives for a while."""
    ranks = launch("tests.axis_ranks", tmp_path, world=4)
    tensor = [found["tensor"] for found in ranks]
    assert sum(tensor[0]["kinds"].values()) == pytest.approx(tensor[0]["whole"], rel=0.01)
    for case in [name for name in tensor[0] if name.startswith("sequence")]:
        assert_close(min(found[case][0] for found in tensor), tensor[0][case][1])
    for number in range(2):
        assert_close(min(found["pipeline"][number][0] for found in ranks), ranks[0]["pipeline"][number][1])


def assert_close(measured: int, reckoned: int) -> None:
    """Within 1 %, and what gloo's threads may still hold."""
    assert 0.99 * reckoned <= measured <= 1.15 * reckoned


def test_what_sequence_and_loss_parallelism_leave() -> None:
    assert tensor_parallel_saved(80, 10, 20, 40, 1, True, True) == 150
    assert tensor_parallel_saved(80, 10, 20, 40, 4) == 20 + 10 + 20 + 40
    assert tensor_parallel_saved(80, 10, 20, 40, 4, sequence=True) == 25 + 10 + 40
    assert tensor_parallel_saved(80, 10, 20, 40, 4, sequence=True, loss=True) == 35 + 10
    assert fsdp_in_pipeline([], 2, 4) == 0
