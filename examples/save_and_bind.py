"""A plan as a file: decided in one process, built in another.

The file holds decisions and a fingerprint, no code. `bind` traces the constructor again and refuses another one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import groundplan as gp


def build(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.plan.json"
        gp.trace(build, layers=2).cast(torch.bfloat16).save(path)
        print(path.read_text())
        subprocess.run([sys.executable, __file__, str(path)], check=True)


def build_from(path: str) -> None:
    model = gp.Plan.load(path).bind(build, layers=2).materialize(seed=1)
    torch.manual_seed(1)
    expected = build(2).to(torch.bfloat16).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    print("another process built the same model")
    try:
        gp.Plan.load(path).bind(build, layers=3)
    except gp.PlanFileError as error:
        print(f"and refused another one: {error}")


if __name__ == "__main__":
    build_from(sys.argv[1]) if len(sys.argv) > 1 else main()
