"""The model that the README shows in all its forms; prints them."""

import torch
from torch import nn

import groundplan as gp


class Tagger(nn.Module):
    """A tie, a dead initialization, a value read in the constructor, a table that is no parameter."""

    def __init__(self, words: int = 50_000, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.positions = nn.Parameter(torch.empty(1, 128, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        rates = torch.linspace(0, 0.1, depth)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(rate.item())) for rate in rates
        )
        for block in self.blocks:
            nn.init.normal_(block.get_parameter("0.weight"), std=0.02)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("decay", torch.pow(2.0, -torch.arange(8.0)), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        value = self.embed(tokens) + self.positions[:, : tokens.shape[1]]
        for block in self.blocks:
            value = value + block(value)
        return torch.as_tensor(self.head(value))


def show() -> dict[str, str]:
    """What the README quotes, by the name of its block."""
    plan = gp.trace(Tagger)
    decided = plan.cast(torch.bfloat16)
    return {
        "graph": plan.graph.to_text(),
        "tensor": str(plan.explain("blocks.3.0.weight")),
        "plan": str(decided.explain()),
        "report": str(decided.report()),
        "memory": str(decided.memory(gp.Training(optimizer="adamw", batch_size=8, seq_len=128))),
        "step": str(decided.memory(gp.Training(optimizer="adamw", batch_size=8, seq_len=128), tier="T1")),
    }


if __name__ == "__main__":
    for title, text in show().items():
        print(f"-- {title} {'-' * (96 - len(title))}\n{text}\n")
