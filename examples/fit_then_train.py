"""A plan that is fitted to a cluster, saved, and carried out by ranks that take a training step.

`plan.fit` decides mesh, sharding and checkpointing in one process; `groundplan fit ... --out FILE` writes the same file. Every
rank loads it and binds it to the constructor; `materialize` makes the mesh, shards, and fills this rank's part. Run by itself,
the script starts two ranks on the CPU.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import groundplan as gp

SIZE, BATCH, TOKENS = 64, 2, 32


def build(layers: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(SIZE, 4, 128, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def inputs() -> tuple[torch.Tensor]:
    return (torch.ones(BATCH, TOKENS, SIZE),)


def main() -> None:
    workload = gp.Training("adamw", batch_size=BATCH, inputs=inputs)
    plan = gp.trace(build, layers=4).fit("2x(1GB-cpu)", workload, axes={"dp_shard": 2})
    print(plan.explain())
    print(plan.diff(gp.trace(build, layers=4)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.plan.json"
        plan.save(path)
        sys.stdout.flush()
        subprocess.run([*torchrun, __file__, str(path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


def on_a_rank(path: str) -> None:
    dist.init_process_group("gloo")
    plan = gp.Plan.load(path).bind(build, layers=4)
    model = plan.materialize(seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.manual_seed(dist.get_rank())
    loss = model(torch.randn(BATCH, TOKENS, SIZE)).square().mean()
    loss.backward()
    optimizer.step()
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"rank {dist.get_rank()} holds {held} of {total} elements, loss {loss:.4f}\n", end="")
    assert held < total and loss.isfinite()
    dist.destroy_process_group()


if __name__ == "__main__":
    on_a_rank(sys.argv[1]) if dist.is_torchelastic_launched() else main()
