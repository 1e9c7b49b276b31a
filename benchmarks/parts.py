"""What parts of a model cost: `plan.materialize_state({name: index})` next to all of it.

The first table is about shards. Every figure is the CPU time of one call in a process of its own that has traced the model
before: `whole` makes the state dict, the others the part of every tensor that one rank in the middle of N has, cut as
torch.chunk cuts (`Shard(1)`: tensors of one dim along that). The bounds are 1.15 times an N-th of `whole` and 2 ms for every
tensor with random values, half of `whole` for `Shard(1)`, and 64 MB of memory beyond that of the result. `user` leaves out the
kernel's time, nearly all of which goes into new memory, and varies more. The parts must be those of the whole tensors.

The second table is about a few rows of tensors at the end of a model that no machine here holds: the seconds from the finished
trace to the values, in a process that has done nothing before; the bound is two. `drawn before` counts the random elements that
the constructor draws before the tensor's own, in 10^9.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import MODELS, Result, fetch_memory, measured, megabytes, print_table, ratio, run_child, tensor_bytes, warm_up

Index = tuple[slice, ...]
SHARDS = {"Shard(0), N = 2": (0, 2), "Shard(0), N = 8": (0, 8), "Shard(0), N = 64": (0, 64), "Shard(1), N = 8": (1, 8)}
ROWS = 8
FAR: dict[str, tuple[str, ...]] = {
    "Llama-3.1-405B": ("model.layers.125.mlp.down_proj.weight", "lm_head.weight"),
    "Llama-3.2-1B": ("model.layers.15.mlp.down_proj.weight",),
}
MOST_SECONDS, MOST_EXTRA = 2.0, 64e6


# -- shards: one process ------------------------------------------------------------------------------------------------


def shard(model: str, part: str, threads: int) -> Result:
    """Make one part of a model's state dict, once."""
    import groundplan as gp

    torch.set_num_threads(threads)
    build = warm_up(model)
    fetch_memory(build)
    plan = gp.trace(build)
    shapes = {tensor.name: tensor.shape for tensor in plan.graph if tensor.kind == "parameter" or is_saved(tensor)}
    wanted = dict.fromkeys(shapes, ...) if part == "whole" else indices(shapes, *SHARDS[part])
    result: Result = {}
    with measured(result):
        found = plan.materialize_state(wanted, seed=0, threads=threads)
    result |= {"bytes": tensor_bytes(list(found.values())), "random": randomly_filled(plan.graph, shapes)}
    if part != "whole":
        return result | {"digest": digest_of(found)}
    cuts = {each: indices(shapes, *SHARDS[each]) for each in SHARDS}
    return result | {"digests": {each: digest_of(found, index) for each, index in cuts.items()}}


def is_saved(tensor: Any) -> bool:
    return tensor.kind == "buffer" and tensor.persistent


