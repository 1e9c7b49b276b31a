"""A hub's checkpoint under the names, and in the pieces, of the transformers model that it is for.

What `from_pretrained` does with each key of a file is done here to entries, by transformers' own conversions and in its order:

1. every key is renamed, and keys that make up one tensor are collected (`_collected`)
2. each collection becomes one or several entries of the model (`_made`)
3. tied weights get the entry of the one name that the checkpoint has (`_share_ties`)
4. keys without a place in the model are sorted into those that transformers ignores and those that it warns of

Nothing is read meanwhile. This file imports transformers only when it is handed one of its models.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..tracer.errors import CheckpointError
from .boxes import Box, whole_box
from .entries import Entry
from .tiles import Tiled, TiledEntry, Untiled, files_of
from .unwrapped import inside, plain_class, unwrapped


@dataclass(frozen=True)
class Converted:
    """A checkpoint as a model sees it."""

    entries: Mapping[str, Entry]
    """By the names of the model's state dict, without wrappers' prefixes; all names of a tied weight are there if one is."""
    ignored: tuple[str, ...]
    """Keys of the files that transformers drops without a word, such as `rotary_emb.inv_freq`."""
    unexpected: tuple[str, ...]
    """Other keys of the files that the model has no place for; transformers warns of them."""
    optional: tuple[str, ...]
    """Names of the model that are missing, which transformers thinks nothing of: the constructor's values are right."""
    conversions: tuple[Any, ...]
    """transformers' conversions that were used, which `save_pretrained` undoes."""


def can_load(module: nn.Module, directory: str | os.PathLike[str]) -> bool:
    """Whether `directory` is one that transformers loads from, and `module`, maybe sharded or wrapped, a model of transformers.

    Raises `CheckpointError` where the checkpoint there is a quantized one.
    """
    if not _is_pretrained(module) or not is_transformers(directory):
        return False
    _check_not_quantized(_config_of(Path(directory)), directory)
    return True


