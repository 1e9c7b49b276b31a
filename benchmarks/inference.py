"""Serving on fake tensors next to real runs, next to transformers' own `generate`, and what it takes of time.

Equal: the peak bytes of every phase next to `torch.profiler`'s, on the CPU, with torch's own kernels (oneDNN off) on one thread;
`off` is the largest difference of any phase in bytes. generate: the peak of a whole call of it next to the larger of the two
phases, with its own bookkeeping beside the model. Time: of `plan.memory(gp.Inference(...))` for published sizes, in bfloat16 with
a prompt of 8192 tokens, in seconds of this process; `KV cache` is what the last step holds.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from common import print_table
from torch import nn
from torch.profiler import ProfilerActivity, profile

import groundplan as gp
from groundplan.planner.allocations import FIRST_STEP, STEP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.measured_inference import LENGTHS, SERVED, measured_inference
from tests.measured_steps import memory_events, plain_kernels

GENERATING = ("Llama", "GPT-2", "Mistral, a window of 8", "Mixtral", "Gemma 2", "Qwen 3", "DeepSeek V3", "Mamba")
SIZES = {  # of the released configurations: layers, width, feed-forward width, heads, heads of keys, words
    "Llama 3 8B": (32, 4096, 14_336, 32, 8, 128_256),
    "Llama 3 70B": (80, 8192, 28_672, 64, 8, 128_256),
    "Llama 3.1 405B": (126, 16_384, 53_248, 128, 8, 128_256),
}


def compared(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row: a model, fake and real."""
    plan, inference = gp.trace(SERVED[model]).cast(dtype), gp.Inference(2, LENGTHS.get(model, 16), new_tokens=5)
    with plain_kernels():
        run = plan.memory(inference).run
        assert run is not None
        real = measured_inference(plan, inference)
    fake = {phase: run.peaks[phase]["cpu"] for phase in real}
    return {
        "model": f"{model}, {str(dtype).removeprefix('torch.')}",
        **{f"{phase}, fake": fake[phase] for phase in (FIRST_STEP, STEP)},
        **{f"{phase}, real": real[phase] for phase in (FIRST_STEP, STEP)},
        "off": max(abs(fake[phase] - real[phase]) for phase in real),
    }


def generated(model: str) -> dict[str, Any]:
    """One row: the peak of `generate`, and of the fake run."""
    plan, new = gp.trace(SERVED[model]), 8
    predicted = plan.memory(gp.Inference(2, 40, new_tokens=new))
    module: Any = plan.materialize(seed=0, progress=False).eval()
    prompt = torch.ones(2, 40, dtype=torch.int64)
    gc.collect()
    with plain_kernels(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        module.generate(prompt, max_new_tokens=new + 1, do_sample=False, eos_token_id=None, pad_token_id=0)
    weights = sum(each.nbytes for each in (*module.parameters(), *module.buffers())) + prompt.nbytes
    now = most = weights
    for nbytes in memory_events(profiler):
        now += nbytes
        most = max(most, now)
    said = max(predicted.phases[FIRST_STEP], predicted.phases[STEP])
    return {"model": model, "generate": most, "fake": said, "fake / generate": round(said / most, 4)}


def timed(name: str) -> dict[str, Any]:
    """One row: a published size, and the seconds that its memory takes."""
    layers, width, forward, heads, keys, words = SIZES[name]

    def build() -> nn.Module:
        config = transformers.LlamaConfig(
            vocab_size=words,
            hidden_size=width,
            intermediate_size=forward,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=keys,
        )
        return transformers.LlamaForCausalLM(config)

    plan = gp.trace(build).cast(torch.bfloat16).to("cuda")
    plan.decisions  # noqa: B018  (the trace's own work, which is done once)
    start = time.process_time()
    memory = plan.memory(gp.Inference(seq_len=8192))
    seconds = time.process_time() - start
    assert memory.run is not None
    kinds = memory.run.by_kind(STEP, "cuda:0")
    shown = {phase: f"{memory.phases[phase] / 1e9:.2f} GB" for phase in ("load", FIRST_STEP, STEP)}
    return {"model": name, "CPU seconds": round(seconds, 1), **shown, "KV cache": f"{kinds['KV cache'] / 1e9:.2f} GB"}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    timed("Llama 3 8B")  # what is imported once
    rows = [timed(name) for name in SIZES]
    print_table(rows, markdown=True)
    calls = [generated(model) for model in GENERATING]
    print_table(calls, markdown=True)
    runs = [compared(model, dtype) for model in SERVED for dtype in (torch.float32, torch.bfloat16)]
    print_table(runs, markdown=True)
    print(f"\n{sum(row['off'] == 0 for row in runs)} of {len(runs)} are equal in every phase, to the byte")
    print(json.dumps({"benchmark": "inference", "torch": torch.__version__, "time": rows, "generate": calls, "runs": runs}))


if __name__ == "__main__":
    main()
