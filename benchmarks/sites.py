"""What it costs to name an op's init function and source line: calling frames next to a TorchFunctionMode.

Every figure is the time of a trace divided by that of a trace whose ops have no sites. `mode` is a TorchFunctionMode that does
no more than note the name of each function it sees, on top of such a trace; `seen` is which of torch.nn.init's functions it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from common import MODELS, Result, median_of_ratios, run_child, script, warm_up
from torch import nn
from torch.overrides import TorchFunctionMode

INITS = [
    "uniform_",
    "normal_",
    "trunc_normal_",
    "constant_",
    "ones_",
    "zeros_",
    "eye_",
    "dirac_",
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "orthogonal_",
    "sparse_",
]
ROUNDS = 15


class Noting(TorchFunctionMode):
    """Notes the names of the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            self.seen.add(func.__name__)
        return func(*args, **kwargs or {})


def measure(side: str, model: str) -> Result:
    """The ratios of one model, both taken in this process."""
    import groundplan as gp
    from groundplan.tracer import sites
    from groundplan.tracer.graph import Site

    build = warm_up(model)
    nothing = Site()

    def with_frames() -> None:
        gp.trace(build)

    def without(change: Callable[[], Any] = mock.MagicMock) -> None:
        with mock.patch.object(sites.Sites, "capture", lambda *_: nothing), change():
            gp.trace(build)

    frames = median_of_ratios(with_frames, without, ROUNDS)
    return {"frames": frames, "mode": median_of_ratios(lambda: without(Noting), without, ROUNDS), "seen": seen()}


def seen() -> list[str]:
    """The init functions that a mode sees when each is called once."""
    more = {"constant_": (0.0,), "sparse_": (0.5,)}
    with Noting() as mode:
        for name in INITS:
            getattr(nn.init, name)(torch.empty(4, 4, 3) if name == "dirac_" else torch.empty(4, 4), *more.get(name, ()))
    return sorted(mode.seen)


def compare(models: Sequence[str], repeats: int) -> list[Result]:
    """One row per model: the median over `repeats` children."""
    return [row(model, [run_child("both", model) for _ in range(repeats)]) for model in models]


def row(model: str, found: list[Result]) -> Result:
    frames, modes = (sorted(each[key] for each in found)[len(found) // 2] for key in ("frames", "mode"))
    return {
        "model": model,
        "frames": round(frames, 3),
        "mode": round(modes, 3),
        "seen": f"{len(found[0]['seen'])} of {len(INITS)}",
    }


if __name__ == "__main__":
    script(measure, compare, [name for name in MODELS if name in ("Llama-3.1-405B", "DeepSeek-V3", "BERT-base")])
