"""SPEC, the command line's word for a constructor: `package.module:callable`, or a transformers `config.json`.

A SPEC never reaches for the network and never runs code that came with a configuration file (`auto_map` is refused).
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .tracer.errors import SpecError, nearest

FORMS = "a SPEC is `package.module:callable` (my_models.vit:ViT) or the path of a transformers config.json"


@dataclass(frozen=True)
class Spec:
    """A constructor and its arguments: `gp.trace(spec.build, *spec.args, **spec.kwargs)`.

    `config` holds the fields of the configuration file, overrides included; it is None for a `module:callable`.
    """

    name: str
    build: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def parse_spec(spec: str, kwargs: Mapping[str, Any] | None = None) -> Spec:
    """The constructor that `spec` names, with `kwargs` as its keyword arguments.

    For `package.module:callable` the current directory is importable, as under `python -m`, and stays so. For a configuration
    file (or a directory that holds a `config.json`) the class is `architectures[0]` and `kwargs` replace fields of the file.
    Raises `SpecError` where `spec` or `kwargs` name nothing that can be built.

    >>> parse_spec("torch.nn:Linear", {"in_features": 2, "out_features": 3}).build
    <class 'torch.nn.modules.linear.Linear'>
    >>> parse_spec("torch.nn:Liner")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    groundplan.tracer.errors.SpecError: 'torch.nn:Liner': torch.nn has no attribute 'Liner'; did you mean Linear, ...
    """
    kwargs = dict(kwargs or {})
    path = Path(spec)
    if path.suffix == ".py":
        raise SpecError(f"{spec!r} is a Python file; write its module and a callable in it: {_dotted(spec)}:MyModel")
    if path.is_file() or path.is_dir():
        return _from_config(path, kwargs)
    if ":" not in spec:
        raise SpecError(f"{spec!r} is no file and has no colon; {FORMS}{_hub_hint(spec)}")
    return _from_callable(spec, kwargs)


def _dotted(path: str) -> str:
    return ".".join(part for part in Path(path).with_suffix("").parts if part not in ("/", ".", ".."))


def _hub_hint(spec: str) -> str:
    if spec.count("/") != 1 or spec.endswith(".json"):
        return ""
    return ". Names on a model hub are not looked up: download the model's config.json and give its path"


# -- package.module:callable --------------------------------------------------------------------------------------------


def _from_callable(spec: str, kwargs: dict[str, Any]) -> Spec:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise SpecError(f"{spec!r} lacks the part {'before' if attribute else 'after'} the colon; {FORMS}")
    if "/" in module_name or module_name.endswith(".py"):
        raise SpecError(f"{spec!r}: {module_name!r} is a path, not a module; write {_dotted(module_name)}:{attribute}")
    build = _attribute(_import(module_name, spec), attribute, spec)
    if isinstance(build, torch.nn.Module):
        raise SpecError(f"{spec!r} is a module that is already built; name its class, or a function that returns it")
    if not callable(build):
        raise SpecError(f"{spec!r} is {build!r}, of type {type(build).__name__}, which cannot be called; {FORMS}")
    _check_arguments(spec, build, kwargs)
    return Spec(spec, build, kwargs=kwargs)


def _import(name: str, spec: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            raise SpecError(f"{spec!r}: there is no module {error.name!r} here or on sys.path; {FORMS}") from error
        raise SpecError(f"{spec!r}: importing {name} failed: {error}") from error
    except Exception as error:  # whatever the user's module raises, said in one line; the cause is kept
        raise SpecError(f"{spec!r}: importing {name} failed: {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, dotted: str, spec: str) -> Any:
    found: Any = module
    seen = module.__name__
    for part in dotted.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise SpecError(f"{spec!r}: {seen} has no attribute {part!r}{nearest(part, dir(found))}") from None
        seen = f"{seen}.{part}"
    return found


def _check_arguments(spec: str, build: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(build)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        signature.bind(**kwargs)
    except TypeError as error:
        raise SpecError(
            f"{spec!r} cannot be called with --kwargs {json.dumps(dict(kwargs), default=repr)}: {error}; "
            f"its signature is {signature}"
        ) from None


# -- a transformers config.json -----------------------------------------------------------------------------------------


def _from_config(path: Path, kwargs: dict[str, Any]) -> Spec:
    file = _config_file(path)
    published = _read_json(file)
    fields = {**published, **kwargs}
    _refuse_remote_code(file, fields)
    with offline():
        transformers = _import_transformers(file)
        model_class = _model_class(transformers, file, fields)
        _check_overrides(transformers, file, published, kwargs)
        config = _build_config(transformers, file, fields)
    return Spec(str(file), model_class, (config,), config=fields)


@contextmanager
def offline() -> Iterator[None]:
    """Keeps the model hub's client, where it is installed, off the network for the duration."""
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        yield
        return
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _config_file(path: Path) -> Path:
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SpecError(f"{str(path)!r} is a directory without a config.json; {FORMS}")
    return file


