"""Loading a checkpoint: groundplan's reader next to safetensors', whole modules next to `from_pretrained`, and a rank's part.

The checkpoint is a Llama-3.2-1B with as many layers as make 3 GB in bfloat16; it is written to a temporary folder as one file,
in shards with an index, and by `torch.save`. Every measurement is a process of its own, the sides alternate, and ratios are the
medians of neighboring runs' (above 1: groundplan is faster). `digest` is of every value that a side has read.

1. `reader`: every tensor into `torch.empty` that nobody has written to. The other side is `safetensors.torch.load_file` and a
   copy. The file is in the page cache.
2. `module`: from the folder to a module. Imports and the model's first construction are done before, on both sides.
3. `cold`: the file is dropped from the page cache before. The other side reads it plainly, into the same 16 MB again and again.
4. `rank`: what one FSDP2 rank of N, or one with a share of the columns, reads of the file, next to its share. Counted by the
   kernel (`rchar`), headers and all.

Peaks are the growth of anonymous memory, sampled each millisecond; mapped file pages (`file MB`) are the page cache's own, and
are listed apart. `holds` of a peak is: no more than the final bytes and 200 MB.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import mmap
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import Build, Result, _status, megabytes, members, print_table, published, run_child, tensor_bytes
from torch import nn

LAYERS = 21
RANKS = (2, 8, 64)
DTYPES = {"as saved": None, "to float32": torch.float32, "to bfloat16": torch.bfloat16}
PIECE = 16 * 2**20


# -- the checkpoint -----------------------------------------------------------------------------------------------------


def model(layers: int) -> Build:
    return published("llama-3.2-1b", num_hidden_layers=layers)


def write(folder: Path, layers: int, form: str) -> None:
    """A checkpoint with random values: `one` file, `shards` with an index, one file in `float32`, or one of `torch.save`."""
    import groundplan as gp

    plan = gp.trace(model(layers))
    module = (plan if form == "float32" else plan.cast(torch.bfloat16)).materialize(seed=0, progress=False)
    if form == "torch":
        folder.mkdir()
        torch.save(module.state_dict(), folder / "pytorch_model.bin")
    else:
        module.save_pretrained(folder, max_shard_size="500MB" if form == "shards" else "100GB")
    for file in folder.iterdir():
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())  # what is not on the disk cannot be dropped from the page cache


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin")]


def read_plainly(folder: Path) -> None:
    memory = memoryview(bytearray(PIECE))
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def drop(folder: Path) -> None:
    for path in files_of(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(folder: Path) -> float:
    """Which part of the files is in the page cache."""
    pages = found = 0
    for path in files_of(folder):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
            count = -(-len(mapped) // mmap.PAGESIZE)
            there = (ctypes.c_ubyte * count)()
            first = ctypes.c_char.from_buffer(mapped)
            ctypes.CDLL(None).mincore(ctypes.byref(first), ctypes.c_size_t(len(mapped)), there)
            del first
            pages, found = pages + count, found + sum(each & 1 for each in bytes(there))
    return found / pages


# -- one measurement ----------------------------------------------------------------------------------------------------


@contextmanager
def watched(result: Result) -> Iterator[None]:
    """Note seconds, what was read, and how far anonymous memory rose; the pages of files at their most."""
    most, over = {"RssAnon": 0, "RssFile": 0}, threading.Event()

    def sample() -> None:
        while not over.wait(0.001):
            for field in most:
                most[field] = max(most[field], _status(field))

    before, io = {field: _status(field) for field in most}, read_so_far()
    thread = threading.Thread(target=sample, daemon=True)
    if result.pop("peaks"):
        thread.start()
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    result.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
    over.set()
    if thread.is_alive():
        thread.join()
    after = read_so_far()
    result.update({key: after[key] - io[key] for key in io})
    result.update(peak=most["RssAnon"] - before["RssAnon"], file_peak=most["RssFile"] - before["RssFile"])


def read_so_far() -> Result:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"rchar": int(lines["rchar"]), "from_disk": int(lines["read_bytes"])}


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def with_groundplan(folder: Path, dtype: torch.dtype | None, threads: int) -> dict[str, torch.Tensor]:
    from groundplan.runtime.boxes import whole_box
    from groundplan.runtime.checkpoint import open_checkpoint
    from groundplan.runtime.loading import Read, read_all
    from groundplan.runtime.workers import Workers

    with open_checkpoint(folder) as checkpoint, Workers(threads) as workers:
        out = {name: torch.empty(each.shape, dtype=dtype or each.dtype) for name, each in checkpoint.entries.items()}
        reads = [Read(each, whole_box(each.shape), out[name]) for name, each in checkpoint.entries.items()]
        read_all(reads, checkpoint, workers)
    return out


def with_safetensors(folder: Path, dtype: torch.dtype | None, _threads: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    out = {}
    for path in files_of(folder):
        for name, tensor in load_file(path).items():
            out[name] = torch.empty(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)
    return out


def plainly(folder: Path, _dtype: torch.dtype | None, _threads: int) -> dict[str, torch.Tensor]:
    read_plainly(folder)
    return {}


READERS = {"groundplan": with_groundplan, "safetensors": with_safetensors, "plain": plainly}


def reader(side: str, folder: Path, threads: int, dtype: str, layers: int) -> Result:
    """Read every tensor of a checkpoint into new memory."""
    import safetensors.torch  # noqa: F401

    import groundplan.runtime.loading  # noqa: F401

    result: Result = {"cached": cached(folder), "peaks": side == "groundplan" and dtype.endswith("!")}
    with watched(result):
        tensors = READERS[side](folder, DTYPES[dtype.removesuffix("!")], threads)
    return result | {"bytes": tensor_bytes(list(tensors.values())), "digest": digest_of(tensors)}


def with_plan(folder: Path, build: Build, threads: int) -> nn.Module:
    import groundplan as gp

    with in_bfloat16():
        return gp.trace(build).materialize(checkpoint=folder, threads=threads, progress=False)


def from_pretrained(folder: Path, _build: Build, _threads: int) -> nn.Module:
    """The weights stay mapped: nothing is read before it is used."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def pretrained_and_written(folder: Path, build: Build, threads: int) -> nn.Module:
    """The same until every weight lies in memory of its own, as after a training step: the others' do already."""
    module = from_pretrained(folder, build, threads)
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.mul_(1)
    return module


