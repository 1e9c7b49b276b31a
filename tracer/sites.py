"""Where an op was called: the init function and the lines of Python on the way there.

A `TorchFunctionMode` sees only four of torch's fourteen init functions; the calling frames name all of them, and cost half as
much (docs/decisions/005). Most ops of a large model come from the same few places: a place is turned into text when it is met
for the first time, and known from then on by its code objects and where in them they stand.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import sys
from collections.abc import Mapping
from functools import cache
from types import CodeType, FrameType
from typing import Any

import torch

from .graph import Frame, Site

_TORCH = os.path.dirname(torch.__file__) + os.sep
_INIT = torch.nn.init.__file__
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGES = tuple(sorted({os.path.dirname(os.path.dirname(torch.__file__)), *sys.path}, key=len, reverse=True))

_SKIP, _BORDER, _IN_INIT, _IN_TORCH, _IN_USER = range(5)


class Sites:
    """The sites of one trace, each a single object however many ops come from it."""

    def __init__(self) -> None:
        self._kinds: dict[int, int] = {}  # by a code object's id, as hashing the object itself takes long
        self._codes: list[CodeType] = []  # keeps the ids from being given to others
        self._known: dict[tuple[Any, ...], Site] = {}

    def capture(self, depth: int = 1) -> Site:
        """The site of the op being recorded, from the calling frames; the innermost `depth` are known to be ours."""
        kind_of = self._kinds.get
        key: list[Any] = []
        init: str | None = None
        init_args: tuple[tuple[str, Any], ...] = ()
        innermost = frame = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            kind = kind_of(id(code))
            if kind is None:
                kind = self._classify(code)
            if kind >= _IN_TORCH:
                if kind == _IN_TORCH or code.co_name != init:  # a wrapper that is called like the init function is no news
                    key.append(id(code))
                    key.append(frame.f_lasti)
                    if kind == _IN_USER:
                        break
            elif kind == _IN_INIT:
                init, init_args = code.co_name, _arguments(frame)
            elif kind == _BORDER:
                break
            frame = frame.f_back  # type: ignore[assignment]
        if init is not None:
            key += (init, init_args, *[type(value) for _, value in init_args])  # the types, as 1 == 1.0 == True
        whole = tuple(key)
        site = self._known.get(whole)
        if site is None:
            site = self._known[whole] = Site(self._spelled(innermost, init), init, init_args)
        return site

    def _classify(self, code: CodeType) -> int:
        kind = self._kinds[id(code)] = _classify(code)
        self._codes.append(code)
        return kind

    def _spelled(self, frame: FrameType | None, init: str | None) -> tuple[Frame, ...]:
        """The lines of torch and the first one of the user's, as the graph keeps them."""
        found: list[Frame] = []
        while frame is not None and (kind := self._kinds[id(frame.f_code)]) != _BORDER:
            if kind == _IN_TORCH or (kind == _IN_USER and frame.f_code.co_name != init):
                found.append(Frame(_short(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name))
                if kind == _IN_USER:
                    break
            frame = frame.f_back
        return tuple(found)


def _classify(code: CodeType) -> int:
    file = code.co_filename
    if os.path.abspath(file).startswith(_OURS):
        return _BORDER if code.co_name == "run_constructor" else _SKIP
    if file == _INIT:
        return _SKIP if code.co_name.startswith("_") else _IN_INIT
    if file in (copy.__file__, contextlib.__file__):
        return _SKIP
    if file.startswith(_TORCH):
        plumbing = ("_ops.py", "_tensor.py", "_python_dispatch.py", "_contextlib.py", "_device.py", "overrides.py")
        return _SKIP if file.endswith(plumbing) else _IN_TORCH
    return _IN_USER


def _arguments(frame: FrameType) -> tuple[tuple[str, Any], ...]:
    """The init function's arguments that differ from their defaults, tensors and generators left out."""
    values = frame.f_locals
    given = []
    for name, default in _parameters(frame.f_code):
        value = values.get(name)
        if value is not default and isinstance(value, int | float | str) and value != default:
            given.append((name, value))
    return tuple(given)


@cache
def _parameters(code: CodeType) -> tuple[tuple[str, Any], ...]:
    """The parameters of an init function with their defaults; one without a default has an object equal to nothing."""
    defaults = _defaults(code.co_name)
    return tuple((name, defaults.get(name, object())) for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


@cache
def _defaults(init: str) -> Mapping[str, Any]:
    function = getattr(torch.nn.init, init, None)
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@cache
def _short(file: str) -> str:
    for root in _PACKAGES:
        if root and file.startswith(root + os.sep):
            return file[len(root) + 1 :].replace(os.sep, "/")
    return file


def here() -> Frame | None:
    """The constructor's line that is running now."""
    return Sites().capture().line
