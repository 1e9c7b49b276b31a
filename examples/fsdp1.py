"""FSDP1 (`FullyShardedDataParallel`): its `param_init_fn` fills a meta module unit by unit, with a single device's values.

Lightning Fabric's FSDPStrategy passes it on: `FSDPStrategy(auto_wrap_policy=..., param_init_fn=gp.param_init_fn(seed=0))`, then
`fabric.setup(plan.meta_module())`. Run by itself, the script starts two ranks on the CPU.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import groundplan as gp

WORDS = torch.arange(64).reshape(2, 32)


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds that the process which starts the ranks need not take
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    dist.init_process_group("gloo")  # nccl, and device_id=torch.cuda.current_device(), where there are GPUs
    model = FullyShardedDataParallel(
        gp.trace(LlamaForCausalLM, config).meta_module(),
        param_init_fn=gp.param_init_fn(seed=0),
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )

    torch.manual_seed(0)
    single = LlamaForCausalLM(config)  # what one device holds, for comparison
    with FullyShardedDataParallel.summon_full_params(model):
        whole, expected = model.state_dict(), single.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in whole.items())

    for which in (model, single):
        optimizer = torch.optim.AdamW(which.parameters(), lr=1e-3)
        loss = which(input_ids=WORDS, labels=WORDS).loss
        loss.backward()
        optimizer.step()
        after = which(input_ids=WORDS, labels=WORDS).loss
        name = "FSDP1" if which is model else "single device"
        print(f"rank {dist.get_rank()}, {name}: loss {loss.item():.4f}, after a step {after.item():.4f}\n", end="")
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        sys.exit(subprocess.run([*torchrun, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)
