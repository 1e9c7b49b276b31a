"""Profiles put together of several: the memory of a plan in which layers do different things, without a trace of that plan."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import groundplan as gp
from groundplan.fitting_training import FitTraining, TrainingOptions
from groundplan.forecast import forecast
from groundplan.planner.estimate import memory
from groundplan.planner.fit_training import LEVELS, Does, Layout, Search, Tried
from groundplan.planner.mixed import NoMix, mixed, pieces_of, rounds_of
from groundplan.planner.profile import Profile

from .closed_form import DEEP, PHASES, inputs_of
from .test_fit_training import cluster_of

MODELS = ("Llama", "GPT-2", "nn.Transformer", "T5", "Gemma 3")
PLENTY = 80 * 10**9
DIVIDED: dict[str, tuple[int, bool]] = {"one device": (1, False), "FSDP": (2, True)}
ALL = tuple(Does(level, gathered) for gathered in (False, True) for level in LEVELS)


@cache
def plan_of(model: str) -> gp.Plan:
    return gp.trace(DEEP[model])


@cache
def search_of(model: str, divided: str, accumulate: int = 1) -> tuple[Search, Layout, dict[Does, Profile]]:
    """A search, a layout on one device or with FSDP, and the profile of each level."""
    devices, sharded = DIVIDED[divided]
    workload = gp.Training("adamw", batch_size=2, inputs=inputs_of(model, 2, 16), accumulate=accumulate)
    axes = {"dp_shard": devices} if sharded else None
    question = FitTraining(plan_of(model), cluster_of(devices, PLENTY), workload, TrainingOptions(axes=axes, tensor=None))
    search, layout = question.search(0.2), question.layouts(False)[0]
    profiles = {}
    for does in search.allowed.does(layout):
        found = search.profile_of(layout.decisions, replace(workload, checkpointing=does.level))
        assert isinstance(found, Profile)
        profiles[does] = found
    return search, layout, profiles


def tried(model: str, divided: str, rounds: Any, accumulate: int = 1) -> Tried:
    search, layout, profiles = search_of(model, divided, accumulate)
    return search.tried(layout, mixed(profiles, rounds), rounds)


@pytest.mark.parametrize("divided", DIVIDED)
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_memory_of_a_trace_and_of_a_run_of_the_very_plan(model: str, divided: str) -> None:
    """At most 1 % less, and more by what a layer leaves to the next of another kind, which counts to the end of the forward."""
    chance = random.Random(f"{model} {divided}")
    _, layout, profiles = search_of(model, divided)
    counts = rounds_of(next(iter(profiles.values())))
    rounds = tuple(drawn(chance, count, list(profiles), in_order=divided == "FSDP") for count in counts)
    found = tried(model, divided, rounds)
    known = plan_of(model)._bound, found.decisions, layout.workload
    traced, run = (forecast(*known, tier, None, None) for tier in ("T0", "T1"))
    for phase in PHASES:
        for truth in (traced.phases[phase], run.phases[phase]):
            assert 0.99 * truth <= found.memory.phases[phase] <= 1.05 * truth, (phase, rounds)


def drawn(chance: random.Random, count: int, does: list[Does], in_order: bool) -> tuple[Does, ...]:
    """What the rounds of a run do: at random, or as a search has it, the middle in order."""
    found = [chance.choice(does) for _ in range(count)]
    return tuple([found[0], *sorted(found[1:-2], key=does.index), *found[-2:]] if in_order else found)


@pytest.mark.parametrize("divided", DIVIDED)
@pytest.mark.parametrize("model", MODELS)
def test_of_layers_that_do_the_same_it_is_the_profile_that_there_was(model: str, divided: str) -> None:
    search, layout, profiles = search_of(model, divided)
    for does, profile in profiles.items():
        rounds = tuple((does,) * count for count in rounds_of(profile))
        whole = memory(search.graph, tried(model, divided, rounds).decisions, layout.workload, profile)
        assert tried(model, divided, rounds).memory.by_device == whole.by_device


# -- laws ---------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("abc"), min_size=4, max_size=30))
def test_pieces_are_all_rounds_in_order_each_once_and_alike(keys: list[str]) -> None:
    pieces = pieces_of(keys)
    assert [number for each in pieces for number in range(each.start, each.start + each.count)] == list(range(len(keys)))
    assert all({*keys[each.start : each.start + each.count]} == {each.key} for each in pieces)
    named = {each.traced: each.start for each in pieces if each.traced != 1}
    assert named == {0: 0, 2: len(keys) - 2, 3: len(keys) - 1}
    for each in pieces:
        assert each.count == 1 or keys[each.start - 1] == each.key


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_more_checkpointing_never_takes_more(data: st.DataObject) -> None:
    """Of a layer that keeps more than another would have to, both given back before the backward of the one before it."""
    model, divided = data.draw(st.sampled_from(("Llama", "GPT-2"))), data.draw(st.sampled_from(list(DIVIDED)))
    levels = data.draw(st.lists(st.sampled_from(LEVELS), min_size=7, max_size=7))
    place = data.draw(st.integers(0, 6))
    less = [*levels[:place], LEVELS[max(LEVELS.index(levels[place]) - 1, 0)], *levels[place + 1 :]]
    more_kept, less_kept = (
        tried(model, divided, (tuple(Does(level) for level in each),)).memory.phases["step"] for each in (levels, less)
    )
    assert less_kept <= more_kept


def test_profiles_of_other_layers_are_refused() -> None:
    _, _, llama = search_of("Llama", "one device")
    _, _, gpt = search_of("T5", "one device")
    with pytest.raises(NoMix, match="another order"):
        mixed({"a": next(iter(llama.values())), "b": next(iter(gpt.values()))}, [["a", "b"] * 3])


def test_rules_that_are_given_again_are_the_same() -> None:
    first, second = (plan_of("Llama").checkpoint_activations({"model.layers.*": "full"}) for _ in range(2))
    assert first.decisions == second.decisions
