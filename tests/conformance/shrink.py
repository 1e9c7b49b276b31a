"""Small versions of the transformers library's architectures, made from their default configurations without a list of models.

A configuration is shrunk by the meaning of its fields' names: fewer layers, widths divided by a power of two (which keeps heads
and groups dividing them), fewer experts, a small vocabulary. Where a model does not accept that, gentler levels are tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LARGEST = 40_000_000  # elements; what is larger after shrinking is left out

_LAYERS = re.compile(r"(^|_)(layers?|depth|blocks|stages?_repeats|n_layer|num_hidden_layers)$")
_WIDTH = re.compile(r"(size|dims?|embd|d_model|d_ff|d_kv|channels?|width|units|rank|inner|features|filters|hidden)$")
_EXPERTS = re.compile(r"(experts|n_routed_experts)$")
_NEVER = re.compile(
    r"patch|image|window|kernel|vocab|pool|stride|block_size|group|bucket|tile|crop|grid|state|codebook_size|chunk"
)
_TOKENS = re.compile(r"token_(id|index)s?$")

Changes = dict[str, Any]


def levels() -> Iterator[dict[str, int]]:
    """How far to shrink, the smallest first: the divisor of widths, the number of layers, whether the vocabulary shrinks too."""
    for divisor in (16, 8, 4, 32, 2, 1):
        yield {"divisor": divisor, "layers": 2, "vocabulary": 1}
    for divisor in (16, 8, 1):
        yield {"divisor": divisor, "layers": 0, "vocabulary": 1}
    for divisor in (8, 1):
        yield {"divisor": divisor, "layers": 2, "vocabulary": 0}
    yield {"divisor": 1, "layers": 0, "vocabulary": 0}


def shrunk(config: Any, level: dict[str, int]) -> Any:
    """A configuration like `config`, shrunk by `level`, the configurations inside it included."""
    changes: Changes = {}
    for name, value in list(config.to_dict().items()):
        inner = getattr(config, name, None)
        if hasattr(inner, "to_dict") and hasattr(inner, "model_type"):
            changes[name] = shrunk(inner, level).to_dict()
        elif (smaller := _smaller(name, value, level)) is not value:
            changes[name] = smaller
    fields = {**config.to_dict(), **changes}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):  # one entry a layer: made anew
        if level["layers"] and isinstance(fields.get(name), list):
            fields[name] = fields[name][: level["layers"]]
    return type(config).from_dict(fields)


def _smaller(name: str, value: Any, level: dict[str, int]) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return _smaller_list(name, value, level)
    if not isinstance(value, int):
        return value
    if "vocab" in name and level["vocabulary"]:
        return min(value, 200)
    if _TOKENS.search(name) and level["vocabulary"]:
        return min(value, 150)
    if _LAYERS.search(name) and level["layers"]:
        return min(value, level["layers"])
    if _EXPERTS.search(name) and "per" not in name:
        return min(value, 8)
    if "max_position" in name or name in ("n_positions", "n_ctx", "max_source_positions", "max_target_positions"):
        return min(value, 128)
    if _is_width(name, value, level):
        return value // level["divisor"]
    return value


def _smaller_list(name: str, value: Any, level: dict[str, int]) -> Any:
    if name in ("depths", "layers", "num_layers") and level["layers"]:
        return type(value)(min(each, 1) for each in value)
    if all(_is_width(name.rstrip("s"), each, level) for each in value) and "out_" not in name:
        return type(value)(each // level["divisor"] for each in value)
    return value


def _is_width(name: str, value: int, level: dict[str, int]) -> bool:
    fits = value >= 2 * level["divisor"] and value % level["divisor"] == 0
    return fits and bool(_WIDTH.search(name)) and not _NEVER.search(name)


def buildable(model: type[nn.Module], config_class: Any) -> Any:
    """The smallest configuration that `model` accepts, or None where there is none of a reasonable size."""
    try:
        base = config_class()
    except Exception:
        return None
    for level in levels():
        try:
            config = shrunk(base, level)
            with torch.device("meta"):
                elements = sum(each.numel() for each in model(config).parameters())
            if elements <= LARGEST:
                model(config)
                return config
        except Exception:  # what a model does not accept is the next level's business
            continue
    return None
