"""The closed form (T0) next to fake runs of the same step (T1): 200 configurations drawn from a seed, and how long T0 takes.

`off` is the largest difference of any phase, in percent of the run; `ms` the processor time of one more configuration, when its
profile is there already. `--speed` prints instead how long it takes for large Llamas: with the constructor's trace and the
profile, and for configurations after that: the plan by itself, and its memory, which is to take less than `AIM_MS`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from common import print_table

import groundplan as gp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.closed_form import CONFIGURATIONS, Configuration, errors
from tests.measured_steps import plain_kernels

AIM_MS = 5
"""A search asks for thousands of configurations: one more is to take no longer."""

LLAMAS: dict[str, dict[str, int]] = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "405B": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128},
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time, and the result."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def compared(configuration: Configuration) -> dict[str, Any]:
    """One row: a configuration in both tiers."""
    plan, training = configuration.plan(), configuration.workload()
    plan.memory(training)
    again, closed = timed(lambda: plan.memory(training))
    found = errors(closed, plan.memory(training, tier="T1"))
    off = {phase: round(100 * error, 2) for phase, error in found.items()}
    return {"configuration": str(configuration), **off, "off": max(map(abs, off.values())), "ms": round(1000 * again, 1)}


def accuracy(count: int) -> list[dict[str, Any]]:
    with plain_kernels():
        rows = [compared(configuration) for configuration in CONFIGURATIONS[:count]]
    print_table(rows, markdown=True)
    every = [abs(row[phase]) for row in rows for phase in ("first_step", "step", "optimizer")]
    print(f"\nmedian {statistics.median(every):.2f} %, worst {max(every):.2f} %, of {len(every)} phases")
    return rows


def median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 2)


RANKS = (64, *range(96, 513, 32))


def speed() -> list[dict[str, Any]]:
    rows = []
    for name, sizes in LLAMAS.items():
        config = transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **sizes)
        seconds, plan = timed(lambda config=config: gp.trace(transformers.LlamaForCausalLM, config).to("cuda"))
        training = gp.Training("adamw", batch_size=1, seq_len=8192)
        made = [timed(lambda size=size, plan=plan: plan.shard({"dp": size}, compute_dtype=torch.bfloat16)) for size in RANKS]
        first, memory = timed(lambda plan=made[0][1], training=training: plan.memory(training))
        later = [timed(lambda plan=plan, training=training: plan.memory(training))[0] for _, plan in made[1:]]
        rows.append(
            {
                "Llama": name,
                "trace, s": round(seconds, 2),
                "first, s": round(first, 2),
                "plan.shard, ms": median_ms([seconds for seconds, _ in made[1:]]),
                "one more, ms": median_ms(later),
                "aim, ms": AIM_MS,
                "peak": memory.peak,
            }
        )
    print_table(rows, markdown=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=len(CONFIGURATIONS))
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = speed() if options.speed else accuracy(options.count)
    print(json.dumps({"benchmark": "closed_form", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
