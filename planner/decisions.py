"""The noun of the second stage: `Decisions`, what is to be done with every tensor, as plain data.

Decisions are a frozen pydantic model: names and numbers, no tensor and no code, so they are saved as JSON and compared with `==`.
What the user asked for is a list of steps in the order of the calls:

* `Cast`: convert floating-point and complex parameters and buffers, as `module.to(dtype)` does;
* `Move`: put parameters and buffers on a device, as `module.to(device)` does.

`plan.cast(torch.bfloat16).to("cuda")` therefore means `build().to(torch.bfloat16).to("cuda")`, values included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

import torch
from pydantic import Field, StringConstraints, field_validator

from ..tracer.errors import DecisionError, nearest
from ..tracer.graph import Ambient, ParamGraph, Storage, TensorNode
from .checkpointing import CheckpointRule
from .fitted import AnyFitted, changed
from .placing import Placing
from .quantizing import Quantizing, check_layers
from .records import DTYPES, Record, device_name, dtype_name, dtype_named
from .sharding import Sharding

_FOR_SERVING = "plan.{} builds for inference, which has no backward to checkpoint activations for"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
HexDigest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8,128}$")]


# -- dtypes and devices -------------------------------------------------------------------------------------------------


def cast_target(dtype: object) -> torch.dtype:
    """`dtype` itself, if `nn.Module.to` accepts it; raises `DecisionError` otherwise."""
    if not isinstance(dtype, torch.dtype):
        known = f"; did you mean torch.{dtype}?" if isinstance(dtype, str) and dtype in DTYPES else ""
        raise DecisionError(f"a cast takes a torch.dtype such as torch.bfloat16, not {dtype!r}{known}")
    if not (dtype.is_floating_point or dtype.is_complex):
        raise DecisionError(f"cannot cast to {dtype}: a cast, like nn.Module.to, takes floating-point or complex dtypes only")
    if dtype == DTYPES.get("float4_e2m1fn_x2"):
        raise DecisionError(f"cannot cast to {dtype}: torch has no conversion to it; take torch.float8_e4m3fn or a wider dtype")
    return dtype


# -- the saved records --------------------------------------------------------------------------------------------------


class Rule(Record):
    """Tensors whose name matches `pattern` (as `fnmatch` does) are converted to the dtype called `dtype`."""

    pattern: Annotated[str, StringConstraints(min_length=1)]
    dtype: str

    @field_validator("dtype")
    @classmethod
    def _is_a_target(cls, name: str) -> str:
        cast_target(dtype_named(name))
        return name


class Cast(Record):
    """Convert floating-point and complex parameters and buffers: the first rule that matches a tensor's name wins."""

    kind: Literal["cast"] = "cast"
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]

    @property
    def uniform(self) -> torch.dtype | None:
        """The one dtype that every tensor gets, where the cast is a plain `module.to(dtype)`; else None."""
        only = self.rules[0]
        return DTYPES[only.dtype] if len(self.rules) == 1 and only.pattern == "*" else None

    def dtype_for(self, names: tuple[str, ...]) -> torch.dtype | None:
        """The dtype the rules give to one tensor that goes by `names`, or None where no rule matches.

        Any of a tied tensor's names may match; raises `DecisionError` where they lead to different dtypes.
        """
        found = {name: rule.dtype for name in names if (rule := self._rule_for(name)) is not None}
        if len(set(found.values())) > 1:
            each = ", ".join(f"{name} to {dtype}" for name, dtype in found.items())
            raise DecisionError(f"one tied tensor cannot have two dtypes: the rules cast {each}; give its names the same dtype")
        return DTYPES[next(iter(found.values()))] if found else None

    def _rule_for(self, name: str) -> Rule | None:
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)


class Move(Record):
    """Put every parameter and buffer on `device`: `cpu`, `cuda` (the current CUDA device) or `cuda:N`."""

    kind: Literal["move"] = "move"
    device: str

    @field_validator("device")
    @classmethod
    def _is_supported(cls, name: str) -> str:
        return _plainly_named_device(name)


Step = Annotated[Cast | Move, Field(discriminator="kind")]


class AmbientSettings(Record):
    """The torch settings that the constructor ran under, as data (`Ambient` in the graph)."""

    default_dtype: str
    default_device: str
    grad_enabled: bool
    inference_mode: bool

    @field_validator("default_dtype")
    @classmethod
    def _is_known(cls, name: str) -> str:
        dtype_named(name)
        return name

    @field_validator("default_device")
    @classmethod
    def _is_supported(cls, name: str) -> str:
        return _plainly_named_device(name)

    @classmethod
    def of(cls, ambient: Ambient) -> AmbientSettings:
        """The data form of a graph's ambient settings."""
        return cls(
            default_dtype=dtype_name(ambient.default_dtype),
            default_device=device_name(ambient.default_device),
            grad_enabled=ambient.grad_enabled,
            inference_mode=ambient.inference_mode,
        )

    def to_ambient(self) -> Ambient:
        """The settings as the tracer takes them."""
        return Ambient(dtype_named(self.default_dtype), self.default_device, self.grad_enabled, self.inference_mode)


