"""What the user says about the values of a build, the same for every door."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint import Rename, Source


@dataclass(frozen=True)
class Load:
    """A checkpoint: where it is, and what to do about names that it or the module does not have."""

    source: Source
    missing: str = "init"
    unexpected: str = "error"
    rename: Rename | None = None


@dataclass(frozen=True)
class Options:
    """Where values come from, and who makes them; what each means is said in `Plan.materialize`."""

    seed: int | None = None
    rng: str = "eager"
    uninitialized: str = "error"
    threads: int | None = None
    load: Load | None = None
