"""One layer quantized, by torchao's `quantize_` or as bitsandbytes' own classes; and what a layer takes up then."""

from __future__ import annotations

import copy
import importlib
import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ..planner.quantizing import Quantizing, Size, config_of, size, torchao
from ..tracer.errors import DecisionError


class Quantizer(Protocol):
    """What does it to a layer, and which layers it is for where the user names none."""

    def is_linear(self, module: nn.Module) -> bool:
        """Whether it is a linear layer, of those that are quantized without being named."""

    def __call__(self, layer: nn.Module) -> nn.Module:
        """The layer, quantized: itself, changed, or another module that is to take its place."""

    def size(self, layer: nn.Module) -> Size:
        """What its weight takes up afterwards; the layer, which may be one of meta tensors, is left as it is."""


def quantizer(found: Quantizing) -> Quantizer:
    """The one that a decision asks for; raises `DecisionError` where its library is missing."""
    return Torchao(found.config) if found.config is not None else Bitsandbytes(str(found.mode))


class Torchao:
    """`torchao.quantization.quantize_`, one layer at a time."""

    def __init__(self, config: Any) -> None:
        torchao()
        self._config = config_of(config)
        self._by_rows = is_by_rows(config)
        self._quantize = importlib.import_module("torchao.quantization").quantize_
        self._is_linear = inspect.signature(self._quantize).parameters["filter_fn"].default

    def is_linear(self, module: nn.Module) -> bool:
        """torchao's own default filter."""
        return bool(self._is_linear(module, ""))

    def __call__(self, layer: nn.Module) -> nn.Module:
        """What `quantize_` does to it inside a model."""
        if self._by_rows and _is_large(layer) and self._keeps_rows(layer):
            self._in_stretches(layer)
            return layer
        made: nn.Module = self._whole(layer)
        return made

    def _in_stretches(self, layer: Any) -> None:
        """Some rows after the other: in one go, torchao's temporaries take several times as much as the weight itself."""
        weight = layer.weight
        layer.weight = _without_memory(weight)
        like = self._whole(layer).weight
        names, context = like.__tensor_flatten__()
        parts = {name: torch.empty_like(getattr(like, name), device=weight.device) for name in names}
        step = _rows_of(weight)
        for start in range(0, len(weight), step):
            rows = nn.Linear(1, 1, bias=False, device="meta")
            rows.weight = nn.Parameter(weight.detach()[start : start + step], requires_grad=False)
            made: Any = self._whole(rows).weight
            for name, part in parts.items():
                part[start : start + step] = getattr(made, name)
            del made  # or it is there while the next ones are made
        whole = type(like).__tensor_unflatten__(parts, context, like.shape, like.stride())
        layer.weight = nn.Parameter(whole, requires_grad=like.requires_grad)

    def _keeps_rows(self, layer: nn.Module) -> bool:
        """Whether the quantized weight is made of tensors that have a row for each of its own."""
        try:
            made: Any = self._whole(_copied(layer)).weight
        except Exception:  # nothing can be said beforehand; in one go it works, or says itself what is wrong
            return False
        if not is_traceable_wrapper_subclass(made):
            return False
        parts = [getattr(made, name) for name in made.__tensor_flatten__()[0]]
        if any(is_traceable_wrapper_subclass(part) for part in parts):
            return False
        return all(part.is_contiguous() and part.shape[:1] == made.shape[:1] for part in parts)

    def _whole(self, layer: nn.Module) -> Any:
        parent = nn.ModuleDict({"layer": layer})
        self._quantize(parent, self._config, filter_fn=lambda module, name: module is layer)
        made: nn.Module = parent["layer"]
        return made

    def size(self, layer: nn.Module) -> Size:
        """Found by quantizing the meta tensors of a copy."""
        weight: Any = layer.weight
        try:
            made, peak = self._tried(_copied(layer))
            if self._by_rows and _is_large(layer) and self._keeps_rows(layer):
                rows = nn.Linear(1, 1, bias=False, device="meta")
                rows.weight = nn.Parameter(torch.empty_like(weight[: _rows_of(weight)], device="meta"))
                return size(weight.shape, weight.dtype, held_bytes(made), self._tried(rows)[1])
        except Exception:  # whatever torchao lacks here (a kernel library, a device), another machine may have
            return size(weight.shape, weight.dtype, None, None)
        return size(weight.shape, weight.dtype, held_bytes(made), max(0, peak - held_bytes(made)))

    def _tried(self, layer: nn.Module) -> tuple[torch.Tensor, int]:
        """The quantized weight of a layer of meta tensors, and the most bytes that would be there meanwhile."""
        with _Allocations() as allocations:
            made: torch.Tensor = self._whole(layer).weight
        return made, allocations.peak


def is_by_rows(config: Any) -> bool:
    """Whether a torchao config, as data, makes each row of a weight by itself: whatever else does not, is quantized in one go.

    Of configs' versions only the second, whose weights are made of plain tensors.

    >>> data = {"granularity": {"_type": "PerTensor", "_data": {}}}
    >>> is_by_rows({"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": data})
    False
    """
    data, grain = config["_data"], _GRAINS.get(config["_type"])
    found = data.get(grain) if grain else None
    if not isinstance(found, dict) or config.get("_version") != 2:
        return False
    if any(data.get(key, plain) != plain for key, plain in _PLAIN.items()):
        return False
    return (found["_type"], found["_data"].get("dim", found["_data"].get("axis"))) in _ROWS or found["_type"] == "PerGroup"


