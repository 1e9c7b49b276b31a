"""A sharded plan as a file: decided in one process without a process group, carried out by two ranks under torchrun.

The file says which axes the mesh has and which modules are the units of FSDP2. Every rank binds it to the constructor, and
`materialize` makes the mesh, shards, and fills this rank's part. Run by itself, the script starts the two ranks.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor

import groundplan as gp


def build(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def main() -> None:
    plan = gp.trace(build, layers=4).shard({"dp": 2})
    print(f"one rank: {plan.memory().peak / 1e3:.0f} kB at most; one device: {gp.trace(build, layers=4).memory().peak / 1e3:.0f}")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.plan.json"
        plan.save(path)
        print(path.read_text(), flush=True)
        subprocess.run([*torchrun, __file__, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def on_a_rank(path: str) -> None:
    dist.init_process_group("gloo")
    model = gp.Plan.load(path).bind(build, layers=4).materialize(seed=0)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    torch.manual_seed(0)
    expected = build(4).state_dict()
    for name, value in model.state_dict().items():  # each rank cuts its own part out of the single device's model
        own = distribute_tensor(expected[name], value.device_mesh, value.placements, src_data_rank=None)
        assert torch.equal(value.to_local(), own.to_local())
    total = sum(value.numel() for value in expected.values())
    print(f"rank {dist.get_rank()} holds {held} of {total} elements, all as on a single device\n", end="")
    dist.destroy_process_group()


if __name__ == "__main__":
    on_a_rank(sys.argv[1]) if dist.is_torchelastic_launched() else main()