class Decisions(Record):
    """Everything a plan says besides its graph: which constructor, under which settings, and the steps that follow it.

    `fingerprint` is the graph's. `bound_state` is a digest of the generator state that the tape holds for, where the constructor
    looked at random values; else None. `constructor` is for display only and never imported. `sharding` is None where one process
    builds it all, `placing` where that puts it on one device. `quantizing` is done after the steps, each to layers of its own.
    `checkpointing` says which modules run again in the backward, and by which level. `fitted` is what `plan.fit` found.
    """

    constructor: str
    fingerprint: Digest
    reference: Literal["cpu", "cuda"]
    groundplan_version: str
    torch_version: str
    ambient: AmbientSettings
    bound_state: HexDigest | None
    steps: tuple[Step, ...]
    sharding: Sharding | None = None
    placing: Placing | None = None
    quantizing: tuple[Quantizing, ...] = ()
    checkpointing: tuple[CheckpointRule, ...] = ()
    fitted: AnyFitted | None = None

    @property
    def casts(self) -> tuple[Cast, ...]:
        """The steps that convert."""
        return tuple(step for step in self.steps if isinstance(step, Cast))

    def cast(self, dtype: torch.dtype | Mapping[str, torch.dtype], graph: ParamGraph) -> Decisions:
        """These decisions, followed by a cast: `module.to(dtype)`, or a dtype per pattern of names, first match first.

        Raises `DecisionError` for a dtype that `nn.Module.to` refuses, for a pattern that matches no floating-point tensor of
        `graph`, and where the names of one tied tensor lead to different dtypes.
        """
        if isinstance(dtype, Mapping):
            cast = _cast_by_rules(dtype)
            check_cast(cast, graph)
        else:
            cast = Cast(rules=(Rule(pattern="*", dtype=dtype_name(cast_target(dtype))),))
        return self._followed_by(cast)

    def to(self, device: str | torch.device) -> Decisions:
        """These decisions, followed by `module.to(device)`; raises `DecisionError` for anything but CPU and CUDA."""
        if self.placing is not None:
            raise DecisionError(f"the plan places each tensor by itself; leave out .to({device!r}), or .place(...)")
        return self._followed_by(Move(device=device_name(device)))

    def shard(self, sharding: Sharding) -> Decisions:
        """These decisions, with the module divided as `sharding` says; raises `DecisionError` beside `place`."""
        if self.placing is not None:
            raise DecisionError("the plan places tensors on several devices of one process; it cannot be sharded as well")
        self._check_not_quantized("shard")
        return self._with("sharding", sharding)

    def place(self, placing: Placing) -> Decisions:
        """These decisions, with each tensor on the device that `placing` says; raises `DecisionError` beside `to` and `shard`."""
        if self.sharding is not None:
            raise DecisionError("the plan shards the module between ranks, each of which has one device; leave out .place(...)")
        if any(isinstance(step, Move) for step in self.steps):
            raise DecisionError("the plan moves the module to one device; leave out .to(...), or .place(...)")
        self._check_not_quantized("place")
        self._check_not_checkpointed("place")
        return self._with("placing", placing)

    def quantize(self, quantizing: Quantizing) -> Decisions:
        """These decisions, followed by `quantizing`; raises `DecisionError` beside `shard` and `place`, and for a layer twice."""
        for name, other in (("shard", self.sharding), ("place", self.placing)):
            if other is not None:
                raise DecisionError(f"a plan that quantizes builds on one device; leave out .{name}(...), or .quantize(...)")
        self._check_not_checkpointed("quantize")
        check_layers(quantizing, self.quantizing)
        return self._with("quantizing", (*self.quantizing, quantizing))

    def checkpoint_activations(self, rules: tuple[CheckpointRule, ...]) -> Decisions:
        """These decisions, with what runs again in the backward; raises `DecisionError` beside `place` and `quantize`."""
        for name, other in (("place", self.placing), ("quantize", self.quantizing)):
            if other:
                raise DecisionError(f"{_FOR_SERVING.format(name)}; leave out .{name}(...), or .checkpoint_activations(...)")
        return self._with("checkpointing", rules)

    def _check_not_checkpointed(self, name: str) -> None:
        if self.checkpointing:
            raise DecisionError(f"{_FOR_SERVING.format(name)}; leave out .checkpoint_activations(...), or .{name}(...)")

    def _check_not_quantized(self, name: str) -> None:
        if self.quantizing:
            raise DecisionError(f"the plan quantizes ({self.quantizing[0].describe()}), on one device; leave out .{name}(...)")

    def _followed_by(self, step: Cast | Move) -> Decisions:
        if self.quantizing:
            raise DecisionError(
                "quantized layers are neither cast nor moved; say plan.cast(...) and plan.to(...) before .quantize(...)"
            )
        return self._with("steps", (*self.steps, step))

    def _with(self, name: str, value: object) -> Decisions:
        """These decisions with one of them made anew, which the record of a search then says."""
        return self.model_copy(update={name: value, "fitted": changed(self.fitted, name)})