def made_and_copied(folder: Path, build: Build, _threads: int) -> nn.Module:
    """The usual way: the module is made, its values are drawn, and written over by `torch.load(mmap=True)`."""
    with in_bfloat16():
        module = build()
    module.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True))
    return module


def made_empty(folder: Path, build: Build, _threads: int) -> nn.Module:
    """The same without drawing, as in Lightning Fabric's `init_module(empty_init=True)`."""
    from transformers.initialization import no_init_weights

    with in_bfloat16(), no_init_weights(), skipped_init():
        module = build()
    module.tie_weights()
    module.load_state_dict(torch.load(folder / "pytorch_model.bin", weights_only=True, mmap=True))
    return module


@contextmanager
def in_bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def skipped_init() -> Iterator[None]:
    names = ("kaiming_uniform_", "uniform_", "normal_")
    before = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


MODULES: dict[str, Callable[[Path, Build, int], nn.Module]] = {
    "groundplan": with_plan,
    "from_pretrained": from_pretrained,
    "from_pretrained, then written to": pretrained_and_written,
    "torch.load": made_and_copied,
    "torch.load, empty": made_empty,
}


def module(side: str, folder: Path, threads: int, _dtype: str, layers: int) -> Result:
    """From a folder to a module, after a little model has been loaded the same way."""
    import groundplan as gp

    small = model(1)
    with torch.device("meta"):
        small()
    with tempfile.TemporaryDirectory() as name:
        gp.trace(torch.nn.Linear, 2, 2).materialize(checkpoint=nn.Linear(2, 2).state_dict(), progress=False)
        torch.save({}, Path(name) / "warm.bin")
        torch.load(Path(name) / "warm.bin", weights_only=True, mmap=True)
    import transformers.modeling_utils  # noqa: F401

    result: Result = {"cached": cached(folder), "peaks": False}
    with watched(result):
        built = MODULES[side](folder, model(layers), threads)
    tensors = dict(built.named_parameters())
    return result | {"bytes": tensor_bytes(list(members(built).values())), "digest": digest_of(tensors)}


