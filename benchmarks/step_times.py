"""How long a training step takes, predicted by `plan.step_time` and measured: 12 layouts drawn from a seed, on 1, 2 and 4 ranks.

Each number of ranks is a job of as many processes on this machine, over gloo, with one thread each. A job measures speeds
(`gp.measure_speeds()`) on all of its ranks before and after, builds every layout, and lets them take steps by turns, so that a
load from outside meets all of them. What counts for a layout is the median of its steps on the slowest rank; its *noise* is half
of what lies between their quartiles.

What is asked is whether the predicted order is the measured one. Two layouts whose times differ by less than their noise together
are not told apart by measuring, so: `spearman` is Spearman's rank correlation over the layouts that are told apart (from the
fastest on, the next one that is slower than the last by more than the noise of both), and `pairs` is how many of all pairs that
are told apart are predicted in the measured order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import groundplan as gp
from groundplan.runtime.checkpointing import checkpoint_layers
from groundplan.runtime.optimizers import optimizers_of
from groundplan.runtime.training_step import forward_and_backward
from groundplan.runtime.verify import real_inputs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

SEED = 20260
WORLDS = (1, 2, 4)
SIZES = {"S": {"hidden_size": 256, "intermediate_size": 704}, "M": {"hidden_size": 512, "intermediate_size": 1408}}
MESHES: dict[int, list[dict[str, Any]]] = {
    1: [{}],
    2: [{"dp": 2}, {"dp": 2, "reshard": False}, {"tp": 2}, {"ddp": 2}],
    4: [{"dp": 4}, {"dp": 4, "reshard": False}, {"dp": 2, "tp": 2}, {"dp_replicate": 2, "dp_shard": 2}, {"ddp": 4}, {"tp": 4}],
}


@dataclass(frozen=True)
class Layout:
    """A model, its batch, and how it is laid out."""

    size: str
    batch: int
    length: int
    mesh: dict[str, Any]
    checkpointing: Any

    def plan(self) -> gp.Plan:
        config = transformers.LlamaConfig(
            vocab_size=4096, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4, **SIZES[self.size]
        )
        plan = gp.trace(transformers.LlamaForCausalLM, config)
        axes = {name: size for name, size in self.mesh.items() if name != "reshard"}
        options = {"reshard": self.mesh["reshard"]} if "reshard" in self.mesh else {}
        rules = {"tensor": "auto"} if "tp" in axes else {}
        return plan.shard(axes, **options, **rules) if axes else plan

    def training(self) -> gp.Training:
        return gp.Training("adamw", batch_size=self.batch, seq_len=self.length, checkpointing=self.checkpointing)

    def __str__(self) -> str:
        mesh = " ".join(f"{name}={value}" for name, value in self.mesh.items()) or "one device"
        return f"{self.size} {self.batch}x{self.length} {mesh} {self.checkpointing}"


def layouts(seed: int, count: int) -> dict[int, list[Layout]]:
    """So many layouts, as many for each number of ranks, no two of them the same."""
    source = random.Random(seed)
    found: dict[int, list[Layout]] = {}
    for world in WORLDS:
        every = [
            Layout(size, batch, length, mesh, checkpointing)
            for size in SIZES
            for batch, length in itertools.product((1, 2, 4), (128, 256))
            for mesh in MESHES[world]
            for checkpointing in ("none", "full")
        ]
        found[world] = source.sample(every, count // len(WORLDS))
    return found


# -- published runs -----------------------------------------------------------------------------------------------------

LLAMAS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
PUBLISHED: tuple[tuple[str, str, int, Any, int], ...] = (
    ("8B", "8xH100-96GB", 2, "selective", 5762),
    ("8B", "128xH100-96GB", 2, "selective", 5605),
    ("8B", "64xA100-80GB", 1, "selective", 2973),
    ("70B", "64xA100-80GB", 1, "full", 331),
)
"""Tokens a second and GPU of Llama 3 under FSDP2 alone, in bfloat16, without torch.compile, 8,192 tokens: torchtitan's
benchmarks/llama3_h100_202412_torchtitan.md (tables 1 and 3) and, on A100, its docs/performance.md of 2024."""


def published() -> Iterator[dict[str, Any]]:
    """Predicted beside published throughput, by the catalog's speeds."""
    for name, cluster, batch, checkpointing, tokens in PUBLISHED:
        config = transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, **LLAMAS[name])
        plan = gp.trace(transformers.LlamaForCausalLM, config).to("cuda")
        plan = plan.shard({"dp": gp.Cluster.parse(cluster).ranks}, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        training = gp.Training("adamw", batch_size=batch, seq_len=8192, checkpointing=checkpointing, clip_grad_norm=1.0)
        found = plan.step_time(training, cluster)
        predicted = batch * 8192 / found.total
        yield {
            "Llama 3": name,
            "cluster": cluster,
            "batch": batch,
            "checkpointing": checkpointing,
            "predicted": round(predicted),
            "published": tokens,
            "off": f"{100 * (predicted / tokens - 1):+.0f} %",
            "of which": str(found).partition(": ")[2],
        }


# -- one rank -----------------------------------------------------------------------------------------------------------


class Stepping:
    """A layout that has been built, and takes steps."""

    def __init__(self, layout: Layout) -> None:
        self.training = layout.training()
        self.module = layout.plan().materialize(seed=0, progress=False).train()
        if layout.checkpointing != "none":
            checkpoint_layers(self.module, layout.checkpointing)
        self.inputs = real_inputs(self.module, self.training, "cpu")
        self.optimizers = optimizers_of(self.module, self.training)

    def step(self) -> float:
        """Seconds of one step, all ranks beginning together."""
        dist.barrier()
        start = time.perf_counter()
        forward_and_backward(self.module, self.inputs, self.training)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        return time.perf_counter() - start


def measured(chosen: Sequence[Layout], rounds: int, steps: int) -> dict[str, Any]:
    """What one rank finds: predictions by the speeds before and after, and the seconds of every step."""
    before = gp.measure_speeds("cpu")
    built = [Stepping(layout) for layout in chosen]
    for each in built:
        each.step(), each.step()
    seconds: list[list[float]] = [[] for _ in built]
    for _ in range(rounds):
        for found, each in zip(seconds, built, strict=True):
            found += [each.step() for _ in range(steps)]
    speeds = [before, gp.measure_speeds("cpu")]
    predicted = [[layout.plan().step_time(layout.training(), speeds=each).to_json() for each in speeds] for layout in chosen]
    return {"seconds": seconds, "predicted": predicted, "speeds": [each.model_dump(mode="json") for each in speeds]}


def rank_main(folder: str, seed: int, count: int, rounds: int, steps: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    from tests import jobs

    jobs.finish(folder, measured(layouts(seed, count)[dist.get_world_size()], rounds, steps))


# -- all of them --------------------------------------------------------------------------------------------------------


def rows_of(world: int, seed: int, count: int, rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """A row for each layout of a number of ranks."""
    from tests import jobs

    with tempfile.TemporaryDirectory() as folder:
        given = map(str, (seed, count, rounds, steps))
        ranks = jobs.launch("benchmarks.step_times", Path(folder), *given, world=world, seconds=900, STEP_TIMES_RANK="1")
    for place, layout in enumerate(layouts(seed, count)[world]):
        slowest = [max(each) for each in zip(*(rank["seconds"][place] for rank in ranks), strict=True)]
        low, middle, high = statistics.quantiles(slowest, n=4)
        predicted = [each["total"] for each in ranks[0]["predicted"][place]]
        yield {
            "ranks": world,
            "layout": str(layout),
            "predicted, ms": round(1000 * statistics.mean(predicted), 1),
            "measured, ms": round(1000 * middle, 1),
            "noise, ms": round(500 * (high - low), 1),
            "ratio": round(statistics.mean(predicted) / middle, 2),
        }


def agreement(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well the predicted order is the measured one, where that is known."""
    from scipy.stats import spearmanr

    def apart(one: dict[str, Any], other: dict[str, Any]) -> bool:
        return abs(one["measured, ms"] - other["measured, ms"]) > one["noise, ms"] + other["noise, ms"]

    def correlation(some: Sequence[dict[str, Any]]) -> float:
        return round(float(spearmanr(*([row[key] for row in some] for key in ("predicted, ms", "measured, ms"))).statistic), 3)

    kept: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: row["measured, ms"]):
        if not kept or apart(row, kept[-1]):
            kept.append(row)
    pairs = [pair for pair in itertools.combinations(rows, 2) if apart(*pair)]
    right = sum((a["predicted, ms"] < b["predicted, ms"]) == (a["measured, ms"] < b["measured, ms"]) for a, b in pairs)
    return {
        "spearman": correlation(kept),
        "told apart": len(kept),
        "spearman of all": correlation(rows),
        "pairs": f"{right} of {len(pairs)}",
    }


@contextmanager
def quiet() -> Iterator[None]:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=12, help="layouts, as many for each of 1, 2 and 4 ranks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each layout in a round")
    parser.add_argument("--published", action="store_true", help="compare with published throughput, and measure nothing")
    options = parser.parse_args()
    from common import print_table

    with quiet():
        if options.published:
            rows = list(published())
            print_table(rows, markdown=True)
            print(json.dumps({"benchmark": "step_times --published", "torch": torch.__version__, "rows": rows}))
            return
        given = (options.seed, options.count, options.rounds, options.steps)
        rows = [row for world in WORLDS for row in rows_of(world, *given)]
    print_table(rows, markdown=True)
    found = agreement(rows)
    print("\n" + ", ".join(f"{name}: {value}" for name, value in found.items()))
    print(json.dumps({"benchmark": "step_times", "torch": torch.__version__, "rows": rows, **found}))


if __name__ == "__main__":
    if os.environ.get("STEP_TIMES_RANK"):
        rank_main(sys.argv[1], *map(int, sys.argv[2:]))
    else:
        main()
