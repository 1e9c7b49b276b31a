"""Quantizing: which layers are quantized and how, as data; torchao or bitsandbytes does it to each as soon as it is filled.

A torchao config is kept as torchao's own dictionary of it. It is made into a config again only by classes of torchao that are
nothing but records, so that a plan file can execute nothing else.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, StringConstraints, field_validator, model_validator

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .records import DTYPES, Record, dtype_name, dtype_named

BITSANDBYTES = ("bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8")
"""What bitsandbytes does, in Lightning's words: 4-bit floats (`dq`: their scales are quantized as well), and 8-bit integers."""

_FILTER = "a filter is a pattern of module names, a list of them, or a function of (module, name) that returns a bool"

Filter = str | Sequence[str] | Callable[[Any, str], bool] | None


# -- the saved records --------------------------------------------------------------------------------------------------


class Size(Record):
    """What quantizing makes of a weight of one shape and dtype: the bytes it takes then, and those that come and go meanwhile.

    Both are None where the machine that took the decision cannot do it.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int | None
    working: int | None

    @field_validator("dtype")
    @classmethod
    def _is_known(cls, name: str) -> str:
        dtype_named(name)
        return name


class Quantizing(Record):
    """The modules called `layers`, in the order in which they are quantized, and how: by a torchao config or bitsandbytes.

    `config` is torchao's dictionary of the config; `mode` one of `BITSANDBYTES`. `filter` is what the user gave, if patterns.
    """

    config: dict[str, JsonValue] | None = None
    mode: Literal["bnb.nf4", "bnb.nf4-dq", "bnb.fp4", "bnb.fp4-dq", "bnb.int8"] | None = None
    filter: tuple[Annotated[str, StringConstraints(min_length=1)], ...] | None = None
    layers: Annotated[tuple[str, ...], Field(min_length=1)]
    sizes: tuple[Size, ...] = ()

    @model_validator(mode="after")
    def _is_one_of_two(self) -> Quantizing:
        if (self.config is None) == (self.mode is None):
            raise ValueError("it has either a torchao config or a bitsandbytes mode")
        if self.config is not None and not isinstance(self.config.get("_type"), str):
            raise ValueError("the torchao config does not name its class under '_type'")
        return self

    def describe(self) -> str:
        """The config in a few words.

        >>> Quantizing(mode="bnb.nf4", layers=("head",)).describe()
        'bnb.nf4'
        """
        return self.mode or _described(self.config)

    def size_of(self, shape: Sequence[int], dtype: object) -> Size | None:
        """What becomes of a weight of this shape and dtype; None where that is not known."""
        return next((size for size in self.sizes if (size.shape, DTYPES[size.dtype]) == (tuple(shape), dtype)), None)


def _described(value: Any) -> str:
    """`Int8WeightOnlyConfig(granularity=PerRow(dim=-1))`, from torchao's dictionary."""
    if isinstance(value, dict) and "_type" in value:
        data = value.get("_data")
        if not isinstance(data, dict):
            return str(data)
        return f"{value['_type']}({', '.join(f'{key}={_described(each)}' for key, each in data.items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(_described, value))}]"
    return str(value)


# -- the door -----------------------------------------------------------------------------------------------------------


def filter_patterns(chosen: object) -> tuple[str, ...] | None:
    """The patterns of a filter; None where it has none, or is a function. Raises `DecisionError` for anything else."""
    if chosen is None or callable(chosen):
        return None
    patterns = (chosen,) if isinstance(chosen, str) else tuple(chosen) if isinstance(chosen, Iterable) else ()
    wrong = next((each for each in patterns if not isinstance(each, str) or not each), None)
    if not patterns or wrong is not None:
        raise DecisionError(f"filter={chosen!r} quantizes nothing; {_FILTER}")
    return patterns


def picks(pattern: str, name: str, is_linear: bool) -> bool:
    """Whether a pattern picks the module called `name`: linear layers by pattern, any module by its very name.

    >>> picks("layers.*", "layers.0.up", True), picks("layers.*", "layers.0", False), picks("embed", "embed", False)
    (True, False, True)
    """
    return name == pattern or (is_linear and fnmatchcase(name, pattern))


def check_patterns(patterns: Sequence[str], layers: Sequence[str], linears: Sequence[str]) -> None:
    """Raise `DecisionError` for a pattern that picks none of `layers`; `linears` are the names it could have picked."""
    for pattern in patterns:
        if not any(picks(pattern, name, True) for name in layers):
            raise DecisionError(f"the pattern {pattern!r} matches no linear layer{nearest(pattern, linears)}")


def check_layers(found: Quantizing, earlier: Iterable[Quantizing]) -> None:
    """Raise `DecisionError` where a layer is quantized twice."""
    for other in earlier:
        twice = next((name for name in found.layers if name in set(other.layers)), None)
        if twice is not None:
            raise DecisionError(
                f"{twice} is quantized already ({other.describe()}); give each call of quantize layers of its own, by filter="
            )


