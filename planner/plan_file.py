"""Decisions as a file: JSON that a person can read, written whole or not at all, and checked in full before it is believed.

A plan file is one JSON object: the fields of `Decisions`, and `format`, `version` and `checksum` (SHA-256 over the canonical JSON
of all the rest, so that white space may change and nothing else). Reading parses JSON and validates fields; nothing is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from ..tracer.errors import PlanFileError
from .decisions import Decisions

FORMAT = "groundplan.plan"
VERSION = 1
LARGEST_FILE = 64 * 2**20  # bytes; a plan holds a few kilobytes, so anything larger is another file
_HEADER = ("format", "version", "checksum")
_SAVE_AGAIN = "save the plan again with plan.save"
_FIND_IT = "give the path of a file that plan.save wrote"


# -- writing ------------------------------------------------------------------------------------------------------------


def save_decisions(decisions: Decisions, path: str | os.PathLike[str]) -> None:
    """Write `decisions` to `path`. A file that is already there is replaced in one step, or left as it was on any failure.

    Raises `PlanFileError` where the file cannot be written.
    """
    text = json.dumps(_document(decisions), indent=2) + "\n"
    try:
        replace_file(Path(os.path.realpath(path)), text.encode("ascii"))
    except OSError as error:
        what = f"cannot write {os.fspath(path)}: {error.strerror or error}"
        raise PlanFileError(f"{what}; give a path in a folder that exists and is writable") from error


def _document(decisions: Decisions) -> dict[str, Any]:
    body = {"format": FORMAT, "version": VERSION, **decisions.model_dump(mode="json")}
    return {**body, "checksum": _checksum(body)}


def _checksum(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole, or leave what was there."""
    # The name is new, in the same folder, so that os.replace is atomic; a plain open keeps the user's umask, unlike mkstemp.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# -- reading ------------------------------------------------------------------------------------------------------------


def load_decisions(path: str | os.PathLike[str]) -> Decisions:
    """Read the decisions that `save_decisions` wrote to `path`; nothing in the file is executed.

    Raises `PlanFileError`, naming the path, what is wrong and the way out, for anything else that may lie there.
    """
    with _named(path):
        document = _parse(_decode(_read(Path(path))))
        _check_header(document)
        decisions = _validate({key: value for key, value in document.items() if key not in _HEADER})
        _check_checksum(document)
        return decisions


@contextmanager
def _named(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except _Refusal as refusal:
        raise PlanFileError(f"cannot load the plan {os.fspath(path)}: {refusal}") from refusal.__cause__


class _Refusal(Exception):
    """What is wrong with a file and the way out; becomes a `PlanFileError` once the path is put in front."""


def _refuse(what: str, way_out: str, cause: BaseException | None = None) -> NoReturn:
    raise _Refusal(f"{what}; {way_out}") from cause


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            _refuse("it is a folder", _FIND_IT)
        if not stat.S_ISREG(status.st_mode):
            _refuse("it is not a regular file", _FIND_IT)
        if status.st_size > LARGEST_FILE:
            _refuse(f"it has {status.st_size:,} bytes and no plan has more than {LARGEST_FILE:,}", _FIND_IT)
        return path.read_bytes()
    except FileNotFoundError as error:
        _refuse("there is no such file", _FIND_IT, error)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        _refuse(f"it cannot be read ({getattr(error, 'strerror', None) or error})", "check the path and its permissions", error)


def _decode(data: bytes) -> str:
    if not data.strip():
        _refuse("the file is empty", _SAVE_AGAIN)
    if data.startswith(b"PK\x03\x04"):
        _refuse("it is a zip archive, as torch.save writes (it was not opened)", _FIND_IT)
    if data[0] == 0x80 and data[1:2] <= b"\x10":
        _refuse("it is a pickle (it was not executed)", _FIND_IT)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(f"it is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x})", _FIND_IT, error)


def _parse(text: str) -> dict[str, Any]:
    try:
        document = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated"):
            _refuse(f"the JSON ends too early, at line {error.lineno}: the file is truncated", _SAVE_AGAIN, error)
        _refuse(f"it is not JSON ({error.msg} at line {error.lineno}, column {error.colno})", _SAVE_AGAIN, error)
    except RecursionError as error:
        _refuse("its JSON is nested too deeply for a plan", _FIND_IT, error)
    except ValueError as error:  # an integer with more digits than Python converts
        _refuse(f"it is not a plan's JSON ({error})", _SAVE_AGAIN, error)
    if not isinstance(document, dict):
        _refuse(f"its JSON is {_shown(document)} where an object was expected", _FIND_IT)
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            _refuse(f"the field {key!r} is there twice ({_shown(found[key])} and {_shown(value)})", _SAVE_AGAIN)
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    _refuse(f"it holds the number {name}, which JSON does not have and no plan needs", _SAVE_AGAIN)


# -- believing ----------------------------------------------------------------------------------------------------------


def _check_header(document: dict[str, Any]) -> None:
    if document.get("format") != FORMAT:
        given = _shown(document["format"]) if "format" in document else "missing"
        _refuse(f"it is not a groundplan plan: the field 'format' is {given} where {FORMAT!r} was expected", _FIND_IT)
    version = document.get("version")
    if not isinstance(version, int) or isinstance(version, bool):
        given = _shown(version) if "version" in document else "missing"
        _refuse(f"the field 'version' is {given} where a whole number was expected", _SAVE_AGAIN)
    if version > VERSION:
        _refuse(f"version {version} was written by a newer groundplan (this one reads version {VERSION})", "upgrade groundplan")
    if version < VERSION:
        _refuse(f"the field 'version' is {version}, and there has never been one before {VERSION}", _SAVE_AGAIN)


def _check_checksum(document: dict[str, Any]) -> None:
    if "checksum" not in document:
        _refuse("the field 'checksum' is missing", _SAVE_AGAIN)
    given, expected = document["checksum"], _checksum(document)
    if given != expected:
        what = f"the contents do not match the field 'checksum' ({_shown(given)}; they give {expected!r}): the file was changed"
        _refuse(what, f"{_SAVE_AGAIN}, and change decisions with plan.cast and plan.to")


def _validate(body: dict[str, Any]) -> Decisions:
    try:
        # By way of JSON text: strict validation takes a JSON list for a tuple, but not a Python list.
        return Decisions.model_validate_json(json.dumps(body))
    except ValidationError as error:
        _refuse("; ".join(_field_errors(error)), _SAVE_AGAIN, error)


def _field_errors(error: ValidationError) -> Iterator[str]:
    for each in error.errors(include_url=False)[:3]:
        field = ".".join(str(part) for part in each["loc"])
        if each["type"] == "missing":
            yield f"the field '{field}' is missing"
        elif each["type"] == "extra_forbidden":
            yield f"the field '{field}' ({_shown(each['input'])}) does not belong in a plan"
        else:
            yield f"the field '{field}' is {_shown(each['input'])}: {each['msg'].removeprefix('Value error, ')}"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {len(value)} fields"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
