"""The table of corrections for CUDA: what is chosen, kept and taken there, against torch's sources and, on a GPU, its memory."""

from __future__ import annotations

import gc
import inspect
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import groundplan as gp
from groundplan.planner.allocations import STEP
from groundplan.planner.cuda_left_out import LEFT_OUT
from groundplan.runtime import cuda_autocast
from groundplan.runtime.cuda_attention import Attended, backend_of
from groundplan.runtime.cuda_kernels import CHOICES, cuda_kernels
from groundplan.runtime.cuda_scratch import TABLE, cuda_scratch_bytes

aten = torch.ops.aten
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLASH, EFFICIENT, CUDNN, MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Step = Callable[..., Any]


class Followed(TorchDispatchMode):
    """The ops that ran, and the bytes of the storages that are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[str] = []
        self.dtypes: list[torch.dtype] = []
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.ops.append(str(func.overloadpacket).removeprefix("aten."))
            found = [each for each in tree_leaves(out) if isinstance(each, torch.Tensor)]
            self.dtypes += [each.dtype for each in found[:1]]
            for each in found:
                self._see(each.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._alive:
            self._alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, storage._cdata, None).atexit = False

    @property
    def held(self) -> int:
        gc.collect()
        return sum(self._alive.values())


def operands(shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


def followed(step: Step, *shapes: tuple[int, ...], dtype: torch.dtype = BF16) -> tuple[Followed, Followed, int]:
    """A step as CUDA takes it: forward, backward, and the bytes that are held between them, the output's included."""
    with cuda_kernels(), FakeTensorMode():
        values = operands(shapes, dtype)
        with Followed() as forward:
            out = step(*values)
        held = forward.held
        with Followed() as backward:
            out.backward(torch.ones_like(out))
    return forward, backward, held


# -- attention ----------------------------------------------------------------------------------------------------------


def called(
    dtype: torch.dtype = BF16,
    shape: tuple[int, ...] = (2, 4, 16, 8),
    keys: tuple[int, ...] | None = None,
    values: tuple[int, ...] | None = None,
    mask: bool = False,
    **options: Any,
) -> Attended:
    q, k, v = (torch.empty(each, dtype=dtype) for each in (shape, keys or shape, values or keys or shape))
    given = torch.ones(shape[-2], (keys or shape)[-2], dtype=torch.bool) if mask else None
    return Attended(q, k, v, given, **{"dropout": 0.0, "causal": False, "scale": None, "grouped": False, **options})


@pytest.mark.parametrize(
    ("call", "backend"),
    [
        (called(), FLASH),
        (called(F16), FLASH),
        (called(dropout=0.5), FLASH),
        (called(causal=True), FLASH),
        (called(shape=(2, 4, 16, 5)), FLASH),  # padded
        (called(shape=(2, 4, 16, 256)), FLASH),
        (called(keys=(2, 2, 16, 8), grouped=True), FLASH),
        (called(mask=True), EFFICIENT),
        (called(F32), EFFICIENT),
        (called(F32, mask=True, dropout=0.5), EFFICIENT),
        (called(shape=(2, 4, 16, 264)), EFFICIENT),
        (called(values=(2, 4, 16, 16)), EFFICIENT),
        (called(causal=True, keys=(2, 4, 32, 8)), EFFICIENT),
        (called(F64), MATH),
        (called(shape=(4, 16, 8)), MATH),
        (called(F32, shape=(2, 4, 16, 6)), MATH),
        (called(mask=True, shape=(2, 4, 16, 12)), MATH),
        (called(mask=True, keys=(2, 2, 16, 8), grouped=True), MATH),
        (called(F32, keys=(2, 2, 16, 8), grouped=True), MATH),
        (called(keys=(1, 4, 16, 8)), MATH),
        (called(shape=(2, 4, 0, 8)), MATH),
    ],
    ids=lambda each: each.name if isinstance(each, SDPBackend) else f"{each.query.dtype} {list(each.query.shape)}",
)
def test_the_kernel_of_attention(call: Attended, backend: SDPBackend) -> None:
    """sdp_utils.cpp, on a device of compute capability 8.0."""
    assert backend_of(call) == backend


