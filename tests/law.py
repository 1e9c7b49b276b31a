"""The one law, checked: tracing and materializing is the same as building eagerly, in everything that can be observed."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import groundplan as gp

_SKIPPED = {"_parameters", "_buffers", "_modules"}


# -- the law ------------------------------------------------------------------------------------------------------------


def assert_law(build: Callable[[], Any], seed: int = 0, cast: torch.dtype | None = None, state: bool = True) -> gp.Plan:
    """Raise `AssertionError`, naming what differs, where `build` does not come out as eager's.

    `state` also asks for every tensor by itself, from its recipe.
    """
    _seed_everything(99)
    before = generator_states()
    plan = gp.trace(build)
    assert_same_states(before, generator_states(), "tracing moved")
    plan = plan.cast(cast) if cast else plan
    built = plan.materialize(seed=seed)
    after = generator_states()
    expected = _eager(build, seed, cast)
    assert_same(expected, built)
    assert_same_states(generator_states(), after, "materialize left elsewhere")
    if state and not plan.graph.host_random:
        assert_same_parts(plan, expected, seed)
    _assert_forms(plan)
    return plan


def _eager(build: Callable[[], Any], seed: int, cast: torch.dtype | None) -> Any:
    _seed_everything(99)
    torch.manual_seed(seed)
    built = build()
    for root in roots(built).values():
        if cast:
            root.to(cast)
    return built


def assert_same_parts(plan: gp.Plan, expected: Any, seed: int) -> None:
    """Every tensor asked for by itself has the bytes that the whole build gives it; the generators stay where they are."""
    tensors = {name: each for name, each in named_tensors(expected).items() if not is_lazy(each) and not each.is_meta}
    names = [name for name in plan.graph.by_name if name in tensors]
    before = generator_states()
    found = plan.materialize_state(names, seed=seed)
    assert_same_states(before, generator_states(), "materialize_state moved")
    for name in names:
        _assert_equal(name, "shape", tensors[name].shape, found[name].shape)
        _assert_equal(name, "dtype", tensors[name].dtype, found[name].dtype)
        _assert_equal(name, "values", content(tensors[name]), content(found[name]))


def _assert_forms(plan: gp.Plan) -> None:
    plan.graph.check()
    plan.graph.to_text()
    for line in str(plan.report()).split("\n"):
        assert len(line) <= 100, f"the report has a line of {len(line)} columns: {line}"


# -- comparing two built modules ----------------------------------------------------------------------------------------


def assert_same(expected: Any, found: Any) -> None:
    """Raise `AssertionError` where two modules (or tuples or dicts of them) differ in anything that can be observed."""
    _assert_equal("the result", "type", type(expected).__qualname__, type(found).__qualname__)
    assert_same_modules(named_modules(expected), named_modules(found))
    left, right = named_tensors(expected), named_tensors(found)
    _assert_equal("the module", "tensors", list(left), list(right))
    for name in left:
        assert_same_tensor(name, left[name], right[name])
    _assert_equal("the module", "ties", _partition(left, id), _partition(right, id))
    _assert_equal("the module", "shared storages", _partition(left, _memory), _partition(right, _memory))


def assert_same_modules(left: Mapping[str, nn.Module], right: Mapping[str, nn.Module]) -> None:
    """The same submodules: names, classes, flags, sharing, and every attribute that can be compared."""
    _assert_equal("the module", "submodules", list(left), list(right))
    _assert_equal("the module", "shared submodules", _partition(left, id), _partition(right, id))
    for name, one in left.items():
        other = right[name]
        _assert_equal(name, "class", type(one).__qualname__, type(other).__qualname__)
        _assert_equal(name, "training", one.training, other.training)
        if not isinstance(one, torch.jit.ScriptModule):
            _assert_equal(name, "persistence", one._non_persistent_buffers_set, other._non_persistent_buffers_set)
            _assert_equal(name, "number of hooks", _hooks(one), _hooks(other))
            _assert_same_value(name, _attributes(one), _attributes(other))


def assert_same_tensor(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """The same in class, geometry, autograd's view of it, Python attributes and bits."""
    _assert_equal(name, "class", type(left), type(right))
    for what in ("dtype", "device", "requires_grad"):
        _assert_equal(name, what, getattr(left, what), getattr(right, what))
    _assert_equal(name, "grad_fn", _autograd(left), _autograd(right))
    _assert_same_value(name, vars(left), vars(right))
    if is_lazy(left):
        return
    _assert_equal(name, "is_inference", left.is_inference(), right.is_inference())
    if not left.is_inference():
        _assert_equal(name, "version", left._version, right._version)
    for what in ("shape", "stride", "storage_offset", "is_conj", "is_neg", "is_contiguous"):
        one, other = getattr(left, what), getattr(right, what)
        _assert_equal(name, what, one() if callable(one) else one, other() if callable(other) else other)
    _assert_equal(name, "values", content(left), content(right))


