"""Device maps of ten models, ours beside accelerate's: bytes offloaded, and how long finding the map takes.

Both get the same room, in bfloat16, for weights alone, and leave every layer whole. A map of accelerate's that needs more than a
device has, counting what it brings there from host memory, is marked: it would run out of memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from common import print_table

import groundplan as gp
from groundplan.planner.chain import chain_of
from groundplan.planner.partition import partition

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.test_partition import as_partition, fits

GB = 10**9
CLUSTERS: dict[str, tuple[list[int], int]] = {
    "2x24GB": ([24 * GB, 24 * GB], 256 * GB),
    "16GB+8GB": ([16 * GB, 8 * GB], 256 * GB),
    "1x24GB+64GB-cpu": ([24 * GB], 64 * GB),
}


def _causal(name: str, **fields: Any) -> Callable[[], Any]:
    config = getattr(transformers, f"{name}Config")(**fields)
    return lambda: getattr(transformers, f"{name}ForCausalLM")(config)


def _sized(width: int, layers: int, heads: int, inner: int, words: int, groups: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
        "vocab_size": words,
        "num_key_value_heads": groups,
    }


MODELS: dict[str, Callable[[], Any]] = {
    "Llama-3.2-3B": _causal("Llama", **_sized(3072, 28, 24, 8192, 128256, 8), tie_word_embeddings=True),
    "Mistral-7B": _causal("Mistral", **_sized(4096, 32, 32, 14336, 32000, 8)),
    "Llama-3.1-8B": _causal("Llama", **_sized(4096, 32, 32, 14336, 128256, 8)),
    "Gemma-2-9B": _causal("Gemma2", **_sized(3584, 42, 16, 14336, 256000, 8), head_dim=256),
    "Qwen2.5-14B": _causal("Qwen2", **_sized(5120, 48, 40, 13824, 152064, 8)),
    "GPT-NeoX-20B": _causal(
        "GPTNeoX", hidden_size=6144, num_hidden_layers=44, num_attention_heads=64, intermediate_size=24576, vocab_size=50432
    ),
    "OPT-30B": _causal("OPT", hidden_size=7168, num_hidden_layers=48, num_attention_heads=56, ffn_dim=28672, vocab_size=50272),
    "Mixtral-8x7B": _causal("Mixtral", **_sized(4096, 32, 32, 14336, 32000, 8)),
    "Llama-3.1-70B": _causal("Llama", **_sized(8192, 80, 64, 28672, 128256, 8)),
    "Llama-3.1-405B": _causal("Llama", **_sized(16384, 126, 128, 53248, 128256, 8)),
}


def compared(name: str, cluster: str) -> dict[str, Any]:
    """One row: a model on a cluster."""
    plan = gp.trace(MODELS[name]).cast(torch.bfloat16)
    devices, host = CLUSTERS[cluster]
    start = time.perf_counter()
    chain = chain_of(plan.graph, plan.decisions)
    found = partition(chain.units, devices, host, resident=chain.resident_bytes)
    seconds = time.perf_counter() - start
    model = plan.meta_module()
    rooms: dict[int | str, int] = dict(enumerate(devices))
    start = time.perf_counter()
    entries = accelerate.infer_auto_device_map(
        model, rooms | {"cpu": host, "disk": 10**15}, no_split_module_classes=model._no_split_modules
    )
    theirs, theirs_seconds = as_partition(chain, entries), time.perf_counter() - start
    over = not fits(chain.units, theirs, devices, host, chain.resident_bytes)
    return {
        "model": f"{name}, {cluster}",
        "offloaded, ours": None if found is None else round(found.offloaded(chain.units) / GB, 2),
        "accelerate's": round(theirs.offloaded(chain.units) / GB, 2),
        "on disk, ours": None if found is None else round(found.on_disk(chain.units) / GB, 2),
        "disk, accelerate's": round(theirs.on_disk(chain.units) / GB, 2),
        "its map": "over budget" if over else "fits",
        "seconds": round(seconds, 2),
        "its seconds": round(theirs_seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS, metavar="MODEL")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = [compared(name, cluster) for name in options.models for cluster in CLUSTERS]
    print_table(rows, markdown=True)
    print(json.dumps({"benchmark": "device_maps", "torch": torch.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
