"""Tier T2 against a real training step on a GPU: requested, active and reserved peaks of every phase."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import groundplan as gp

from .test_reserved_run import net, training

ROOT = Path(__file__).resolve().parents[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

PROGRAM = """
import json, sys, torch
import groundplan as gp
from groundplan.runtime.training_step import run_training
from tests.test_reserved_cuda import MODELS

build, workload = MODELS[sys.argv[1]]
module = gp.trace(build).to("cuda").materialize(seed=0, progress=False)
inputs = workload().inputs()
inputs = {k: v.cuda() for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(each.cuda() for each in inputs)
torch.cuda.empty_cache()
found, now = {}, []

def close():
    stats = torch.cuda.memory_stats()
    peaks = {name: stats[f"{name}_bytes.all.peak"] for name in ("requested", "active", "reserved")}
    for phase in now:
        found[phase] = {name: max(peaks[name], found.get(phase, {}).get(name, 0)) for name in peaks}

def phase(name):
    torch.cuda.synchronize()
    if now:
        close()
    now[:] = ["optimizer" if name == "first_optimizer" else name]
    torch.cuda.reset_peak_memory_stats()

run_training(module, inputs, workload(), phase)
torch.cuda.synchronize()
close()
print(json.dumps(found))
"""


def llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=16_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    return LlamaForCausalLM(config)


def tokens() -> dict[str, torch.Tensor]:
    found = torch.ones(4, 1024, dtype=torch.int64)
    return {"input_ids": found, "labels": found}


MODELS = {"layers": (net, training), "Llama": (llama, lambda: gp.Training("adamw", inputs=tokens))}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["", "expandable_segments:True"])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_predicted_is_what_a_gpu_reserves(model: str, setting: str) -> None:
    """Kernels of CUDA keep and need other things than those of the CPU that stand in for them: hence the tolerances."""
    environment = os.environ | {"PYTORCH_ALLOC_CONF": setting, "PYTORCH_CUDA_ALLOC_CONF": setting}
    command = [sys.executable, "-c", PROGRAM, model]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    real = json.loads(done.stdout.splitlines()[-1])
    assert set(real) == {"first_step", "step", "optimizer"}
    build, workload = MODELS[model]
    memory = gp.trace(build).to("cuda").memory(workload(), tier="T2", allocator=setting, cluster=gp.Cluster.here())
    for phase, peaks in real.items():
        usage = memory.reserved[phase]["cuda:0"]
        assert usage.active == pytest.approx(peaks["active"], rel=0.05), (phase, usage, peaks)
        assert usage.reserved == pytest.approx(peaks["reserved"], rel=0.1, abs=40 * 2**20), (phase, usage, peaks)