def _autograd(tensor: torch.Tensor) -> str:
    """Whether it is a leaf, and the class of its `grad_fn`; asking may raise where a base was changed in place."""
    try:
        return f"{type(tensor.grad_fn).__name__}, leaf: {tensor.is_leaf}"
    except RuntimeError as error:
        return str(error)


def _assert_same_value(name: str, left: Any, right: Any) -> None:
    """Compare what `==` can decide, through containers; anything else must at least be of the same class."""
    _assert_equal(name, "class of an attribute", type(left).__qualname__, type(right).__qualname__)
    if isinstance(left, torch.Tensor):
        assert_same_tensor(name, left, right)
    elif isinstance(left, dict):
        _assert_equal(name, "keys", list(map(repr, left)), list(map(repr, right)))
        for key, value in left.items():
            _assert_same_value(f"{name}.{key}", value, right[key])
    elif isinstance(left, list | tuple):
        _assert_equal(name, "length", len(left), len(right))
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            _assert_same_value(f"{name}[{index}]", one, other)
    elif isinstance(left, np.ndarray):
        _assert_equal(name, "array", left.tobytes(), right.tobytes())
    elif isinstance(left, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        _assert_equal(name, "value", repr(left), repr(right))


def _assert_equal(name: str, what: str, left: Any, right: Any) -> None:
    if left != right:
        raise AssertionError(f"{name}: {what} is {_short(left)} in eager and {_short(right)} here")


def _short(value: Any) -> str:
    text = value[:32].hex() if isinstance(value, bytes) else str(value)
    return text if len(text) < 400 else f"{text[:400]}…"


# -- what there is ------------------------------------------------------------------------------------------------------


def roots(built: Any) -> dict[str, nn.Module]:
    """The modules that were returned, by prefix."""
    if isinstance(built, nn.Module):
        return {"": built}
    return {str(key): member for key, member in (built.items() if isinstance(built, Mapping) else enumerate(built))}


def named_modules(built: Any) -> dict[str, nn.Module]:
    """Every submodule under every name."""
    return {
        f"{prefix}.{name}".strip("."): module
        for prefix, root in roots(built).items()
        for name, module in root.named_modules(remove_duplicate=False)
    }


def named_tensors(built: Any) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and plain tensor attribute under every name."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in named_modules(built).items():
        own = {**module._parameters, **module._buffers}
        own |= {name: value for name, value in vars(module).items() if name not in _SKIPPED}
        for name, value in own.items():
            found.update(_tensors_in(f"{prefix}.{name}".strip("."), value, 0))
    return found


def _tensors_in(name: str, value: Any, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, list | tuple) and depth < 4:
        for index, each in enumerate(value):
            yield from _tensors_in(f"{name}[{index}]", each, depth + 1)
    elif isinstance(value, dict) and depth < 4:
        for key, each in value.items():
            yield from _tensors_in(f"{name}[{key!r}]", each, depth + 1)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes, those left out that lead back into the module or are of torch's own making."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _SKIPPED and "_hooks" not in name and not isinstance(value, nn.Module | weakref.ref | torch.Tensor)
    }


def _hooks(module: nn.Module) -> dict[str, int]:
    """How many hooks of each kind; they go by numbers that torch counts up over the whole process."""
    return {name: len(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}


def _partition(named: Mapping[str, Any], key: Callable[[Any], Any]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, each in named.items():
        groups.setdefault(key(each), []).append(name)
    return sorted(groups.values())


def _memory(tensor: torch.Tensor) -> Any:
    if is_lazy(tensor) or not tensor.untyped_storage().nbytes() or tensor.is_meta:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def content(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in index order."""
    if tensor.is_meta or not tensor.numel():
        return b""
    plain = tensor.detach().resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return bytes(plain.view(torch.uint8).numpy().data)


# -- random states ------------------------------------------------------------------------------------------------------


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states() -> dict[str, bytes]:
    """The states of torch's, Python's and numpy's global generators."""
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": repr(random.getstate()).encode(),
        "numpy": repr([np.asarray(part).tolist() for part in np.random.get_state()]).encode(),
    }


def assert_same_states(expected: Mapping[str, bytes], found: Mapping[str, bytes], verb: str) -> None:
    """Raise `AssertionError` where a generator stands elsewhere."""
    for name, state in expected.items():
        assert state == found[name], f"{verb} the generator of {name}"
