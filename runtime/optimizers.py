"""The optimizers that `gp.Training` names, made for a module, and their step on fake tensors.

What each takes in closed form is in `planner/optimizers.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from ..planner.adam import compiled_bytes
from ..planner.muon import Slot, hidden_matrices
from ..planner.workload import Training
from ..tracer.errors import DecisionError

_LEARNING_RATE = 1e-3

_KINDS: Mapping[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "sgd-momentum": functools.partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
"""Those that have every implementation."""


def optimizers_of(module: nn.Module, training: Training) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers that `training` names, over the parameters that require a gradient: one, or Muon and AdamW.

    Raises `DecisionError` where there is nothing to train, and where torchao is needed and is not there.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise DecisionError("no parameter of the module requires a gradient, so there is nothing to train")
    chosen, name = training.implementation, training.optimizer
    options = {} if chosen is None else {"foreach": chosen == "foreach", "fused": chosen == "fused"}
    if name == "adafactor":
        return (torch.optim.Adafactor(trained, lr=_LEARNING_RATE, foreach=chosen == "foreach"),)
    if name == "adamw-8bit":
        return (_torchao().AdamW8bit(trained, lr=_LEARNING_RATE),)
    if name == "muon":
        return tuple(_muon_and_adamw(module, trained, options))
    return (_KINDS[name](trained, lr=_LEARNING_RATE, **options),)


def _muon_and_adamw(
    module: nn.Module, trained: Sequence[nn.Parameter], options: Mapping[str, Any]
) -> Iterator[torch.optim.Optimizer]:
    hidden = {id(each) for each in hidden_parameters(module)}
    matrices = [each for each in trained if id(each) in hidden]
    others = [each for each in trained if id(each) not in hidden]
    if matrices:
        yield torch.optim.Muon(matrices, lr=_LEARNING_RATE)
    if others:
        yield torch.optim.AdamW(others, lr=_LEARNING_RATE, **options)


def hidden_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The matrices inside a module that Muon is for (`planner.optimizers.hidden_matrices`).

    >>> net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 9))
    >>> [tuple(each.shape) for each in hidden_parameters(net)]
    [(8, 4), (8, 8)]
    """
    numbers: dict[int, int] = {}
    parameters = list(module.parameters())
    for number, parameter in enumerate(parameters):
        numbers[id(parameter)] = number
    slots = [
        Slot(numbers[id(value)], f"{path}.{name}", value.ndim, type(owner).__name__)
        for path, owner in module.named_modules()
        for name, value in owner._parameters.items()
        if value is not None
    ]
    return [parameters[number] for number in sorted(hidden_matrices(slots))]


def _torchao() -> Any:
    try:
        import torchao.optim
    except ImportError as error:
        raise DecisionError('optimizer="adamw-8bit" is torchao\'s, which is not installed: pip install torchao') from error
    return torchao.optim


# -- on fake tensors ----------------------------------------------------------------------------------------------------


@contextmanager
def on_fake_tensors(
    training: Training, on_cuda: bool, uncounted: Callable[[], AbstractContextManager[Any]], taken: Callable[[int, str], None]
) -> Iterator[None]:
    """Have an optimizer step fake tensors: numbers that it looks at are made up, what it compiles runs as it is written.

    What a compiled kernel does not allocate is run under `uncounted()`, what it does, on CUDA or the CPU, is given to `taken`.
    """
    with ExitStack() as stack:
        if training.optimizer == "adafactor":
            stack.enter_context(_NumbersMadeUp())  # type: ignore[no-untyped-call]
        if training.optimizer == "adamw-8bit":
            stack.enter_context(_not_compiled(on_cuda, uncounted, taken))
        yield


class _NumbersMadeUp(TorchDispatchMode):
    """Answers `item()` with 1.0 where there are no values: Adafactor scales with norms, and no shape depends on them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0


def _make_tables() -> None:
    """torchao's tables of values, which it makes once by looking at tensors."""
    import torchao.optim.subclass_8bit as written

    with _disable_current_modes():
        for name in ("get_qmap_signed", "get_qmap_unsigned"):
            getattr(written, name, tuple)()


@contextmanager
def _not_compiled(
    on_cuda: bool, uncounted: Callable[[], AbstractContextManager[Any]], taken: Callable[[int, str], None]
) -> Iterator[None]:
    """Run torchao's step of one parameter as it is written, but count what the compiled one takes."""
    import torchao.optim.adam as written

    step = written.single_param_adam
    _make_tables()

    def counted(parameter: torch.Tensor, *rest: Any) -> None:
        with uncounted():
            step(parameter, *rest)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if nbytes := compiled_bytes(local.shape, on_cuda):
            taken(nbytes, "single_param_adam")

    with torch.compiler.set_stance("force_eager"), mock.patch.object(written, "single_param_adam", counted):
        yield
