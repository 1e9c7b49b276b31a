"""What the benchmarks share: the models, children that measure one side each, and medians of ratios.

A benchmark compares two sides (groundplan and eager, say). Every measurement runs in a child process of its own, so that peak
memory belongs to one side; the sides alternate, and what is reported is the median of the ratios of neighboring runs, as a
machine that others use as well has no meaningful absolute times. Linux only: memory is read from /proc/self.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import mmap
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

CONFIGS = Path(__file__).resolve().parent.parent / "examples" / "configs"
Build = Callable[[], nn.Module]
Result = dict[str, Any]


# -- models -------------------------------------------------------------------------------------------------------------


def published(config: str, **changes: Any) -> Build:
    """The transformers class of a file in examples/configs, some of its fields changed."""
    from groundplan.spec import parse_spec

    spec = parse_spec(str(CONFIGS / f"{config}.json"), changes)
    return lambda: spec.build(*spec.args, **spec.kwargs)


def default_of(model: str, config: str, **changes: Any) -> Build:
    """A transformers class with its configuration class's defaults, some fields changed."""
    import transformers

    kind, options = getattr(transformers, model), getattr(transformers, config)(**changes)
    return lambda: kind(options)


def many_linears(num_hidden_layers: int = 45_000) -> Build:
    """As many `nn.Linear`s: a trace of nothing but small steps."""
    return lambda: nn.Sequential(*[nn.Linear(64, 64) for _ in range(num_hidden_layers)])


def stack_of_layers(num_hidden_layers: int = 96) -> Build:
    """A GPT of torch.nn parts: embeddings, layers made one by one, a head that is tied to the embedding."""

    def build() -> nn.Module:
        model = nn.Module()
        model.tokens, model.places = nn.Embedding(50_257, 1_600), nn.Embedding(1_024, 1_600)
        layers = [nn.TransformerEncoderLayer(1_600, 25, 6_400, norm_first=True) for _ in range(num_hidden_layers)]
        model.layers, model.norm = nn.ModuleList(layers), nn.LayerNorm(1_600)
        model.head = nn.Linear(1_600, 50_257, bias=False)
        model.head.weight = model.tokens.weight
        return model

    return build


def copied_layers(num_hidden_layers: int = 96) -> Build:
    """The same number of layers as `nn.TransformerEncoder` makes them: copies of one."""
    return lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(1_600, 25, 6_400), num_hidden_layers)


def separate_experts(**changes: Any) -> Build:
    """DeepSeek-V3 with every expert a module of its own, as it was published: 44,544 more `nn.Linear`s."""
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as code

    build = published("deepseek-v3", **changes)

    def experts(config: Any) -> nn.ModuleList:
        return nn.ModuleList(code.DeepseekV3MLP(config, config.moe_intermediate_size) for _ in range(config.n_routed_experts))

    def patched() -> nn.Module:
        with (
            mock.patch.object(code, "DeepseekV3Experts", experts),
            mock.patch.object(code.DeepseekV3PreTrainedModel, "_init_weights", code.PreTrainedModel._init_weights),
        ):
            return build()

    return patched


def truncated_vit(num_hidden_layers: int = 24) -> Build:
    """ViT-Large whose linear and convolution weights are truncated at two standard deviations."""
    from transformers import ViTConfig, ViTModel

    class TruncatedViT(ViTModel):
        def _init_weights(self, module: nn.Module) -> None:
            if not isinstance(module, nn.Linear | nn.Conv2d):
                super()._init_weights(module)
                return
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    size = {"hidden_size": 1_024, "intermediate_size": 4_096, "num_attention_heads": 16}
    config = ViTConfig(num_hidden_layers=num_hidden_layers, **size)
    return lambda: TruncatedViT(config)


MODELS: dict[str, Callable[..., Build]] = {
    "nn.Linear x 45,000": many_linears,
    "torch.nn GPT, 96 layers": stack_of_layers,
    "nn.TransformerEncoder, 96 layers": copied_layers,
    "DeepSeek-V3, 44,544 expert Linears": separate_experts,
    "Llama-3.1-405B": lambda **changes: published("llama-3.1-405b", **changes),
    "DeepSeek-V3": lambda **changes: published("deepseek-v3", **changes),
    "Llama-3.2-1B": lambda **changes: published("llama-3.2-1b", **changes),
    "Llama-3.2-1B, untied": lambda **changes: published("llama-3.2-1b", tie_word_embeddings=False, **changes),
    "Llama-3.2-1B, 4 layers": lambda **changes: published("llama-3.2-1b", **{"num_hidden_layers": 4} | changes),
    "ViT-base": lambda **changes: published("vit-base-patch16-224", **changes),
    "ViT, 300M, trunc_normal_ at 2 sigma": truncated_vit,
    "BERT-base": lambda **changes: default_of("BertModel", "BertConfig", **changes),
    "GPT-2": lambda **changes: default_of("GPT2LMHeadModel", "GPT2Config", **changes),
    "nn.Transformer": lambda **changes: nn.Transformer if not changes else lambda: nn.Transformer(16, 2, 1, 1, 16),
}