def default_decisions(graph: ParamGraph, constructor: str, bound_state: str | None = None) -> Decisions:
    """The decisions of a fresh trace: build what the constructor builds, where and as it builds it."""
    return Decisions(
        constructor=constructor,
        fingerprint=graph.fingerprint,
        reference="cuda" if graph.reference.startswith("cuda") else "cpu",
        groundplan_version=groundplan_version(),
        torch_version=str(torch.__version__),
        ambient=AmbientSettings.of(graph.ambient),
        bound_state=bound_state,
        steps=(),
    )


@lru_cache(maxsize=1)
def groundplan_version() -> str:
    """The installed version, or `unknown` where groundplan runs from a source tree that was never installed."""
    try:
        return version("groundplan")
    except PackageNotFoundError:
        return "unknown"


# -- what the decisions mean for one tensor -----------------------------------------------------------------------------


def castable(tensor: TensorNode) -> bool:
    """Whether `nn.Module.to(dtype)` converts this tensor: a parameter or buffer of floating-point or complex numbers."""
    return tensor.kind != "attribute" and (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def cast_dtype(tensor: TensorNode, cast: Cast) -> torch.dtype:
    """The dtype of `tensor`, as the constructor left it, after `cast`."""
    target = cast.dtype_for(tensor.names) if castable(tensor) else None
    return tensor.dtype if target is None else target


def dtype_after(tensor: TensorNode, casts: Sequence[Cast]) -> torch.dtype:
    """The dtype of `tensor`, as the constructor left it, after one cast and the next."""
    dtype = tensor.dtype
    for cast in casts if castable(tensor) else ():
        dtype = cast.dtype_for(tensor.names) or dtype
    return dtype


def final_dtype(tensor: TensorNode, decisions: Decisions) -> torch.dtype:
    """The dtype of `tensor` in the finished module."""
    return dtype_after(tensor, decisions.casts)


def final_device(tensor: TensorNode, storage: Storage, decisions: Decisions) -> str:
    """The device of `tensor`, a view of `storage`, in the finished module: plain attributes stay where they were made."""
    if decisions.placing is not None and tensor.kind != "attribute":
        return decisions.placing.device_for(tensor) or storage.device
    moves = [step.device for step in decisions.steps if isinstance(step, Move)]
    return moves[-1] if moves and tensor.kind != "attribute" else storage.device


# -- the doors ----------------------------------------------------------------------------------------------------------


def check_cast(cast: Cast, graph: ParamGraph) -> None:
    """Raise `DecisionError` where a rule of `cast` matches nothing it could convert, or a tied tensor gets two dtypes."""
    targets = [tensor for tensor in graph.tensors if castable(tensor)]
    names = [name for tensor in targets for name in tensor.names]
    for rule in cast.rules if cast.uniform is None else ():
        if not any(fnmatchcase(name, rule.pattern) for name in names):
            raise DecisionError(_no_match(rule.pattern, names, graph))
    for tensor in targets:
        cast.dtype_for(tensor.names)


def _no_match(pattern: str, names: list[str], graph: ParamGraph) -> str:
    other = next((name for name in graph.by_name if fnmatchcase(name, pattern)), None)
    if other is None:
        return f"the pattern {pattern!r} matches no floating-point parameter or buffer{nearest(pattern, names)}"
    tensor = graph.by_name[other]
    what = f"{other}, {'an' if tensor.kind == 'attribute' else 'a'} {tensor.kind} of {tensor.dtype}"
    return f"the pattern {pattern!r} matches only tensors that a cast leaves alone ({what}); drop it"


def _cast_by_rules(dtypes: Mapping[str, torch.dtype]) -> Cast:
    if not dtypes:
        raise DecisionError("an empty mapping casts nothing; say cast(torch.bfloat16) or cast({'*norm*': torch.float32, ...})")
    for pattern in dtypes:
        if not isinstance(pattern, str) or not pattern:
            raise DecisionError(f"a cast maps patterns of tensor names to dtypes; {pattern!r} is no pattern")
    rules = (Rule(pattern=pattern, dtype=dtype_name(cast_target(dtype))) for pattern, dtype in dtypes.items())
    return Cast(rules=tuple(rules))


def _plainly_named_device(name: str) -> str:
    if device_name(name) != name:
        raise DecisionError(f"the device is written {name!r} where {device_name(name)!r} was expected")
    return name