def rank(side: str, folder: Path, _threads: int, _dtype: str, layers: int) -> Result:
    """What the rank in the middle reads, under FSDP2 of so many ranks or with a share of the columns of every matrix."""
    from shards import others_imagined, sharded
    from torch.distributed.tensor import DTensor

    import groundplan as gp

    kind, count = side.split()
    with in_bfloat16():
        plan = gp.trace(model(layers))
    built = sharded(plan, int(count)) if kind == "FSDP2" else in_columns(plan, int(count))
    result: Result = {"peaks": False}  # sampling them reads from /proc, which counts
    with others_imagined(int(count), {}), watched(result):
        gp.materialize(built, checkpoint=folder, threads=2)
    held = [each.to_local() if isinstance(each, DTensor) else each for each in built.parameters()]
    return result | {"bytes": tensor_bytes(held), "digest": ""}


def in_columns(plan: Any, count: int) -> nn.Module:
    """The meta module of the middle rank of `count`, every matrix divided along its last dim."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=count // 2, world_size=count, store=FakeStore())
    mesh, built, made = init_device_mesh("cpu", (count,)), plan.meta_module(), {}
    for owner in list(built.modules()):
        for name, tensor in owner.named_parameters(recurse=False):
            if tensor not in made:
                made[tensor] = nn.Parameter(distribute_tensor(tensor, mesh, [Shard(tensor.dim() - 1)]))
            owner.register_parameter(name, made[tensor])
    return built


CHILDREN = {"reader": reader, "module": module, "rank": rank}


# -- the tables ---------------------------------------------------------------------------------------------------------


class Files:
    """The checkpoints, each made when it is first asked for, one at a time: 3 GB are much for a page cache."""

    def __init__(self, root: Path, layers: int) -> None:
        self._root, self._layers = root, layers

    def folder(self, form: str) -> Path:
        folder = self._root / form
        if not folder.exists():
            if os.fork() == 0:
                write(folder, self._layers, form)
                os._exit(0)
            if os.wait()[1]:
                raise SystemExit(f"writing {folder} failed")
        return folder

    def remove(self, form: str) -> None:
        shutil.rmtree(self._root / form, ignore_errors=True)


def rounds_of(
    kind: str, sides: Sequence[str], folders: Sequence[Path], threads: int, dtype: str, options: Any, cold: bool = False
) -> list[dict[str, Result]]:
    """`repeats` rounds with one child per side; every other round in the opposite order."""
    found = []
    for turn in range(options.repeats):
        one: dict[str, Result] = {}
        for side, folder in list(zip(sides, folders, strict=True))[:: 1 if turn % 2 == 0 else -1]:
            drop(folder) if cold else read_plainly(folder)
            one[side] = run_child(kind, side, str(folder), str(threads), dtype, str(options.layers))
        found.append(one)
    return found


def ratio(rounds: Sequence[dict[str, Result]], other: str, key: str = "seconds") -> float:
    return round(statistics.median(each[other][key] / each["groundplan"][key] for each in rounds), 2)


def middle(rounds: Sequence[dict[str, Result]], side: str, key: str) -> Any:
    return statistics.median(each[side][key] for each in rounds)


def reader_row(files: Files, form: str, threads: int, dtype: str, options: Any) -> Result:
    folder, other = files.folder(form), "safetensors"
    rounds = rounds_of("reader", ("groundplan", other), (folder, folder), threads, dtype, options)
    return {
        "file": form,
        "dtype": dtype,
        "threads": threads,
        "groundplan s": middle(rounds, "groundplan", "seconds"),
        "safetensors s": middle(rounds, other, "seconds"),
        "speed-up": ratio(rounds, other),
        "CPU speed-up": ratio(rounds, other, "cpu_seconds"),
        "same values": len({each["digest"] for one in rounds for each in one.values()}) == 1,
    }


def peak_row(files: Files, form: str, dtype: str, options: Any) -> Result:
    one = run_child("reader", "groundplan", str(files.folder(form)), "2", f"{dtype}!", str(options.layers))
    return {
        "file": form,
        "dtype": dtype,
        "final MB": megabytes(one["bytes"]),
        "peak MB": megabytes(one["peak"]),
        "file MB": megabytes(one["file_peak"]),
        "holds": one["peak"] <= one["bytes"] + 200e6,
    }


def module_rows(files: Files, threads: int, options: Any) -> list[Result]:
    one, torchs = files.folder("one"), files.folder("torch")
    pairs = (
        ("from_pretrained", one),
        ("from_pretrained, then written to", one),
        ("torch.load", torchs),
        ("torch.load, empty", torchs),
    )
    return [module_row(other, folder, threads, options) for other, folder in pairs]


def module_row(other: str, folder: Path, threads: int, options: Any) -> Result:
    rounds = rounds_of("module", ("groundplan", other), (folder, folder), threads, "as saved", options)
    return {
        "next to": other,
        "threads": threads,
        "groundplan s": middle(rounds, "groundplan", "seconds"),
        "other s": middle(rounds, other, "seconds"),
        "speed-up": ratio(rounds, other),
        "CPU speed-up": ratio(rounds, other, "cpu_seconds"),
        "same values": len({each["digest"] for one in rounds for each in one.values()}) == 1,
    }


def cold_row(files: Files, form: str, threads: int, options: Any) -> Result:
    folder = files.folder(form)
    rounds = rounds_of("reader", ("groundplan", "plain"), (folder, folder), threads, "as saved", options, cold=True)
    ones = [each for one in rounds for each in one.values()]
    size = sum(path.stat().st_size for path in files_of(folder))
    return {
        "file": form,
        "threads": threads,
        "groundplan s": middle(rounds, "groundplan", "seconds"),
        "plain s": middle(rounds, "plain", "seconds"),
        "speed-up": ratio(rounds, "plain"),
        "in the cache before": max(each["cached"] for each in ones),
        "read from disk": round(min(each["from_disk"] for each in ones) / size, 3),
        "was cold": all(each["cached"] < 0.01 and each["from_disk"] > 0.99 * size for each in ones),
    }


def rank_row(files: Files, side: str, options: Any) -> Result:
    one = run_child("rank", side, str(files.folder("one")), "2", "as saved", str(options.layers))
    return {
        "rank": f"{side.split()[0]}, 1 of {side.split()[1]}",
        "share MB": megabytes(one["bytes"]),
        "read MB": megabytes(one["rchar"]),
        "of share": round(one["rchar"] / one["bytes"], 4),
        "holds": one["rchar"] <= 1.05 * one["bytes"],
    }


def tables(options: Any, root: Path) -> dict[str, list[Result]]:
    files, found = Files(root, options.layers), {}
    counts = sorted({1, torch.get_num_threads()})
    if "reader" in options.only:
        rows = [reader_row(files, form, threads, "as saved", options) for form in ("one", "shards") for threads in counts]
        found["reader"] = [*rows, *[reader_row(files, "one", threads, "to float32", options) for threads in counts]]
    files.remove("shards")
    if "rank" in options.only:
        found["rank"] = [rank_row(files, side, options) for side in (*[f"FSDP2 {count}" for count in RANKS], "columns 8")]
    if "cold" in options.only:
        found["cold"] = [cold_row(files, "one", threads, options) for threads in counts]
    if "module" in options.only:
        found["module"] = [row for threads in counts for row in module_rows(files, threads, options)]
    files.remove("torch")
    if "peak" in options.only:
        found["peak"] = [peak_row(files, "one", dtype, options) for dtype in ("as saved", "to float32")]
        files.remove("one")
        found["peak"].append(peak_row(files, "float32", "to bfloat16", options))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model; 21 make 3 GB")
    parser.add_argument("--only", nargs="+", default=("reader", "module", "cold", "rank", "peak"), metavar="TABLE")
    parser.add_argument("--folder", help="where the checkpoints are written; the system's temporary folder otherwise")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, side, folder, threads, dtype, layers = options.child
        torch.set_num_threads(int(threads))
        print(json.dumps(CHILDREN[kind](side, Path(folder), int(threads), dtype, int(layers))))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        found = tables(options, Path(root))
    for rows in found.values():
        print_table(rows, options.markdown)
        print()
    print(json.dumps({"benchmark": Path(__file__).stem, "torch": torch.__version__, "repeats": options.repeats} | found))


if __name__ == "__main__":
    main()
