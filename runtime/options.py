"""What the user says about the values of a build, the same for every door."""

from __future__ import annotations

from dataclasses import dataclass

from ..tracer.errors import MaterializeError
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

    @classmethod
    def of(
        cls,
        seed: int | None,
        checkpoint: Source | None,
        rng: str,
        uninitialized: str,
        missing: str,
        unexpected: str,
        rename: Rename | None,
        threads: int | None,
    ) -> Options:
        """As the doors name them; raises `MaterializeError` for what means nothing without a checkpoint."""
        if checkpoint is not None:
            return cls(seed, rng, uninitialized, threads, Load(checkpoint, missing, unexpected, rename))
        if missing != "init" or unexpected != "error" or rename is not None:
            raise MaterializeError(
                "missing=, unexpected= and rename= say what to do with a checkpoint; name it with checkpoint=PATH"
            )
        return cls(seed, rng, uninitialized, threads)
