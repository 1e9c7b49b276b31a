"""FSDP2 under torchrun: a meta module, sharded layer by layer, then filled; each rank draws only what it holds.

`gp.materialize` takes the place of `to_empty` and `init_weights`. Whatever the number of ranks, the values are those of one
device. Run by itself, the script starts two ranks: `torchrun --standalone --nproc-per-node 2 torchrun_fsdp2.py`.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import groundplan as gp

WORDS = torch.arange(64).reshape(2, 32)


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds that the process which starts the ranks need not take

    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    dist.init_process_group("gloo")  # nccl, and a mesh of "cuda", where there are GPUs
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))

    model = gp.trace(LlamaForCausalLM, config).meta_module()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    gp.materialize(model, seed=0)  # instead of model.to_empty(device=...) and model.init_weights()

    torch.manual_seed(0)
    single = LlamaForCausalLM(config)  # what one device holds, for comparison
    expected = single.state_dict()
    assert all(torch.equal(value.full_tensor(), expected[name]) for name, value in model.state_dict().items())

    for which in (model, single):
        optimizer = torch.optim.AdamW(which.parameters(), lr=1e-3)
        loss = which(input_ids=WORDS, labels=WORDS).loss
        loss.backward()
        optimizer.step()
        after = which(input_ids=WORDS, labels=WORDS).loss
        name = "sharded" if which is model else "single device"
        print(f"rank {dist.get_rank()}, {name}: loss {loss.item():.4f}, after a step {after.item():.4f}\n", end="")
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.run([*torchrun, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
