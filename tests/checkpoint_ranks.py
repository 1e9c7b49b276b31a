"""Sharded modules that are filled from checkpoints: `torchrun --nproc-per-node N -m tests.checkpoint_ranks FOLDER WHAT ...`.

`save` writes sharded modules with DCP, `again` loads them, `load` the checkpoints that lie in the folder, `broken` meets broken
ones. Each rank writes what it finds to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard

import groundplan as gp

from . import jobs
from .checkpoint_files import FORMS, State, eager, is_drawn, one_file, other_state
from .layouts import MODELS, Model, both, differing, fsdp, left_on_meta, line, local, members, tensor_parallel

Found = dict[str, Any]
Shard = Callable[[nn.Module, Model], nn.Module]
SEED = 3
NAMES = ("Llama", "rough", "conv net")
WHOLE = ("safetensors", "index", "torch", "dcp")
LAYOUTS: dict[int, dict[str, Shard]] = {
    2: {"FSDP": fsdp, "TP": tensor_parallel},
    3: {"FSDP": fsdp},
    4: {"FSDP x TP": both},
}


def launch(world: int, folder: Path, *what: str) -> list[Found]:
    """Run one job of so many processes, and return what each rank has found."""
    return jobs.launch("tests.checkpoint_ranks", folder, *what, world=world, seconds=400)


@cache
def plan_of(name: str) -> gp.Plan:
    return gp.trace(MODELS[name].build)


@cache
def state_for(name: str) -> State:
    return other_state(MODELS[name].build)


def write_forms(folder: Path) -> None:
    """Every model in some of the forms, and random parts of it."""
    for name in NAMES:
        tensors, draw = state_for(name), random.Random(name)
        for form in WHOLE:
            (folder / name / form).mkdir(parents=True)
            FORMS[form](folder / name / form, tensors)
        for number in range(3):
            some = {key: tensor for key, tensor in tensors.items() if draw.random() < 0.6}
            one_file(folder / name / f"part {number}", some)


PATHS = {"safetensors": "model.safetensors", "index": "model.safetensors.index.json", "torch": "model.pt", "dcp": "dcp"}
PATHS |= {f"part {number}": "model.safetensors" for number in range(3)}

# -- loading ------------------------------------------------------------------------------------------------------------


def expected_of(name: str, some: State) -> tuple[State, torch.Tensor]:
    """What eager gives, and where it leaves the generator."""
    module = eager(MODELS[name].build, some, SEED)
    state = torch.get_rng_state()
    return {key: tensor.detach().clone() for key, tensor in members(module).items()}, state


def loaded(name: str, shard: Shard, path: Path, some: State, dtype: torch.dtype | None = None) -> Found:
    """What is not as eager has it."""
    plan = plan_of(name)
    module = shard((plan.cast(dtype) if dtype else plan).meta_module(), MODELS[name])
    torch.manual_seed(100 + dist.get_rank())
    before = torch.get_rng_state()
    gp.materialize(module, seed=SEED, checkpoint=path)
    after = torch.get_rng_state()
    values, end = expected_of(name, some)
    if dtype:
        values = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in values.items()}
    expected = end if is_drawn(plan.graph, some) else before
    return {
        "differing": differing(values, members(module)),
        "meta": left_on_meta(module),
        "generator": torch.equal(after, expected),
    }


def load(folder: Path) -> list[Found]:
    """Every layout for this number of processes, with every model and every checkpoint."""
    found = []
    for name in NAMES:
        tensors, draw = state_for(name), random.Random(name)
        states = dict.fromkeys(WHOLE, tensors)
        for number in range(3):
            states[f"part {number}"] = {key: tensor for key, tensor in tensors.items() if draw.random() < 0.6}
        for layout, shard in LAYOUTS[dist.get_world_size()].items():
            for form, some in list(states.items())[:: 1 if dist.get_world_size() == 2 else 3]:
                case = {"model": name, "layout": layout, "form": form}
                found.append(case | tried(partial(loaded, name, shard, folder / name / form / PATHS[form], some)))
    return found


def tried(check: Callable[[], Found]) -> Found:
    try:
        return check()
    except Exception:
        return {"error": traceback.format_exc()}


# -- saved by several ranks ---------------------------------------------------------------------------------------------


def save(folder: Path) -> list[Found]:
    """Each model, sharded in each way, as DCP writes it."""
    for name in NAMES:
        for layout, shard in LAYOUTS[dist.get_world_size()].items():
            module = shard(plan_of(name).meta_module(), MODELS[name])
            gp.materialize(module, checkpoint=folder / name / "safetensors" / "model.safetensors")
            state = module.state_dict() if layout == "TP" else get_model_state_dict(module)
            state_dict_saver.save(state, checkpoint_id=folder / name / f"saved by {layout}")
    return []


def again(folder: Path) -> list[Found]:
    """What several ranks have saved, in this number of processes; that of TP is converted too."""
    found = []
    for name in NAMES[dist.get_world_size() == 3 :]:  # Llama takes long to import
        for path in sorted((folder / name).glob("saved by *")):
            dtype = torch.bfloat16 if path.name.endswith("TP") else None
            for layout, shard in LAYOUTS[dist.get_world_size()].items():
                case = {"model": name, "layout": layout, "form": path.name}
                found.append(case | tried(partial(loaded, name, shard, path, state_for(name), dtype)))
    return found


# -- broken on one rank -------------------------------------------------------------------------------------------------

BROKEN = ("cut short", "absent", "other names", "other shape", "other dtype", "fails while it is read", "other options", "fine")


def broken(folder: Path) -> list[Found]:
    """Rank 1 sees another file than the others, or none: what each rank raises, how soon, and what is left."""
    return [met(folder, what) for what in BROKEN]


def met(folder: Path, what: str) -> Found:
    rank = dist.get_rank()
    path = folder / what / f"{rank}" / "model.safetensors"
    tensors = other_state(lambda: nn.Linear(6, 8))
    odd = rank == 1
    if odd and what == "other names":
        tensors["other"] = torch.ones(3)
    if odd and what == "other shape":
        tensors["extra"] = torch.ones(3)
    if odd and what == "other dtype":
        tensors["weight"] = tensors["weight"].double()
    path = one_file(path.parent, tensors)
    if odd and what == "cut short":
        path.write_bytes(path.read_bytes()[:-5])
    if odd and what == "absent":
        path.unlink()
    os.chdir(path.parent)  # the same path on every rank, and another file
    module: nn.Module = gp.trace(nn.Linear, 6, 8).meta_module()
    fully_shard(module, mesh=line())
    torch.manual_seed(5)
    before, start = torch.get_rng_state(), time.monotonic()
    error: Exception | None = None
    options: Any = {"unexpected": "ignore"} if what == "other shape" or (odd and what == "other options") else {}
    reads = fails if odd and what == "fails while it is read" else os.preadv
    try:
        with mock.patch("os.preadv", reads):
            gp.materialize(module, seed=0, checkpoint="model.safetensors", timeout=30, **options)
    except Exception as raised:
        error = raised
    parameters = [local(tensor) for tensor in module.parameters()]
    return {
        "what": what,
        "error": type(error).__name__ if error else None,
        "message": str(error),
        "seconds": time.monotonic() - start,
        "meta": [tensor.is_meta for tensor in parameters],
        "generator": torch.equal(before, torch.get_rng_state()),
    }


def fails(descriptor: int, buffers: Any, offset: int) -> int:
    """`os.preadv` on a disk whose data, and not the header, is gone."""
    if offset > 100:
        raise OSError(5, "Input/output error")
    return _preadv(descriptor, buffers, offset)


_preadv = os.preadv
WHAT = {"load": load, "save": save, "again": again, "broken": broken}


def main(folder: str, *what: str) -> None:
    """One rank's work."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=90))
    found = {each: WHAT[each](Path(folder)) for each in what}
    jobs.finish(folder, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
