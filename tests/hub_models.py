"""Small models of the transformers library, saved as hubs hold them, and inputs for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from .conformance.architectures import classes_of
from .conformance.shrink import buildable


@dataclass(frozen=True)
class Small:
    """A model class with a small configuration."""

    kind: Any
    config: Any

    def build(self) -> Any:
        """A new one, as its constructor leaves it."""
        return self.kind(copy.deepcopy(self.config))

    def saved(self, directory: Path, **options: Any) -> Path:
        """Saved with random values everywhere, as `save_pretrained` writes them."""
        torch.manual_seed(1)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.normal_(0, 0.1)
        model.save_pretrained(directory, **options)
        return directory

    def reference(self, directory: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
        """What transformers loads from there, and what it says about it."""
        model, info = self.kind.from_pretrained(directory, output_loading_info=True, **options)
        return model, info


def small(model_type: str, ending: str = "") -> Small:
    """A model of a type: the first class that ends so, else a language model if it has one, else one with another head."""
    config_class, classes = classes_of(model_type)
    heads = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    classes = [each for each in classes if each.__name__.endswith(ending)]
    classes.sort(key=lambda each: -2 * each.__name__.endswith(heads) - ("For" in each.__name__))
    config = buildable(classes[0], config_class)
    assert config is not None, f"no small configuration of {classes[0].__name__}"
    return Small(classes[0], config)


def mixture(kind: str = "Mixtral", experts: int = 4) -> Small:
    """A mixture of experts with this many of them."""
    import transformers as tf

    config = getattr(tf, f"{kind}Config")(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        num_local_experts=experts,
    )
    return Small(getattr(tf, f"{kind}ForCausalLM"), config)


# -- inputs -------------------------------------------------------------------------------------------------------------


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Random inputs of the kind that the model names as its main one."""
    torch.manual_seed(3)
    config = model.config
    made = _MAKERS[model.main_input_name](config)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        made["decoder_input_ids"] = torch.randint(3, 90, (2, 5))
    return made


def _ids(config: Any) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, min(90, config.get_text_config().vocab_size), (2, 7))}


def _pixels(config: Any) -> dict[str, torch.Tensor]:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 64
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": torch.randn(1, getattr(vision, "num_channels", 3), height, width)}


def _waves(config: Any) -> dict[str, torch.Tensor]:
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # an audio spectrogram transformer
        return {"input_values": torch.randn(1, config.max_length, config.num_mel_bins)}
    return {"input_values": torch.randn(1, 4000)}


def _features(config: Any) -> dict[str, torch.Tensor]:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return {"input_features": torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions)}
    return {"input_features": torch.randn(1, 64, getattr(config, "input_feat_per_channel", 80))}


_MAKERS: Mapping[str, Callable[[Any], dict[str, torch.Tensor]]] = {
    "input_ids": _ids,
    "pixel_values": _pixels,
    "input_values": _waves,
    "input_features": _features,
}


def outputs_of(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every tensor that the model gives for these inputs."""
    torch.manual_seed(4)
    with torch.no_grad():
        found = model.eval()(**inputs)
    return [leaf for leaf in tree_leaves(found.to_tuple()) if isinstance(leaf, torch.Tensor)]
