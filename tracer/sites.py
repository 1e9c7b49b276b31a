"""Where an op was called: the init function and the lines of Python on the way there.

A `TorchFunctionMode` sees only four of torch's fourteen init functions; the calling frames name all of them, and cost half as
much (docs/decisions/005). They are kept as (code, line) while tracing and turned into text afterwards.
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
from typing import Any, NamedTuple

import torch

from .graph import Frame, Site

_TORCH = os.path.dirname(torch.__file__) + os.sep
_INIT = torch.nn.init.__file__
_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PACKAGES = tuple(sorted({os.path.dirname(os.path.dirname(torch.__file__)), *sys.path}, key=len, reverse=True))
_USER_FRAMES = 1

_SKIP, _IN_INIT, _IN_TORCH, _IN_USER, _BORDER = range(5)
_kinds: dict[CodeType, int] = {}


class RawSite(NamedTuple):
    """A site as it is noted on the hot path."""

    lines: tuple[tuple[CodeType, int], ...]
    init: str | None
    init_args: tuple[tuple[str, Any], ...]


def _kind(code: CodeType) -> int:
    kind = _kinds.get(code)
    if kind is None:
        kind = _kinds[code] = _classify(code)
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


def capture() -> RawSite:
    """The site of the op being recorded, from the calling frames."""
    frame: FrameType | None = sys._getframe(2)
    lines: list[tuple[CodeType, int]] = []
    init: str | None = None
    init_args: tuple[tuple[str, Any], ...] = ()
    users = 0
    while frame is not None and users < _USER_FRAMES:
        code = frame.f_code
        kind = _kind(code)
        if kind == _BORDER:
            break
        if kind == _IN_INIT:
            init, init_args = code.co_name, _arguments(frame)
        elif kind == _IN_TORCH:
            lines.append((code, frame.f_lineno))
        elif kind == _IN_USER and code.co_name != init:  # a wrapper that is called like the init function is no news
            lines.append((code, frame.f_lineno))
            users += 1
        frame = frame.f_back
    return RawSite(tuple(lines), init, init_args)


def _arguments(frame: FrameType) -> tuple[tuple[str, Any], ...]:
    """The init function's arguments that differ from their defaults, tensors and generators left out."""
    code, values = frame.f_code, frame.f_locals
    defaults = _defaults(code.co_name)
    missing = object()
    return tuple(
        (name, values[name])
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if isinstance(values.get(name), (int, float, str, bool)) and values[name] != defaults.get(name, missing)
    )


@cache
def _defaults(init: str) -> Mapping[str, Any]:
    function = getattr(torch.nn.init, init, None)
    if function is None:
        return {}
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def spell(raw: RawSite) -> Site:
    """The site as the graph keeps it, with file names short enough to read and the same on every machine."""
    frames = tuple(Frame(_short(code.co_filename), line, code.co_name) for code, line in raw.lines)
    return Site(frames, raw.init, raw.init_args)


@cache
def _short(file: str) -> str:
    for root in _PACKAGES:
        if root and file.startswith(root + os.sep):
            return file[len(root) + 1 :].replace(os.sep, "/")
    return file


def here() -> Frame | None:
    """The constructor's line that is running now."""
    raw = capture()
    return spell(raw).line
