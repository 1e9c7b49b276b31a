"""The one law, checked: tracing and materializing is the same as building eagerly, in everything that can be observed."""

from __future__ import annotations

import dataclasses
import hashlib
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
_DEPTH = 8


# -- the law ------------------------------------------------------------------------------------------------------------


def assert_law(build: Callable[[], Any], seed: int = 0, cast: torch.dtype | None = None, state: bool = True) -> gp.Plan:
    """`assert_law_of` a constructor without arguments."""
    return assert_law_of(build, seed=seed, cast=cast, state=state)


def assert_law_of(
    build: Callable[..., Any], *args: Any, seed: int = 0, cast: torch.dtype | None = None, state: bool = True, **kwargs: Any
) -> gp.Plan:
    """Raise `AssertionError`, naming what differs, where `build(*args, **kwargs)` does not come out as eager's.

    The module is built twice: the second one is equal too, and shares memory with the first only where two eager ones do.
    `state` also asks for every tensor by itself, from its recipe.
    """
    _seed_everything(99)
    before = generator_states()
    plan = gp.trace(build, *args, **kwargs)
    assert_same_states(before, generator_states(), "tracing moved")
    plan = plan.cast(cast) if cast else plan
    built = plan.materialize(seed=seed)
    after = generator_states()

    def eager() -> Any:
        return _eager(lambda: build(*args, **kwargs), seed, cast)

    expected = eager()
    assert_same(expected, built)
    assert_same_states(generator_states(), after, "materialize left elsewhere")
    _assert_independent(plan, seed, built, expected, eager)
    if cast is None and not plan.graph.seed_dependent:
        assert_true_graph(plan, expected)
    if state:
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


def _assert_independent(plan: gp.Plan, seed: int, built: Any, expected: Any, eager: Callable[[], Any]) -> None:
    """Another model of the same plan is equal, and holds memory of the first one only where eager models share some."""
    _seed_everything(99)
    again = plan.materialize(seed=seed)
    assert_same(expected, again)
    shared = _shared_names(built, again)
    if shared or any(storage.constant for storage in plan.graph.storages):
        _assert_equal("two models", "shared memory", _shared_names(expected, eager()), shared)


def _shared_names(one: Any, other: Any) -> list[str]:
    """The tensors of `other` that lie in memory of `one`."""
    memory = {_memory(tensor) for tensor in named_tensors(one).values()}
    return [name for name, tensor in named_tensors(other).items() if _memory(tensor) in memory]


def assert_true_graph(plan: gp.Plan, expected: Any) -> None:
    """What the graph says of every tensor is what the eager module shows."""
    tensors, kinds, by_name = named_tensors(expected), _kinds(expected), plan.graph.by_name
    named = {name: tensor for name, tensor in tensors.items() if name in _own_names(tensors, kinds)}
    _assert_equal("the graph", "tensors", sorted(named), sorted(by_name))
    _assert_same_groups("ties of the graph", _partition(named, id), _partition(by_name, id))
    for name, tensor in named.items():
        node = by_name[name]
        if name == node.name:
            _assert_equal(name, "kind and persistence", kinds[name], (node.kind, node.persistent))
        _assert_equal(name, "requires_grad in the graph", tensor.requires_grad, node.requires_grad)
        if is_opaque(tensor):
            assert node.opaque, f"{name}: the graph takes it for an ordinary tensor"
        elif not is_lazy(tensor):
            _assert_equal(name, "geometry in the graph", _geometry(tensor), node.view[1:])
            if (
                _grad_fn(tensor) == "AsStridedBackward0"
            ):  # how autograd takes a view anew whose base was changed; not ours to tell
                assert node.grad_fn is not None, f"{name} has no grad_fn in the graph"
            else:
                _assert_equal(name, "grad_fn in the graph", _grad_fn(tensor), node.grad_fn)


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    size, stride, offset = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return tensor.dtype, size, stride, offset, tensor.is_conj(), tensor.is_neg()


def _kinds(built: Any) -> dict[str, tuple[str, bool]]:
    """What every name stands for, and whether a state_dict has it."""
    found: dict[str, tuple[str, bool]] = {}
    for prefix, module in named_modules(built).items():
        passing = getattr(module, "_non_persistent_buffers_set", ())
        found |= {f"{prefix}.{name}".strip("."): ("parameter", True) for name, _ in module._parameters.items()}
        found |= {f"{prefix}.{name}".strip("."): ("buffer", name not in passing) for name, _ in module._buffers.items()}
    return {name: found.get(name, ("attribute", True)) for name in named_tensors(built)}


def _own_names(tensors: Mapping[str, torch.Tensor], kinds: Mapping[str, tuple[str, bool]]) -> set[str]:
    """The names that count: a parameter's names as a parameter, not those of attributes that hold it too."""
    order = ("parameter", "buffer", "attribute")
    groups = _partition(tensors, id)
    first = {name: min(order.index(kinds[other][0]) for other in group) for group in groups for name in group}
    return {name for name in tensors if order.index(kinds[name][0]) == first[name]}


