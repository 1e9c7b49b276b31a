"""Parts of stored tensors: any box into any memory, and no more bytes than a rank's share."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import groundplan as gp
from groundplan.runtime import entries, loading
from groundplan.runtime.checkpoint import Checkpoint
from groundplan.runtime.entries import Held, Pieced, Stored
from groundplan.runtime.files import File
from groundplan.runtime.loading import Read, read_all
from groundplan.runtime.workers import Workers

from .checkpoint_files import FORMS, other_state
from .law import content
from .layouts import local

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # DCP's, of a single process
Box = tuple[range, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2)

# -- any box, any memory ------------------------------------------------------------------------------------------------


@st.composite
def strides_of(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in any order of the dims, with gaps, or with elements on top of each other."""
    strides, reached = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = reached
        reached *= max(1, shape[dim]) + draw(st.sampled_from((0, 0, 0, 1, 3)))
    for dim in range(len(shape)):
        if draw(st.integers(0, 9)) == 0:
            strides[dim] = draw(st.sampled_from((0, 1)))
    return tuple(strides)


def part_of(size: int, steps: bool) -> st.SearchStrategy[range]:
    """A range of indices; of all of them half of the time."""
    step = st.integers(1, 4) if steps else st.just(1)
    some = st.builds(lambda one, two, by: range(min(one, two), max(one, two), by), *[st.integers(0, size)] * 2, step)
    return st.one_of(st.just(range(size)), some)