# What fits here, and is built for real.
BUILT = (
    "Llama-3.2-1B",
    "Llama-3.2-1B, 4 layers",
    "ViT, 300M, trunc_normal_ at 2 sigma",
    "ViT-base",
    "BERT-base",
    "GPT-2",
    "nn.Transformer",
)


def warm_up(name: str) -> Build:
    """Import all that the model needs, and run every stage once on little ones; returns the model's constructor."""
    import groundplan as gp

    gp.trace(nn.Linear, 2, 2).cast(torch.bfloat16).materialize(seed=0)
    small = MODELS[name](num_hidden_layers=1)
    gp.trace(small)
    with torch.device("meta"):
        small()
    return MODELS[name]()


def fetch_memory(build: Build) -> None:
    """Write once to as much memory as building a model takes, and free it.

    A virtual machine fetches memory that it has not used lately from its host at the first write, at up to two seconds a GB:
    neither side's doing, and not to be paid by the one that comes first.
    """
    with torch.device("meta"):
        nbytes = 3 * tensor_bytes(list(build().parameters())) // 2
    with mmap.mmap(-1, max(mmap.PAGESIZE, min(nbytes, _available() * 2 // 3))) as memory:
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


# -- one measurement ----------------------------------------------------------------------------------------------------


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _user_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


@contextmanager
def measured(result: Result) -> Iterator[None]:
    """Note wall and CPU seconds of the body, and how far resident memory rose above where it stood: at most, and at the end.

    `user_seconds` are the CPU's without the kernel's, nearly all of which go into new memory.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts from here
    before, user, cpu, wall = _status("VmRSS"), _user_seconds(), time.process_time(), time.perf_counter()
    yield
    result.update(seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu, user_seconds=_user_seconds() - user)
    result.update(peak_growth=_status("VmHWM") - before, growth=_status("VmRSS") - before)


def members(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def tensor_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """The bytes of the tensors' storages, each counted once."""
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}.values())


def digest(model: nn.Module) -> str:
    """A digest of names, geometry and values, and of the generator's state afterwards."""
    found = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for name, tensor in members(model).items():
        found.update(repr((name, tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad)).encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def allocated_peak(body: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that torch's CPU allocator had handed out at once inside `body`, and what `body` returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        returned = body()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, returned


# -- children and ratios ------------------------------------------------------------------------------------------------


def run_child(*words: str) -> Result:
    """This same script once more, measuring one side; its last line is the result."""
    command = [sys.executable, sys.argv[0], "--child", *words]
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules compiled anew in every child would count as work
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def alternating(model: str, sides: Sequence[str], repeats: int) -> list[dict[str, Result]]:
    """`repeats` rounds with one child per side; every other round in the opposite order."""
    rounds = []
    for turn in range(repeats):
        order = sides if turn % 2 == 0 else sides[::-1]
        rounds.append({side: run_child(side, model) for side in order})
        print(".", end="", file=sys.stderr, flush=True)
    print(f" {model}", file=sys.stderr)
    return rounds


def ratio(rounds: Sequence[dict[str, Result]], one: str, other: str, key: str) -> float:
    """The median over the rounds of one side's figure divided by the other's."""
    return statistics.median(each[one][key] / each[other][key] for each in rounds)


def middle(rounds: Sequence[dict[str, Result]], side: str, key: str) -> Any:
    """The median of one side's figure."""
    return statistics.median(each[side][key] for each in rounds)


def median_of_ratios(one: Callable[[], Any], other: Callable[[], Any], repeats: int) -> float:
    """How many times as long `one` takes as `other`, both run in this process by turns."""
    found = []
    for turn in range(repeats):
        order = (one, other) if turn % 2 == 0 else (other, one)
        taken = {body: _seconds(body) for body in order}
        found.append(taken[one] / taken[other])
    return statistics.median(found)


def _seconds(body: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


# -- the script ---------------------------------------------------------------------------------------------------------


def script(
    measure: Callable[[str, str], Result], compare: Callable[[Sequence[str], int], list[Result]], models: Sequence[str]
) -> None:
    """`python benchmarks/NAME.py [--repeats N] [--models A B]` compares; with `--child SIDE MODEL` it measures one side.

    `models` are those that are compared when none is named.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=models, choices=MODELS, metavar="MODEL")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    rows = compare(options.models, options.repeats)
    print_table(rows, options.markdown)
    print(json.dumps({"benchmark": Path(sys.argv[0]).stem, "torch": torch.__version__, "repeats": options.repeats, "rows": rows}))


def print_table(rows: Sequence[Result], markdown: bool = False) -> None:
    """The rows as text, or in Markdown, one column per key."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    if markdown:
        for row in (cells[0], ["---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]):
            print(f"| {' | '.join(row)} |")
        return
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]))


def _shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else f"{value:,.0f}"
        if isinstance(value, float)
        else str(value)
    )


def megabytes(nbytes: float) -> float:
    """Bytes in units of 10^6, rounded."""
    return round(nbytes / 10**6, 1)