def _read_json(file: Path) -> dict[str, Any]:
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{file} is not valid JSON: {error}; {FORMS}") from error
    except OSError as error:
        raise SpecError(f"{file} cannot be read: {error.strerror}") from error
    if not isinstance(fields, dict):
        raise SpecError(f"{file} holds a JSON {type(fields).__name__}; a configuration is an object with `model_type`")
    return fields


def _refuse_remote_code(file: Path, fields: Mapping[str, Any]) -> None:
    for where in _paths_to("auto_map", fields):
        raise SpecError(
            f"{file}: `{where}` asks for code that comes with the model, which groundplan never runs; remove it when "
            "transformers has the class, or import the code yourself and give `package.module:callable`"
        )


def _paths_to(key: str, value: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == key:
                yield f"{prefix}{name}"
            yield from _paths_to(key, inner, f"{prefix}{name}.")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _paths_to(key, inner, f"{prefix}{index}.")


def _import_transformers(file: Path) -> ModuleType:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise SpecError(f"{file} needs transformers ({error}): pip install 'transformers>=5'") from error


def _model_class(transformers: ModuleType, file: Path, fields: Mapping[str, Any]) -> Callable[..., Any]:
    architectures = fields.get("architectures")
    if not architectures:
        raise SpecError(
            f'{file} has no `architectures`, so it names no class; add "architectures": ["LlamaForCausalLM"] to it, '
            """or give --kwargs '{"architectures": ["LlamaForCausalLM"]}', with the class you mean"""
        )
    if not isinstance(architectures, list) or not isinstance(architectures[0], str):
        raise SpecError(f'{file}: `architectures` is {architectures!r}; it is a list of class names: ["LlamaForCausalLM"]')
    name = architectures[0]
    found = getattr(transformers, name, None)
    if missing := getattr(found, "_backends", None):
        raise SpecError(f"{file}: transformers' {name} needs packages that are not installed: {', '.join(missing)}")
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise SpecError(
            f"{file}: `architectures` names {name!r}, which is no model class of transformers {transformers.__version__}"
            f"{nearest(name, dir(transformers))}"
        )
    model_class: Callable[..., Any] = found
    return model_class


def _check_overrides(transformers: ModuleType, file: Path, published: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """A misspelled field would be taken, and change nothing."""
    if not kwargs:
        return
    config = _build_config(transformers, file, {**published, **{key: kwargs[key] for key in kwargs if key == "model_type"}})
    known = {*published, *dir(config), "attn_implementation", "torch_dtype", "dtype"}
    for key in kwargs:
        if key not in known and not hasattr(config, key):
            raise SpecError(f"{file}: --kwargs names {key!r}, which is no field of {type(config).__name__}{nearest(key, known)}")


def _build_config(transformers: ModuleType, file: Path, fields: Mapping[str, Any]) -> Any:
    rest = copy.deepcopy(dict(fields))  # configuration classes write into nested fields
    model_type = rest.pop("model_type", None)
    types = transformers.CONFIG_MAPPING
    if not isinstance(model_type, str) or model_type not in types:
        known = sorted(types.keys())
        hint = nearest(str(model_type), known) or '; give it one, such as "llama"'
        raise SpecError(f"{file}: `model_type` is {model_type!r}, which transformers {transformers.__version__} lacks{hint}")
    try:
        return transformers.AutoConfig.for_model(model_type, **rest)
    except Exception as error:  # each configuration class checks its fields in its own way; the cause is kept
        raise SpecError(f"{file}: {model_type} refuses these fields: {type(error).__name__}: {error}") from error
