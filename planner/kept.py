"""What is worked out once for an object and kept for as long as it is there; by identity, as comparing takes longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

_kept: dict[int, dict[Any, Any]] = {}

_Owner = TypeVar("_Owner")
_Arguments = ParamSpec("_Arguments")
_Found = TypeVar("_Found")

MOST = 64
"""Of one function and owner, so many results are kept."""


def kept_with(owner: Any) -> dict[Any, Any]:
    """A dict that goes when `owner` goes.

    >>> class Owner: pass
    >>> owner = Owner()
    >>> kept_with(owner)["found"] = 3
    >>> kept_with(owner), kept_with(Owner())
    ({'found': 3}, {})
    """
    if id(owner) not in _kept:
        _kept[id(owner)] = {}
        weakref.finalize(owner, _kept.pop, id(owner), None).atexit = False
    return _kept[id(owner)]


def kept(function: Callable[Concatenate[_Owner, _Arguments], _Found]) -> Callable[Concatenate[_Owner, _Arguments], _Found]:
    """Works out a function once for each owner, its first argument, and the others, which are hashable and all that it looks at.

    What it returns is shared by all who ask, and so must not be changed.

    >>> class Owner: pass
    >>> squares = kept(lambda owner, number: [number**2])
    >>> owner = Owner()
    >>> squares(owner, 3), squares(owner, 3) is squares(owner, 3), squares(owner, 3) is squares(Owner(), 3)
    ([9], True, False)
    """

    @wraps(function)
    def found(owner: _Owner, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Found:
        known = kept_with(owner).setdefault(function, {})
        key = (args, *kwargs.items()) if kwargs else args
        if key not in known:
            if len(known) >= MOST:
                known.pop(next(iter(known)))
            known[key] = function(owner, *args, **kwargs)
        result: _Found = known[key]
        return result

    return found
