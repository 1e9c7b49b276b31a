"""The rules by which a search divides layers along a tensor axis, the user's, the model's, or inferred ones, and its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from .planner.workload import Training
from .tracer.errors import DecisionError, GroundplanError

if TYPE_CHECKING:
    from .plan import Plan

Engine = Literal["torch", "transformers"]


@dataclass(frozen=True)
class TensorAxis:
    """A tensor axis as the user wishes it: rules, `"auto"`, `"infer"`, or None for no such axis.

    `Plan.shard` says what each means; here `"auto"` infers rules where the model brings none.
    """

    plan: Plan
    wish: str | Mapping[str, str] | None
    workload: Training

    def __post_init__(self) -> None:
        if isinstance(self.wish, str) and self.wish not in ("auto", "infer"):
            raise DecisionError(f'tensor={self.wish!r} is neither "auto" nor "infer" nor a mapping of patterns to styles')

    def sizes(self, most: int) -> list[int]:
        """The sizes of the axis that may be tried, up to `most`; 1 is no axis."""
        if self.wish is None:
            return [1]
        if self._given is not None:
            return list(range(1, most + 1))
        return sorted({1, *(size for size in self._inferred_sizes(most) if size <= most)})

    def rules(self, ranks: int) -> tuple[Mapping[str, str], Engine] | None:
        """The rules for so many ranks; None where nothing can be divided between them."""
        if self._given is not None:
            return self._given
        from .runtime.tensor_rules import checked_rules

        found = checked_rules(self.plan._bound, self.plan.decisions, ranks, self.workload).rules
        return (found, "torch") if found else None

    @cached_property
    def _given(self) -> tuple[Mapping[str, str], Engine] | None:
        """What need not be inferred."""
        if isinstance(self.wish, Mapping):
            return self.wish, "torch"
        if self.wish == "auto":
            try:
                return self.plan._own_rules(), "transformers"
            except DecisionError:
                return None
        return None

    def _inferred_sizes(self, most: int) -> list[int]:
        """Nothing where forward cannot be traced, unless that is what was asked for."""
        from .runtime.tensor_rules import divisible

        try:
            return list(divisible(self.plan._bound, self.plan.decisions, self.workload).sizes(most))
        except GroundplanError:
            if self.wish == "infer":
                raise
            return []
