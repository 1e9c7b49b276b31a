"""Will it fit? Peak bytes of weights, gradients and optimizer state for published models, from their configurations alone."""

import json
from pathlib import Path

import torch
import transformers

import groundplan as gp

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))


def plan_for(path: Path) -> gp.Plan:
    fields = json.loads(path.read_text())
    model = getattr(transformers, fields["architectures"][0])
    return gp.trace(model, model.config_class(**fields))


def main() -> None:
    print(f"{'model':28}{'weights':>14}{'bfloat16':>14}{'train, adamw':>16}{'bfloat16':>14}")
    for path in CONFIGS:
        plan = plan_for(path)
        half = plan.cast(torch.bfloat16)
        workload = gp.Training(optimizer="adamw")
        peaks = [
            plan.memory().phases["checkpoint"],
            half.memory().phases["checkpoint"],
            plan.memory(workload).peak,
            half.memory(workload).peak,
        ]
        print(
            f"{path.stem:28}" + "".join(f"{peak / 1e9:>{width}.1f}" for peak, width in zip(peaks, (14, 14, 16, 14), strict=True))
        )
    print("GB (10^9 bytes) of tensors on one device, without activations")

    binding = plan_for(CONFIGS[-1]).memory(gp.Training(optimizer="adamw")).binding
    name, nbytes = binding.tensors[0]
    print(f"\n{CONFIGS[-1].stem}: the peak is in the phase {binding.phase!r}; its largest tensor is {name}, {nbytes:,} bytes")


if __name__ == "__main__":
    main()
