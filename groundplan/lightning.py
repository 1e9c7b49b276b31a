"""Lightning Fabric's "efficient initialization", planned: what `fabric.init_module()` puts around a constructor, around a trace.

    with fabric.init_module():                      plan = gp.lightning.trace(fabric, MyModel, config)
        model = MyModel(config)                     model = plan.materialize(seed=0)

The values are the same, bit for bit, after the same seed. `init_module` sets two things: the default dtype, which the precision
plugin says, and the default device, which the strategy says. They are read off the real thing, by entering it; what else it would
do is either asked for where it belongs (`plan.quantize`, `fabric.setup`) or refused.

Nothing of Lightning is imported here: whoever hands over a Fabric has it, under whichever of its names (`lightning.fabric`,
`lightning_fabric`), and a precision string needs none.

Inside `LightningModule.configure_model` the Trainer has set dtype and device already; there, plain `gp.trace` does.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .plan import Plan
from .plan import trace as trace_plan
from .tracer.ambient import ambient_now, default_dtype_kept
from .tracer.errors import DecisionError, nearest

_ALIASES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""What Fabric takes for historical reasons, as strings or integers."""

_DTYPES = {
    "16-true": torch.float16,
    "16-mixed": None,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": None,
    "32-true": None,
    "64-true": torch.float64,
    "transformer-engine": torch.bfloat16,
    "transformer-engine-float16": torch.float16,
}
"""The default dtype while a constructor runs; None where Fabric leaves it as it is (float32, unless you set another)."""

_BITSANDBYTES = {
    "_NF4Linear": "bnb.nf4",
    "_NF4DQLinear": "bnb.nf4-dq",
    "_FP4Linear": "bnb.fp4",
    "_FP4DQLinear": "bnb.fp4-dq",
    "_Int8LinearInference": "bnb.int8",
    "_Linear8bitLt": "bnb.int8-training",
}
"""The class that Fabric's plugin puts in place of `nn.Linear`, and what it is called."""

_LIGHTNING = ("lightning", "lightning_fabric", "pytorch_lightning")


@dataclass(frozen=True)
class Surroundings:
    """What a constructor runs under, None standing for what there is anyway; and how its plan is quantized."""

    dtype: torch.dtype | None = None
    device: torch.device | None = None
    quantization: str | None = None


# -- the two doors ------------------------------------------------------------------------------------------------------


