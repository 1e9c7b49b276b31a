"""What one FSDP rank's share of a model costs: `gp.materialize(module)` on a sharded meta module, next to the whole model.

The first table: every figure is one call in a process of its own, which is the rank in the middle of N. It has traced the model,
made its meta module, and called `fully_shard` on every layer and on the root, on a mesh of N on the CPU. The bound on CPU time is
1.15 times an N-th of what `plan.materialize(seed=0)` takes for the whole model with as many threads, and 2 ms for every tensor
with random values; the one on memory is 64 MB beyond the shards, and the largest tensor that is not made element by element
(these models have none). The shards must be the whole model's, and what `plan.materialize_state` gives for some of them
(`as cut`).

The second table is about a model that no machine here holds: one rank of 512 for real, step by step. The bound is 2 ms for every
random tensor, and for every element that the rank holds what it costs to fill a `nn.Linear` of 10^8 elements with `normal_`.

The other ranks are imagined: the process group is torch's fake one, and what they would say is put in. What a rank does for them
is done, and counts: it compares what is to be built, and finds its part of the rounds of each `trunc_normal_`. Waiting is left
out, and the store's traffic.

`user of bound` leaves the kernel's time out on both sides. That is what the first write to new memory costs, which on a virtual
machine is the host's doing, and depends on how long ago the memory was given back.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from common import MODELS, Build, Result, fetch_memory, measured, megabytes, print_table, run_child, tensor_bytes, warm_up
from parts import chunk, digest_of, extra_memory, middle, randomly_filled
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

DEFAULT = ("Llama-3.2-1B", "ViT, 300M, trunc_normal_ at 2 sigma")
RANKS = (8, 64, 512)
FAR, FAR_RANKS = ("Llama-3.1-405B", "Llama-3.2-1B"), 512
EACH_TENSOR, MOST_EXTRA = 0.002, 64e6
CHECKED = 9  # tensors that are made once more
FILLED = 10_000  # rows and columns of the nn.Linear that says what an element costs


# -- one rank -----------------------------------------------------------------------------------------------------------


def sharded(plan: Any, count: int) -> nn.Module:
    """The meta module of the rank in the middle of `count`: `fully_shard` for the members of every ModuleList, and the root."""
    dist.init_process_group("fake", rank=count // 2, world_size=count, store=FakeStore())
    mesh = init_device_mesh("cpu", (count,))
    module = plan.meta_module()
    for layers in [each for each in module.modules() if isinstance(each, nn.ModuleList)]:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module


@contextmanager
def others_imagined(count: int, lengths: dict[str, int]) -> Iterator[None]:
    """This process is one of `count` ranks; the numbers that the others work out are in `lengths`, or are added to it."""
    from groundplan.runtime.ranks import Ranks, Seen

    class Imagined(Ranks):
        def agree(self, said: Mapping[str, str]) -> None:
            json.dumps(dict(said))

        def largest(self, key: str, first: int, parts: int, find: Callable[[int], int]) -> int:
            if key not in lengths:
                lengths[key] = max(map(find, range(parts)))
            elif (mine := (self.rank - first) % self.count) < parts:
                find(mine)
            return lengths[key]

        def united(self, key: str, first: int, seen: Seen | None, numel: int) -> int | None:
            json.dumps([seen] * self.count)
            return lengths[key] if seen is not None else None

    ranks = Imagined()
    ranks.rank, ranks.count = count // 2, count
    with mock.patch("groundplan.runtime.inplace.together", lambda *_: nullcontext(ranks)):
        yield


def held_by(module: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of each parameter."""
    return {name: tensor.to_local().detach() for name, tensor in module.named_parameters()}


