"""DeepSpeed's ZeRO-3: each submodule of a meta module is filled, and divided between the ranks before the next one is.

`gp.deepspeed_zero3` takes the place of building under `deepspeed.zero.Init()`. With Lightning Fabric's DeepSpeedStrategy(stage=3)
it is called with `strategy.config`, before `fabric.setup`. Run by itself, the script starts two ranks on the CPU.
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

import groundplan as gp

WORDS = torch.arange(64).reshape(2, 32)
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}


def main() -> None:
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    deepspeed.init_distributed("gloo")  # nccl where there are GPUs
    model = gp.trace(LlamaForCausalLM, config).meta_module()
    gp.deepspeed_zero3(model, CONFIG, seed=0)
    engine, *_ = deepspeed.initialize(
        model=model, config=CONFIG, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), dist_init_required=False
    )

    torch.manual_seed(0)
    single = LlamaForCausalLM(config)  # what one device holds, for comparison
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        whole, expected = dict(model.named_parameters()), single.named_parameters()
        assert all(torch.equal(whole[name], value) for name, value in expected)

    loss = engine(input_ids=WORDS, labels=WORDS).loss
    engine.backward(loss)
    engine.step()
    after = engine(input_ids=WORDS, labels=WORDS).loss
    print(f"rank {dist.get_rank()}, ZeRO-3: loss {loss.item():.4f}, after a step {after.item():.4f}\n", end="")
    before = single(input_ids=WORDS, labels=WORDS).loss
    assert torch.allclose(loss, before, atol=1e-5)
    print(f"rank {dist.get_rank()}, single device: loss {before.item():.4f}\n", end="")
    dist.destroy_process_group()


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        main()
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        surroundings = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        sys.exit(subprocess.run([*torchrun, __file__], env=surroundings, check=False).returncode)