def trace(fabric: Any, build: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """`gp.trace(build, *args, **kwargs)`, as under `fabric.init_module()`.

    `fabric` is a `Fabric` (launched, if it has several devices), a `Trainer`, a precision plugin, or a precision string. A string
    leaves the default device as it is:

    * `"16-true"`, `"bf16-true"`, `"64-true"`: constructed in that dtype;
    * `"32-true"`, `"16-mixed"`, `"bf16-mixed"`: constructed in the default dtype, which is float32 unless you set another;
    * `"bnb.nf4"`, `"bnb.int8"` and the others of `BitsandbytesPrecision`: followed by `plan.quantize`;
    * `"transformer-engine"`, `"transformer-engine-float16"`: constructed in bfloat16, float16; `fabric.setup` replaces layers;
    * `16`, `"bf16"`, `32`, `64`: what Fabric takes them for.

    On a GPU, `init_module` draws from CUDA's random stream, and so does this.

    Raises `DecisionError` for a precision that there is not, or whose package is not installed, and for plugins and strategies
    of your own that say themselves what a constructor runs under.

    >>> trace("bf16-true", torch.nn.Linear, 3, 4).materialize(seed=0).weight.dtype
    torch.bfloat16
    """
    around = _surroundings(fabric)
    with _under(around):
        plan = trace_plan(build, *args, **kwargs)
    return plan if around.quantization is None else _quantized(plan, around.quantization)


@contextmanager
def ambient(fabric: Any) -> Iterator[None]:
    """The default dtype and the default device of `fabric.init_module()`, for whatever is traced, bound or built under it.

    `fabric` is as in `trace`. A saved plan finds its constructor again under it:
    `with ambient(fabric): plan = gp.Plan.load(path).bind(MyModel, config)`.

    Raises what `trace` raises, and `DecisionError` for `bnb.*`, which is no setting of torch's but a step of the plan.

    >>> with ambient("64-true"):
    ...     torch.zeros(1).dtype
    torch.float64
    """
    around = _surroundings(fabric)
    if around.quantization is not None:
        raise DecisionError(
            f"{around.quantization} is no setting that a constructor runs under; say gp.lightning.trace(fabric, build, ...), "
            f"or trace under the dtype and say plan.quantize({around.quantization!r})"
        )
    with _under(around):
        yield


@contextmanager
def _under(around: Surroundings) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(default_dtype_kept())
        if around.device is not None:
            stack.enter_context(around.device)
        if around.dtype is not None:
            torch.set_default_dtype(around.dtype)
        yield


def _quantized(plan: Plan, quantization: str) -> Plan:
    quantize = getattr(plan, "quantize", None)
    if quantize is None:
        raise DecisionError(f"this version of groundplan cannot quantize yet, which {quantization!r} asks for")
    quantized: Plan = quantize(quantization)
    return quantized


# -- what Fabric says ---------------------------------------------------------------------------------------------------


def _surroundings(fabric: Any) -> Surroundings:
    if isinstance(fabric, str | int):
        return _of_name(str(fabric))
    if hasattr(fabric, "strategy"):
        return _of_strategy(fabric)
    if hasattr(fabric, "module_init_context"):
        return _of_plugin(fabric)
    raise DecisionError(
        f"the precision comes from a Fabric, a Trainer, a precision plugin or a string, not {fabric!r}; strings are {_known()}"
    )


def _of_name(name: str) -> Surroundings:
    name = _ALIASES.get(name, name)
    if name in _BITSANDBYTES.values():
        return Surroundings(_compute_dtype(name), quantization=name)
    if name not in _DTYPES:
        raise DecisionError(f"{name!r} is no precision of Lightning Fabric; known are {_known()}{nearest(name, _names())}")
    if name.startswith("transformer-engine") and importlib.util.find_spec("transformer_engine") is None:
        raise DecisionError(
            f"{name!r} needs the package transformer_engine, 0.11 or newer, which is not installed: pip install "
            "'transformer_engine[pytorch]', on a machine with CUDA; to construct in its dtype only, say "
            f'"{"16" if name.endswith("16") else "bf16"}-true"'
        )
    return Surroundings(_DTYPES[name])


def _of_strategy(fabric: Any) -> Surroundings:
    """A Fabric's or a Trainer's; the Trainer's contexts are those that it calls `configure_model` under."""
    strategy = fabric.strategy
    trainer = hasattr(strategy, "precision_plugin")
    plugin = strategy.precision_plugin if trainer else strategy.precision
    _refuse_own(strategy, "tensor_init_context" if trainer else "module_init_context")
    precision = _of_plugin(plugin)
    if getattr(strategy, "zero_stage_3", False):  # DeepSpeed's context would partition modules; its tensors are the root device's
        return Surroundings(precision.dtype, strategy.root_device, precision.quantization)
    with strategy.tensor_init_context() if trainer else fabric.init_module():
        device = torch.device(ambient_now().default_device)
    return Surroundings(precision.dtype, device, precision.quantization)


def _of_plugin(plugin: Any) -> Surroundings:
    _refuse_own(plugin, "module_init_context")
    _refuse_own(plugin, "tensor_init_context")
    classes = {each.__name__ for each in type(plugin).__mro__}
    if "BitsandbytesPrecision" in classes:
        return _of_bitsandbytes(plugin)
    if "TransformerEnginePrecision" in classes and plugin.replace_layers:
        raise DecisionError(
            f"{type(plugin).__name__}(replace_layers=True) would construct Transformer Engine's layers, on the GPU; leave it at "
            "None, and fabric.setup replaces the layers of the finished model, which keeps its values"
        )
    before = torch.get_default_dtype()
    with default_dtype_kept(), plugin.module_init_context():
        dtype = torch.get_default_dtype()
    return Surroundings(None if dtype == before else dtype)


def _of_bitsandbytes(plugin: Any) -> Surroundings:
    if plugin.ignore_modules:
        raise DecisionError(
            f"BitsandbytesPrecision(ignore_modules={plugin.ignore_modules}) is refused here as it is under fabric.init_module(); "
            "leave it out and say in plan.quantize which modules stay as they are"
        )
    return Surroundings(plugin.dtype, quantization=_BITSANDBYTES[plugin._linear_cls.__name__])


def _compute_dtype(name: str) -> torch.dtype:
    """What `BitsandbytesPrecision` takes where nothing is said."""
    bfloat16 = not name.startswith("bnb.int8") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bfloat16 else torch.float16


def _refuse_own(owner: Any, method: str) -> None:
    """What is not Lightning's may do more than set the dtype and the device, and would not be there when the model is built."""
    function = getattr(type(owner), method)
    if function.__module__.partition(".")[0] not in _LIGHTNING:
        raise DecisionError(
            f"{type(owner).__name__} has a {method} of its own, which may do anything; enter it in what is traced, where it is "
            f"entered again when the model is built: def build(): with it.{method}(): return MyModel()"
        )


def _names() -> list[str]:
    return [*_DTYPES, *_BITSANDBYTES.values(), *_ALIASES]


def _known() -> str:
    return ", ".join(_names())