def test_the_kernel_of_attention_is_one_that_the_user_allows() -> None:
    for allowed in (EFFICIENT, CUDNN, MATH):
        with sdpa_kernel(allowed):
            assert backend_of(called()) == allowed
    with sdpa_kernel([MATH, FLASH]):
        assert backend_of(called(F32)) == MATH
    with sdpa_kernel(FLASH), pytest.raises(gp.MemoryRunError, match=r"no kernel for attention of torch.float32 \(2, 4, 16, 8\)"):
        backend_of(called(F32))


BATCH, HEADS, LENGTH, SIZE = 2, 4, 50, 8
ATTENDED = ((BATCH, HEADS, LENGTH, SIZE),) * 3
ROWS = BATCH * HEADS * LENGTH


def test_flash_attention_keeps_a_number_for_each_row() -> None:
    """derivatives.yaml: q, k, v, output, logsumexp, seed and offset: three numbers of 64 bits (flash_api.cpp `mha_fwd`)."""
    forward, backward, held = followed(F.scaled_dot_product_attention, *ATTENDED)
    assert forward.ops[0] == "_scaled_dot_product_flash_attention"
    assert "_scaled_dot_product_flash_attention_backward" in backward.ops
    assert held == ROWS * SIZE * 2 + ROWS * 4 + 3 * 8


def test_memory_efficient_attention_keeps_rows_in_steps_of_32() -> None:
    """attention.cu `_efficient_attention_forward`: `ceil_div(max_seqlen_q, kAlignLSE) * kAlignLSE`."""
    forward, backward, held = followed(F.scaled_dot_product_attention, *ATTENDED, dtype=F32)
    assert forward.ops[0] == "_scaled_dot_product_efficient_attention"
    assert "_scaled_dot_product_efficient_attention_backward" in backward.ops
    assert held == ROWS * SIZE * 4 + BATCH * HEADS * 64 * 4 + 2 * 8


def test_a_mask_of_bools_becomes_one_that_is_added() -> None:
    with cuda_kernels(), FakeTensorMode():
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
        q, k, v = operands(ATTENDED, BF16)
        with Followed() as forward:
            out = F.scaled_dot_product_attention(q, k, v, mask)
        assert "where" in forward.ops and "constant_pad_nd" in forward.ops  # 50 columns are not a multiple of 8
        rows = 64  # in steps of 32
        padded = LENGTH * 56 * 2
        assert forward.held == out.nbytes + BATCH * HEADS * rows * 4 + 2 * 8 + padded


def test_without_a_backward_memory_efficient_attention_keeps_no_sums() -> None:
    with cuda_kernels(), FakeTensorMode(), torch.no_grad():
        q, k, v = operands(ATTENDED, F32)
        with Followed() as forward:
            out = F.scaled_dot_product_attention(q, k, v)
        assert forward.held == out.nbytes


def test_sizes_are_padded_for_flash_attention() -> None:
    forward, _, _ = followed(F.scaled_dot_product_attention, *(((2, 4, 16, 5),) * 3))
    assert forward.ops.count("constant_pad_nd") == 3 and "_scaled_dot_product_flash_attention" in forward.ops


# -- other choices ------------------------------------------------------------------------------------------------------


def test_dropout_keeps_bools() -> None:
    """derivatives.yaml `native_dropout`: result1, which is of bools on CUDA (Dropout.cu `dropout_cuda`)."""
    forward, backward, held = followed(lambda value: F.dropout(value, 0.1), (40, 8))
    assert forward.ops == ["native_dropout"] and "native_dropout_backward" in backward.ops
    assert held == 40 * 8 * (2 + 1)


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_dropout_of_nothing_or_all_has_no_kernel_of_its_own(chance: float) -> None:
    forward, _, _ = followed(lambda value: F.dropout(value, chance), (40, 8))
    assert "native_dropout" not in forward.ops


def test_softmax_reads_halves_and_writes_floats() -> None:
    for function in (F.softmax, F.log_softmax):
        forward, _, held = followed(lambda value, run=function: run(value, -1, dtype=F32), (40, 8), dtype=F16)
        assert "_to_copy" not in forward.ops and held == 40 * 8 * 4
        forward, _, _ = followed(lambda value, run=function: run(value, -1, dtype=F32), (40, 8), dtype=BF16)
        assert forward.ops[0] == "_to_copy"  # of float16 alone


