"""What is worked out once for an object and kept for as long as it is there; by identity, as comparing takes longer."""

from __future__ import annotations

import weakref
from typing import Any

_kept: dict[int, dict[Any, Any]] = {}


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