def index_of(plan: Any, name: str, count: int) -> tuple[slice, ...]:
    """The part of a tensor that the rank in the middle of `count` has."""
    return chunk(plan.graph.tensor(name).shape, 0, count, count // 2)


def is_as_cut(plan: Any, held: Mapping[str, torch.Tensor], count: int) -> bool:
    """Whether some of the shards, from the first to the last, are the parts that `plan.materialize_state` gives."""
    names = list(held)
    names = list(dict.fromkeys(names[number * (len(names) - 1) // (CHECKED - 1)] for number in range(CHECKED)))
    cut = plan.materialize_state({name: index_of(plan, name, count) for name in names}, seed=0)
    return all(torch.equal(held[name].view(torch.uint8), cut[name].detach().view(torch.uint8)) for name in names)


# -- shards: one process ------------------------------------------------------------------------------------------------


def whole(model: str, _count: int, threads: int, _lengths: dict[str, int]) -> Result:
    """Build the model; afterwards, find out what its ranks tell each other."""
    import groundplan as gp

    build = prepared(model, threads)
    plan = gp.trace(build)
    result: Result = {}
    with measured(result):
        module = plan.materialize(seed=0, threads=threads, progress=False)
    tensors = dict(module.named_parameters())
    cuts = {count: {name: index_of(plan, name, count) for name in tensors} for count in RANKS}
    result["digests"] = {str(count): digest_of(tensors, cuts[count]) for count in RANKS}
    result["random"] = randomly_filled(plan.graph, tensors)
    del module, tensors
    lengths: dict[str, int] = {}
    with others_imagined(RANKS[-1], lengths):
        gp.materialize(sharded(plan, RANKS[-1]), seed=0, threads=threads)
    return result | {"lengths": lengths}


def shard(model: str, count: int, threads: int, lengths: dict[str, int]) -> Result:
    """Fill the shards of one rank."""
    import groundplan as gp

    build = prepared(model, threads)
    plan = gp.trace(build)
    module = sharded(plan, count)
    result: Result = {}
    with others_imagined(count, lengths), measured(result):
        gp.materialize(module, seed=0, threads=threads)
    held = held_by(module)
    result |= {"bytes": tensor_bytes([*held.values(), *module.buffers()]), "digest": digest_of(held)}
    return result | {"as_cut": is_as_cut(plan, held, count)}


def prepared(model: str, threads: int) -> Build:
    """What every child does first."""
    torch.set_num_threads(threads)
    build = warm_up(model)
    fetch_memory(build)
    return build


# -- shards: the table --------------------------------------------------------------------------------------------------


def shard_rows(model: str, repeats: int, threads: int) -> list[Result]:
    """One row for the whole and one for each number of ranks."""
    lengths: dict[str, int] | None = None
    rounds = []
    for turn in range(repeats):
        found = {}
        for count in (0, *RANKS)[:: 1 if turn % 2 == 0 else -1]:
            side = "shard" if count else "whole"
            found[count] = run_child(side, model, str(count), str(threads), json.dumps(lengths or {}))
            lengths = found[0]["lengths"] if lengths is None else lengths
        rounds.append(found)
    ones = [each[0] for each in rounds]
    rows = [shard_row(model, count, threads, rounds) for count in RANKS]
    first = {"model": model, "N": "whole", "threads": threads, "CPU s": middle(ones, "cpu_seconds")}
    return [dict.fromkeys(rows[0], "") | first | {"user s": middle(ones, "user_seconds")}, *rows]


def shard_row(model: str, count: int, threads: int, rounds: Sequence[dict[int, Result]]) -> Result:
    ones, alls = [each[count] for each in rounds], [each[0] for each in rounds]
    bounds = [1.15 * each["cpu_seconds"] / count + EACH_TENSOR * each["random"] for each in alls]
    of_bound = statistics.median(one["cpu_seconds"] / bound for one, bound in zip(ones, bounds, strict=True))
    user_bounds = [1.15 * each["user_seconds"] / count + EACH_TENSOR * each["random"] for each in alls]
    user_of_bound = statistics.median(one["user_seconds"] / bound for one, bound in zip(ones, user_bounds, strict=True))
    return {
        "model": model,
        "N": count,
        "threads": threads,
        "CPU s": middle(ones, "cpu_seconds"),
        "user s": middle(ones, "user_seconds"),
        "bound s": statistics.median(bounds),
        "of bound": of_bound,
        "holds": of_bound <= 1,
        "user of bound": user_of_bound,
        "shards MB": megabytes(middle(ones, "bytes")),
        "extra MB": megabytes(extra_memory(ones)),
        "allowed MB": megabytes(MOST_EXTRA),
        "extra holds": extra_memory(ones) <= MOST_EXTRA,
        "same values": all(one["digest"] == each["digests"][str(count)] for one, each in zip(ones, alls, strict=True)),
        "as cut": all(each["as_cut"] for each in ones),
    }


# -- one rank of a model that fits nowhere ------------------------------------------------------------------------------


def far(model: str, count: int, threads: int, _lengths: dict[str, int]) -> Result:
    """Trace, shard and fill, each measured by itself; and what a random element costs."""
    import groundplan as gp

    torch.set_num_threads(threads)
    build = warm_up(model)
    with torch.device("meta"):
        numel = sum(tensor.numel() for tensor in build().parameters())
    fetch_memory(lambda: nn.Linear(numel // count // 1_000, 1_000, bias=False))
    element = nanoseconds_each(threads)
    steps: dict[str, Result] = {"trace": {}, "shard": {}, "fill": {}}
    with measured(steps["trace"]):
        plan = gp.trace(build)
    with measured(steps["shard"]):
        module = sharded(plan, count)
    with others_imagined(count, {}), measured(steps["fill"]):
        gp.materialize(module, seed=0, threads=threads)
    held = held_by(module)
    facts = {
        "bytes": tensor_bytes([*held.values(), *module.buffers()]),
        "numel": sum(tensor.numel() for tensor in held.values()),
        "random": randomly_filled(plan.graph, held),
        "as_cut": is_as_cut(plan, held, count),
    }
    return {"steps": steps} | element | facts


def nanoseconds_each(threads: int) -> Result:
    """The CPU time, and the user's part of it, of an element of a `nn.Linear` that `plan.materialize` fills with `normal_`."""
    import groundplan as gp

    def build() -> nn.Module:
        layer = nn.Linear(FILLED, FILLED, bias=False)
        nn.init.normal_(layer.weight)
        return layer

    plan, result = gp.trace(build), Result()
    with measured(result):
        plan.materialize(seed=0, threads=threads, progress=False)
    return {"element": result["cpu_seconds"] / FILLED**2 * 1e9, "user_element": result["user_seconds"] / FILLED**2 * 1e9}


def far_rows(model: str, repeats: int, threads: int) -> list[Result]:
    """One row for every step."""
    ones = [run_child("far", model, str(FAR_RANKS), str(threads), "{}") for _ in range(repeats)]
    bounds = [each["element"] * 1e-9 * each["numel"] + EACH_TENSOR * each["random"] for each in ones]
    of_bound = statistics.median(each["steps"]["fill"]["cpu_seconds"] / bound for each, bound in zip(ones, bounds, strict=True))
    user_bounds = [each["user_element"] * 1e-9 * each["numel"] + EACH_TENSOR * each["random"] for each in ones]
    user_of_bound = statistics.median(
        each["steps"]["fill"]["user_seconds"] / bound for each, bound in zip(ones, user_bounds, strict=True)
    )
    names = {"trace": "gp.trace", "shard": "meta_module, fully_shard", "fill": "gp.materialize"}
    rows = [far_row(model, names[step], threads, [each["steps"][step] for each in ones]) for step in names]
    fills = [{"peak_growth": each["steps"]["fill"]["peak_growth"], "bytes": each["bytes"]} for each in ones]
    last = {
        "ns an element": middle(ones, "element"),
        "10^6 elements": middle(ones, "numel") / 1e6,
        "tensors": middle(ones, "random"),
        "bound s": statistics.median(bounds),
        "of bound": of_bound,
        "holds": of_bound <= 1,
        "user of bound": user_of_bound,
        "extra MB": megabytes(extra_memory(fills)),
        "extra holds": extra_memory(fills) <= MOST_EXTRA,
        "as cut": all(each["as_cut"] for each in ones),
    }
    return [row | (last if row is rows[-1] else dict.fromkeys(last, "")) for row in rows]


def far_row(model: str, step: str, threads: int, ones: Sequence[Result]) -> Result:
    return {
        "model": model,
        "N": FAR_RANKS,
        "threads": threads,
        "step": step,
        "s": middle(ones, "seconds"),
        "CPU s": middle(ones, "cpu_seconds"),
        "user s": middle(ones, "user_seconds"),
        "peak MB": megabytes(middle(ones, "peak_growth")),
    }


# -- the script ---------------------------------------------------------------------------------------------------------

CHILDREN: dict[str, Callable[[str, int, int, dict[str, int]], Result]] = {"whole": whole, "shard": shard, "far": far}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="threads of every process; 1, so that CPU time is work")
    parser.add_argument("--models", nargs="*", default=DEFAULT, choices=MODELS, metavar="MODEL", help="to shard")
    parser.add_argument("--far", nargs="*", default=FAR[:1], choices=FAR, metavar="MODEL", help="to be one rank of 512 of")
    parser.add_argument("--markdown", action="store_true", help="print the tables in Markdown")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, model, count, threads, lengths = options.child
        print(json.dumps(CHILDREN[side](model, int(count), int(threads), json.loads(lengths))))
        return
    shards = [row for model in options.models for row in shard_rows(model, options.repeats, options.threads)]
    ranks = [row for model in options.far for row in far_rows(model, options.repeats, options.threads)]
    for rows in filter(None, (shards, ranks)):
        print_table(rows, options.markdown)
        print()
    figures = {"torch": torch.__version__, "repeats": options.repeats, "threads": options.threads, "shards": shards, "far": ranks}
    print(json.dumps({"benchmark": Path(__file__).stem} | figures))


if __name__ == "__main__":
    main()