def indices(shapes: Mapping[str, tuple[int, ...]], dim: int, count: int) -> dict[str, Index]:
    """The part of every tensor that the rank in the middle of `count` has."""
    return {name: chunk(shape, min(dim, len(shape) - 1), count, count // 2) for name, shape in shapes.items()}


def chunk(shape: tuple[int, ...], dim: int, count: int, rank: int) -> Index:
    """Where torch.chunk cuts for a rank; a tensor without dims is every rank's."""
    if not shape:
        return ()
    each = -(-shape[dim] // count)
    return (*[slice(None)] * dim, slice(rank * each, (rank + 1) * each))


def randomly_filled(graph: Any, names: Mapping[str, Any]) -> int:
    """How many of the tensors have random values."""
    filled = {view.storage for op in graph.ops if op.random and op.live for view in op.targets}
    return sum(graph.tensor(name).view.storage in filled for name in names)


def digest_of(tensors: Mapping[str, torch.Tensor], parts: Mapping[str, Index] | None = None) -> str:
    """A digest of the names, shapes and values of the tensors, or of a part of each."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        part = tensor.detach() if parts is None else tensor.detach()[parts[name]]
        found.update(repr((name, part.dtype, tuple(part.shape))).encode())
        found.update(part.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -- shards: the table --------------------------------------------------------------------------------------------------


def shard_rows(model: str, repeats: int, threads: int) -> list[Result]:
    """One row for the whole and one for each way to shard."""
    rounds = []
    for turn in range(repeats):
        order = ["whole", *SHARDS][:: 1 if turn % 2 == 0 else -1]
        rounds.append({part: run_child("shard", model, part, str(threads)) for part in order})
    whole = [each["whole"] for each in rounds]
    cost, peak = middle(whole, "cpu_seconds"), extra_memory(whole)
    rows = [shard_row(model, part, rounds) for part in SHARDS]
    first = {"model": model, "part": "whole", "CPU s": cost, "user s": middle(whole, "user_seconds"), "extra MB": megabytes(peak)}
    return [dict.fromkeys(rows[0], "") | first, *rows]


def shard_row(model: str, part: str, rounds: Sequence[dict[str, Result]]) -> Result:
    dim, count = SHARDS[part]
    ones = [each[part] for each in rounds]

    def bound(each: Mapping[str, Result]) -> float:
        whole = each["whole"]["cpu_seconds"]
        return 0.5 * whole if dim else 1.15 * whole / count + 0.002 * each["whole"]["random"]

    of_bound = statistics.median(each[part]["cpu_seconds"] / bound(each) for each in rounds)
    return {
        "model": model,
        "part": part,
        "CPU s": middle(ones, "cpu_seconds"),
        "user s": middle(ones, "user_seconds"),
        "1/N": 1 / count,
        "x whole": ratio(rounds, part, "whole", "cpu_seconds"),
        "user x whole": ratio(rounds, part, "whole", "user_seconds"),
        "of bound": of_bound,
        "holds": of_bound <= 1,
        "extra MB": megabytes(extra_memory(ones)),
        "extra holds": extra_memory(ones) <= MOST_EXTRA,
        "same values": all(each[part]["digest"] == each["whole"]["digests"][part] for each in rounds),
    }


def extra_memory(children: Sequence[Result]) -> float:
    """The most that resident memory rose beyond the result's own bytes."""
    return max(each["peak_growth"] - each["bytes"] for each in children)


def middle(children: Sequence[Result], key: str) -> Any:
    return statistics.median(each[key] for each in children)


# -- a few rows, far into the stream ------------------------------------------------------------------------------------


def far(model: str, name: str, threads: int) -> Result:
    """The first rows of one tensor, straight after the trace."""
    import groundplan as gp

    torch.set_num_threads(threads)
    build = MODELS[model]()
    traced: Result = {}
    with measured(traced):
        plan = gp.trace(build)
    result: Result = {}
    with measured(result):
        plan.materialize_state({name: slice(0, ROWS)}, seed=0, threads=threads)
    last = max(op.index for op in plan.graph.recipe(name) if op.random)
    before = sum(op.targets[0].numel for op in plan.graph.ops if op.random and op.index < last)
    return result | {"trace": traced["seconds"], "before": before}


def far_rows(model: str, repeats: int, threads: int) -> list[Result]:
    """One row a tensor."""
    return [far_row(model, name, [run_child("far", model, name, str(threads)) for _ in range(repeats)]) for name in FAR[model]]


def far_row(model: str, name: str, children: Sequence[Result]) -> Result:
    return {
        "model": model,
        "part": f"{name}[:{ROWS}]",
        "drawn before": children[0]["before"] / 1e9,
        "trace s": middle(children, "trace"),
        "then s": middle(children, "seconds"),
        "worst s": max(each["seconds"] for each in children),
        "CPU s": middle(children, "cpu_seconds"),
        "holds": middle(children, "seconds") <= MOST_SECONDS,
        "peak MB": megabytes(middle(children, "peak_growth")),
    }


# -- the script ---------------------------------------------------------------------------------------------------------

CHILDREN: dict[str, Callable[[str, str, int], Result]] = {"shard": shard, "far": far}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of every process; 1, so that CPU time is work")
    parser.add_argument("--models", nargs="*", default=["Llama-3.2-1B"], choices=MODELS, metavar="MODEL", help="to shard")
    parser.add_argument("--far", nargs="*", default=["Llama-3.1-405B"], choices=FAR, metavar="MODEL", help="to take rows of")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, model, part, threads = options.child
        print(json.dumps(CHILDREN[side](model, part, int(threads))))
        return
    shards = [row for model in options.models for row in shard_rows(model, options.repeats, options.threads)]
    parts = [row for model in options.far for row in far_rows(model, options.repeats, options.threads)]
    for rows in filter(None, (shards, parts)):
        print_table(rows, options.markdown)
        print()
    figures = {"torch": torch.__version__, "repeats": options.repeats, "threads": options.threads, "shards": shards, "far": parts}
    print(json.dumps({"benchmark": Path(__file__).stem} | figures))


if __name__ == "__main__":
    main()
