"""How long `plan.fit` searches for training, without the run that checks what was found: published models on large clusters.

`trace` is the constructor's trace, `search` everything after it in seconds of wall time, with forward and backward traced for
each size of the tensor axis and level of checkpointing; beside it those of a processor, which other work on the machine does not
lengthen much. `aim` is what it is to stay under on two cores.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from common import print_table

import groundplan as gp


@dataclass(frozen=True)
class Case:
    """A model, a cluster, and the seconds that the search is to stay under."""

    build: Callable[[], Any]
    cluster: str
    seq_len: int
    aim: int | None = None


def llama(**sizes: int) -> Callable[[], Any]:
    config = transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **sizes)
    return lambda: transformers.LlamaForCausalLM(config)


_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
_405B = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}

CASES = {
    "Llama 8B": Case(llama(**_8B), "8xH100-80GB", 8192),
    "Llama 405B": Case(llama(**_405B), "512xH100-80GB", 8192, 20),
    "DeepSeek-V3": Case(lambda: transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config()), "2048xH100-80GB", 4096, 60),
}


def row_of(name: str, case: Case) -> dict[str, Any]:
    """One search, from nothing."""
    start = time.perf_counter()
    plan = gp.trace(case.build)
    traced, processor = time.perf_counter(), time.process_time()
    training = gp.Training("adamw", batch_size=1, seq_len=case.seq_len)
    found = plan.fit(case.cluster, training, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32, tier="T0")
    done, used = time.perf_counter(), time.process_time() - processor
    fitted = found.decisions.fitted
    return {
        "model": name,
        "cluster": case.cluster,
        "trace, s": round(traced - start, 1),
        "search, s": round(done - traced, 1),
        "of a processor, s": round(used, 1),
        "aim, s": case.aim,
        "layout": fitted.candidates[0].layout,
        "verdict": fitted.verdict,
        "peak, GB": round(fitted.peak / 1e9, 1),
        "s a step": round(fitted.seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    chosen = parser.parse_args().models
    rows = [row_of(name, CASES[name]) for name in chosen]
    print_table(rows, markdown=True)
    print(json.dumps({"benchmark": "search", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
