"""The fingerprint: the same in another process, another for any difference that matters."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import groundplan as gp

PROGRAM = """
import transformers, torch, groundplan as gp
config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
torch.manual_seed({seed})
print(gp.trace(transformers.LlamaForCausalLM, config).graph.fingerprint)
"""


def test_another_process_gives_the_same() -> None:
    def run(seed: int) -> str:
        environment = os.environ | {"PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", PROGRAM.format(seed=seed)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip()

    assert run(1) == run(2) != ""


class Small(nn.Module):
    def __init__(self, width: int = 4, std: float = 0.1, tied: bool = False, frozen: bool = False, extra: Any = None) -> None:
        super().__init__()
        self.a = nn.Linear(width, width, bias=False)
        self.b = nn.Linear(width, width, bias=False)
        nn.init.normal_(self.a.weight, std=std)
        if tied:
            self.b.weight = self.a.weight
        self.a.weight.requires_grad_(not frozen)
        self.register_buffer("table", torch.tensor([1.0, 2.0]) if extra is None else torch.tensor(extra))


CHANGES: dict[str, Callable[[], nn.Module]] = {
    "shape": lambda: Small(width=5),
    "init argument": lambda: Small(std=0.2),
    "tie": lambda: Small(tied=True),
    "requires_grad": lambda: Small(frozen=True),
    "constant": lambda: Small(extra=[1.0, 3.0]),
    "constant's dtype": lambda: Small(extra=[1, 2]),
    "training flag": lambda: Small().eval(),
    "dtype": lambda: Small().double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_difference_gives_another(change: str) -> None:
    plain = gp.trace(Small).graph.fingerprint
    assert gp.trace(Small).graph.fingerprint == plain
    assert gp.trace(CHANGES[change]).graph.fingerprint != plain


def test_ambient_settings_take_part() -> None:
    plain = gp.trace(Small).graph.fingerprint
    with torch.no_grad():
        assert gp.trace(Small).graph.fingerprint != plain


def test_values_from_numpy_and_python_random_take_no_part() -> None:
    def build() -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("noise", torch.tensor([random.random(), float(np.random.rand())]))
        return module

    random.seed(0)
    first = gp.trace(build).graph.fingerprint
    random.seed(1)
    assert gp.trace(build).graph.fingerprint == first
