"""What the user may decide of plan.fit's search for training, and what it says where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan import relaxing
from groundplan.fitting_training import FitTraining
from groundplan.planner import fit_training
from groundplan.planner.fit_training import Search, Tried
from groundplan.planner.fitted import Fitted
from groundplan.planner.memory import Memory
from groundplan.planner.speeds import Link, Speeds
from groundplan.planner.verdict import Verdict

MB = 10**6


class Block(nn.Module):
    """A gated layer with a residual stream around it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(128, 512), nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, value: torch.Tensor) -> Any:
        return value + self.down(self.up(value) * torch.sigmoid(self.gate(value)))


class Model(nn.Module):
    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, value: torch.Tensor) -> Any:
        for layer in self.layers:
            value = layer(value)
        return value


def training(batch: int = 4, **options: Any) -> gp.Training:
    return gp.Training("adamw", batch_size=batch, inputs=(torch.ones(batch, 256, 128),), **options)


def fit(cluster: str | gp.Cluster = "2x24GB", workload: gp.Training | None = None, **options: Any) -> gp.Plan:
    return gp.trace(Model).fit(cluster, workload or training(), **{"tier": "T0", "tensor": None, **options})


def fitted(plan: gp.Plan) -> Fitted:
    found = plan.decisions.fitted
    assert isinstance(found, Fitted)
    return found


def axes(plan: gp.Plan) -> dict[str, int]:
    sharding = plan.decisions.sharding
    return {} if sharding is None else {axis.name: axis.size for axis in sharding.axes}


# -- what is fixed ------------------------------------------------------------------------------------------------------


def test_axes_are_as_they_are_given() -> None:
    assert axes(fit(axes={"tp": 2}, tensor="auto")) == {"tp": 2}
    assert axes(fit(axes={"fsdp": 2}, tensor="auto")) == {"fsdp": 2}
    assert any("tp=" in each.layout for each in fitted(fit(tensor="auto")).candidates)
    assert not any("tp=" in each.layout for each in fitted(fit(tensor=None)).candidates)


def test_the_users_own_rules_divide_layers() -> None:
    rules = {"layers.*.up": "colwise", "layers.*.gate": "colwise", "layers.*.down": "rowwise"}
    plan = fit(axes={"tp": 2}, tensor=rules)
    sharding = plan.decisions.sharding
    assert sharding is not None and {rule.pattern: rule.style for rule in sharding.tensor} == rules


def test_levels_are_those_that_are_allowed() -> None:
    assert {rule.level for rule in fit(checkpointing="full").decisions.checkpointing} == {"full"}
    assert {rule.level for rule in fit(workload=training(checkpointing="selective")).decisions.checkpointing} == {"selective"}
    assert not fit().decisions.checkpointing


def test_offload_is_taken_where_it_is_asked_for_and_told() -> None:
    plan = fit("1x4GB+64GB-cpu", offload=True)
    assert plan.decisions.sharding is not None and plan.decisions.sharding.offload
    assert any("host memory" in reason.what for reason in fitted(plan).reasons)
    assert plan.decisions.sharding.shard_ranks == 1


def test_weights_may_be_stored_in_what_is_allowed() -> None:
    plan = fit(dtype=(None, torch.bfloat16))
    assert {("bfloat16" in each.layout) for each in fitted(plan).candidates} == {True, False}


def test_precision_is_told_where_there_is_a_choice() -> None:
    plan = fit(compute_dtype=(None, torch.bfloat16))
    assert any("computed in torch.bfloat16" in each.layout for each in fitted(plan).candidates)
    assert all("computed" not in each.layout for each in fitted(fit(compute_dtype=torch.bfloat16)).candidates)


def test_what_is_reserved_stays_free() -> None:
    plain = fit("1x4GB", training(64))
    peak = fitted(plain).peak
    room = int(peak * 1.2) + 1_500 * MB
    cluster = gp.Cluster(devices=(gp.Cluster.parse("1x4GB").devices[0].model_copy(update={"memory": room}),))
    fitting, less = fit(cluster, training(64)), fit(cluster, training(64), reserve=peak // 3)
    assert fitted(less).peak < fitted(fitting).peak
    assert less.decisions.checkpointing


def test_unequal_devices_are_each_looked_at() -> None:
    plan = fit("6GB+4GB")
    assert axes(plan) and plan.memory().fits("6GB+4GB").verdict == fitted(plan).verdict
    assert {room.place.partition(" on ")[2] for room in plan.memory().fits("6GB+4GB").rooms} == {"6GB", "4GB"}
    with pytest.raises(gp.FitError, match="on 1GB"):
        fit("6GB+1GB")


def test_one_device_needs_no_mesh() -> None:
    plan = fit("1x4GB")
    assert plan.decisions.sharding is None and plan.decisions.steps[-1].device == "cuda"  # type: ignore[union-attr]


# -- micro-batches ------------------------------------------------------------------------------------------------------


def test_a_batch_is_split_where_that_is_allowed_and_needed() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, num_hidden_layers=2
    )
    plan = gp.trace(transformers.LlamaForCausalLM, config)
    workload = gp.Training("adamw", batch_size=16, seq_len=1024)
    whole = plan.fit("1x4GB", workload, tier="T0")
    room = fitted(whole).peak // 2 + 1_150 * MB  # half of it besides what CUDA takes
    cluster = gp.Cluster(devices=(gp.Cluster.parse("1x4GB").devices[0].model_copy(update={"memory": room}),))
    with pytest.raises(gp.FitError, match=r"split_batch=True"):
        plan.fit(cluster, workload, tier="T0", checkpointing="none")
    split = plan.fit(cluster, workload, tier="T0", split_batch=True, checkpointing="none")
    record = fitted(split).workload
    assert record.batch_size * record.accumulate == 16 and record.accumulate > 1
    assert split.memory().phases == split.memory(record.to_training()).phases