@st.composite
def stored_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """A tensor over a storage that is to be written to a file, and the byte at which it begins there."""
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    if draw(st.booleans()) and shape:
        shape = (*shape[:-1], draw(st.integers(1, 300)))
    strides, dtype = draw(strides_of(shape)), draw(st.sampled_from(DTYPES))
    length = 1 + sum(max(0, size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    values = (torch.arange(length) * 7 % 113).to(dtype)
    return values.as_strided(shape, strides), draw(st.integers(0, 9))


@st.composite
def memory_for(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory to read into: of some dtype, in any order of the dims, with gaps; full of something else."""
    kinds = [dtype, dtype, *(each for each in (torch.float32, torch.float64, torch.bfloat16) if torch.can_cast(dtype, each))]
    order = draw(st.permutations(range(len(shape))))
    wide = [shape[dim] + draw(st.sampled_from((0, 0, 0, 2))) for dim in order]
    base = torch.full(wide, 99, dtype=torch.int64).to(draw(st.sampled_from(kinds)))
    return base.permute([order.index(dim) for dim in range(len(shape))])[tuple(slice(size) for size in shape)]


def indexed(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    return tensor[tuple(slice(part.start, part.stop, part.step) for part in box)]


@contextmanager
def written(tensor: torch.Tensor, start: int) -> Iterator[Stored]:
    """The entry of a tensor's storage in a file, from byte `start` on."""
    storage = tensor.untyped_storage()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        path.write_bytes(b"\xaa" * start + bytes(storage.tolist()))
        file = File(path)
        try:
            yield Stored("tensor", tuple(tensor.shape), tensor.dtype, file, start, tensor.stride())
        finally:
            file.close()


def assert_read(out: torch.Tensor, tensor: torch.Tensor, box: Box) -> None:
    expected = torch.empty(out.shape, dtype=out.dtype).copy_(indexed(tensor, box))
    assert content(out) == content(expected), (tensor.stride(), box)


SHORTEST = st.sampled_from([(512, 2**22), (1, 1), (16, 1), (16, 50), (10**6, 100)])


@given(st.data(), stored_tensors(), SHORTEST)
@settings(max_examples=250, deadline=None, derandomize=True)
def test_any_box_is_read_into_any_memory(data: st.DataObject, stored: tuple[torch.Tensor, int], sizes: tuple[int, int]) -> None:
    tensor, start = stored
    box: Box = tuple(data.draw(part_of(size, True)) for size in tensor.shape)
    out = data.draw(memory_for(tuple(map(len, box)), tensor.dtype))
    with mock.patch.multiple(entries, _SHORTEST=sizes[0], _ROWS=sizes[1]), written(tensor, start) as entry:
        entry.read(box, out)
    assert_read(out, tensor, box)


@given(st.data(), stored_tensors(), SHORTEST, st.sampled_from([(1, 1), (40, 30), (2**24, 2**20)]))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_any_box_is_read_in_pieces(
    data: st.DataObject, stored: tuple[torch.Tensor, int], sizes: tuple[int, int], cuts: tuple[int, int]
) -> None:
    tensor, start = stored
    box: Box = tuple(data.draw(part_of(size, False)) for size in tensor.shape)
    out = data.draw(memory_for(tuple(map(len, box)), tensor.dtype))
    done: list[int] = []
    with (
        mock.patch.multiple(entries, _SHORTEST=sizes[0], _ROWS=sizes[1], _CONVERTED=cuts[1]),
        mock.patch.multiple(loading, READ_BYTES=cuts[0]),
        written(tensor, start) as entry,
        Workers(data.draw(st.sampled_from((1, 2)))) as workers,
    ):
        read_all([Read(entry, box, out)], Checkpoint("test", {}), workers, done.append)
    assert_read(out, tensor, box)
    assert sum(done) == out.numel() * out.dtype.itemsize


@given(st.data(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_box_is_put_together_from_pieces(data: st.DataObject, sizes: list[int]) -> None:
    tensor = torch.arange(math.prod(sizes)).view(sizes)
    boxes: list[Box] = [()]
    for size in sizes:
        cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=3))})
        boxes = [(*box, range(one, two)) for box in boxes for one, two in itertools.pairwise(cuts)]
    pieces = [(tuple(part.start for part in box), Held("tensor", indexed(tensor, box))) for box in boxes]
    entry = Pieced("tensor", tuple(sizes), tensor.dtype, "test", data.draw(st.permutations(pieces)))
    box: Box = tuple(data.draw(part_of(size, True)) for size in sizes)
    out = data.draw(memory_for(tuple(map(len, box)), tensor.dtype))
    entry.read(box, out)
    assert_read(out, tensor, box)


# -- no more than a rank's share ----------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Large enough for parts of it to be read by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(256, 768), nn.LayerNorm(768), nn.Linear(768, 256)) for _ in range(2))
        self.head = nn.Linear(256, 515)  # no number of ranks divides it


@contextmanager
def one_of(world: int) -> Iterator[None]:
    """This process is the second of several ranks, the others are imagined."""
    dist.init_process_group("fake", rank=1, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all that is read from files."""
    found: list[int] = []
    real = File.read

    def read(self: File, start: int, memory: memoryview, what: str) -> None:
        found.append(len(memory))
        real(self, start, memory, what)

    monkeypatch.setattr(File, "read", read)
    return found


def by_rows(module: Any, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def by_tensors(module: Any, world: int) -> None:
    plan = {"layers.*.0": ColwiseParallel(), "layers.*.2": RowwiseParallel(), "head": ColwiseParallel()}
    parallelize_module(module, init_device_mesh("cpu", (world,)), plan)


def by_both(module: Any, world: int) -> None:
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(
        module, mesh["tensor"], {"layers.*.0": ColwiseParallel(), "layers.*.2": RowwiseParallel(), "head": ColwiseParallel()}
    )
    for layer in module.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(module, mesh=mesh["data"])


HEADERS = 100_000  # bytes: headers, indices, pickles
SHARDINGS: dict[str, Callable[[Any, int], None]] = {"FSDP": by_rows, "TP": by_tensors, "FSDP x TP": by_both}


@pytest.mark.parametrize(
    ("form", "dtype"), [("safetensors", None), ("safetensors", torch.bfloat16), ("dcp", None), ("torch", None)]
)
@pytest.mark.parametrize(("sharding", "world"), [("FSDP", 2), ("FSDP", 4), ("TP", 2), ("TP", 4), ("FSDP x TP", 4)])
def test_a_rank_reads_its_share(
    tmp_path: Path, read_bytes: list[int], sharding: str, world: int, form: str, dtype: torch.dtype | None
) -> None:
    tensors = other_state(Wide)
    checkpoint = FORMS[form](tmp_path, tensors)
    plan = gp.trace(Wide).cast(dtype) if dtype else gp.trace(Wide)
    with one_of(world):
        module = plan.meta_module()
        SHARDINGS[sharding](module, world)
        read_bytes.clear()
        gp.materialize(module, checkpoint=checkpoint, missing="error")
        held = {name: local(tensor) for name, tensor in module.named_parameters()}
    share = sum(tensor.numel() * 4 for tensor in held.values())
    assert share * 0.999 <= sum(read_bytes) <= share * 1.05 + HEADERS, sum(read_bytes) / share
    assert share < sum(tensor.nbytes for tensor in tensors.values()) * 0.6
    for name, tensor in held.items():
        assert set(tensor.flatten()[:50].tolist()) <= set(tensors[name].to(tensor.dtype).flatten().tolist()), name


def test_a_device_alone_reads_each_byte_once(tmp_path: Path, read_bytes: list[int]) -> None:
    tensors = other_state(Wide)
    for form in ("safetensors", "index", "dcp", "torch"):
        (tmp_path / form).mkdir()
        checkpoint = FORMS[form](tmp_path / form, tensors)
        read_bytes.clear()
        gp.trace(Wide).materialize(checkpoint=checkpoint)
        whole = sum(tensor.nbytes for tensor in tensors.values())
        assert whole <= sum(read_bytes) <= whole + HEADERS, form