def test_rms_norm_is_one_kernel_that_keeps_a_number_for_each_row() -> None:
    """derivatives.yaml `_fused_rms_norm`: input, weight, rrms."""
    forward, backward, held = followed(lambda value, weight: F.rms_norm(value, (8,), weight), (40, 8), (8,))
    assert forward.ops == ["_fused_rms_norm"] and "_fused_rms_norm_backward" in backward.ops
    assert held == 40 * 8 * 2 + 40 * 4


def test_rms_norm_with_a_weight_of_another_dtype_is_composed() -> None:
    with cuda_kernels(), FakeTensorMode(), Followed() as forward:
        F.rms_norm(torch.ones(4, 8, dtype=BF16), (8,), torch.ones(8))
    assert "_fused_rms_norm" not in forward.ops and "rsqrt" in forward.ops


def test_rms_norm_is_differentiated_as_on_the_cpu() -> None:
    """What it gives back has the shapes and dtypes of what it was given; without a weight, too."""
    with cuda_kernels(), FakeTensorMode():
        value, weight = operands(((4, 3, 8), (8,)), BF16)
        F.rms_norm(value, (8,), weight).sum().backward()
        assert value.grad is not None and weight.grad is not None
        assert (value.grad.shape, weight.grad.shape) == (value.shape, weight.shape)
        alone = torch.ones(4, 8, requires_grad=True)
        F.rms_norm(alone, (8,)).sum().backward()
        assert alone.grad is not None and alone.grad.shape == (4, 8)


# -- autocast -----------------------------------------------------------------------------------------------------------


def is_by_name(op: str) -> bool:
    """Whether dims are given by their names, which torch before 2.13 has. No fake tensor has names: `aten.ones.names` raises."""
    return "dimname" in op.lower() or ".names_" in op


def listed(name: str) -> set[str]:
    """The ops of one of the lists in the header of the torch that is installed."""
    header = (Path(torch.__file__).parent / "include/ATen/autocast_mode.h").read_text()
    body = re.search(rf"#define {name}\(_\)(.*?)\n\n", header, re.DOTALL)
    assert body is not None
    found = re.findall(r'_\((?:ADD_NS\()?(\w+)(?:\),[\s\\]*"([\w.]+)"|, (\w+))?', body.group(1))
    named = {full or f"{name}.{overload}".rstrip(".") for name, full, overload in found}
    return {each for each in named if not is_by_name(each)}


def also_on_the_cpu(names: set[str]) -> set[str]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in names if has(f"aten::{name}", "AutocastCPU")}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cuda_autocast.FLOAT32, "AT_FORALL_FP32"),
        (cuda_autocast.FLOAT32_OUT, "AT_FORALL_FP32_SET_OPT_DTYPE"),
        (cuda_autocast.FLOAT32_NORM, "AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE"),
        (cuda_autocast.WIDEST, "AT_FORALL_PROMOTE"),
        (cuda_autocast.LOWER_PRECISION, "AT_FORALL_LOWER_PRECISION_FP"),
    ],
)
def test_the_lists_of_autocast_are_torchs(ours: Any, theirs: str) -> None:
    """Each op is in the list that torch has it in; of the lower precision, what the CPU converts too is left to torch."""
    both = also_on_the_cpu(listed(theirs)) if theirs == "AT_FORALL_LOWER_PRECISION_FP" else set()
    assert {name for name in ours if name in cuda_autocast.AUTOCAST} == listed(theirs) - both


