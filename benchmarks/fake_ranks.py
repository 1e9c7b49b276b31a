"""One rank's step on fake tensors next to real ranks, and what a fake one of a large model costs.

Real is `torch.profiler` in processes over gloo, on the CPU: the running sum of its memory events over two steps of the module
that the same plan materializes. `off` is the largest difference of any phase on any rank, as a share; what a thread of gloo gives
back the profiler does not see, so a real rank may seem to take more (tests/rank_steps.py). `--large` runs rank 0 of a Llama of 80
billion parameters under FSDP2 instead, and prints seconds of the processor, which other work on the machine does not add to, and
the peak of the whole process.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import print_table

import groundplan as gp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import rank_steps

_LARGE = {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "intermediate_size": 28672,
    "vocab_size": 128256,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "tie_word_embeddings": False,
}


def compared(which: str, world: int) -> list[dict[str, Any]]:
    """A row for every case of so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = rank_steps.launch(world, which, Path(folder))
    return [_row(list(each)) for each in zip(*ranks, strict=True)]


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    """One case, on all of its ranks."""
    error = next((each["error"] for each in found if "error" in each), None)
    if error is not None:
        return {"case": found[0]["case"], "off": error.strip().splitlines()[-1][:80]}
    first = found[0]
    off = max(abs(each["fake"][phase] - real) / real for each in found for phase, real in each["real"].items())
    phases = ("first_step", "step", "optimizer")
    return {
        "case": first["case"],
        **{f"{phase}, {side}": first[side][phase] for phase in phases for side in ("fake", "real")},
        "off": f"{100 * off:.2f} %",
    }


def large(ranks: int) -> dict[str, Any]:
    """What rank 0 of `ranks` takes, and what finding that out costs."""
    import transformers

    def build() -> torch.nn.Module:
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LARGE))

    plan = gp.trace(build).to("cuda").shard({"dp": ranks}, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    wall, start = time.perf_counter(), time.process_time()
    memory = plan.memory(gp.Training(batch_size=1, seq_len=4096), tier="T1")
    seconds = time.process_time() - start
    return {
        "ranks": ranks,
        "parameters": f"{sum(each.numel for each in plan.graph.parameters) / 1e9:.1f}e9",
        **{phase: f"{memory.phases[phase] / 2**30:.2f} GiB" for phase in ("first_step", "step", "optimizer")},
        "processor seconds": round(seconds, 1),
        "wall seconds": round(time.perf_counter() - wall, 1),
        "process peak": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="long", choices=rank_steps.SETS)
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--large", nargs="+", type=int, metavar="RANKS", help="ranks of the large model, such as 8 512")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.large:
        rows = [large(ranks) for ranks in options.large]
    else:
        rows = [row for world in options.worlds for row in compared(options.cases, world)]
    print_table(rows, markdown=True)
    print(json.dumps({"benchmark": "fake_ranks", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