def assert_same_parts(plan: gp.Plan, expected: Any, seed: int) -> None:
    """Every tensor asked for by itself is as in the whole build; the generators stay where they are."""
    tensors = {name: each for name, each in named_tensors(expected).items() if not is_lazy(each) and not each.is_meta}
    names = [name for name in plan.graph.by_name if name in tensors and not is_opaque(tensors[name])]
    before = generator_states()
    found = plan.materialize_state(names, seed=seed)
    assert_same_states(before, generator_states(), "materialize_state moved")
    _assert_equal("parts", "names", names, list(found))
    for name in names:
        for what in ("shape", "dtype", "device", "requires_grad"):
            _assert_equal(name, f"{what} of the part", getattr(tensors[name], what), getattr(found[name], what))
        _assert_same_bits(name, tensors[name], found[name])
    for name in names if len(names) <= 8 else names[-1:]:
        _assert_same_bits(f"{name}, asked for alone", tensors[name], plan.materialize_state([name], seed=seed)[name])


def _assert_forms(plan: gp.Plan) -> None:
    plan.graph.check()
    assert plan.graph.to_text()
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
    _assert_same_groups("ties", _partition(left, id), _partition(right, id))
    _assert_same_groups("shared storages", _partition(left, _memory), _partition(right, _memory))


def assert_same_modules(left: Mapping[str, nn.Module], right: Mapping[str, nn.Module]) -> None:
    """The same submodules: names, classes, flags, sharing, and every attribute that can be compared."""
    _assert_equal("the module", "submodules", list(left), list(right))
    _assert_same_groups("shared submodules", _partition(left, id), _partition(right, id))
    for name, one in left.items():
        other = right[name]
        _assert_equal(name, "class", _class(one), _class(other))
        _assert_equal(name, "training", one.training, other.training)
        _assert_equal(name, "slots", _slots(one), _slots(other))
        if not isinstance(one, torch.jit.ScriptModule):
            _assert_equal(name, "persistence", one._non_persistent_buffers_set, other._non_persistent_buffers_set)
            _assert_equal(name, "number of hooks", _hooks(one), _hooks(other))
            _assert_same_value(name, _attributes(one), _attributes(other))