def is_transformers(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory's `config.json` is one of transformers, and the process uses transformers at all."""
    return "transformers.modeling_utils" in sys.modules and "model_type" in _config_of(Path(directory))


def converted(module: nn.Module, entries: Mapping[str, Entry]) -> Converted:
    """The entries of a hub's checkpoint, given by their names in its files, by the names of `module`, which `can_load` accepts.

    Raises `CheckpointError` where a conversion of transformers fails, as it does for tensors that do not fit together.
    """
    model: Any = unwrapped(module)
    conversions = _conversions(model)
    state = model.state_dict(keep_vars=True)
    jobs, homeless = _collected(model, conversions, state, entries)
    found: dict[str, Entry] = {}
    latest = _Latest()
    for job in jobs:
        found.update(_made(job, model, state, latest))
    for name in [name for name in found if name not in state]:
        homeless.setdefault(name, []).extend(source.name for source in _sources(found.pop(name)))
    _share_ties(model, state, found)
    ignored, unexpected, optional = _sorted_out(model, homeless, [name for name in state if name not in found])
    return Converted(found, ignored, unexpected, optional, tuple(each for each in conversions if each.was_used()))


def finish_loading(module: nn.Module, directory: str | os.PathLike[str], checkpoint: Converted) -> None:
    """Give a loaded model what `from_pretrained` gives it besides tensors: the generation config, and the way to save it back.

    A custom `generate` that a directory brings along is code, and stays there. The module is left in the mode that it is in,
    which after a constructor is training, where `from_pretrained` says `.eval()`.
    """
    kept = inside(module)
    kept._weight_conversions = list(checkpoint.conversions)  # type: ignore[assignment]
    model: Any = unwrapped(module)
    if not (type(model).can_generate() and hasattr(model, "adjust_generation_fn")):
        return
    options: dict[str, Any] = {"cache_dir": None, "force_download": False, "proxies": None, "local_files_only": True}
    options |= {"token": None, "revision": "main", "subfolder": "", "trust_remote_code": False}
    model.adjust_generation_fn(None, False, None, str(directory), **options)
    kept.generation_config = model.generation_config


# -- what may be loaded -------------------------------------------------------------------------------------------------


def _is_pretrained(module: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")  # whoever has one of its models has imported it
    return modeling is not None and issubclass(plain_class(inside(module)), modeling.PreTrainedModel)


def _config_of(directory: Path) -> dict[str, Any]:
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _check_not_quantized(config: Mapping[str, Any], directory: str | os.PathLike[str]) -> None:
    inner = [config, *(each for each in config.values() if isinstance(each, dict))]
    quantized = next((each["quantization_config"] for each in inner if each.get("quantization_config")), None)
    if quantized is None:
        return
    method = quantized.get("quant_method") if isinstance(quantized, dict) else None
    raise CheckpointError(
        f"the checkpoint in {os.fspath(directory)} is quantized (quantization_config: {method or 'no quant_method given'}), and "
        "its tensors are no plain weights. Save it without quantization first: model = from_pretrained(directory); "
        "model.dequantize(); model.save_pretrained(other), or load it with from_pretrained itself"
    )


# -- 1. keys are renamed and collected ----------------------------------------------------------------------------------


@dataclass
class _Job:
    """What becomes of a key, or of several that are converted together."""

    name: str
    """In the model; where a conversion makes several tensors, the first one's."""
    converter: Any
    """None: the key is only renamed."""
    sources: dict[str, list[Entry]] = field(default_factory=dict)
    """By the pattern of the converter that they match."""


def _conversions(model: Any) -> list[Any]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError as error:
        raise CheckpointError(
            f"reading a hub's checkpoint needs a newer transformers ({error}): pip install --upgrade transformers"
        ) from error
    return list(get_model_conversion_mapping(model))


def _collected(
    model: Any, conversions: Iterable[Any], state: Mapping[str, Any], entries: Mapping[str, Entry]
) -> tuple[list[_Job], dict[str, list[str]]]:
    """The jobs; and the keys for which the model has no place, by the names that they would have there.

    As the loop of `transformers.core_model_loading.convert_and_load_state_dict_in_model`, which cannot be called for this: it
    reads and places tensors on its way.
    """
    from transformers import core_model_loading as core

    renamings = [each for each in conversions if isinstance(each, core.WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, core.WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    prefix = model.base_model_prefix
    jobs: dict[str, _Job] = {}
    homeless: dict[str, list[str]] = {}
    for key in sorted(entries, key=core.dot_natural_key):
        name, pattern = core.rename_source_key(key, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if name not in state and key in state:  # it should not have been renamed
            name, pattern = core.rename_source_key(key, [], [], prefix, state)  # type: ignore[arg-type]
        if name not in state:
            homeless.setdefault(name, []).append(key)
            continue
        job = jobs.setdefault(name, _Job(name, None if pattern is None else by_pattern[pattern]))
        job.sources.setdefault(key if pattern is None else pattern, []).append(entries[key])
    return list(jobs.values()), homeless


# -- 2. collections become entries --------------------------------------------------------------------------------------


def _made(job: _Job, model: Any, state: Mapping[str, Any], latest: _Latest) -> dict[str, Entry]:
    """The entries that a job makes.

    Most conversions only move elements about in boxes (experts stacked, projections split): of these just what is wanted is
    read. The others (interleaved rows, dequantized blocks) read their sources whole, whatever part of them is wanted.
    """
    if job.converter is None:
        return {job.name: next(iter(job.sources.values()))[0]}  # of two keys for one name, transformers takes the first
    try:
        tiled = _run(job, model, {pattern: [Tiled.of(each) for each in group] for pattern, group in job.sources.items()})
        return {name: tensor.entry(name) for name, tensor in tiled.items()}
    except Untiled:
        return _Computation(job, model, state[job.name].dtype).entries(latest)


def _run(job: _Job, model: Any, tensors: dict[str, list[Any]]) -> dict[str, Any]:
    """What the converter makes of the tensors; `tensors` is emptied, so that each can go as soon as it is used."""
    converter = copy.deepcopy(job.converter)
    converter.collected_tensors.update(tensors)
    tensors.clear()
    try:
        made = converter.convert(job.name, model=model, config=model.config)
    except Untiled:
        raise
    except Exception as error:
        sources = [each for group in job.sources.values() for each in group]
        shapes = ", ".join(f"{each.name} {list(each.shape)}" for each in sources[:4]) + ", …" * (len(sources) > 4)
        raise CheckpointError(
            f"transformers' conversion of {len(sources)} tensors ({shapes}, in {files_of(sources)}) into {job.name} fails: "
            f"{error}. The checkpoint may be of another model, or not whole"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True, eq=False)
class _Computation:
    """A conversion that needs its sources whole."""

    job: _Job
    model: Any
    dtype: torch.dtype
    """Of the model's tensor: transformers converts to it before anything else."""

    def entries(self, latest: _Latest) -> dict[str, Entry]:
        """Shapes are found on meta tensors."""
        made = self.run(lambda source: torch.empty(source.shape, dtype=self.dtype, device="meta"))
        return {name: _ComputedEntry(name, tuple(each.shape), each.dtype, self, latest) for name, each in made.items()}

    def values(self) -> dict[str, torch.Tensor]:
        """The tensors, from what is read of the files now."""
        return self.run(self._read)

    def run(self, tensor_of: Any) -> dict[str, torch.Tensor]:
        groups = self.job.sources.items()
        return _run(self.job, self.model, {pattern: [tensor_of(each) for each in group] for pattern, group in groups})

    def _read(self, source: Entry) -> torch.Tensor:
        out = torch.empty(source.shape, dtype=self.dtype)
        source.read(whole_box(source.shape), out)
        return out

    def sources(self) -> list[Entry]:
        return [each for group in self.job.sources.values() for each in group]


class _Latest:
    """What the computation that ran last has made: its other tensors, which stand near in the model, need not read again.

    Of one computation only, and one at a time: its sources and results are whole tensors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._computation: _Computation | None = None
        self._values: dict[str, torch.Tensor] = {}

    def value(self, computation: _Computation, name: str) -> torch.Tensor:
        with self._lock:
            if self._computation is not computation:
                self._computation, self._values = None, {}
                self._values = computation.values()
                self._computation = computation
            return self._values[name]


@dataclass(frozen=True)
class _ComputedEntry:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    computation: _Computation
    latest: _Latest

    divisible = False

    @property
    def where(self) -> str:
        return files_of(self.computation.sources())

    @property
    def position(self) -> tuple[str, int]:
        return self.computation.sources()[0].position

    @property
    def elements(self) -> Any:
        return id(self.computation), self.name

    def expect(self, box: Box) -> None:
        pass

    def read(self, box: Box, out: torch.Tensor) -> None:
        whole = self.latest.value(self.computation, self.name)
        out.copy_(whole[tuple(slice(each.start, each.stop, each.step) for each in box)])


def _sources(entry: Entry) -> list[Entry]:
    if isinstance(entry, _ComputedEntry):
        return entry.computation.sources()
    if isinstance(entry, TiledEntry):
        return list({id(tile.source): tile.source for tile in entry.tiles}.values())
    return [entry]


# -- 3. tied weights ----------------------------------------------------------------------------------------------------


def _share_ties(model: Any, state: Mapping[str, Any], found: dict[str, Entry]) -> None:
    """Give tied names the entry of the one that the checkpoint has, which may be any of them."""
    groups: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(name)
    for names in groups.values():
        stored = [name for name in names if name in found]
        for name in names if stored else ():
            mine, first = state.get(name), state.get(stored[0])
            if name not in found:
                found[name] = found[stored[0]]
            elif mine is first and found[name] is not found[stored[0]]:
                found[name] = found[stored[0]] = _TwiceStored(found[stored[0]], name, found[name])


@dataclass(frozen=True)
class _TwiceStored:
    """A tied weight that the checkpoint has under two names, which `from_pretrained` unties where they differ."""

    entry: Entry
    other_name: str
    other: Entry

    divisible = True

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.dtype

    @property
    def where(self) -> str:
        return self.entry.where

    @property
    def position(self) -> tuple[str, int]:
        return self.entry.position

    @property
    def elements(self) -> Any:
        return self.entry.elements

    def expect(self, box: Box) -> None:
        self.entry.expect(box)

    def read(self, box: Box, out: torch.Tensor) -> None:
        """The box, and the other's to compare it with: twice the bytes, but few checkpoints are so."""
        self.entry.read(box, out)
        again = torch.empty_like(out)
        if self.other.shape == self.shape:
            self.other.read(box, again)
        if self.other.shape != self.shape or not torch.equal(out, again):
            raise CheckpointError(
                f"{self.other_name} is tied to another weight in this model, and the checkpoint holds different values for them "
                f"({self.name} in {self.where}, {self.other.name} in {self.other.where}): build the model with "
                "tie_word_embeddings=False in its config, as from_pretrained would untie it"
            )


# -- 4. what is left ----------------------------------------------------------------------------------------------------


def _sorted_out(
    model: Any, homeless: Mapping[str, list[str]], missing: Iterable[str]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The keys that transformers ignores, the other ones without a place, and the missing names that it does not mind."""
    info = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(homeless))
    model._adjust_missing_and_unexpected_keys(info)
    ignored = [key for name, keys in homeless.items() if name not in info.unexpected_keys for key in keys]
    unexpected = [key for name, keys in homeless.items() if name in info.unexpected_keys for key in keys]
    return tuple(ignored), tuple(unexpected), tuple(name for name in missing if name not in info.missing_keys)
