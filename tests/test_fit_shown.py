"""What plan.fit decided, as users see it: explanations, reports, the page, and the difference between two plans."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import groundplan as gp
from groundplan.planner.fit_training import Short
from groundplan.planner.fitted import Fitted, FittedServing
from groundplan.planner.step_time import human_seconds
from groundplan.planner.verdict import Room
from groundplan.relaxing import _nearest
from groundplan.units import format_bytes

from .test_page import BROWSER, Page, browse

WIDTH, TOKENS, BATCH = 512, 64, 64


class Layer(nn.Module):
    """What keeps more than its input: a wide inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = value + self.down(torch.relu(self.up(value)))
        return found


class Net(nn.Module):
    def __init__(self, layers: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            value = layer(value)
        scores: torch.Tensor = self.head(self.norm(value))
        return scores


def inputs() -> tuple[torch.Tensor]:
    return (torch.empty(BATCH, TOKENS, WIDTH),)


TRAINING = gp.Training("adamw", batch_size=BATCH, inputs=inputs)
CLUSTER = "4x3300MB"


@pytest.fixture(scope="module")
def plan() -> gp.Plan:
    return gp.trace(Net)


@pytest.fixture(scope="module")
def fitted(plan: gp.Plan) -> gp.Plan:
    return plan.fit(CLUSTER, TRAINING, compute_dtype=torch.bfloat16, dtype=[None], tier="T0", tensor=None)


@pytest.fixture(scope="module")
def served(plan: gp.Plan) -> gp.Plan:
    return plan.cast(torch.bfloat16).fit("1x24GB", gp.Inference(inputs=inputs))


def record(plan: gp.Plan) -> Fitted:
    assert isinstance(plan.decisions.fitted, Fitted)
    return plan.decisions.fitted


def words(shown: object) -> str:
    """Text without its lines, as columns are narrow."""
    return " ".join(str(shown).split())


# -- explanations -------------------------------------------------------------------------------------------------------


def test_an_explanation_says_what_was_asked_and_what_was_found(fitted: gp.Plan) -> None:
    found, text = record(fitted), words(fitted.explain())
    assert f'{CLUSTER}, for Training("adamw", batch_size={BATCH})' in text
    assert "as you said tensor=None, dtype=as it is, compute_dtype=bfloat16, tier=T0" in text
    assert f"{found.verdict}, checked in closed form (T0)" in text and f"{format_bytes(found.peak)} a rank" in text
    assert words(found.binding) in text
    rate = found.samples / found.seconds
    assert f"{human_seconds(found.seconds)} a step of {found.samples} samples: {rate:.3g} samples/s" in text


def test_every_reason_and_every_candidate_is_there_and_the_chosen_one_is_marked(fitted: gp.Plan) -> None:
    found, shown = record(fitted), str(fitted.explain())
    for reason in found.reasons:
        assert words(reason.what) in words(shown) and words(reason.why) in words(shown)
    table = shown.partition("layouts that were tried")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(table) == len(found.candidates) >= 2
    for line, each in zip(table, found.candidates, strict=True):
        assert each.layout in line and each.verdict in line and format_bytes(each.peak) in line
        assert each.seconds is None or human_seconds(each.seconds) in line
        assert each.missing is None or f"{format_bytes(each.missing)}" in line
    assert [line.lstrip().startswith(">") for line in table] == [True] + [False] * (len(table) - 1)
    assert max(map(len, shown.splitlines())) <= 100


def test_what_does_not_fit_says_how_much_is_missing(plan: gp.Plan) -> None:
    found = record(plan.fit("4x3100MB", TRAINING, tier="T0", tensor=None))
    short = [each for each in found.candidates if each.seconds is None]
    assert len(short) == 2 and len({each.layout for each in found.candidates}) == len(found.candidates), "each layout once"
    for each in short:
        said = re.search(r"; ([\d.]+ (kB|MB|GB)) missing", each.short)
        assert each.verdict == "does not fit" and said and said[1] == format_bytes(each.missing or 0)


def test_the_nearest_is_said_of_the_search_that_leaves_least_free() -> None:
    """The first search leaves a margin free, for which something is short that fits otherwise; the last says what is missing."""
    roomy, whole, other = (SimpleNamespace(describe=lambda name=name: name) for name in ("dp_shard=4", "dp_shard=4", "tp=4"))
    short = [
        Short(cast(Any, layout), Room("rank 0", "step", needed, {}, 20, 100), cast(Any, None))
        for layout, needed in ((roomy, 90), (whole, 120), (other, 110))
    ]
    assert _nearest(short) is short[2]
    assert _nearest(short[:2]) is short[1]


def test_you_did_not_ask_for_what_the_search_decided(fitted: gp.Plan, served: gp.Plan) -> None:
    for each in (fitted, served):
        assert "plan.fit decided it" in str(each.explain())
    text = words(fitted.explain())
    assert "you asked for it" not in text and "cuda: plan.fit decided it" in text
    served_text = words(served.explain())
    assert "cast to bfloat16 (you asked for it)" in served_text and "cuda:0: plan.fit decided it" in served_text
    of_a_tensor = str(served.explain("head.weight"))
    assert "plan.fit decided to move to cuda:0" in of_a_tensor and "by your cast to bfloat16" in of_a_tensor
    assert "plan.fit" not in str(gp.trace(Net).cast(torch.bfloat16).to("cuda").explain())


def test_a_cast_that_the_search_was_allowed_is_its_own(plan: gp.Plan) -> None:
    found = plan.cast({"norm.*": torch.float32}).fit(CLUSTER, TRAINING, dtype=torch.bfloat16, tier="T0", tensor=None)
    text = words(found.explain())
    assert "cast norm.* to float32 (you asked for it)" in text and "cast to bfloat16 (plan.fit decided it)" in text
    assert "by your cast of 'norm.*' to float32 and then plan.fit's cast to bfloat16" in words(found.explain("norm.weight"))


def test_what_you_decide_afterwards_is_yours_and_the_figures_are_said_to_be_older(fitted: gp.Plan) -> None:
    found = fitted.checkpoint_activations({"layers.0-1": "full"}).cast(torch.bfloat16)
    text = words(found.explain())
    assert "checkpoint activations of layers.0-1 full: you asked for it" in text
    assert "cast to bfloat16 (you asked for it)" in text and "move to cuda (plan.fit decided it)" in text
    assert "since then you said checkpointing and a cast or a move: the figures are those of the plan before that" in text
    assert record(fitted).changed == () and "since then" not in str(fitted.explain())


def test_serving_has_a_record_too(served: gp.Plan) -> None:
    found = served.decisions.fitted
    assert isinstance(found, FittedServing) and found.verdict == "fits"
    text = words(served.explain())
    assert "24GB, for Inference(batch_size=1)" in text and "all of it on cuda:0" in text and words(found.binding) in text
    linears = gp.trace(lambda: nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(40))))
    placed = linears.fit("1x8GB+64GB-cpu", gp.Inference(batch_size=1))
    text = words(placed.explain())
    assert placed.decisions.placing is not None and "in host memory" in text and "on disk" not in text
    assert "you asked for it" not in text and "the device the constructor asked for" not in text


