"""LightningModule.configure_model: the Trainer has set precision and device, groundplan builds the network under them.

The same module trains on one device and, under ModelParallelStrategy, sharded: each rank then makes its own part only, with the
values of one device. Lightning starts the second process; everything runs on the CPU.
"""

import logging
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

try:
    import pytorch_lightning as pl
except ImportError:  # the lightning package has it under another name
    import lightning.pytorch as pl  # type: ignore[import-not-found, no-redef]

CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
)
WORDS: Any = torch.arange(128).reshape(4, 32)


def shard(network: Any, mesh: Any) -> nn.Module:
    """Without groundplan, Lightning would now say `to_empty` and every `reset_parameters`; Llama's norms have none."""
    for layer in network.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return gp.materialize(network, seed=0)


class Writer(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network: Any = None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.network is None:  # fit, validate and test each call this
            plan, mesh = gp.trace(LlamaForCausalLM, CONFIG), self.device_mesh
            self.network = plan.materialize(seed=0) if mesh is None else shard(plan.meta_module(), mesh["data_parallel"])

    def training_step(self, words: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.network(input_ids=words, labels=words).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(precision: Any, devices: int, strategy: Any = "auto") -> torch.Tensor:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings: Any = {"precision": precision, "max_steps": 2, "use_distributed_sampler": False, **quiet}
    trainer = pl.Trainer(accelerator="cpu", devices=devices, strategy=strategy, **settings)
    writer = Writer()
    trainer.fit(writer, torch.utils.data.DataLoader(WORDS, batch_size=2))
    weight, losses = next(writer.parameters()), torch.tensor(writer.losses)
    what = f"{type(weight).__name__} of {weight.dtype}"
    print(f"{precision}, rank {trainer.global_rank} of {devices}: {what}, losses {losses.tolist()}")
    return losses


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the process that Lightning starts
    first = "LOCAL_RANK" not in os.environ  # which that process has
    alone = [train(precision, 1) for precision in ("bf16-true", "32-true") if first]
    together = train("32-true", 2, pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    assert all(torch.allclose(each, together, atol=1e-4) for each in alone[1:])