def test_all_that_autocast_converts_on_cuda_is_known() -> None:
    """By torch's table of kernels: what the lists do not name is converted alike on both, or has no CPU."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = {each.removeprefix("aten::") for each in torch._C._dispatch_get_all_op_names() if each.startswith("aten::")}
    on_cuda = {name for name in names if has(f"aten::{name}", "AutocastCUDA") and not is_by_name(name)}
    missing = on_cuda - set(cuda_autocast.AUTOCAST) - listed("AT_FORALL_LOWER_PRECISION_FP")
    in_builds_with_cudnn = {"_cudnn_rnn"}
    assert missing - in_builds_with_cudnn == {"binary_cross_entropy", "cudnn_convolution", "cudnn_convolution_transpose"}


@pytest.mark.parametrize(
    ("step", "op", "dtype"),
    [
        (lambda value: F.softmax(value @ value, -1), "_softmax", F32),
        (lambda value: F.layer_norm(value @ value, (8,)), "native_layer_norm", F32),
        (lambda value: (value @ value).sum(), "sum", F32),
        (lambda value: (value @ value) ** 2, "pow", F32),
        (lambda value: (value @ value).exp(), "exp", F32),
        (lambda value: (value @ value).norm(), "linalg_vector_norm", F32),
        (lambda value: F.cross_entropy(value @ value, torch.zeros(8, dtype=torch.int64)), "_log_softmax", BF16),
        (lambda value: F.cross_entropy(value @ value, torch.zeros(8, dtype=torch.int64)), "nll_loss_forward", F32),
        (lambda value: F.mse_loss(value @ value, torch.ones(8, 8)), "mse_loss", F32),
        (lambda value: torch.mv(value, value[0]), "mv", BF16),
        (lambda value: torch.addcmul(value, value @ value, value), "addcmul", F32),
        (lambda value: F.gelu(value @ value), "gelu", BF16),
        (lambda value: F.max_pool2d((value @ value)[None], 2), "max_pool2d_with_indices", BF16),
        (lambda value: (value @ value).sum(dtype=BF16), "sum", BF16),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_autocast_converts_as_on_cuda(step: Step, op: str, dtype: torch.dtype) -> None:
    with cuda_kernels(), FakeTensorMode():
        value = torch.ones(8, 8)
        with torch.autocast("cpu", BF16), Followed() as forward:
            step(value)
    assert dict(zip(forward.ops, forward.dtypes, strict=True))[op] == dtype


def test_weights_are_converted_once() -> None:
    with cuda_kernels(), FakeTensorMode():
        layer, value = nn.Linear(8, 8), torch.ones(4, 8)
        with torch.autocast("cpu", BF16), Followed() as forward:
            layer(layer(value))
    assert forward.ops.count("_to_copy") == 3  # weight, bias, input


# -- nobody else is touched ---------------------------------------------------------------------------------------------


def test_real_tensors_meet_no_change() -> None:
    q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
    before = F.scaled_dot_product_attention(q, k, v), F.softmax(q.half(), -1, dtype=F32)
    with cuda_kernels():
        torch.manual_seed(0)
        inside = F.scaled_dot_product_attention(q, k, v), F.softmax(q.half(), -1, dtype=F32)
        dropped = F.dropout(torch.ones(1000), 0.5)
    torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(before, inside, strict=True))
    assert torch.equal(dropped, F.dropout(torch.ones(1000), 0.5))


def test_nor_does_autocast_of_real_tensors() -> None:
    """Of ops that both convert otherwise, that only one converts, and that are composed of converted ones."""
    q = torch.randn(8, 8)
    steps: list[Step] = [
        *(lambda: F.softmax(q @ q, -1), lambda: F.layer_norm(q @ q, (8,)), lambda: torch.mv(q, q[0]), lambda: (q @ q).norm()),
        *(lambda: torch.einsum("ab,bc->ac", q, q), lambda: F.max_pool2d((q @ q)[None], 2), lambda: (q @ q).cumsum(0)),
        *(lambda: F.mse_loss(q @ q, q), lambda: torch.addcmul(q, q @ q, q), lambda: F.avg_pool2d((q @ q)[None], 2)),
    ]

    def found() -> list[torch.Tensor]:
        with torch.autocast("cpu", BF16):
            return [step() for step in steps]

    before = found()
    with cuda_kernels():
        inside = found()
    assert all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(before, inside, strict=True))


def test_another_threads_tensors_neither() -> None:
    found: list[list[str]] = []

    def drop() -> None:
        with Followed() as mode:
            F.dropout(torch.ones(100), 0.5)
        found.append(mode.ops)

    with cuda_kernels(), FakeTensorMode():
        thread = threading.Thread(target=drop)
        thread.start()
        thread.join()
    assert "native_dropout" not in found[0] and "bernoulli_" in found[0]


def test_kernels_are_as_they_were_afterwards() -> None:
    def table() -> list[str]:
        return [torch._C._dispatch_dump_table(f"aten::{name}") for name in (*CHOICES, *cuda_autocast.AUTOCAST)]

    before = table()
    with pytest.raises(ZeroDivisionError), cuda_kernels():
        assert table() != before
        _ = 1 / 0
    assert table() == before


# -- what kernels take --------------------------------------------------------------------------------------------------


def flash_backward(
    query: tuple[int, ...], keys: tuple[int, ...], device: str = "cpu", contiguous: bool = True
) -> tuple[Any, ...]:
    """The arguments of flash attention's backward, laid out [batch, length, heads, size] in memory."""

    def made(shape: tuple[int, ...]) -> torch.Tensor:
        if not contiguous:
            return torch.ones(shape, dtype=BF16, device=device)
        batch, heads, length, size = shape
        return torch.ones(batch, length, heads, size, dtype=BF16, device=device).transpose(1, 2)

    q, k, v, gradient = made(query), made(keys), made(keys), made(query)
    sums = torch.ones(query[:3], device=device)
    seed, offset = (torch.zeros(size, dtype=torch.uint64, device=device) for size in ((2,), ()))
    return gradient, q, k, v, made(query), sums, None, None, query[2], keys[2], 0.0, True, seed, offset


