"""What a process holds beside its tensors: CUDA context, workspaces, communicators, itself. Bytes, each with its source.

Ranges, not measurements of your machine: what is known only roughly has `low` and `high` apart. What goes through the caching
allocator (`cached`) is part of its reserved bytes, so replay it as an allocation; the rest is `Device.taken`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .allocator_config import MIB, AllocatorError

KIB = 2**10


@dataclass(frozen=True, slots=True)
class Overhead:
    """From `low` to `high` bytes for each `per`, by `source`; `cached`: handed out by the caching allocator."""

    low: int
    high: int
    per: str
    cached: bool
    source: str


CUBLAS_WORKSPACE = 2 * 4096 * KIB + 8 * 16 * KIB
"""`:4096:2:16:8`: 8.125 MiB."""

CUBLAS_WORKSPACE_HOPPER = 8 * 4096 * KIB
"""32 MiB."""

NCCL_SIMPLE = 4 * MIB
NCCL_LL = 8 * 512 * 8 * 16
NCCL_LL128 = 120 * 640 * 8 * 8
"""The buffers of one NCCL connection, one for each protocol."""

OVERHEADS: Mapping[str, Overhead] = MappingProxyType(
    {
        "cuda context": Overhead(
            low=300 * 10**6,
            high=10**9,
            per="process and device",
            cached=False,
            source=(
                "reports, so rough: about 300 MB since CUDA 11.7 loads kernels as they are used, and over 1 GB with all of them, "
                "which that comes to at most (pytorch/pytorch#107667, 2023); 300 to 400 MB (pytorch/pytorch#20532, 2019); 426 "
                "MiB with none (RTX 6000 Ada, torch 2.10, unslothai/unsloth-zoo#1053)"
            ),
        ),
        "cublas workspace": Overhead(
            low=CUBLAS_WORKSPACE,
            high=CUBLAS_WORKSPACE,
            per="cuBLAS handle and stream, from the first matrix product on",
            cached=True,
            source="aten/src/ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize; CUBLAS_WORKSPACE_CONFIG changes it",
        ),
        "cublas workspace, compute capability 9": Overhead(
            low=CUBLAS_WORKSPACE_HOPPER,
            high=CUBLAS_WORKSPACE_HOPPER,
            per="cuBLAS handle and stream, from the first matrix product on",
            cached=True,
            source="the same function: 4096 * 8 * 1024 for Hopper",
        ),
        "cublas workspace, compute capability 10 and 12": Overhead(
            low=CUBLAS_WORKSPACE,
            high=CUBLAS_WORKSPACE_HOPPER,
            per="cuBLAS handle and stream, from the first matrix product on",
            cached=True,
            source="the same function: Blackwell counts as Hopper in its later versions, not in its earlier ones",
        ),
        "cublaslt workspace": Overhead(
            low=0,
            high=1024 * KIB,
            per="cuBLASLt handle and stream",
            cached=True,
            source=(
                "the same file, parseCUDABlasLtWorkspaceSize: none of its own while it shares cuBLAS's "
                "(TORCH_CUBLASLT_UNIFIED_WORKSPACE), else 1024 KiB; CUBLASLT_WORKSPACE_SIZE changes it"
            ),
        ),
        "nccl connection": Overhead(
            low=NCCL_SIMPLE + NCCL_LL + NCCL_LL128,
            high=10 * MIB,
            per="channel, peer and direction of a communicator",
            cached=False,
            source=(
                "NCCL src/init.cc, computeBuffSizes: DEFAULT_BUFFSIZE, DEFAULT_LL_BUFFSIZE, DEFAULT_LL128_BUFFSIZE, by the "
                "counts in src/include/device.h; in pages of 2 MiB these are the 10485760 bytes of a buffer in NVIDIA/nccl#1685"
            ),
        ),
        "nccl communicator": Overhead(
            low=688 * 10**6,
            high=1_600_000_000,
            per="communicator",
            cached=False,
            source=(
                "reports: 688 MB on four A100 with NVLink (NVIDIA/nccl#964); 1.6 GB for one, about 6 GB for three or more "
                "(NVIDIA/nccl#864)"
            ),
        ),
        "host process": Overhead(
            low=265 * 10**6,
            high=500 * 10**6,
            per="process, in host memory",
            cached=False,
            source="264 MB resident after `import groundplan` and a small build (measured, torch 2.13 for the CPU), doubled",
        ),
        "host process, torch for cuda": Overhead(
            low=275 * 10**6,
            high=550 * 10**6,
            per="process with a torch that was built for CUDA, in host memory, whether it uses CUDA or not",
            cached=False,
            source="540 MB resident in place of 266 MB (measured, torch 2.11 for CUDA 13.0, 2.13 for the CPU), doubled",
        ),
        "host process, torch.distributed": Overhead(
            low=46 * 10**6,
            high=100 * 10**6,
            per="process of several ranks, in host memory",
            cached=False,
            source="46 MB more resident with torch.distributed, DTensor and FSDP2 imported (measured, torch 2.13 for the CPU)",
        ),
        "host process, transformers": Overhead(
            low=115 * 10**6,
            high=250 * 10**6,
            per="process that builds a transformers model, in host memory, besides torch.distributed, which it imports",
            cached=False,
            source="111 to 122 MB more resident with a Llama or BERT imported and traced (measured, transformers 5.24)",
        ),
        "host process with cuda": Overhead(
            low=265 * 10**6,
            high=2 * 10**9,
            per="process that uses CUDA, in host memory",
            cached=False,
            source="1,904,088 kB resident at most (pytorch/pytorch#12873)",
        ),
    }
)


def cublas_workspace(capability: tuple[int, int], setting: str | None = None) -> Overhead:
    """The cuBLAS workspace on a device of this compute capability, or under a `CUBLAS_WORKSPACE_CONFIG`.

    Raises `AllocatorError` for a setting without `:KiB:count`, of which torch would only warn, and take its default.

    >>> cublas_workspace((9, 0)).high // 2**20, cublas_workspace((8, 0), ":4096:8").high // 2**20
    (32, 32)
    """
    if setting is not None:
        parts = re.findall(r":(\d+):(\d+)", setting)
        if not parts:
            raise AllocatorError(f"CUBLAS_WORKSPACE_CONFIG={setting} has no :KiB:count, such as :4096:8")
        nbytes = sum(int(size) * KIB * int(count) for size, count in parts)
        default = OVERHEADS["cublas workspace"]
        return Overhead(nbytes, nbytes, default.per, default.cached, f"CUBLAS_WORKSPACE_CONFIG={setting}")
    major = {9: "cublas workspace, compute capability 9"}
    major |= dict.fromkeys((10, 12), "cublas workspace, compute capability 10 and 12")
    return OVERHEADS[major.get(capability[0], "cublas workspace")]
