"""Inputs of one step, as meta tensors: those that the user gives, or made from the module's signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..planner.inference import Inference
from ..planner.workload import Training
from ..tracer.errors import DecisionError

_WAY_OUT = "say inputs=... in the workload: a mapping or a tuple of tensors (meta ones do), or a callable that gives one"

Workload = Training | Inference


def example_inputs(module: nn.Module, workload: Workload) -> Any:
    """The inputs of `workload` as a mapping or a tuple; without any, made from the module's forward.

    A transformers model says in its configuration what it takes: tokens of `batch_size` x `seq_len` (and labels of the same shape
    where it has a language model's head), images, or sound. Of other modules, those with one argument whose first layer is an
    `nn.Embedding`, `nn.Linear` or `nn.Conv1d` are known. Raises `DecisionError` for what is not.

    >>> example_inputs(nn.Linear(3, 4), Training(batch_size=2))[0].shape
    torch.Size([2, 3])
    """
    given = workload.inputs() if callable(workload.inputs) else workload.inputs
    if given is not None:
        return _checked(given)
    main = getattr(module, "main_input_name", None)
    if isinstance(main, str) and hasattr(module, "config"):
        return _of_transformers(module, main, workload)
    return (_of_first_layer(module, workload),)


def _checked(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return (given,)
    if isinstance(given, list):
        return tuple(given)
    if not isinstance(given, Mapping | tuple):
        raise DecisionError(f"inputs is a {type(given).__name__}; {_WAY_OUT}")
    return dict(given) if isinstance(given, Mapping) else given


# -- transformers -------------------------------------------------------------------------------------------------------


def _of_transformers(module: Any, main: str, workload: Workload) -> dict[str, torch.Tensor]:
    if isinstance(workload, Inference):
        return _prompt(module, main, workload)
    if main == "input_ids":
        return _tokens(module, (workload.batch_size, _length(workload)))
    made = {main: _main_input(module, main, workload, torch.float32)}
    if main == "input_features":
        made["labels"] = _meta((workload.batch_size, _length(workload)), torch.int64)
    return made


def _prompt(module: Any, main: str, inference: Inference) -> dict[str, torch.Tensor]:
    """What serving begins with: no labels, and of a decoder that reads what an encoder gives, its first tokens."""
    dtype = module.dtype if inference.autocast is None else torch.float32
    made = {main: _main_input(module, main, inference, dtype)}
    if getattr(module.config, "is_encoder_decoder", False):
        begin = 1 if main == "input_ids" else inference.seq_len or 1
        made["decoder_input_ids"] = _meta((inference.batch_size, begin), torch.int64)
    return made


def _main_input(module: Any, main: str, workload: Workload, dtype: torch.dtype) -> torch.Tensor:
    config, batch = module.config, workload.batch_size
    if main == "input_ids":
        return _meta((batch, _length(workload)), torch.int64)
    if main == "pixel_values":
        return _meta((batch, getattr(config, "num_channels", 3), *_image_size(config)), dtype)
    if main == "input_values":
        return _meta((batch, _length(workload)), dtype)
    if main == "input_features" and hasattr(config, "max_source_positions"):  # two frames of sound make one position
        return _meta((batch, config.num_mel_bins, 2 * config.max_source_positions), dtype)
    raise DecisionError(f"{type(module).__name__} takes {main}, which cannot be made from its configuration; {_WAY_OUT}")


def _tokens(module: Any, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    takes = inspect.signature(module.forward).parameters
    named = ["input_ids"]
    if "labels" in takes and module.get_output_embeddings() is not None:
        named.append("labels")
    elif "decoder_input_ids" in takes:
        named.append("decoder_input_ids")
    return {name: _meta(shape, torch.int64) for name in named}


def _length(workload: Workload) -> int:
    if workload.seq_len is None:
        raise DecisionError("the module takes sequences; say how long: seq_len=... in the workload, or give inputs=...")
    return workload.seq_len


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if size is None:
        raise DecisionError(f"{type(config).__name__} does not say how large images are; {_WAY_OUT}")
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


# -- other modules ------------------------------------------------------------------------------------------------------


def _of_first_layer(module: nn.Module, workload: Workload) -> torch.Tensor:
    takes = inspect.signature(module.forward).parameters.values()
    needed = [each for each in takes if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    first = next((each for each in module.modules() if not list(each.children())), module)
    sequence = () if workload.seq_len is None else (workload.seq_len,)
    if len(needed) == 1 and needed[0].kind is not needed[0].VAR_POSITIONAL:
        if isinstance(first, nn.Embedding):
            return _meta((workload.batch_size, _length(workload)), torch.int64)
        if isinstance(first, nn.Linear):
            return _meta((workload.batch_size, *sequence, first.in_features), first.weight.dtype)
        if isinstance(first, nn.Conv1d):
            return _meta((workload.batch_size, first.in_channels, _length(workload)), first.weight.dtype)
    raise DecisionError(f"no inputs can be made for {type(module).__name__} from its signature; {_WAY_OUT}")


def _meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
