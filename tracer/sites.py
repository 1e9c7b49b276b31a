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

_SKIP, _IN_INIT, _IN_TORCH, _IN_USER, _BORDER = range(5)


class Sites:
    """The sites of one trace, each a single object however many ops come from it."""

    def __init__(self) -> None:
        self._kinds: dict[int, tuple[int, CodeType]] = {}  # by id, as hashing a code object takes long; the object keeps its id
        self._known: dict[tuple[Any, ...], Site] = {}

    def capture(self, depth: int = 1) -> Site:
        """The site of the op being recorded, from the calling frames; the innermost `depth` are known to be ours."""
        kinds = self._kinds
        key: list[int] = []
        frames: list[FrameType] = []
        init: str | None = None
        init_args: tuple[tuple[str, Any], ...] = ()
        frame: FrameType | None = sys._getframe(depth)
        while frame is not None:
            code = frame.f_code
            known = kinds.get(id(code))
            kind = known[0] if known is not None else self._kind_of(code)
            if kind != _SKIP:
                if kind == _BORDER:
                    break
                if kind == _IN_INIT:
                    init, init_args = code.co_name, _arguments(frame)
                elif kind == _IN_TORCH or code.co_name != init:  # a wrapper that is called like the init function is no news
                    key += (id(code), frame.f_lasti)
                    frames.append(frame)
                    if kind == _IN_USER:
                        break
            frame = frame.f_back
        whole = (init, init_args, *[type(value) for _, value in init_args], *key)  # as 1 == 1.0 == True
        site = self._known.get(whole)
        if site is None:
            site = self._known[whole] = Site(tuple(map(_spelled, frames)), init, init_args)
        return site

    def _kind_of(self, code: CodeType) -> int:
        kind = _classify(code)
        self._kinds[id(code)] = kind, code
        return kind


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
    return tuple(
        [
            (name, values[name])
            for name, default in _parameters(frame.f_code)
            if isinstance(values.get(name), (int, float, str, bool)) and values[name] != default
        ]
    )


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


def _spelled(frame: FrameType) -> Frame:
    """The frame as the graph keeps it: a file name short enough to read and the same on every machine."""
    return Frame(_short(frame.f_code.co_filename), frame.f_lineno, frame.f_code.co_name)


@cache
def _short(file: str) -> str:
    for root in _PACKAGES:
        if root and file.startswith(root + os.sep):
            return file[len(root) + 1 :].replace(os.sep, "/")
    return file


def here() -> Frame | None:
    """The constructor's line that is running now."""
    return Sites().capture().line
