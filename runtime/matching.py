"""Which tensor of a module comes from which entry of a checkpoint; everything that does not fit is said at once.

A checkpoint's names are a state dict's: those of parameters and persistent buffers, any one of a tied tensor's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..planner.records import dtype_name
from ..tracer.errors import CheckpointError, MaterializeError, nearest
from ..tracer.graph import ParamGraph, TensorNode
from .checkpoint import Checkpoint
from .entries import Entry, Strange

_SHOWN = 12
_log = logging.getLogger("groundplan")


@dataclass(frozen=True)
class Matched:
    """What a checkpoint holds of a graph's tensors, by each tensor's first name.

    `entries` has the names that are found, `missing` those that are not, `missing_here` those of them that are in the module too.
    `ties` are the other entries of tied tensors, which have to hold the same.
    """

    where: str
    entries: Mapping[str, Entry]
    ties: Sequence[tuple[str, Entry, Entry]]
    missing: tuple[str, ...]
    missing_here: tuple[str, ...]

    def log_missing(self, alone: bool) -> None:
        """Tell the user what the checkpoint does not have, through the logger `groundplan`; unless `alone`, for all ranks."""
        missing = self.missing_here if alone else self.missing
        if missing and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            shown, more = ", ".join(missing[:_SHOWN]), len(missing) - _SHOWN
            _log.warning(
                "%s has no value for %d tensor%s, initialized as the constructor does: %s%s",
                self.where,
                len(missing),
                "s" * (len(missing) != 1),
                shown,
                f", … and {more} more" if more > 0 else "",
            )


def matched(
    graph: ParamGraph,
    checkpoint: Checkpoint,
    members: Mapping[str, torch.Tensor],
    missing: str = "init",
    unexpected: str = "error",
    optional: Sequence[str] = (),
) -> Matched:
    """Find the entry of every parameter and persistent buffer; raises one `CheckpointError` that lists all that does not fit.

    `members` are the tensors that the module has, which may be a part of what the graph has. The `optional` names may be missing
    without a word.
    """
    _check_options(missing, unexpected)
    state = [node for node in graph.state if not node.lazy]
    expected = {name: node for node in state for name in node.names}
    found: dict[str, Entry] = {}
    ties: list[tuple[str, Entry, Entry]] = []
    problems: list[str] = []
    for name, node in expected.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            continue
        problem = _problem(name, node, entry)
        if problem:
            problems.append(problem)
        elif node.name in found and found[node.name].elements != entry.elements:
            ties.append((name, found[node.name], entry))
        else:
            found.setdefault(node.name, entry)
    ignored = tuple(name for name in checkpoint.entries if name not in expected)
    absent = [node.name for node in state if not any(name in checkpoint.entries for name in node.names)]
    if unexpected == "error":
        problems += [_unexpected(name, checkpoint.entries[name], graph, expected, absent) for name in ignored]
    lost = tuple(name for name in absent if name not in optional)
    lost_here = tuple(name for name in lost if name in members)
    if missing == "error":
        problems += [f"{name} is missing{nearest(name, ignored)}" for name in lost_here]
    if problems:
        raise CheckpointError(_message(checkpoint, problems, ignored if unexpected == "error" else (), expected))
    return Matched(checkpoint.where, found, ties, lost, lost_here)


def _check_options(missing: str, unexpected: str) -> None:
    if missing not in ("init", "error"):
        raise MaterializeError(f'missing={missing!r} is neither "init" nor "error"')
    if unexpected not in ("error", "ignore"):
        raise MaterializeError(f'unexpected={unexpected!r} is neither "error" nor "ignore"')


def _problem(name: str, node: TensorNode, entry: Entry) -> str | None:
    """What stands against filling a tensor from an entry."""
    if isinstance(entry, Strange):
        return f"{name} {entry.why}"
    if node.opaque and "DTensor" not in node.type:
        return f"{name} is a {node.type} tensor in the module, which is not filled from a checkpoint"
    if not node.opaque and entry.shape != node.shape and not (entry.shape == (1,) and node.shape == ()):
        return f"{name} has the shape {list(entry.shape)} in the checkpoint and {list(node.shape)} in the module"
    if not converts(entry.dtype, node.dtype):
        return f"{name} is {dtype_name(entry.dtype)} in the checkpoint, which does not convert to {dtype_name(node.dtype)}"
    return None


def converts(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a value keeps its meaning: `torch.can_cast`, so that no fraction, imaginary part or range of kinds is lost."""
    return source == target or torch.can_cast(source, target)


def _unexpected(name: str, entry: Entry, graph: ParamGraph, expected: Mapping[str, TensorNode], lost: Sequence[str]) -> str:
    node = graph.by_name.get(name)
    if node is not None:
        if node.lazy:
            return f"{name} belongs to a lazy module, whose shapes the first call decides; load it after that"
        kind = "a buffer that is not persistent" if node.kind == "buffer" else f"an {node.kind}"
        if graph.storages[node.view.storage].device == "meta":
            return f"{name} is on the meta device in the module, as the constructor asks for"
        return f"{name} is {kind} in the module: a state dict has no such key"
    return f"{name} {list(entry.shape)} is not in the module{nearest(name, lost or expected)}"


def _message(checkpoint: Checkpoint, problems: Sequence[str], ignored: Sequence[str], expected: Mapping[str, TensorNode]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    hint = _prefix_hint(ignored, expected) or ('\nLeave them with unexpected="ignore", or say rename={...}' if ignored else "")
    plural = "s do" if len(problems) != 1 else " does"
    return (
        f"{checkpoint.where} does not fit the module, nothing was loaded; {len(problems)} tensor{plural} not:{shown}{more}{hint}"
    )


def _prefix_hint(ignored: Sequence[str], expected: Mapping[str, TensorNode]) -> str:
    """Where every name that is not expected differs by one prefix from one that is, how to say so."""
    for name in ignored:
        for depth in range(1, name.count(".") + 1):
            prefix = ".".join(name.split(".")[:depth]) + "."
            hits = [each for each in ignored if each.startswith(prefix) and each.removeprefix(prefix) in expected]
            if len(hits) * 2 > len(ignored):
                pattern = prefix.replace(".", r"\.")
                return f'\n{len(hits)} of them fit without {prefix!r} in front: rename={{r"^{pattern}": ""}}'
        break
    return ""