def check_quantizing(found: Quantizing, graph: ParamGraph) -> None:
    """Raise `DecisionError` where a layer is no module of `graph`."""
    names = {name for module in graph.modules for name in module.names}
    strange = next((name for name in found.layers if name not in names), None)
    if strange is not None:
        raise DecisionError(f"the plan quantizes {strange}, and there is no such module{nearest(strange, names)}")


def quantized_names(tensor: TensorNode, quantizing: Sequence[Quantizing]) -> dict[str, Quantizing]:
    """Under which of its names a tensor is the weight of a quantized layer."""
    owners = {f"{layer}.weight" if layer else "weight": each for each in quantizing for layer in each.layers}
    return {name: owners[name] for name in tensor.names if name in owners}


# -- torchao's configs as data ------------------------------------------------------------------------------------------


def torchao() -> ModuleType:
    """`torchao.core.config`; raises `DecisionError` where torchao is missing."""
    try:
        return importlib.import_module("torchao.core.config")
    except ImportError as error:
        raise DecisionError(f"quantizing needs torchao ({error}): pip install torchao") from error


def config_data(config: Any) -> dict[str, JsonValue]:
    """A torchao config as plain data; raises `DecisionError` where it cannot be read back from that."""
    core = torchao()
    if not isinstance(config, core.AOBaseConfig):
        what = f"quantize takes a torchao config such as Int8WeightOnlyConfig(), or one of {', '.join(BITSANDBYTES)}"
        raise DecisionError(f"{what}, not {config!r}{nearest(config, BITSANDBYTES) if isinstance(config, str) else ''}")
    name = type(config).__name__
    if name == "FqnToConfig":
        raise DecisionError(
            "FqnToConfig names modules itself; give each of its configs a call: plan.quantize(config, filter=names)"
        )
    try:
        data: dict[str, JsonValue] = core.config_to_dict(config)
        json.dumps(data, allow_nan=False)
        same = core.config_to_dict(config_of(data)) == data
    except (DecisionError, TypeError, ValueError, NotImplementedError) as error:
        raise DecisionError(
            f"a plan cannot keep this {name}, {_shown(config)}: {error}; take one of torchao's own, made of plain values"
        ) from error
    if not same:
        raise DecisionError(f"torchao reads another {name} back than was saved, {_shown(config)}; take one made of plain values")
    return data


def config_of(data: Any) -> Any:
    """The torchao config that `config_data` was given. Nothing is called but classes of torchao that are mere records."""
    core = torchao()
    for each in _typed(data):
        _check_typed(each, core)
    try:
        return core.config_from_dict(data)
    except (TypeError, ValueError, AssertionError) as error:
        raise DecisionError(
            f"torchao cannot read the config {_described(data)}: {error}; quantize anew with this torchao"
        ) from error


def _typed(value: Any) -> Iterator[dict[str, Any]]:
    """Every dictionary inside that names a class."""
    if isinstance(value, dict):
        if "_type" in value:
            yield value
        for each in value.values():
            yield from _typed(each)
    elif isinstance(value, list):
        for each in value:
            yield from _typed(each)


def _check_typed(value: dict[str, Any], core: ModuleType) -> None:
    name, data = value["_type"], value.get("_data")
    if name == "torch.dtype":
        known = isinstance(data, str) and data in DTYPES
    else:
        classes = list(_classes(name, core))
        known = bool(classes) and all(_is_record(each, data, core) for each in classes)
    if not known:
        raise DecisionError(
            f"torchao has no config, or part of one, called {name!r} with {_shown(data)}; quantize anew with this torchao"
        )


def _classes(name: Any, core: ModuleType) -> Iterator[Any]:
    """Whatever torchao may find under this name: it looks through its modules in no certain order."""
    for path in core.ALLOWED_AO_MODULES if isinstance(name, str) else ():
        try:
            module = importlib.import_module(path)
        except ImportError:  # a prototype that this installation cannot import; torchao passes over it as well
            continue
        if hasattr(module, name):
            yield getattr(module, name)


def _is_record(kind: Any, data: Any, core: ModuleType) -> bool:
    if not isinstance(kind, type) or not kind.__module__.startswith("torchao."):
        return False
    if issubclass(kind, enum.Enum):
        return isinstance(data, str) and data in kind.__members__
    is_tuple = issubclass(kind, tuple) and hasattr(kind, "_fields")
    return isinstance(data, dict) and (issubclass(kind, core.AOBaseConfig) or dataclasses.is_dataclass(kind) or is_tuple)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def size(shape: Sequence[int], dtype: Any, nbytes: int | None, working: int | None) -> Size:
    """The record of a size."""
    return Size(shape=tuple(shape), dtype=dtype_name(dtype), nbytes=nbytes, working=working)