# -- time ---------------------------------------------------------------------------------------------------------------


def test_when_time_is_over_the_best_so_far_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "_is_late", lambda self: True)
    plan = fit(time_limit=1000.0)
    assert not fitted(plan).proven and len(fitted(plan).candidates) == 1


def test_what_a_run_shows_to_fall_short_has_less_to_go_by() -> None:
    """In T1 the caching allocator reserves beside what is counted: there is a plan for the closed form that a run refutes."""
    cluster, workload = "2x3200MB", training(16)
    closed, run = fit(cluster, workload), fit(cluster, workload, tier="T1")
    assert fitted(run).tier == "T1" and fitted(closed).tier == "T0"
    assert run.memory(workload, tier="T1").fits(cluster).verdict == fitted(run).verdict


# -- afterwards ---------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_the_workload_it_was_fitted_to(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, vocab_size=512, num_hidden_layers=2
    )
    workload = gp.Training("sgd", batch_size=2, seq_len=32)
    plan = gp.trace(transformers.LlamaForCausalLM, config).fit("2x4GB", workload, tier="T0")
    assert plan.memory().phases == plan.memory(workload).phases and "step" in plan.memory().phases
    plan.save(tmp_path / "plan.json")
    again = gp.Plan.load(tmp_path / "plan.json").bind(transformers.LlamaForCausalLM, config)
    assert again.memory().phases == plan.memory().phases and again.decisions == plan.decisions


# -- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(axes={"pp": 2}), "pipeline axis is for plan.shard"),
        (lambda: fit(axes={"dp": 3}), "no mesh has dp=3"),
        (lambda: fit(axes={"rows": 2}), "no axis is called 'rows'"),
        (lambda: fit(checkpointing="some"), "checkpointing is 'some'"),
        (lambda: fit(tensor="columns"), "neither"),
        (lambda: fit(tier="T2"), "tier='T2'"),
        (lambda: fit(reserve=-1), "reserve is -1"),
        (lambda: fit(time_limit=0), "time_limit is 0"),
        (lambda: fit(disk=True), "disk=True is not for Training"),
        (lambda: gp.trace(Model).shard({"dp": 2}).fit("2x4GB", training()), "shards already"),
        (
            lambda: gp.trace(Model).checkpoint_activations({"layers.*": "full"}).fit("2x4GB", training()),
            "checkpoints activations",
        ),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], gp.Plan], message: str) -> None:
    with pytest.raises(gp.GroundplanError, match=message):
        call()


# -- runs that refute ---------------------------------------------------------------------------------------------------


def refuted_beyond(monkeypatch: pytest.MonkeyPatch, cluster: str) -> None:
    """Have a run of the step take as much as if the devices were those of another cluster."""

    def checked(self: FitTraining, best: Tried) -> tuple[Memory, Verdict]:
        return best.memory, best.memory.fits(cluster, self.margin)

    monkeypatch.setattr(FitTraining, "_checked_by", checked)


def test_where_every_run_refutes_what_was_found_that_is_an_error_with_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    refuted_beyond(monkeypatch, "2x1GB")
    with pytest.raises(gp.FitError, match=r"on 1GB: does not fit"):
        fit("2x24GB")


def test_what_a_run_refutes_has_to_come_to_less_than_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """However much the closed form had left."""
    whole = fit("2x24GB", training(256), axes={"dp_shard": 2})
    room = f"2x{int((fitted(whole).peak * 0.8 + 2_740 * MB) * 1.2) // MB}MB"
    refuted_beyond(monkeypatch, room)
    plan = fit("2x24GB", training(256), axes={"dp_shard": 2})
    assert plan.memory(training(256)).fits(room).verdict == fitted(plan).verdict == "fits"


def test_a_plan_made_simpler_has_no_more_to_go_by_than_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a slow link layers stay gathered; where that gains little enough, they do not, and still a run must bear it out."""
    slow = Speeds.of("2x24GB").model_copy(update={"within": Link(bandwidth=1e8)})
    workload, options = training(256), {"axes": {"dp_shard": 2}, "speeds": slow}
    whole = fit("2x24GB", workload, **options)
    assert whole.decisions.sharding is not None and whole.decisions.sharding.reshard_rules
    room = f"2x{int((fitted(whole).peak * 0.8 + 2_740 * MB) * 1.2) // MB}MB"
    monkeypatch.setattr(fit_training, "ALIKE", 10.0)
    refuted_beyond(monkeypatch, room)
    plan = fit("2x24GB", workload, **options)
    assert plan.decisions.sharding is not None and not plan.decisions.sharding.reshard_rules
    assert plan.memory(workload).fits(room).verdict == fitted(plan).verdict == "fits"


def test_what_would_help_where_nothing_fits_is_said_of_layers_that_keep_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaxing, "relaxations", lambda question: [])  # which take most of the time
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    plan = gp.trace(transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=512, num_hidden_layers=8, **sizes))
    workload = gp.Training("adamw", batch_size=64, seq_len=1024)
    with pytest.raises(gp.FitError, match=r"not carried out yet: sequence_parallel=True and loss_parallel=True: the peak"):
        plan.fit("2x2800MB", workload, tier="T0", axes={"tp": 2}, margin=0.0)
