"""Checkpoints in every form that is read, made of a state dict, and what eager does with one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import state_dict_saver

import groundplan as gp

from .law import content, is_opaque, named_tensors, roots

State = dict[str, torch.Tensor]


def one_file(folder: Path, tensors: State, name: str = "model.safetensors") -> Path:
    """All tensors in one file, whose form its name says."""
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".safetensors"):
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder / name


def several_files(folder: Path, tensors: State, stem: str = "model", suffix: str = "safetensors", count: int = 3) -> Path:
    """Every third tensor in one of three files, and the index of them."""
    where: dict[str, str] = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}.{suffix}"
        part = {key: tensors[key] for key in list(tensors)[number::count]}
        one_file(folder, part, name)
        where |= dict.fromkeys(part, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": where}))
    return index


def hub(folder: Path) -> Path:
    """Makes a folder look like one of the hub's; returns the folder."""
    (folder / "config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"something else")
    return folder


def saved_by_dcp(folder: Path, tensors: Mapping[str, Any]) -> Path:
    state_dict_saver.save(dict(tensors), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def legacy(folder: Path, tensors: State) -> Path:
    torch.save(tensors, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def nested(tensors: State) -> dict[str, Any]:
    """Dicts in dicts instead of dots."""
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *path, key = name.split(".")
        place = found
        for each in path:
            place = place.setdefault(each, {})
        place[key] = tensor
    return found


def lightning(folder: Path, tensors: State) -> Path:
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "global_step": 7, "state_dict": tensors, "optimizer_states": [optimizer], "callbacks": {}}
    torch.save(content | {"hyper_parameters": {"width": 3}}, folder / "last.ckpt")
    return folder / "last.ckpt"


def dumped(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "model.pt")
    return folder / "model.pt"


FORMS: dict[str, Callable[[Path, State], Any]] = {
    "safetensors": one_file,
    "index": several_files,
    "folder": lambda folder, tensors: one_file(folder, tensors).parent,
    "folder, any name": lambda folder, tensors: one_file(folder, tensors, "weights.safetensors").parent,
    "folder with index": lambda folder, tensors: several_files(folder, tensors).parent,
    "hub": lambda folder, tensors: hub(one_file(folder, tensors).parent),
    "hub, sharded": lambda folder, tensors: hub(several_files(folder, tensors).parent),
    "hub, bin": lambda folder, tensors: hub(one_file(folder, tensors, "pytorch_model.bin").parent),
    "hub, bin, sharded": lambda folder, tensors: hub(several_files(folder, tensors, "pytorch_model", "bin").parent),
    "dcp": saved_by_dcp,
    "dcp, nested": lambda folder, tensors: saved_by_dcp(folder, nested(tensors)),
    "torch": lambda folder, tensors: one_file(folder, tensors, "model.pt"),
    "torch, nested": lambda folder, tensors: dumped(folder, nested(tensors)),
    "legacy": legacy,
    "lightning": lightning,
    "mapping": lambda folder, tensors: tensors,
    "string": lambda folder, tensors: str(one_file(folder, tensors)),
}


# -- what eager does ----------------------------------------------------------------------------------------------------


def state_of(built: Any) -> State:
    """The state dicts of all that a constructor returns."""
    found: State = {}
    for prefix, root in roots(built).items():
        found |= {f"{prefix}.{key}" if prefix else key: value for key, value in root.state_dict().items()}
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def other_state(build: Callable[[], Any], seed: int = 5) -> State:
    """A state dict in which nothing is as the constructor makes it; what shares memory there shares it here."""
    torch.manual_seed(seed)
    tensors = state_of(build())
    seen = set()
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        if not is_opaque(tensor) and storage.data_ptr() not in seen and tensor.dtype != torch.bool:
            seen.add(storage.data_ptr())
            torch.empty(0, dtype=tensor.dtype).set_(storage).add_(1)
    return {name: tensor.detach() for name, tensor in tensors.items()}


def eager(build: Callable[[], Any], tensors: State, seed: int, dtype: torch.dtype | None = None) -> Any:
    """`build()` and `load_state_dict`; names that are missing keep what the constructor gives them."""
    torch.manual_seed(seed)
    built = build()
    for prefix, root in roots(built).items():
        if dtype:
            root.to(dtype)
        own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        assert not root.load_state_dict(own, strict=False).unexpected_keys
    return built


def is_drawn(graph: gp.ParamGraph, some: State) -> bool:
    """Whether anything that a checkpoint with these tensors does not have depends on random numbers."""
    made = [each for each in graph.tensors if each.kind == "attribute" or not any(name in some for name in each.names)]
    return bool(graph.seed_dependent) or any(op.random for each in made for op in graph.recipe(each.name))


def assert_same_values(expected: Any, found: Any) -> None:
    """Raise `AssertionError` where two modules differ in their tensors: names, classes, geometry, bits, ties, shared memory."""
    left, right = named_tensors(expected), named_tensors(found)
    assert list(left) == list(right)
    for name, one in left.items():
        other = right[name]
        assert type(one) is type(other), name
        if nn.parameter.is_lazy(one) or is_opaque(one):
            continue
        for what in ("dtype", "device", "shape", "requires_grad"):
            assert getattr(one, what) == getattr(other, what), (name, what, getattr(one, what), getattr(other, what))
        assert one.stride() == other.stride(), (name, one.stride(), other.stride())
        assert content(one) == content(other), name
    assert groups(left, id) == groups(right, id)
    assert groups(left, memory) == groups(right, memory)


def groups(tensors: State, key: Callable[[torch.Tensor], Any]) -> list[list[str]]:
    found: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        found.setdefault(key(tensor), []).append(name)
    return sorted(found.values())


def memory(tensor: torch.Tensor) -> Any:
    if nn.parameter.is_lazy(tensor) or is_opaque(tensor) or tensor.is_meta or not tensor.untyped_storage().nbytes():
        return id(tensor)
    return tensor.untyped_storage().data_ptr()
