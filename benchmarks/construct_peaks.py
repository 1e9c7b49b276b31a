"""Predicted and measured peaks of whole processes: building, building a rank's part, and reading checkpoints.

Every row is a process of its own (every rank of a sharded one is). `measured` is its peak of resident memory, all that Python,
torch and the model's library take included. `predicted` is the phase's tensors by `plan.memory()`, tier T0, and what a process
holds besides by the table of overheads (`planner/process.py`). A row holds within 5 % and 100 MB. Sizes are in 10^6 bytes.

`own` is the part of the difference that the phase itself makes: how far it rose above what the process held when it began, less
the tensors' bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MODELS, Build, Result, _status, megabytes, print_table, run_child
from torch import nn

SHARE, SLACK = 0.05, 100e6
BF16 = torch.bfloat16


class Orthogonal(nn.Module):
    """Layers whose weights are made by a QR decomposition, which nothing can take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3_000, 3_000) for _ in range(6))
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)


BUILDS: dict[str, Callable[[], Build]] = {
    **{name: (lambda name=name: MODELS[name]()) for name in ("Llama-3.2-1B, 4 layers", "ViT-base", "BERT-base", "GPT-2")},
    "ViT, 300M, trunc_normal_": lambda: MODELS["ViT, 300M, trunc_normal_ at 2 sigma"](),
    "nn.Transformer, 24 layers": lambda: lambda: nn.Transformer(1_024, 16, 6, 6, 4_096),
    "LSTM": lambda: lambda: nn.LSTM(2_048, 2_048, num_layers=4),
    "orthogonal_": lambda: Orthogonal,
}
CASTS: dict[str, Any] = {"": None, "bfloat16": BF16, "partly bfloat16": {"*0*": torch.float32, "*": BF16}}
FORMS = ("safetensors", "shards", "torch.save", "dcp")
UNITS = {"nn.Transformer, 24 layers": "layers", "Llama-3.2-1B, 4 layers": "layers"}


# -- one process --------------------------------------------------------------------------------------------------------


def planned(model: str, cast: str) -> Any:
    import groundplan as gp

    plan = gp.trace(BUILDS[model]())
    return plan if CASTS[cast] is None else plan.cast(CASTS[cast])


def child(kind: str, model: str, cast: str, more: str) -> Result:
    """One process: `whole`, or `load` from the checkpoint at `more`."""
    plan = planned(model, cast)
    if kind == "whole":
        return peak_of(plan, "construct", lambda: plan.materialize(seed=0, progress=False))
    return peak_of(plan, "load", lambda: plan.materialize(checkpoint=more, missing="error", progress=False))


def rank(kind: str, model: str, cast: str, more: str, folder: str) -> None:
    """One of several: its axes are in `more`, such as `dp=2`, and a checkpoint's path after a space."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    axes, _, checkpoint = more.partition(" ")
    plan = planned(model, cast).shard({name: int(size) for name, size in (axis.split("=") for axis in axes.split(","))})
    memory = plan.memory().rank(dist.get_rank())
    options = {"seed": 0} | ({"checkpoint": checkpoint, "missing": "error"} if checkpoint else {})
    found = peak_of(plan, "load" if checkpoint else "construct", lambda: plan.materialize(**options), memory)
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def peak_of(plan: Any, phase: str, body: Callable[[], Any], memory: Any = None) -> Result:
    from groundplan.planner.process import process_bytes

    gc.collect()
    tensors = (memory or plan.memory()).by_device[phase]["cpu"]
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = body()
    peak = _status("VmHWM")
    held = process_bytes(plan.graph, plan.decisions)
    del kept
    return {"before": before, "peak": peak, "tensors": tensors, "predicted": tensors + sum(held.values())}


# -- rows ---------------------------------------------------------------------------------------------------------------


def row(kind: str, model: str, cast: str, found: Result) -> Result:
    difference = found["peak"] - found["predicted"]
    print(kind, model, cast, megabytes(difference), {name: megabytes(each) for name, each in found.items()}, file=sys.stderr)
    return {
        "what": kind,
        "model": model + (f", {cast}" if cast else ""),
        "tensors": megabytes(found["tensors"]),
        "predicted": megabytes(found["predicted"]),
        "measured": megabytes(found["peak"]),
        "off": megabytes(difference),
        "off %": round(100 * difference / found["predicted"], 1),
        "own": megabytes(found["peak"] - found["before"] - found["tensors"]),
        "holds": abs(difference) <= SHARE * found["predicted"] + SLACK,
    }


def whole_rows(models: Sequence[str]) -> list[Result]:
    return [row("construct", model, cast, run_child("whole", model, cast, "")) for model in models for cast in CASTS]


def load_rows(models: Sequence[str], root: Path) -> list[Result]:
    found = []
    for model in models:
        for form in FORMS:
            path = written(model, form, root)
            found += [row(f"load, {form}", model, cast, run_child("load", model, cast, str(path))) for cast in CASTS]
    return found


def rank_rows(models: Sequence[str], worlds: Sequence[int], root: Path) -> list[Result]:
    found = []
    for model in models:
        path = written(model, "safetensors", root)
        for world in worlds:
            for cast in ("", "bfloat16"):
                for kind, checkpoint in (("construct", ""), ("load", f" {path}")):
                    ones = run_ranks(world, model, cast, f"dp={world}{checkpoint}")
                    worst = max(ones, key=lambda each: abs(each["peak"] - each["predicted"]))
                    found.append(row(f"{kind}, {world} ranks", model, cast, worst))
    return found


def run_ranks(world: int, model: str, cast: str, more: str) -> list[Result]:
    """A job of `world` processes."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", *torchrun, sys.argv[0], "--rank", "rank", model, cast, more, folder]
        quiet = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-4000:])
        return [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(world)]


def written(model: str, form: str, root: Path) -> Path:
    """The checkpoint of a model in one of the forms; written by a process of its own when first asked for."""
    path = (
        root / f"{abs(hash(model))}-{form}{'.safetensors' if form == 'safetensors' else '.bin' if form == 'torch.save' else ''}"
    )
    if not path.exists():
        run_child("write", model, form, str(path))
    return path


def write(model: str, form: str, path: str) -> Result:
    plan = planned(model, "")
    if form == "torch.save":
        torch.save(plan.materialize(seed=0, progress=False).state_dict(), path)
    elif form == "dcp":
        plan.save_checkpoint(0, path, format="dcp")
    else:
        plan.save_checkpoint(0, path, max_shard_size="200MB")
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(BUILDS), choices=BUILDS, metavar="MODEL", help="built in whole")
    parser.add_argument("--loaded", nargs="*", default=["BERT-base"], choices=BUILDS, metavar="MODEL", help="from checkpoints")
    parser.add_argument("--sharded", nargs="*", default=list(UNITS), choices=BUILDS, metavar="MODEL", help="on several ranks")
    parser.add_argument("--worlds", nargs="*", type=int, default=(2, 4), help="numbers of ranks")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--rank", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        rank(*options.rank)
    if options.child:
        print(
            json.dumps(
                (write if options.child[0] == "write" else lambda *words: child(options.child[0], *words))(*options.child[1:])
            )
        )
        return
    with tempfile.TemporaryDirectory() as root:
        rows = whole_rows(options.models) + load_rows(options.loaded, Path(root))
        rows += rank_rows(options.sharded, options.worlds, Path(root))
    print_table(rows, options.markdown)
    held = sum(each["holds"] for each in rows)
    print(f"\n{held} of {len(rows)} within {SHARE:.0%} and {SLACK / 1e6:.0f} MB")
    print(json.dumps({"benchmark": "construct_peaks", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
