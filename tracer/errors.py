"""Every error groundplan raises on purpose, as one tree.

* `GroundplanError`
    * `TraceError`: the constructor did something a trace cannot follow
    * `GraphError`: a parameter graph contradicts itself (a bug, or a hand-built graph that is wrong)
    * `UnknownNameError`: a tensor name or a pattern that matches nothing
    * `DecisionError`: a decision that cannot be taken (a dtype, a device, a pattern)
    * `PlanFileError`: a saved plan that cannot be read, or is not this constructor's
    * `MaterializeError`: building failed; nothing half-built is left behind
        * `UninitializedError`: the constructor leaves tensors without values, and no source for them was given
        * `RanksError`: the processes that build together do not agree, or one of them failed
        * `CheckpointError`: a checkpoint that cannot be read or written, or that is not this module's
    * `FitError`: no plan was found that fits a cluster
    * `MemoryRunError`: a training step that cannot be run without memory
    * `CalibrationError`: a calibration that cannot be read, or is of another kind of device or version of torch
    * `SpecError`: a command-line SPEC that names no constructor

Errors that the user's own constructor raises are never wrapped: they come out as eager raises them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GroundplanError(Exception):
    """The root of every error that groundplan raises on purpose."""


class TraceError(GroundplanError):
    """The constructor did something that a trace cannot follow; the message names it and the way out."""


class GraphError(GroundplanError):
    """A parameter graph contradicts itself."""


class UnknownNameError(GroundplanError, KeyError):
    """A tensor name or a pattern that matches nothing in the graph; the message lists the nearest names."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0]) if self.args else ""


class DecisionError(GroundplanError, ValueError):
    """A decision that cannot be taken: an unknown dtype, an unsupported device, a pattern without a match."""


class PlanFileError(GroundplanError):
    """A saved plan that cannot be read, or that belongs to another constructor."""


class MaterializeError(GroundplanError):
    """Building the module failed; nothing half-built is left behind."""


class UninitializedError(MaterializeError):
    """The constructor leaves tensors without values, and the caller named no source for them."""


class RanksError(MaterializeError):
    """The ranks that build a module together do not agree, or one of them failed; the message names the rank."""


class CheckpointError(MaterializeError):
    """A checkpoint that cannot be read or written, or is not this module's; the message names the file and the tensors."""


class MemoryRunError(GroundplanError):
    """A training step looks at values, which a run without memory does not have; the message names the op and the way out."""


class CalibrationError(GroundplanError):
    """A calibration that cannot be read or written, or that is of another kind of device or version of torch."""


class FitError(GroundplanError):
    """No plan was found that fits a cluster; the message says what is missing where."""


class SpecError(GroundplanError):
    """A command-line SPEC that does not name a constructor."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence fragment with the known names nearest to `name`, or an empty string.

    >>> nearest("layer.wieght", ["layer.weight", "layer.bias"])
    '; did you mean layer.weight, layer.bias?'
    """
    names = list(known)
    found = difflib.get_close_matches(name, names, count, cutoff=0.5)
    return f"; did you mean {', '.join(found)}?" if found else ""
