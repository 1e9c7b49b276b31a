"""The module that a plan says, filled from a checkpoint; what that does not have gets the constructor's values.

A meta module is filled in place: nothing is drawn that the checkpoint has. Where autograd knows something of the constructor's
tensors (gradient hooks, a result with a `grad_fn`), only a real run of the constructor makes them; that is done, and then loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..planner.check import check_decisions
from ..planner.decisions import Decisions
from ..tracer.collect import roots_of
from .boxes import whole_box
from .build import Build
from .check import check_uninitialized
from .filler import alias_of
from .inplace import fill_module
from .job import Progress
from .loading import Loading, Read, all_members, opened, read_all
from .materialize import materialize, restored_on_failure
from .meta import HookedError, forget, meta_likeness, meta_module
from .options import Options
from .ranks import Ranks
from .workers import Workers


def materialize_loaded(
    build: Build,
    decisions: Decisions,
    options: Options,
    progress: Progress | None = None,
) -> Any:
    """What the constructor returns, filled; raises `CheckpointError`, and nothing has happened then."""
    check_decisions(decisions, build.graph)
    try:
        built = None if any(tensor.grad_fn for tensor in build.graph.tensors) else meta_module(build, decisions)
    except HookedError:
        built = None
    if built is None:
        return _run_and_loaded(build, decisions, options, progress)
    root = nn.Module()
    root._modules.update(roots_of(built))
    fill_module(root, Ranks(), options, None, progress)
    forget(root)
    return built


def _run_and_loaded(
    build: Build,
    decisions: Decisions,
    options: Options,
    progress: Progress | None,
) -> Any:
    """The constructor is run for real, draws and all, and the checkpoint's values take the place of its own."""
    assert options.load is not None
    checkpoint = opened(options.load, build.graph, all_members(build.graph), lambda: meta_likeness(build, decisions))
    with restored_on_failure(), checkpoint as loading, Workers(options.threads) as workers:
        check_uninitialized(build.graph, options.uninitialized, set(loading.matched.missing))
        loading.matched.log_missing(alone=True)
        kept = "empty" if options.uninitialized == "error" else options.uninitialized
        built = materialize(build, decisions, options.seed, kept, progress, options.threads, options.rng)
        read_all(_reads(built, loading), loading.checkpoint, workers)
        for root in roots_of(built).values():
            loading.finish(root)
    return built


def _reads(built: Any, loading: Loading) -> Iterator[Read]:
    for prefix, root in roots_of(built).items():
        for name, tensor in (*root.named_parameters(prefix), *root.named_buffers(prefix)):
            entry = loading.matched.entries.get(name)
            if entry is not None:
                yield Read(entry, whole_box(entry.shape), alias_of(tensor).view(entry.shape))