def assert_same_tensor(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """The same in class, geometry, autograd's view of it, Python attributes and bits."""
    _assert_equal(name, "class", type(left), type(right))
    for what in ("dtype", "device", "requires_grad"):
        _assert_equal(name, what, getattr(left, what), getattr(right, what))
    _assert_same_value(name, vars(left), vars(right))
    if is_lazy(left):
        return
    if is_opaque(left):
        _assert_equal(
            name, "kind", (left.layout, left.is_quantized, left.is_nested), (right.layout, right.is_quantized, right.is_nested)
        )
        for number, (one, other) in enumerate(zip(parts_of(left), parts_of(right), strict=True)):
            _assert_equal(f"{name}, part {number}", "geometry", _geometry(one), _geometry(other))
            _assert_same_bits(f"{name}, part {number}", one, other)
        return
    _assert_equal(name, "is_inference", left.is_inference(), right.is_inference())
    if not left.is_inference():
        _assert_equal(name, "version", left._version, right._version)
    _assert_equal(name, "shape", left.shape, right.shape)
    for what in ("stride", "storage_offset", "is_conj", "is_neg"):
        _assert_equal(name, what, getattr(left, what)(), getattr(right, what)())
    _assert_equal(name, "autograd", _autograd(left), _autograd(right))
    _assert_equal(name, "bytes of its storage", left.untyped_storage().nbytes(), right.untyped_storage().nbytes())
    _assert_same_bits(name, left, right)
    if isinstance(left, nn.Parameter):
        _assert_equal(name, "number of hooks", len(left._backward_hooks or ()), len(right._backward_hooks or ()))
        _assert_same_value(f"{name}.grad", left.grad, right.grad)


def _autograd(tensor: torch.Tensor) -> str:
    """Its place in autograd's graph; asking may raise where a base was changed in place."""
    try:
        return f"{type(tensor.grad_fn).__name__}, leaf: {tensor.is_leaf}, view: {tensor._is_view()}"
    except RuntimeError as error:
        return str(error)


def _grad_fn(tensor: torch.Tensor) -> str | None:
    try:
        return None if tensor.grad_fn is None else type(tensor.grad_fn).__name__
    except RuntimeError:
        return None


def _assert_same_bits(name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    """The same bytes in index order; NaN is equal to the same NaN, 0.0 differs from -0.0."""
    one, other = content(left), content(right)
    if one != other:
        size = left.element_size()
        index = next(i for i in range(left.numel()) if one[i * size : (i + 1) * size] != other[i * size : (i + 1) * size])
        differing = sum(one[i : i + size] != other[i : i + size] for i in range(0, len(one), size))
        place = torch.unravel_index(torch.tensor(index), left.shape) if left.dim() else ()
        at = ", ".join(str(int(each)) for each in place)
        values = [each.detach().reshape(-1)[index].item() for each in (left, right)]
        raise AssertionError(
            f"{name}: {differing} of {left.numel()} values differ; at [{at}] it is {values[0]!r} in eager and {values[1]!r} here"
        )


def _assert_same_value(name: str, left: Any, right: Any, depth: int = 0) -> None:
    """Compare what `==` can decide, through containers and dataclasses; anything else must at least be of the same class."""
    _assert_equal(name, "class of an attribute", _class(left), _class(right))
    if isinstance(left, torch.Tensor):
        assert_same_tensor(name, left, right)
    elif depth > _DEPTH or isinstance(left, weakref.ref):
        return
    elif isinstance(left, dict):
        _assert_equal(name, "keys", list(map(_key, left)), list(map(_key, right)))
        for key, one, other in zip(left, left.values(), right.values(), strict=True):
            _assert_same_value(f"{name}.{key}".strip("."), one, other, depth + 1)
    elif isinstance(left, list | tuple):
        _assert_equal(name, "length", len(left), len(right))
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            _assert_same_value(f"{name}[{index}]", one, other, depth + 1)
    elif dataclasses.is_dataclass(left) and not isinstance(left, type):
        _assert_same_value(name, getattr(left, "__dict__", {}), getattr(right, "__dict__", {}), depth + 1)
    elif (state := _state_of_generator(left)) is not None:
        _assert_equal(name, "state", state, _state_of_generator(right))
    elif isinstance(left, np.ndarray):
        _assert_equal(name, "array", (left.dtype, left.shape, left.tobytes()), (right.dtype, right.shape, right.tobytes()))
    elif isinstance(left, bool | int | float | complex | str | bytes | torch.dtype | torch.device | np.generic):
        _assert_equal(name, "value", repr(left), repr(right))
    elif not callable(left) and _defines(left, "__eq__") and not _equal(left, right):
        raise AssertionError(f"{name}: value is {_short(left)} in eager and {_short(right)} here")


def _state_of_generator(value: Any) -> str | None:
    """The state of a private generator, as text; None for anything else."""
    if isinstance(value, torch.Generator):
        return hashlib.sha256(value.get_state().numpy().tobytes()).hexdigest()
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state())
    return None


def _defines(value: Any, method: str) -> bool:
    """Whether its class does not leave the method to `object`."""
    return getattr(type(value), method) is not getattr(object, method)


def _equal(left: Any, right: Any) -> bool:
    """`==`, where it has an answer; a class whose `==` raises is not compared."""
    try:
        return bool(left == right)
    except Exception:
        return True


def _key(key: Any) -> str:
    """A dict's key; objects that are known by their address only, by their class."""
    return _class(key) if isinstance(key, nn.Module | torch.Tensor) or not _defines(key, "__repr__") else repr(key)


def _class(value: Any) -> str:
    """The class by name: some are made anew by each constructor."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _assert_equal(name: str, what: str, left: Any, right: Any) -> None:
    if left != right:
        raise AssertionError(f"{name or 'the module'}: {what} is {_short(left)} in eager and {_short(right)} here")


def _assert_same_groups(what: str, left: list[list[str]], right: list[list[str]]) -> None:
    """The same partition of names; the groups that only one of the two has are shown."""
    one, other = [each for each in left if each not in right], [each for each in right if each not in left]
    _assert_equal("the module", what, one, other)


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


def _slots(module: nn.Module) -> dict[str, bool]:
    """The names under which a module may hold a parameter, a buffer or a submodule, and whether it does."""
    held = {**module._parameters, **module._buffers, **module._modules}
    return {name: value is not None for name, value in held.items()}


def _hooks(module: nn.Module) -> dict[str, int]:
    """How many hooks of each kind; they go by numbers that torch counts up over the whole process."""
    return {name: len(value) for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}


def _partition(named: Mapping[str, Any], key: Callable[[Any], Any]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, each in named.items():
        groups.setdefault(key(each), []).append(name)
    return sorted(sorted(group) for group in groups.values())


def _memory(tensor: torch.Tensor) -> Any:
    if is_lazy(tensor) or is_opaque(tensor) or not tensor.untyped_storage().nbytes() or tensor.is_meta:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def is_opaque(tensor: torch.Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The ordinary tensors that a sparse, quantized or nested tensor is made of."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        return [tensor.int_repr(), torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]


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
        if state != found[name]:
            left, right = (hashlib.sha256(each).hexdigest()[:16] for each in (state, found[name]))
            raise AssertionError(f"{verb} the generator of {name}: its state is {left} in eager and {right} here")
