"""Plan files: what is saved comes back, and nothing else is believed."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from groundplan.planner.decisions import AmbientSettings, Cast, Decisions, Move, Rule
from groundplan.planner.plan_file import LARGEST_FILE, _checksum, load_decisions, save_decisions
from groundplan.tracer.errors import PlanFileError

PLAN = Decisions(
    constructor="model.Model",
    fingerprint="ab" * 32,
    reference="cpu",
    groundplan_version="0.1.0",
    torch_version="2.13.0",
    ambient=AmbientSettings(default_dtype="float32", default_device="cpu", grad_enabled=True, inference_mode=False),
    bound_state=None,
    steps=(Cast(rules=(Rule(pattern="*norm*", dtype="float32"), Rule(pattern="*", dtype="bfloat16"))), Move(device="cuda:1")),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "model.plan.json"
    save_decisions(PLAN, found)
    return found


# -- writing ------------------------------------------------------------------------------------------------------------


def test_a_saved_plan_comes_back(path: Path) -> None:
    assert load_decisions(path) == PLAN
    assert load_decisions(str(path)) == PLAN


def test_a_plan_file_can_be_read_by_a_person(path: Path) -> None:
    document = json.loads(path.read_text())
    assert document["format"] == "groundplan.plan" and document["version"] == 1
    assert document["steps"][0]["rules"][1] == {"pattern": "*", "dtype": "bfloat16"}
    assert path.read_text().count("\n") > 20


def test_white_space_may_change(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_decisions(path) == PLAN


def test_saving_replaces_and_leaves_nothing_else(path: Path) -> None:
    save_decisions(PLAN.to("cpu"), path)
    assert load_decisions(path) == PLAN.to("cpu")
    assert os.listdir(path.parent) == [path.name]


def test_saving_keeps_the_users_umask(path: Path) -> None:
    plain = path.with_name("plain")
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_saving_through_a_link_keeps_the_link(path: Path) -> None:
    link = path.with_name("link.json")
    link.symlink_to(path)
    save_decisions(PLAN.to("cpu"), link)
    assert link.is_symlink() and load_decisions(path) == PLAN.to("cpu")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(PlanFileError, match=re.escape(str(path)) + ".*No space left"):
        save_decisions(PLAN.to("cpu"), path)
    monkeypatch.undo()
    assert load_decisions(path) == PLAN
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("where", [".", "missing/plan.json"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    with pytest.raises(PlanFileError, match=re.escape(str(tmp_path))):
        save_decisions(PLAN, tmp_path / where)
    assert os.listdir(tmp_path) == []


# -- broken files -------------------------------------------------------------------------------------------------------


class _Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


def _edited(edit: Callable[[dict[str, Any]], object], seal: bool = True) -> Callable[[Path], object]:
    """Change the document; `seal` renews the checksum, so that only the change itself is wrong."""

    def write(path: Path) -> None:
        document = json.loads(path.read_text())
        edit(document)
        if seal:
            document["checksum"] = _checksum(document)
        path.write_text(json.dumps(document, indent=2))

    return write


def _bytes(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _replaced(old: str, new: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return write


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _huge(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(LARGEST_FILE + 1)


def _rule(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document["steps"][0]["rules"][1].update(changes)


def _set(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda document: document.update(changes)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (Path.unlink, "no such file"),
    "folder": (_folder, "it is a folder"),
    "named pipe": (_fifo, "not a regular file"),
    "not UTF-8": (_bytes(b'{"format": "\xff"}'), "not UTF-8.*byte 12 is 0xff"),
    "UTF-16": (lambda path: path.write_text(path.read_text(), "utf-16"), "not UTF-8"),
    "empty": (_bytes(b""), "empty"),
    "blank": (_bytes(b" \n\n"), "empty"),
    "truncated": (lambda path: os.truncate(path, 200), "truncated"),
    "not JSON": (_bytes(b"steps:\n  - cast: bfloat16\n"), "not JSON.*line 1"),
    "two documents": (lambda path: path.write_text(path.read_text() * 2), "not JSON.*Extra data"),
    "a list": (_bytes(b"[1, 2]"), "a list of 2 where an object"),
    "a string": (_bytes(b'"groundplan.plan"'), "'groundplan.plan' where an object"),
    "no format": (_bytes(b'{"architectures": ["LlamaForCausalLM"]}'), "not a groundplan plan.*'format' is missing"),
    "other format": (_edited(_set(format="safetensors")), "'format' is 'safetensors'"),
    "newer version": (_edited(_set(version=2, novelty=1)), "newer groundplan.*upgrade"),
    "older version": (_edited(_set(version=0)), "'version' is 0"),
    "version a string": (_edited(_set(version="1")), "'version' is '1' where a whole number"),
    "version a boolean": (_edited(_set(version=True)), "'version' is True"),
    "version missing": (_edited(lambda document: document.pop("version")), "'version' is missing"),
    "missing field": (_edited(lambda document: document.pop("ambient")), "'ambient' is missing"),
    "missing optional": (_edited(lambda document: document.pop("bound_state")), "'bound_state' is missing"),
    "missing checksum": (_edited(lambda document: document.pop("checksum"), seal=False), "'checksum' is missing"),
    "missing kind": (_edited(lambda document: document["steps"][1].pop("kind")), "'steps.1'"),
    "extra field": (_edited(_set(hooks="os.system")), r"'hooks' \('os.system'\) does not belong"),
    "extra field inside": (_edited(_rule(scale=2)), r"'steps.0.cast.rules.1.scale' \(2\) does not belong"),
    "wrong type": (_edited(lambda document: document["ambient"].update(grad_enabled=1)), "'ambient.grad_enabled' is 1"),
    "steps no list": (_edited(_set(steps={"0": "cast"})), "'steps' is an object with 1 fields"),
    "unknown step": (_edited(lambda document: document["steps"][1].update(kind="shard")), "'steps.1'.*'shard'"),
    "unknown dtype": (_edited(_rule(dtype="bfloat61")), "'steps.0.cast.rules.1.dtype' is 'bfloat61'.*did you mean bfloat16"),
    "no dtype": (_edited(_rule(dtype="nn")), "no dtype called 'nn'"),
    "integer dtype": (_edited(_rule(dtype="int8")), "torch.int8.*floating-point"),
    "empty rules": (_edited(lambda document: document["steps"][0].update(rules=[])), "'steps.0.cast.rules' is a list of 0"),
    "unsupported device": (_edited(lambda document: document["steps"][1].update(device="mps")), "'mps'.*CPU and CUDA"),
    "alias of a device": (_edited(lambda document: document["steps"][1].update(device="cpu:0")), "'cpu:0' where 'cpu'"),
    "unsupported reference": (_edited(_set(reference="xla")), "'reference' is 'xla'"),
    "malformed fingerprint": (_edited(_set(fingerprint="AB" * 32)), "'fingerprint' is 'ABAB"),
    "short fingerprint": (_edited(_set(fingerprint="ab")), "'fingerprint' is 'ab'"),
    "lone surrogate": (_edited(_set(constructor="\ud800")), "."),
    "tampered": (_replaced('"cuda:1"', '"cuda:0"'), "do not match the field 'checksum'"),
    "checksum no text": (_edited(_set(checksum=1), seal=False), "'checksum' \\(1;"),
    "duplicate keys": (_replaced('"reference": "cpu"', '"reference": "cuda", "reference": "cpu"'), "'reference' is there twice"),
    "nested": (_bytes(b"[" * 200_000), "nested too deeply"),
    "NaN": (_replaced('"version": 1', '"version": NaN'), "the number NaN"),
    "Infinity": (_replaced('"version": 1', '"version": -Infinity'), "the number -Infinity"),
    "endless integer": (_replaced('"version": 1', '"version": ' + "9" * 5000), "not a plan's JSON"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(_Bomb())), "pickle.*not executed"),
    "torch.save": (lambda path: torch.save({"w": torch.ones(1)}, path), "zip archive"),
    "old torch.save": (lambda path: torch.save(1, path, _use_new_zipfile_serialization=False), "pickle"),
    "huge": (_huge, "67,108,865 bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_by_name(path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.chdir(path.parent)
    damage, message = BROKEN[kind]
    damage(path)
    before = sorted(os.listdir(path.parent))
    with pytest.raises(PlanFileError, match=message) as caught:
        load_decisions(path)
    assert str(path) in str(caught.value) and "; " in str(caught.value)
    assert sorted(os.listdir(path.parent)) == before
    assert len(str(caught.value)) < 700


def test_a_huge_file_is_refused_unread(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _huge(path)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(PlanFileError):
        load_decisions(path)


def test_an_unreadable_file_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PlanFileError, match=r"Permission denied.*check the path"):
        load_decisions(path)


def test_a_null_byte_in_the_path_is_refused() -> None:
    with pytest.raises(PlanFileError, match="cannot be read"):
        load_decisions("plan\0.json")


# -- laws ---------------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
targets = st.sampled_from(["float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "complex64"])
rules = st.builds(Rule, pattern=names.filter(bool), dtype=targets)
steps = st.one_of(
    st.builds(Cast, rules=st.lists(rules, min_size=1, max_size=4).map(tuple)),
    st.builds(Move, device=st.sampled_from(["cpu", "cuda", "cuda:0", "cuda:7"])),
)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
plans = st.builds(
    Decisions,
    constructor=names,
    fingerprint=digests,
    reference=st.sampled_from(["cpu", "cuda"]),
    groundplan_version=names,
    torch_version=names,
    ambient=st.builds(
        AmbientSettings,
        default_dtype=targets,
        default_device=st.sampled_from(["cpu", "cuda:0"]),
        grad_enabled=st.booleans(),
        inference_mode=st.booleans(),
    ),
    bound_state=st.none() | digests,
    steps=st.lists(steps, max_size=5).map(tuple),
)
quick = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(plan=plans)
def test_every_plan_survives_the_file(path: Path, plan: Decisions) -> None:
    save_decisions(plan, path)
    assert load_decisions(path) == plan


@quick
@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
def test_one_changed_byte_never_changes_the_plan(path: Path, where: float, byte: int) -> None:
    save_decisions(PLAN, path)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] = byte
    path.write_bytes(bytes(data))
    _refused_or_the_same(path)


def test_no_byte_of_the_steps_can_be_changed(path: Path) -> None:
    original = path.read_bytes()
    start, end = original.index(b'"steps"'), original.index(b'"checksum"')
    for position in range(start, end):
        if not original[position : position + 1].isspace():
            path.write_bytes(original[:position] + bytes([original[position] ^ 1]) + original[position + 1 :])
            with pytest.raises(PlanFileError):
                load_decisions(path)


def test_no_truncation_is_believed(path: Path) -> None:
    data = path.read_bytes().rstrip()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(PlanFileError):
            load_decisions(path)


def _refused_or_the_same(path: Path) -> None:
    try:
        found = load_decisions(path)
    except PlanFileError:
        return
    assert found == PLAN
