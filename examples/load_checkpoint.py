"""Checkpoints: a hub's folder read straight into place, a part of one completed by the constructor, an initial one written."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import groundplan as gp

FIELDS = json.loads((Path(__file__).parent / "configs" / "llama-3.2-1b.json").read_text())
CONFIG = LlamaConfig(**FIELDS | {"num_hidden_layers": 2, "vocab_size": 8_000, "hidden_size": 512, "intermediate_size": 1_024})


def main(folder: Path) -> None:
    torch.manual_seed(1)
    LlamaForCausalLM(CONFIG).save_pretrained(folder / "hub")
    reference: Any = LlamaForCausalLM.from_pretrained(folder / "hub", dtype=torch.bfloat16)

    plan = gp.lightning.trace("bf16-true", LlamaForCausalLM, CONFIG)  # made in bfloat16, as from_pretrained does it
    model = plan.materialize(checkpoint=folder / "hub").eval()  # nothing is drawn, nothing is copied twice
    tokens = torch.arange(12).view(1, 12)
    assert torch.equal(model(tokens).logits, reference(tokens).logits)
    print("a hub's folder: the same logits as from_pretrained's model")

    full = load_file(folder / "hub" / "model.safetensors")
    save_file({name: value for name, value in full.items() if "layers.1." not in name}, folder / "part.safetensors")
    model = plan.materialize(seed=0, checkpoint=folder / "part.safetensors")  # the second layer is drawn, as eager draws it
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    eager = LlamaForCausalLM(CONFIG).state_dict()
    drawn = [name for name, value in model.state_dict().items() if "layers.1." in name and torch.equal(value, eager[name])]
    print(f"part of it: {len(drawn)} tensors are missing, and have the values of the constructor at seed 0")

    plan.save_checkpoint(0, folder / "initial", max_shard_size="8MB")  # tensor by tensor: the model is never there
    print(f"an initial checkpoint: {len(list((folder / 'initial').glob('*.safetensors')))} files and an index")
    try:
        plan.materialize(checkpoint={"model.norm.wieght": torch.ones(512)})
    except gp.CheckpointError as error:
        print(error)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
