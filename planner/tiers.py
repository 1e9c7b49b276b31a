"""The tiers of a prediction, from a closed form to a replay of the allocator."""

from __future__ import annotations

from typing import Any, Literal, get_args

from ..tracer.errors import DecisionError, nearest

Word = Literal["fits", "tight", "does not fit"]
"""What a verdict says."""

Tier = Literal["T0", "T1", "T2"]
"""T0: closed form. T1: the step, of training or serving, on fake tensors. T2: that, and the CUDA caching allocator's rules."""

_WORDS = '"T0" for the closed form, "T1" for a run on fake tensors, "T2" for that and what the CUDA caching allocator makes of it'


def check_tier(tier: object, workload: object, allocator: Any = None) -> None:
    """Raises `DecisionError` for a tier that there is not, and one that lacks what it needs.

    >>> check_tier("T3", None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    groundplan.tracer.errors.DecisionError: tier='T3' is not known: say "T0" for the closed form, ...
    """
    if tier not in get_args(Tier):
        raise DecisionError(f"tier={tier!r} is not known: say {_WORDS}{nearest(str(tier), get_args(Tier))}")
    if tier != "T0" and workload is None:
        raise DecisionError(f'tier="{tier}" runs a step: say plan.memory(gp.Training(...), tier="{tier}"), or gp.Inference(...)')
    if tier == "T1" and allocator is not None:
        raise DecisionError(f'allocator={allocator!r} is for tier="T2", which is T1 with the allocator replayed, and for "T0"')
