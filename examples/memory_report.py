"""Will it fit? Peak bytes of published models, constructed and trained with AdamW, from their configurations alone.

`--json` prints everything that `plan.memory(...)` knows instead of the table: phases, devices, the tensors that make the peak.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

import groundplan as gp

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
COLUMNS = ("build, load", "train, adamw", "build, load", "train, adamw")


def plan_for(path: Path) -> gp.Plan:
    fields = json.loads(path.read_text())
    model = getattr(transformers, fields["architectures"][0])
    return gp.trace(model, model.config_class(**fields))


def main() -> None:
    workload = gp.Training(optimizer="adamw")
    found: dict[str, list[gp.Memory]] = {}
    for path in CONFIGS:
        plan = plan_for(path)
        half = plan.cast(torch.bfloat16)
        found[path.stem] = [plan.memory(), plan.memory(workload), half.memory(), half.memory(workload)]
    if "--json" in sys.argv:
        names = ("float32", "float32, adamw", "bfloat16", "bfloat16, adamw")
        data = {
            model: {name: each.to_json() for name, each in zip(names, memories, strict=True)} for model, memories in found.items()
        }
        print(json.dumps(data, indent=2))
        return

    print(f"{'peak, in GB':24}{'float32':>28}{'bfloat16':>28}")
    print(" " * 24 + "".join(f"{name:>14}" for name in COLUMNS))
    for model, memories in found.items():
        print(f"{model:24}" + "".join(f"{memory.peak / 1e9:14,.1f}" for memory in memories))
    print("GB is 10^9 bytes; tensors on one device, without activations\n")
    for model, memories in found.items():
        binding = memories[1].binding
        name, nbytes = binding.tensors[0]
        print(f"{model}: the peak of training is in {binding.phase}; the largest part is {name}'s, {nbytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
