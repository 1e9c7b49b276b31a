"""CUDA on a machine without it: a constructor may put tensors there while it is traced, as nothing is computed there.

Enough of `torch.cuda` is replaced, for the duration of a trace, that every call with a device reaches the tape. What asks the
hardware itself (`get_device_properties`) raises as it does in eager, and `torch.cuda.is_available()` says False.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


class ImaginedGenerator:
    """Stands for the generator of a device that this machine does not have: a position, nothing else."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def initial_seed(self) -> int:
        return self._seed

    def manual_seed(self, seed: int) -> ImaginedGenerator:
        self._seed = seed
        return self

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self._seed])


class Recorder(Protocol):
    """What the replacements ask of a tape."""

    def relocated(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor: ...
    def seed_imagined(self, seed: int, index: int | None) -> None: ...


_current = [0]


def current_device() -> int:
    """The number of the current CUDA device, the imagined one where there is none."""
    return torch.cuda.current_device() if torch.cuda.is_available() else _current[-1]


def default_device() -> torch.device:
    """`torch.get_default_device()`, which fails where the default device is not there."""
    if torch.cuda.is_available():
        return torch.get_default_device()
    modes = [mode for mode in reversed(_get_current_function_mode_stack()) if isinstance(mode, DeviceContext)]
    context = modes[0] if modes else getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return _numbered(context.device if context is not None else "cpu")


@contextmanager
def cuda_imagined(tape: Recorder) -> Iterator[None]:
    """Make calls with a CUDA device reach `tape`, where this machine has none."""
    if torch.cuda.is_available():
        yield
        return
    _current.append(0)
    try:
        with ExitStack() as stack:
            for owner, name, replacement in _replacements(tape):
                original = getattr(owner, name)
                stack.enter_context(replaced(owner, name, replacement))
                stack.enter_context(_scriptable(replacement, original))
            yield
    finally:
        _current.pop()


@contextmanager
def replaced(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """For a while, `replacement` is what `owner` has under `name`."""
    own = vars(owner).get(name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def _scriptable(replacement: Any, original: Any) -> Iterator[None]:
    """Let `torch.jit.script`, which knows torch's functions by identity, take the one for the other."""
    table = torch.jit._builtins._get_builtin_table()
    operator = table.get(id(original))
    if operator is not None:
        table[id(replacement)] = operator
    try:
        yield
    finally:
        table.pop(id(replacement), None)


def _replacements(tape: Recorder) -> list[tuple[Any, str, Any]]:
    def seed_one(seed: int) -> None:
        tape.seed_imagined(int(seed), _current[-1])

    def seed_all(seed: int) -> None:
        tape.seed_imagined(int(seed), None)

    return [
        (torch.cuda, "_lazy_init", lambda: None),  # which every call with a CUDA device makes first
        (torch.cuda, "current_device", current_device),
        (torch.cuda, "set_device", _set_device),
        (torch.cuda, "_exchange_device", _exchange),
        (torch.cuda, "_maybe_exchange_device", _exchange),
        (torch.cuda, "manual_seed", seed_one),
        (torch.cuda, "manual_seed_all", seed_all),
        (torch, "tensor", _making(torch.tensor, tape)),
        (torch, "as_tensor", _making(torch.as_tensor, tape)),
        (torch, "asarray", _making(torch.asarray, tape)),
        (torch.Tensor, "new_tensor", _new_tensor(tape)),
        (torch.Tensor, "to", _to),
        (torch.Tensor, "cuda", _to_cuda),
    ]


def _set_device(device: Any) -> None:
    index = torch.cuda._utils._get_device_index(device)
    if index >= 0:
        _current[-1] = index


def _exchange(index: int) -> int:
    before = _current[-1]
    if index >= 0:
        _current[-1] = index
    return before


def _making(original: Callable[..., Any], tape: Recorder) -> Callable[..., Any]:
    """`torch.tensor` and its like, which make the tensor on the CPU and move it where the dispatcher cannot see it."""

    def make(*args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("device")
        source = args[0] if args else None
        if asked is None and isinstance(source, torch.Tensor) and original is not torch.tensor:
            return original(*args, **kwargs)
        device = _numbered(default_device() if asked is None else asked)
        if device.type != "cuda":
            return original(*args, **kwargs)
        if isinstance(source, torch.Tensor):
            kwargs["device"] = device
            return _copied(original, source, kwargs)
        return tape.relocated(original(*args, **kwargs | {"device": "cpu"}), device)

    return make


def _copied(original: Callable[..., Any], source: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """A tensor made from a tensor, by the operator that eager would call for it."""
    wants_gradient = options.pop("requires_grad", False)
    options.pop("pin_memory", None)
    copy = original is torch.tensor or bool(options.pop("copy", False))
    moved = source.detach().to(**options, copy=copy) if original is torch.tensor else source.to(**options, copy=copy)
    return moved.requires_grad_() if wants_gradient else moved


def _new_tensor(tape: Recorder) -> Callable[..., Any]:
    make = _making(torch.tensor, tape)

    def new_tensor(self: torch.Tensor, data: Any, **options: Any) -> Any:
        return make(data, **{"dtype": self.dtype, "device": self.device} | options)

    return new_tensor


_original_to = torch.Tensor.to


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if args and isinstance(args[0], str | int | torch.device):
        args = (_numbered(args[0]), *args[1:])
    elif kwargs.get("device") is not None:
        kwargs["device"] = _numbered(kwargs["device"])
    return _original_to(self, *args, **kwargs)


def _to_cuda(
    self: torch.Tensor,
    device: Any = None,
    non_blocking: bool = False,
    memory_format: torch.memory_format = torch.preserve_format,
) -> Any:
    where = _numbered("cuda" if device is None else device)
    if where.type != "cuda":
        raise RuntimeError(f"Invalid device, must be cuda device, but got {where.type}")
    return _original_to(self, where, non_blocking=non_blocking, memory_format=memory_format)


def _numbered(device: str | int | torch.device) -> torch.device:
    """The device, with its number if it is a CUDA device: torch would ask the driver for it."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cuda", _current[-1]) if found.type == "cuda" and found.index is None else found