@pytest.mark.parametrize("which", ["fitted", "served"])
def test_saved_loaded_and_bound_it_explains_itself_the_same(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    plan: gp.Plan = request.getfixturevalue(which)
    plan.save(tmp_path / "plan.json")
    again = gp.Plan.load(tmp_path / "plan.json").bind(Net)
    assert again.decisions == plan.decisions
    assert str(again.explain()) == str(plan.explain())


def test_files_of_plans_that_were_not_fitted_still_load(plan: gp.Plan, tmp_path: Path) -> None:
    """A file from before there was a record has no such field; its checksum is of what it has."""
    from groundplan.planner.plan_file import _checksum

    path = tmp_path / "plan.json"
    plan.save(path)
    body = {name: value for name, value in json.loads(path.read_text()).items() if name not in ("fitted", "checksum")}
    path.write_text(json.dumps({**body, "checksum": _checksum(body)}))
    assert gp.Plan.load(path).decisions == plan.decisions


# -- reports and the page -----------------------------------------------------------------------------------------------


def test_a_report_mentions_the_fit(fitted: gp.Plan, plan: gp.Plan) -> None:
    report = fitted.report()
    assert f"fit fitted to {CLUSTER} for Training" in words(report)
    assert report.to_json()["fitted"] == json.loads(record(fitted).model_dump_json())
    assert plan.report().to_json()["fitted"] is None and "fitted to" not in str(plan.report())


@pytest.fixture(scope="module")
def page(fitted: gp.Plan, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    fitted.report(cluster=CLUSTER).to_html(path)
    return path.read_text(encoding="utf-8")


def test_the_page_has_the_decisions_the_candidates_and_the_reasons(fitted: gp.Plan, page: str) -> None:
    found, shown = record(fitted), Page(page)
    assert "What plan.fit decided" in shown.text["h2"]
    for reason in found.reasons:
        assert reason.what in shown.text["th"] and reason.why in shown.text["td"]
    peaks = [int(cell["data-value"] or 0) for cell in shown.all("td") if "data-value" in cell]
    for each in found.candidates:
        assert each.layout in shown.text["td"] and each.peak in peaks
        assert each.seconds is None or human_seconds(each.seconds) in shown.text["td"]
    assert [row.get("class") for row in shown.all("tr")].count("chosen") == 1
    assert shown.data["fitted"] == json.loads(found.model_dump_json())
    ids = [attributes["id"] for _, attributes in shown.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert not re.search(r"url\(|https?:|fetch\(", page.split('id="report"')[0])


def test_the_page_of_serving_has_no_candidates(served: gp.Plan, tmp_path: Path) -> None:
    served.report(cluster="1x24GB").to_html(tmp_path / "report.html")
    shown = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "What plan.fit decided" in shown.text["h2"] and "all of it on cuda:0" in shown.text["th"]
    assert not [row for row in shown.all("tr") if row.get("class") == "chosen"]


PROBE = """
<script>
const said = [];
window.addEventListener("error", (event) => said.push("error: " + event.message));
document.addEventListener("securitypolicyviolation", (event) => said.push("violation: " + event.violatedDirective));
window.addEventListener("load", () => {
  const section = document.getElementById("what-plan.fit-decided").parentNode;
  const table = section.querySelectorAll("table")[1];
  const peaks = () => [...table.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.value));
  table.querySelectorAll("th button")[2].click(); const down = peaks();
  document.title = JSON.stringify({ said, down, wide: document.documentElement.scrollWidth <= window.innerWidth });
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("size", ["1200,900", "500,800"])
def test_a_browser_shows_and_sorts_it(fitted: gp.Plan, page: str, tmp_path: Path, size: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(page.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    found = json.loads(Page(browse(path, tmp_path, f"--window-size={size}")).text["title"][0])
    assert found["said"] == [] and found["wide"]
    assert found["down"] == sorted((each.peak for each in record(fitted).candidates), reverse=True)


# -- two plans ----------------------------------------------------------------------------------------------------------


def differences(this: gp.Plan, other: gp.Plan, **given: Any) -> dict[str, tuple[str, str]]:
    return {each.what: (each.this, each.other) for each in this.diff(other, **given).differences}


def test_equal_plans_differ_in_nothing(plan: gp.Plan, fitted: gp.Plan) -> None:
    assert not plan.diff(plan) and not fitted.diff(fitted)
    assert "they decide the same" in str(plan.diff(gp.trace(Net)))


def test_every_decision_is_compared(plan: gp.Plan) -> None:
    assert differences(plan, plan.to("cuda")) == {"device": ("as constructed", "cuda")}
    assert differences(plan.cast(torch.bfloat16), plan) == {"casts": ("cast to bfloat16", "none")}
    assert differences(plan.shard({"dp": 2}), plan.shard({"dp_replicate": 2, "dp_shard": 2})) == {
        "mesh": ("dp=2", "dp_replicate=2 x dp_shard=2")
    }
    more = plan.shard({"dp": 2}, compute_dtype=torch.bfloat16, reduce_dtype=torch.float32, offload=True)
    assert differences(plan.shard({"dp": 2}), more) == {
        "computes in": ("the dtype of the parameters", "bfloat16"),
        "reduces gradients in": ("the dtype of the gradients", "float32"),
        "shards in host memory": ("no", "yes"),
    }
    kept = plan.shard({"dp": 2}, reshard={"layers.0-2": False, "*": True})
    assert differences(plan.shard({"dp": 2}), kept) == {"after their forward, layers.{0-2}": ("freed", "stay gathered")}
    halves = plan.shard({"dp": 2}, units=["layers.*.up", "layers.*.down"])
    assert differences(plan.shard({"dp": 2}), halves)["units of FSDP"] == (
        "layers.{0-7}, all else together",
        "layers.{0-7}.down, layers.{0-7}.up, all else together",
    )
    rules = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
    assert differences(plan.shard({"tp": 2}, tensor=rules), plan.shard({"tp": 2}, tensor=rules)) == {}
    ran = plan.checkpoint_activations({"layers.0-3": "full", "layers.4": "selective"})
    assert differences(ran, plan) == {
        "checkpointing of layers.{0-3}": ("full", "none"),
        "checkpointing of layers.4": ("selective", "none"),
    }
    placed = plan.place({"layers.*": "cuda:0", "*": "cpu"})
    assert differences(placed, plan) == {"placing": ("layers.* on cuda:0, * on cpu", "all on as constructed")}


def test_what_means_the_same_is_no_difference(plan: gp.Plan) -> None:
    one = plan.checkpoint_activations({"layers.0-3": "full", "layers.4-7": "full"})
    assert not one.diff(plan.checkpoint_activations({"layers.*": "full"}))
    assert not plan.place({"layers.*": "cpu", "*": "cpu"}).diff(plan.place({"*": "cpu"}))
    assert not plan.shard({"dp": 2}).diff(plan.shard({"dp": 2}, units=["layers.0-3", "layers.4-7"]))


def test_memory_and_time_are_side_by_side(fitted: gp.Plan, plan: gp.Plan) -> None:
    other = plan.to("cuda").shard({"dp": 4})
    found = fitted.diff(other)
    data = found.to_json()
    for phase, nbytes in fitted.memory().phases.items():
        assert data["phases"][phase] == {"this": nbytes, "other": other.memory(TRAINING).phases[phase]}
    assert found.times is not None and found.times[0].time is not None and found.times[1].time is not None
    assert found.times[0].seconds == pytest.approx(record(fitted).candidates[0].seconds)
    assert found.times[1].time.total == other.step_time(TRAINING, CLUSTER).total
    assert data["step"]["other"]["time"]["total"] == found.times[1].time.total and data["step"]["this"]["samples"] == 4 * BATCH
    shown = str(found)
    assert human_seconds(found.times[0].time.total) in shown and format_bytes(other.memory(TRAINING).peak) in shown
    assert max(map(len, shown.splitlines())) <= 100 and "<pre" in found._repr_html_()


def test_without_a_cluster_there_is_no_time_and_without_a_workload_the_weights_alone(plan: gp.Plan, tmp_path: Path) -> None:
    weights = plan.diff(plan.cast(torch.bfloat16))
    assert weights.times is None and weights.to_json(tmp_path / "diff.json")["phases"].keys() == plan.memory().phases.keys()
    assert json.loads((tmp_path / "diff.json").read_text()) == weights.to_json()
    trained = plan.diff(plan.cast(torch.bfloat16), TRAINING)
    assert trained.times is None and "optimizer" in trained.to_json()["phases"]


def test_a_time_that_is_not_known_says_why(plan: gp.Plan) -> None:
    found = plan.to("cuda").shard({"dp": 4}).diff(plan.to("cuda").shard({"dp": 8}), TRAINING, CLUSTER)
    assert found.times is not None and found.times[1].time is None
    assert "the plan has 8 ranks" in found.times[1].unknown and "not known" in str(found) and "8 ranks" in str(found)


def test_a_loaded_plan_is_compared_without_its_constructor(fitted: gp.Plan, plan: gp.Plan, tmp_path: Path) -> None:
    fitted.save(tmp_path / "plan.json")
    loaded = gp.Plan.load(tmp_path / "plan.json")
    assert not fitted.diff(loaded) and not loaded.diff(fitted)
    with pytest.raises(gp.PlanFileError, match="no constructor yet"):
        loaded.diff(loaded)


def test_plans_of_other_constructors_are_refused(plan: gp.Plan) -> None:
    with pytest.raises(gp.DecisionError, match=r"different constructors.*Net \(fingerprint \w+\) and .*Linear \(fingerprint"):
        plan.diff(gp.trace(nn.Linear, 3, 4))
    with pytest.raises(gp.DecisionError, match="of different arguments"):
        plan.diff(gp.trace(Net, 7))
    with pytest.raises(gp.DecisionError, match=r"another gp\.Plan, not with 'plan\.json'"):
        plan.diff("plan.json")  # type: ignore[arg-type]
