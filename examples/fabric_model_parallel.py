"""Lightning Fabric's ModelParallelStrategy: its `parallelize_fn` shards the meta module and fills it.

Fabric itself would call `to_empty` and every `reset_parameters`, and only warn about modules that have none, such as Llama's
norms; it leaves alone a module that has its values. Fabric starts the second process; both run on the CPU.
"""

import os
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

try:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
except ImportError:  # the lightning package has it under another name
    from lightning.fabric import Fabric  # type: ignore[import-not-found, no-redef]
    from lightning.fabric.strategies import ModelParallelStrategy  # type: ignore[import-not-found, no-redef]

CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
WORDS = torch.arange(64).reshape(2, 32)


def parallelize(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return gp.materialize(model, seed=0)


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the process that Fabric starts
    strategy = ModelParallelStrategy(parallelize, data_parallel_size=2, tensor_parallel_size=1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(gp.trace(LlamaForCausalLM, CONFIG).meta_module())
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-3))
    loss = model(input_ids=WORDS, labels=WORDS).loss
    fabric.backward(loss)
    optimizer.step()
    after = model(input_ids=WORDS, labels=WORDS).loss
    print(f"rank {fabric.global_rank}: loss {loss.item():.4f}, after a step {after.item():.4f}\n", end="")

    torch.manual_seed(0)
    single = LlamaForCausalLM(CONFIG)  # on one device, for comparison
    expected = single(input_ids=WORDS, labels=WORDS).loss
    assert torch.allclose(loss, expected, atol=1e-5)
    fabric.print(f"a single device: loss {expected.item():.4f}")
    fabric.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
