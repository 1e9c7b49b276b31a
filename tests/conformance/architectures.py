"""The transformers library's model types with all of their classes, heads included."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn


@cache
def _mappings() -> list[Any]:
    from transformers.models.auto import modeling_auto

    found = [getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING")]
    return [mapping for mapping in found if hasattr(mapping, "_model_mapping")]


def types(first: str, last: str) -> list[str]:
    """The names of the model types from `first` to `last`, by their first letter."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return sorted(name for name in CONFIG_MAPPING if first <= name[0] <= last)


def classes_of(model_type: str) -> tuple[Any, list[type[nn.Module]]]:
    """The configuration class of a type, and the model classes that the library knows for it."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]
    found: dict[type[nn.Module], None] = {}
    for mapping in _mappings():
        try:
            classes = mapping[config]
        except (KeyError, ValueError, ImportError, AttributeError):
            continue
        found.update(dict.fromkeys(classes if isinstance(classes, list | tuple) else [classes]))
    return config, list(found)