def embedded(tokens: int, words: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    gradient = torch.ones(tokens, width, dtype=dtype, device=device)
    return gradient, torch.zeros(tokens, dtype=torch.int64, device=device), words, -1, False


CALLS: dict[str, tuple[Any, Callable[[str], tuple[Any, ...]], int]] = {
    "flash attention": (
        aten._scaled_dot_product_flash_attention_backward.default,
        lambda device: flash_backward((2, 4, 200, 72), (2, 4, 200, 72), device),
        2 * 4 * 256 * (96 + 1) * 4,
    ),
    "flash attention, large": (
        aten._scaled_dot_product_flash_attention_backward.default,
        lambda device: flash_backward((2, 4, 128, 200), (2, 4, 128, 200), device),
        2 * 4 * 128 * (256 + 1) * 4,
    ),
    "flash attention, keys shared": (
        aten._scaled_dot_product_flash_attention_backward.default,
        lambda device: flash_backward((2, 4, 128, 64), (2, 2, 128, 64), device),
        2 * 4 * 128 * (64 + 1) * 4 + 2 * 2 * 4 * 128 * 64 * 2,
    ),
    "flash attention, copied": (
        aten._scaled_dot_product_flash_attention_backward.default,
        lambda device: flash_backward((2, 4, 128, 64), (2, 4, 128, 64), device, contiguous=False),
        2 * 4 * 128 * (64 + 1) * 4 + 2 * 2 * 4 * 128 * 64 * 2,
    ),
    "embedding, unsorted": (
        aten.embedding_dense_backward.default,
        lambda device: embedded(3072, 500, 64, BF16, device),
        0,
    ),
    "embedding, few words": (
        aten.embedding_dense_backward.default,
        lambda device: embedded(4000, 3000, 64, BF16, device),
        8 * (3 * 4000 + 2 * 3000 + 3400) + 3400 * 64 * 4,
    ),
    "embedding, many words": (
        aten.embedding_dense_backward.default,
        lambda device: embedded(4000, 50_000, 64, F32, device),
        8 * (3 * 4000 + 2 * 4000 + 4400) + 4400 * 64 * 4,
    ),
    "norms": (
        aten._foreach_norm.Scalar,
        lambda device: ([torch.ones(70_000, device=device), torch.ones(5, device=device)], 2.0),
        2 * 2 * 4,
    ),
    "an expanded operand": (
        aten.mm.default,
        lambda device: (torch.ones(1, 1, device=device).expand(50, 70), torch.ones(70, 90, device=device)),
        50 * 70 * 4,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_a_kernel_takes(name: str) -> None:
    """Sizes as torch's sources say them, written out."""
    op, arguments, nbytes = CALLS[name]
    with FakeTensorMode():
        args = arguments("cpu")
        assert cuda_scratch_bytes(op, args, op(*args)) == nbytes


def test_memory_efficient_attentions_backward_takes_sums_and_products() -> None:
    def taken(dtype: torch.dtype) -> int:
        q = torch.ones(ATTENDED[0], dtype=dtype)
        return cuda_scratch_bytes(aten._scaled_dot_product_efficient_attention_backward.default, (q, q, q, q, None, q), None)

    assert taken(BF16) == ROWS * 4 and taken(F32) == ROWS * 4 + ROWS * SIZE * 4


# -- the table itself ---------------------------------------------------------------------------------------------------


def entries() -> Iterator[tuple[str, Any]]:
    yield from CHOICES.items()
    yield from ((str(op), entry) for op, entry in TABLE.items() if inspect.isfunction(entry) and entry.__name__ != "<lambda>")


@pytest.mark.parametrize(("name", "entry"), list(entries()), ids=lambda each: each if isinstance(each, str) else "")
def test_every_entry_says_its_source(name: str, entry: Any) -> None:
    assert re.search(r"\w+\.(cpp|cu|cuh|h|yaml)\b", inspect.getdoc(entry) or ""), f"{name} has no source"


def test_what_is_left_out_is_of_ops_that_there_are() -> None:
    for name in (name for known in LEFT_OUT.values() for name in known):
        assert hasattr(aten, name), name


# -- a whole step -------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention with dropout, a norm, and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.RMSNorm(64), nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, value: torch.Tensor) -> Any:
        q, k, v = self.qkv(self.norm(value)).view(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 32, 64)
        return value + F.dropout(self.out(attended), 0.1)


def test_a_step_for_cuda_keeps_what_cuda_keeps() -> None:
    plan = gp.trace(Layer).cast(BF16)
    training = gp.Training("sgd", inputs=(torch.ones(2, 32, 64, dtype=BF16),))
    on_cuda, on_cpu = (each.memory(training, tier="T1").run for each in (plan.to("cuda"), plan))
    assert on_cuda is not None and on_cpu is not None
    ops = {each.op for each in on_cuda.allocations}
    assert {"_scaled_dot_product_flash_attention", "native_dropout", "_fused_rms_norm"} <= ops
    assert "bernoulli_" not in ops and "_scaled_dot_product_flash_attention_for_cpu" not in ops
    assert on_cuda.by_kind(STEP, "cuda:0")["activation"] < on_cpu.by_kind(STEP, "cpu")["activation"]


# -- on a GPU -----------------------------------------------------------------------------------------------------------


def requested(name: str) -> int:
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{name}"])


def held_on_gpu(step: Step, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype) -> int:
    """The bytes that are there after the forward and were not before."""
    values = operands(shapes, dtype, "cuda")
    step(*values)  # workspaces
    before = requested("current")
    out = step(*values)
    found = requested("current") - before
    del out
    return found


HELD: dict[str, tuple[Step, tuple[tuple[int, ...], ...], torch.dtype]] = {
    "flash attention": (F.scaled_dot_product_attention, ATTENDED, BF16),
    "memory-efficient attention": (F.scaled_dot_product_attention, ATTENDED, F32),
    "attention of plain operations": (F.scaled_dot_product_attention, ATTENDED, F64),
    "dropout": (lambda value: F.dropout(value, 0.1), ((40, 8),), BF16),
    "softmax of halves": (lambda value: F.softmax(value, -1, dtype=F32), ((40, 8),), F16),
    "rms norm": (lambda value, weight: F.rms_norm(value, (8,), weight), ((40, 8), (8,)), BF16),
    "layer norm": (lambda value: F.layer_norm(value, (8,)), ((40, 8),), BF16),
}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", HELD)
def test_what_is_kept_is_what_a_gpu_keeps(name: str) -> None:
    step, shapes, dtype = HELD[name]
    if name == "flash attention":
        with sdpa_kernel(FLASH):
            real = held_on_gpu(step, shapes, dtype)
    else:
        real = held_on_gpu(step, shapes, dtype)
    assert followed(step, *shapes, dtype=dtype)[2] == real


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_what_a_kernel_takes_is_what_it_takes_on_a_gpu(name: str) -> None:
    op, arguments, nbytes = CALLS[name]
    args = arguments("cuda")
    op(*args)
    before = requested("current")
    torch.cuda.reset_peak_memory_stats()
    out = op(*args)
    results = sum(each.nbytes for each in tree_leaves(out) if isinstance(each, torch.Tensor))
    assert requested("peak") - before - results == nbytes


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("function", [lambda value: F.softmax(value @ value, -1), lambda value: (value @ value) ** 2])
def test_autocast_keeps_what_it_keeps_on_a_gpu(function: Step) -> None:
    def under(device: str) -> Step:
        def step(value: torch.Tensor) -> Any:
            with torch.autocast(device, BF16):
                return function(value)

        return step

    real = held_on_gpu(under("cuda"), ((64, 64),), F32)
    assert followed(under("cpu"), (64, 64), dtype=F32)[2] == real