_GRAINS = {
    "Int8WeightOnlyConfig": "granularity",
    "Int8DynamicActivationInt8WeightConfig": "granularity",
    "IntxWeightOnlyConfig": "granularity",
    "Int8DynamicActivationIntxWeightConfig": "weight_granularity",
    "Float8WeightOnlyConfig": "granularity",
}
_PLAIN = {
    "intx_choose_qparams_algorithm": {"_type": "IntxChooseQParamsAlgorithm", "_data": "AFFINE"},
    "intx_packing_format": {"_type": "IntxPackingFormat", "_data": "UNPACKED_TO_INT8"},
}
_ROWS = (("PerRow", -1), ("PerAxis", 0))
_STRETCH, _STRETCHES = 2**24, 64  # at least so many elements at a time, and not more stretches than this


def _is_large(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or type(weight) is not nn.Parameter or weight.numel() <= _STRETCH:
        return False
    return weight.is_contiguous() and weight.device.type in ("cpu", "meta")  # tried on the CPU only


def _rows_of(weight: torch.Tensor) -> int:
    """How many rows are quantized at a time."""
    return max(1, max(_STRETCH, weight.numel() // _STRETCHES) // weight.shape[1])


def _without_memory(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)


def _copied(layer: nn.Module) -> nn.Module:
    """A layer of meta tensors of its own."""
    made = copy.copy(layer)
    made.__dict__["_parameters"] = {
        name: None if each is None else _without_memory(each) for name, each in layer._parameters.items()
    }
    return made


class Bitsandbytes:
    """bitsandbytes' `Linear4bit` or `Linear8bitLt` in place of a linear layer, as Lightning's BitsandbytesPrecision converts."""

    def __init__(self, mode: str) -> None:
        try:
            self._nn = importlib.import_module("bitsandbytes").nn
        except ImportError as error:
            raise DecisionError(f"{mode} needs bitsandbytes ({error}): pip install bitsandbytes") from error
        self._mode = mode.removeprefix("bnb.")

    def is_linear(self, module: nn.Module) -> bool:
        """Any `nn.Linear`, except what bitsandbytes has made already."""
        return isinstance(module, nn.Linear) and not isinstance(module, self._nn.Linear4bit | self._nn.Linear8bitLt)

    def __call__(self, layer: nn.Module) -> nn.Module:
        """A new layer with the old one's values; its weight is quantized on the device where it is."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"bitsandbytes quantizes nn.Linear, and this is a {type(layer).__name__}")
        weight, bias = layer.weight.data, layer.bias
        with torch.device("meta"):
            made = self._layer(layer.in_features, layer.out_features, bias is not None)
        made.weight = self._weight(weight, made.weight)
        if bias is not None:
            made.bias = nn.Parameter(bias.data.clone(), requires_grad=bias.requires_grad)
        made.train(layer.training)
        moved: nn.Module = made.to(weight.device)
        return moved

    def _layer(self, width: int, height: int, bias: bool) -> Any:
        if self._mode == "int8":
            return self._nn.Linear8bitLt(width, height, bias, has_fp16_weights=False, threshold=6.0)
        kind, _, nested = self._mode.partition("-")
        return self._nn.Linear4bit(width, height, bias, quant_type=kind, compress_statistics=bool(nested))

    def _weight(self, weight: torch.Tensor, empty: Any) -> Any:
        if self._mode == "int8":
            return self._nn.Int8Params(
                weight.cpu(), requires_grad=False, has_fp16_weights=False
            )  # quantized on its way from there
        return self._nn.Params4bit(
            weight,
            requires_grad=False,
            quant_type=empty.quant_type,
            blocksize=empty.blocksize,
            compress_statistics=empty.compress_statistics,
            quant_storage=empty.quant_storage,
            module=empty.module,
        )

    def size(self, layer: nn.Module) -> Size:
        """In closed form: bitsandbytes does nothing to a tensor without memory."""
        weight: Any = layer.weight
        count = weight.numel()
        if self._mode == "int8":
            return size(weight.shape, weight.dtype, count + 4 * weight.shape[0], 2 * count)
        blocks = -(-count // 64)
        scales = 4 * blocks if "-" not in self._mode else blocks + 4 * -(-blocks // 256) + 4 * 256 + 4
        return size(weight.shape, weight.dtype, -(-count // 2) + scales + 4 * 16, 4 * blocks)


# -- what it takes up ---------------------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """The most bytes that ops have made and that are there at once, counted on meta tensors, where nothing is allocated."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outside = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, torch.Tensor) and not is_traceable_wrapper_subclass(each):
                storage = each.untyped_storage()
                if storage._cdata not in outside | self._known:
                    self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, nbytes = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += nbytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._released, key, nbytes)

    def _released(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self._now -= nbytes


def held_bytes(tensor: torch.Tensor) -> int:
    """The bytes of a tensor, or of the tensors that it is made of."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
