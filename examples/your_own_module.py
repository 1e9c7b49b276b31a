"""A module of your own, unmodified: ties, values read in the constructor, buffers that view each other, dead initializations.

Nothing in it knows groundplan: no `reset_parameters`, no device arguments.
"""

import torch
from torch import nn

import groundplan as gp


class Net(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        rates = [rate.item() for rate in torch.linspace(0, 0.2, depth)]  # values, not shapes
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Dropout(rate)) for rate in rates)
        self.embed = nn.Embedding(100, width, padding_idx=0)
        self.head = nn.Linear(width, 100, bias=False)
        self.head.weight = self.embed.weight  # a tie
        self.scale = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.scale, std=0.02)
        self.register_buffer("table", torch.arange(2 * width).float().view(2, width) / width)
        self.register_buffer("first", self.get_buffer("table")[0])  # a view of the other buffer
        for block in self.blocks:
            nn.init.orthogonal_(block.get_parameter("0.weight"))  # overwrites what nn.Linear drew


def main() -> None:
    plan = gp.trace(Net, width=64, depth=3)
    print(plan.report(), "\n")
    print(plan.explain("blocks.0.0.weight"), "\n")

    model = plan.materialize(seed=7)
    torch.manual_seed(7)
    eager = Net(width=64, depth=3)
    assert all(torch.equal(value, eager.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight
    assert model.first.data_ptr() == model.table.data_ptr()
    print("identical to eager: values, the tie, and the buffer that views the other")


if __name__ == "__main__":
    main()
