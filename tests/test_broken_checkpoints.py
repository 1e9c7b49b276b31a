"""Checkpoints that are damaged, hostile, or not this module's: the file is named, nothing changes, nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import state_dict_saver

import groundplan as gp
from groundplan.runtime.files import File

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # torch's own
Spoil = Callable[[Path], Any]
"""Makes a broken checkpoint in an empty folder, and returns what to say as checkpoint=."""


class Model(nn.Module):
    """Two linear layers, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.embed = nn.Embedding(5, 6)
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


NAMES = ("up.weight", "up.bias", "down.weight", "down.bias", "embed.weight", "count")


def state() -> dict[str, torch.Tensor]:
    """What belongs into a `Model`, each tied tensor once."""
    torch.manual_seed(11)
    return {name: tensor.detach().clone() for name, tensor in Model().state_dict().items() if name in NAMES}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def refused(checkpoint: Any, *says: str, error: type[Exception] = gp.CheckpointError, **options: Any) -> str:
    """The message with which `checkpoint` is refused; everything is afterwards as it was."""
    plan = gp.trace(Model)
    module, generator, held = plan.meta_module(), torch.get_rng_state(), descriptors()
    for threads in (1, 2):
        with pytest.raises(error) as caught:
            gp.materialize(module, seed=0, checkpoint=checkpoint, threads=threads, **options)
        message = str(caught.value)
        for each in says:
            assert each in message, message
        assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        assert torch.equal(torch.get_rng_state(), generator)
        assert descriptors() == held
    with pytest.raises(error):
        plan.materialize(seed=0, checkpoint=checkpoint, **options)
    assert torch.equal(torch.get_rng_state(), generator) and descriptors() == held
    return message


# -- paths --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "meta-llama/Llama-3.1-8B", "a\0b", "x" * 5000, "~/model.safetensors"])
def test_a_path_to_nothing(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(path, path.split("\0")[0])
    if len(path) < 100:
        assert "snapshot_download" in message


@pytest.mark.parametrize("source", [7, 3.5, b"bytes", ["a.safetensors"], object()])
def test_what_is_no_path(source: Any) -> None:
    refused(source, "neither a path nor a mapping")


def test_a_folder_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("hello")
    refused(tmp_path, str(tmp_path), "holds no checkpoint", "README.md")


def test_an_empty_folder(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "holds nothing")


@pytest.mark.parametrize("names", [("a.safetensors", "b.safetensors"), ("a.safetensors.index.json", "b.safetensors.index.json")])
def test_a_folder_with_several_checkpoints(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        save_file(state(), tmp_path / name)
    refused(tmp_path, str(tmp_path), "several checkpoints", *names)


def test_a_folder_that_is_called_like_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.mkdir()
    refused(path, str(path), "holds no checkpoint")
    refused(tmp_path, str(path), "is not a file")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    refused(path, str(path), "is not a file")


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    path.chmod(0)
    refused(path, str(path), "Permission denied")


def test_the_disk_fails_when_a_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file(state(), path)
    real = os.open

    def fails(name: Any, *rest: Any, **options: Any) -> int:
        if str(name) == str(path):
            raise PermissionError(13, "Permission denied", str(name))
        return real(name, *rest, **options)

    monkeypatch.setattr(os, "open", fails)
    refused(path, str(path), "Permission denied")


@pytest.mark.parametrize("form", ["safetensors", "torch", "legacy", "dcp"])
def test_the_disk_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    path = saved(form, tmp_path)
    real, calls = os.preadv, [0]
    assert gp.trace(Model).materialize(checkpoint=path).up.weight.shape == (8, 6)

    def fails(descriptor: int, buffers: Any, offset: int) -> int:
        calls[0] += 1
        if calls[0] % 9 == 0 or offset > 600:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", fails)
    refused(path, str(path), "Input/output error")


def saved(form: str, folder: Path, tensors: Any = None) -> Path:
    """A checkpoint in one of the forms."""
    tensors = state() if tensors is None else tensors
    path = folder / f"checkpoint.{form}"
    if form == "safetensors":
        save_file(tensors, path)
    elif form == "dcp":
        state_dict_saver.save(tensors, checkpoint_id=path, no_dist=True)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "torch")
    return path


# -- safetensors --------------------------------------------------------------------------------------------------------


def written(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header (JSON, text or bytes)."""
    text = header if isinstance(header, str | bytes) else json.dumps(header)
    raw = text if isinstance(text, bytes) else text.encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(shape: Any = (2,), offsets: Any = (0, 8), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    refused(path, str(path), "is empty")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 30, 100])
def test_a_file_cut_short_in_its_header(tmp_path: Path, length: int) -> None:
    path = saved("safetensors", tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    refused(path, str(path), "header")


@pytest.mark.parametrize("lost", [1, 4, 100])
def test_a_file_cut_short_in_its_data(tmp_path: Path, lost: int) -> None:
    path = saved("safetensors", tmp_path)
    path.write_bytes(path.read_bytes()[:-lost])
    message = refused(path, str(path), "copy it again")
    assert any(name in message for name in NAMES)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_an_absurd_length_of_the_header(tmp_path: Path, length: int) -> None:
    path = written(tmp_path, {"a": entry()}, bytes(8), length)
    refused(path, str(path), f"{length:,} bytes")


@pytest.mark.parametrize("text", ["{not json}", b'{"\xff": 1}', "{{", '{"a": NaN', "[" * 50_000, '{"a": ' + "9" * 6000 + "}"])
def test_a_header_that_is_no_json(tmp_path: Path, text: Any) -> None:
    path = written(tmp_path, text)
    refused(path, str(path), "header of")


@pytest.mark.parametrize("header", [[], "text", 7, None, [{"a": entry()}]])
def test_a_header_that_is_no_dict(tmp_path: Path, header: Any) -> None:
    path = written(tmp_path, json.dumps(header) + " " * 8)
    refused(path, str(path), "header of", "names of tensors belong")


def test_a_name_twice_in_a_header(tmp_path: Path) -> None:
    one = json.dumps(entry())
    path = written(tmp_path, f'{{"up.bias": {one}, "up.bias": {one}}}', bytes(8))
    refused(path, str(path), "up.bias twice")


ENTRIES = {
    "nothing": None,
    "a list": [1, 2],
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "no dtype": {"shape": [2], "data_offsets": [0, 8]},
    "no offsets": {"dtype": "F32", "shape": [2]},
    "dtype that is a list": entry(dtype=["F32"]),
    "dtype that is a dict": entry(dtype={}),
    "shape that is a number": entry(shape=2),
    "shape that is text": entry(shape="2"),
    "shape with text": entry(shape=["2"]),
    "shape with a fraction": entry(shape=[2.5]),
    "shape with infinity": entry(shape=[float("inf")]),
    "shape with NaN": entry(shape=[float("nan")]),
    "shape with a truth": entry(shape=[True, 2]),
    "negative sizes": entry(shape=[-1, -2]),
    "offsets that are infinite": entry(offsets=[0, float("inf")]),
    "one offset": entry(offsets=[0]),
    "three offsets": entry(offsets=[0, 8, 8]),
    "offsets backwards": entry(offsets=[8, 0]),
    "negative offsets": entry(offsets=[-8, 0]),
    "too few bytes": entry(shape=[3]),
    "too many bytes": entry(shape=[1]),
    "a huge shape": entry(shape=[2**62, 2**62]),
    "offsets beyond the end": entry(offsets=[0, 2**40], shape=[2**38]),
    "offsets far beyond the end": entry(offsets=[2**63, 2**63 + 8]),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_a_header_with_a_wrong_entry(tmp_path: Path, what: str) -> None:
    path = written(tmp_path, {"up.bias": ENTRIES[what]}, bytes(8))
    refused(path, str(path), "up.bias")


@pytest.mark.parametrize(
    ("offsets", "size", "says"),
    [
        (((0, 8), (4, 12)), 12, "overlaps"),
        (((0, 8), (0, 8)), 8, "overlaps"),
        (((0, 8), (12, 20)), 20, "does not begin"),
        (((4, 12), (12, 20)), 20, "does not begin"),
    ],
)
def test_tensors_that_overlap_or_leave_a_gap(tmp_path: Path, offsets: Any, size: int, says: str) -> None:
    header = {f"tensor {number}": entry(offsets=each) for number, each in enumerate(offsets)}
    path = written(tmp_path, header, bytes(size))
    refused(path, str(path), "tensor ", says)


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    path = saved("safetensors", tmp_path)
    path.write_bytes(path.read_bytes() + b"\0\0\0\0")
    refused(path, str(path), "damaged")


def test_a_dtype_that_torch_does_not_have(tmp_path: Path) -> None:
    path = written(tmp_path, {"up.bias": entry(shape=[8], dtype="F7_E2M4")}, bytes(8))
    refused(path, str(path), "up.bias", "F7_E2M4")


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_to_a_header(tmp_path: Path, seed: int) -> None:
    """Whatever bytes are changed: the file is refused with its name, or holds something else."""
    path = saved("safetensors", tmp_path)
    good = path.read_bytes()
    fuzzed(path, good, range(8 + int.from_bytes(good[:8], "little")), seed)


def fuzzed(path: Path, good: bytes, places: range, seed: int, count: int = 60, checkpoint: Path | None = None) -> None:
    from groundplan.runtime.checkpoint import open_checkpoint
    from groundplan.runtime.entries import Strange, read_whole

    draw = random.Random(seed)
    held = descriptors()
    for _ in range(count):
        spoiled = bytearray(good)
        for _ in range(draw.choice((1, 1, 3))):
            spoiled[draw.choice(places)] = draw.randrange(256)
        path.write_bytes(bytes(spoiled))
        try:
            with open_checkpoint(checkpoint or path) as found:
                for each in found.entries.values():
                    if not isinstance(each, Strange):
                        read_whole(each)
        except gp.CheckpointError as error:
            assert str(checkpoint or path) in str(error), error
        assert descriptors() == held


# -- indices ------------------------------------------------------------------------------------------------------------


def indexed(folder: Path, index: Any) -> Path:
    """Two files that hold a `Model`, and an index."""
    tensors = state()
    save_file({name: tensors[name] for name in NAMES[:3]}, folder / "one.safetensors")
    save_file({name: tensors[name] for name in NAMES[3:]}, folder / "two.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    return path


def weight_map(**other: Any) -> dict[str, Any]:
    where = {name: "one.safetensors" if name in NAMES[:3] else "two.safetensors" for name in NAMES}
    return {"metadata": {}, "weight_map": where | {name.replace("__", "."): file for name, file in other.items()}}


def test_an_index_that_is_right(tmp_path: Path) -> None:
    path = indexed(tmp_path, weight_map())
    for checkpoint in (path, tmp_path):
        module = gp.trace(Model).materialize(checkpoint=checkpoint)
        assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state().items())


@pytest.mark.parametrize("index", [{}, {"metadata": {}}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, [], 7])
def test_an_index_without_a_weight_map(tmp_path: Path, index: Any) -> None:
    path = indexed(tmp_path, index)
    refused(path, str(path), "weight_map")
    refused(tmp_path, str(path), "weight_map")


@pytest.mark.parametrize("text", ["", "{", "not json", "[" * 50_000])
def test_an_index_that_is_no_json(tmp_path: Path, text: str) -> None:
    path = indexed(tmp_path, text)
    refused(path, str(path), "cannot read the index")


def test_an_index_that_names_a_file_that_is_absent(tmp_path: Path) -> None:
    path = indexed(tmp_path, weight_map(up__bias="three.safetensors"))
    refused(path, str(path), "up.bias", "three.safetensors")


def test_an_index_that_names_the_wrong_file(tmp_path: Path) -> None:
    path = indexed(tmp_path, weight_map(up__bias="two.safetensors"))
    refused(path, str(path), "up.bias", "two.safetensors")


def test_an_index_that_names_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    path = indexed(tmp_path, weight_map(other="two.safetensors"))
    refused(path, str(path), "other", "two.safetensors")


@pytest.mark.parametrize(
    "file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", "", 7, None, ["a"], "a\0"]
)
def test_an_index_that_leads_elsewhere(tmp_path: Path, file: Any) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file(state(), tmp_path / "one.safetensors")
    path = indexed(inside, weight_map(up__bias=file))
    refused(path, str(inside))
    refused(inside, str(inside))


def test_one_of_several_files_is_damaged(tmp_path: Path) -> None:
    path = indexed(tmp_path, weight_map())
    damaged = tmp_path / "two.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-3])
    refused(path, str(damaged))


# -- torch.save ---------------------------------------------------------------------------------------------------------


class Hostile:
    """Pickled as a call of `os.system` that leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_a_hostile_pickle_is_not_executed(tmp_path: Path, form: str) -> None:
    marker = tmp_path / "executed"
    path = saved(form, tmp_path, state() | {"extra": Hostile(marker)})
    refused(path, str(path), "would execute code", "system")
    assert not marker.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_hostile_pickle_is_not_executed(tmp_path: Path, protocol: int) -> None:
    marker, path = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps({"up.bias": Hostile(marker)}, protocol))
    refused(path, str(path))
    refused(tmp_path, str(path))
    assert not marker.exists()


@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_a_whole_module(tmp_path: Path, form: str) -> None:
    path = saved(form, tmp_path, nn.Linear(2, 3))
    refused(path, str(path), "would execute code", "save module.state_dict()")


@pytest.mark.parametrize("form", ["torch", "legacy"])
@pytest.mark.parametrize("content", [[torch.ones(3)], torch.ones(3), 7, None, "text"], ids=lambda each: type(each).__name__)
def test_what_is_no_dict(tmp_path: Path, form: str, content: Any) -> None:
    path = saved(form, tmp_path, [content] if content is None else content)
    refused(path, str(path), "where a dict of tensors belongs")


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_a_file_of_torch_save_cut_short(tmp_path: Path, form: str, share: float) -> None:
    path = saved(form, tmp_path)
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * share)])
    refused(path, str(path))


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(path, str(path), "cannot be read by torch.load")


def test_a_scripted_module(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)
    refused(path, str(path))


def test_one_name_twice_after_nesting(tmp_path: Path) -> None:
    path = saved("torch", tmp_path, {"up": {"bias": torch.ones(8)}, "up.bias": torch.zeros(8)})
    refused(path, str(path), "two tensors called up.bias")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", ["torch", "legacy"])
def test_random_damage_to_a_file_of_torch_save(tmp_path: Path, form: str, seed: int) -> None:
    path = saved(form, tmp_path)
    good = path.read_bytes()
    fuzzed(path, good, range(len(good)), seed)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "sparse_coo": lambda: torch.eye(8).to_sparse(),
    "sparse_csr": lambda: torch.eye(8).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 3, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["torch", "legacy", "mapping"])
def test_tensors_that_are_not_plain(tmp_path: Path, form: str, kind: str) -> None:
    tensors = state() | {"up.bias": KINDS[kind]()}
    refused(tensors if form == "mapping" else saved(form, tmp_path, tensors), "up.bias", kind)


# -- mappings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong", [{"up.bias": [1.0] * 8}, {"up.bias": None}, {7: torch.ones(8)}, {"up": {"bias": torch.ones(8)}}]
)
def test_mappings_of_something_else(wrong: Any) -> None:
    refused(wrong, "a state dict maps names to tensors")


def test_a_mapping_of_meta_tensors() -> None:
    refused(state() | {"up.bias": torch.empty(8, device="meta")}, "up.bias", "meta")


def test_a_mapping_of_lazy_parameters() -> None:
    refused(state() | {"up.bias": nn.UninitializedParameter()}, "up.bias", "lazy")


# -- torch.distributed.checkpoint ---------------------------------------------------------------------------------------


def metadata_of(path: Path) -> Any:
    with (path / ".metadata").open("rb") as file:
        return pickle.load(file)


def remade(folder: Path, change: Callable[[Any], Any]) -> Path:
    """A checkpoint of DCP whose metadata is changed."""
    path = saved("dcp", folder)
    metadata = metadata_of(path)
    changed = change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata if changed is None else changed))
    return path


def test_dcp_without_its_metadata(tmp_path: Path) -> None:
    path = saved("dcp", tmp_path)
    (path / ".metadata").unlink()
    refused(path, str(path), "holds no checkpoint", ".distcp")


@pytest.mark.parametrize("content", [b"", b"\x80", b"not a pickle", b"\x80\x04.", pickle.dumps([1, 2]), pickle.dumps(None)])
def test_dcp_with_damaged_metadata(tmp_path: Path, content: bytes) -> None:
    path = saved("dcp", tmp_path)
    (path / ".metadata").write_bytes(content)
    refused(path, str(path / ".metadata"))


def test_dcp_with_hostile_metadata(tmp_path: Path) -> None:
    path, marker = saved("dcp", tmp_path), tmp_path / "executed"
    (path / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    refused(path, str(path / ".metadata"), "system", "would execute code")
    assert not marker.exists()


@pytest.mark.parametrize("what", ["builtins eval", "builtins getattr", "torch load", "torch.serialization load", "os system"])
def test_dcp_whose_metadata_names_functions(tmp_path: Path, what: str) -> None:
    path, marker = saved("dcp", tmp_path), tmp_path / "executed"
    module, name = what.split()
    (path / ".metadata").write_bytes(f"c{module}\n{name}\n(S'touch {marker}'\ntR.".encode())
    refused(path, str(path / ".metadata"), f"{module}.{name}")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["Metadata", "MetadataIndex", "ChunkStorageMetadata"])
def test_dcp_whose_metadata_changes_classes(tmp_path: Path, name: str) -> None:
    """A pickle can set attributes of what it names: torch's own classes must not be what it gets."""
    path = saved("dcp", tmp_path)
    pickled = f"c{dcp_metadata.__name__}\n{name}\n(N(dS'injected'\nI1\nstb.".encode()
    (path / ".metadata").write_bytes(pickled)
    refused(path, str(path / ".metadata"))
    assert not hasattr(getattr(dcp_metadata, name), "injected")


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_to_dcps_metadata(tmp_path: Path, seed: int) -> None:
    path = saved("dcp", tmp_path)
    good = (path / ".metadata").read_bytes()
    fuzzed(path / ".metadata", good, range(len(good)), seed, checkpoint=path)


@pytest.mark.parametrize("seed", range(2))
def test_random_damage_to_dcps_files(tmp_path: Path, seed: int) -> None:
    path = saved("dcp", tmp_path)
    file = next(path.glob("*.distcp"))
    fuzzed(file, file.read_bytes(), range(file.stat().st_size), seed, count=30, checkpoint=path)


def test_dcp_without_a_file(tmp_path: Path) -> None:
    path = saved("dcp", tmp_path)
    file = next(path.glob("*.distcp"))
    file.unlink()
    refused(path, str(file), "No such file")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_dcp_with_a_file_cut_short(tmp_path: Path, share: float) -> None:
    path = saved("dcp", tmp_path)
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    refused(path, str(file), "cut short")


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "sub/../../outside.distcp", "", ".", "..", "a\0b", 7, None])
def test_dcp_whose_metadata_leads_elsewhere(tmp_path: Path, name: Any) -> None:
    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.relative_path = name

    (tmp_path / "outside.distcp").write_bytes(bytes(10_000))
    path = remade(tmp_path, change)
    refused(path, str(path))


def first_chunk(metadata: Any, **changes: Any) -> None:
    """Change the first piece of up.weight, in the list of pieces and in that of places."""
    said = metadata.state_dict_metadata["up.weight"]
    chunk = said.chunks[0]
    place = metadata.storage_data.pop(dcp_metadata.MetadataIndex("up.weight", chunk.offsets))
    for key, value in changes.items():
        setattr(chunk, key, torch.Size(value))
    metadata.storage_data[dcp_metadata.MetadataIndex("up.weight", chunk.offsets)] = place


def twice(metadata: Any) -> None:
    """Half of up.weight, two times: as many elements as it has, and half of them nowhere."""
    first_chunk(metadata, sizes=(4, 6))
    metadata.state_dict_metadata["up.weight"].chunks *= 2


def no_places(metadata: Any) -> None:
    metadata.storage_data.clear()


def odd(**changes: Any) -> Callable[[Any], None]:
    """Sets attributes of the first tensor's metadata."""

    def change(metadata: Any) -> None:
        for key, value in changes.items():
            setattr(metadata.state_dict_metadata["up.weight"], key, value)

    return change


def odd_place(**changes: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        for index, place in metadata.storage_data.items():
            if index.fqn == "up.weight":
                for key, value in changes.items():
                    setattr(place, key, value)

    return change


CHANGES: dict[str, Callable[[Any], Any]] = {
    "pieces that are too few": lambda metadata: first_chunk(metadata, sizes=(4, 6)),
    "a piece twice": twice,
    "a piece beyond the end": lambda metadata: first_chunk(metadata, offsets=(1, 0)),
    "a negative piece": lambda metadata: first_chunk(metadata, offsets=(-1, 0)),
    "a piece with other dims": lambda metadata: first_chunk(metadata, offsets=(0, 0, 0), sizes=(8, 6, 1)),
    "no places": no_places,
    "no pieces": odd(chunks=[]),
    "pieces that are none": odd(chunks=[7]),
    "a size that is none": odd(size=None),
    "properties that are none": odd(properties=None),
    "another shape than in the file": odd_place(offset=0),
    "a negative place": odd_place(offset=-8),
    "a place that is none": odd_place(offset=None),
    "a negative length": odd_place(length=-10_000_000),
    "a place beyond the end": odd_place(offset=2**60),
    "no tensors' metadata": lambda metadata: setattr(metadata, "state_dict_metadata", None),
    "no storage data": lambda metadata: setattr(metadata, "storage_data", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_dcp_with_wrong_metadata(tmp_path: Path, what: str) -> None:
    path = remade(tmp_path, CHANGES[what])
    refused(path, str(path))


def test_dcp_with_another_dtype_than_its_file(tmp_path: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata["up.weight"].properties.dtype = torch.int32

    path = remade(tmp_path, change)
    refused(path, str(path), "up.weight", "int32")


# -- what is not this module's ------------------------------------------------------------------------------------------

FORMS = ("safetensors", "torch", "legacy", "dcp")


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_shape(tmp_path: Path, form: str) -> None:
    path = saved(form, tmp_path, state() | {"up.weight": torch.ones(6, 8)})
    refused(path, str(path), "up.weight", "[6, 8]", "[8, 6]")


@pytest.mark.parametrize(
    ("name", "dtype", "other"),
    [("up.bias", torch.complex64, "float32"), ("count", torch.float32, "int64"), ("count", torch.complex64, "int64")],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_dtype_that_does_not_convert(tmp_path: Path, form: str, name: str, dtype: torch.dtype, other: str) -> None:
    tensors = state()
    path = saved(form, tmp_path, tensors | {name: tensors[name].to(dtype)})
    refused(path, str(path), name, str(dtype).removeprefix("torch."), other)


@pytest.mark.parametrize("form", FORMS)
def test_names_that_the_module_does_not_have(tmp_path: Path, form: str) -> None:
    path = saved(form, tmp_path, state() | {"up.wieght": torch.ones(2), "other": torch.ones(3)})
    refused(path, str(path), "up.wieght", "other", 'unexpected="ignore"')


def test_a_prefix_is_recognized() -> None:
    tensors = {f"model.{name}": tensor for name, tensor in state().items()}
    message = refused(tensors, "rename={")
    pattern = re.search(r'rename=\{r"(.*)": ""\}', message)
    assert pattern is not None
    module = gp.trace(Model).materialize(checkpoint=tensors, rename={pattern[1]: ""}, missing="error")
    assert torch.equal(module.up.weight, state()["up.weight"])


@pytest.mark.parametrize("form", FORMS)
def test_names_that_the_checkpoint_does_not_have(tmp_path: Path, form: str) -> None:
    path = saved(form, tmp_path, {name: tensor for name, tensor in state().items() if name not in ("up.bias", "embed.weight")})
    refused(path, str(path), "up.bias is missing", "embed.weight is missing", missing="error")


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_tensor_with_two_values(tmp_path: Path, form: str) -> None:
    tensors = state()
    both = tensors | {"head.weight": tensors["embed.weight"] + 1}
    path = saved(form, tmp_path, both)
    refused(path, str(path), "embed.weight", "head.weight", "one tensor in the module")
    refused(both, "embed.weight", "head.weight", "one tensor in the module")


def test_a_tied_tensor_that_lies_twice_in_one_storage(tmp_path: Path) -> None:
    """The same place in the file, and other strides."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.two.weight = self.one.weight

    weight = torch.randn(4, 4)
    path = saved("torch", tmp_path, {"one.weight": weight, "two.weight": weight.t()})
    with pytest.raises(gp.CheckpointError, match="one tensor in the module"):
        gp.trace(Square).materialize(checkpoint=path)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        ({r"^(up|down)\.": "up."}, "a tensor has one source"),
        (lambda name: "same", "a tensor has one source"),
        ({"(": "x"}, "no regular expression"),
        ({"[": None}, "no regular expression"),
        ({7: "x"}, "no regular expression"),
        ({"up": 7}, "neither a string nor None"),
        ({"up": r"\2"}, "rename cannot put"),
        ({"up": r"\g<name>"}, "rename cannot put"),
        (lambda name: 7, "which is no name"),
        (lambda name: name.encode(), "which is no name"),
    ],
)
def test_a_wrong_rename(rename: Any, says: str) -> None:
    refused(state(), says, rename=rename)


@pytest.mark.parametrize("options", [{"missing": "ignore"}, {"unexpected": "warn"}, {"missing": None}, {"unexpected": True}])
def test_options_that_there_are_not(options: Any) -> None:
    name = next(iter(options))
    refused(state(), f"{name}=", error=gp.MaterializeError, **options)


@pytest.mark.parametrize("options", [{"missing": "error"}, {"unexpected": "ignore"}, {"rename": {}}])
def test_options_without_a_checkpoint(options: Any) -> None:
    refused(None, "checkpoint=PATH", error=gp.MaterializeError, **options)


# -- files that change meanwhile ----------------------------------------------------------------------------------------


@pytest.fixture
def during_reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Says what happens in the middle of reading: once the first tensor has been read."""
    real, lock = File.read, threading.Lock()

    def install(happen: Callable[[], Any]) -> None:
        def read(self: File, start: int, memory: memoryview, what: str) -> None:
            real(self, start, memory, what)
            if what in NAMES:
                with lock:
                    happen()

        monkeypatch.setattr(File, "read", read)

    yield install


def truncate(path: Path) -> None:
    os.truncate(path, 700)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def overwrite(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size - 8)
        file.write(b"\x01" * 8)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 10))


@pytest.mark.parametrize("happen", [truncate, append, overwrite])
@pytest.mark.parametrize("form", ["safetensors", "torch", "dcp"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, during_reading: Any, form: str, happen: Spoil) -> None:
    path = saved(form, tmp_path)
    file = next(path.glob("*.distcp")) if form == "dcp" else path
    good = file.read_bytes()
    changed = [False]

    def once() -> None:
        if not changed[0]:
            changed[0] = True
            happen(file)

    during_reading(once)
    plan = gp.trace(Model)
    for threads in (1, 2):
        file.write_bytes(good)
        changed[0] = False
        module, generator, held = plan.meta_module(), torch.get_rng_state(), descriptors()
        with pytest.raises(gp.CheckpointError, match=re.escape(str(file))):
            gp.materialize(module, seed=0, checkpoint=path, threads=threads)
        assert changed[0] and all(tensor.is_meta for tensor in module.parameters())
        assert torch.equal(torch.get_rng_state(), generator) and descriptors() == held


@pytest.mark.parametrize("form", ["safetensors", "torch", "legacy", "dcp"])
@pytest.mark.parametrize("when", ["while its tensors are read", "once it is open"])
def test_a_file_that_is_replaced_is_still_read_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, when: str
) -> None:
    """Another file of that name is another file: what was opened stays, whole; never a mixture of the two."""
    tensors = state()
    path = saved(form, tmp_path)
    (tmp_path / "other").mkdir()
    other = saved(form, tmp_path / "other", {name: tensor + 1 for name, tensor in reversed(tensors.items())})
    file, new = (next(each.glob("*.distcp")) if form == "dcp" else each for each in (path, other))
    real, done = File.read, [False]

    def read(self: File, start: int, memory: memoryview, what: str) -> None:
        if self.path == file and not done[0] and (when == "once it is open" or what in NAMES):
            done[0] = True
            os.replace(new, file)
        real(self, start, memory, what)

    monkeypatch.setattr(File, "read", read)
    module = gp.trace(Model).materialize(checkpoint=path)
    assert done[0] or form == "legacy"
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in tensors.items())


# -- nothing partial ----------------------------------------------------------------------------------------------------


def test_no_folder_of_offloaded_tensors_is_left(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    path, folder = saved("safetensors", tmp_path), tmp_path / "offloaded"
    plan = gp.trace(Model).place({"up.*": "disk", "*": "cpu"})
    for wrong in (path.read_bytes()[:-3], b"", b"x" * 100):
        path.write_bytes(wrong)
        with pytest.raises(gp.CheckpointError, match=re.escape(str(path))):
            plan.materialize(seed=0, checkpoint=path, offload_dir=folder)
        assert not folder.exists()


def test_no_folder_is_left_where_the_disk_fails_in_the_middle(tmp_path: Path, during_reading: Any) -> None:
    pytest.importorskip("accelerate")
    path, folder = saved("safetensors", tmp_path), tmp_path / "offloaded"
    during_reading(lambda: os.truncate(path, 0))
    with pytest.raises(gp.CheckpointError, match=re.escape(str(path))):
        gp.trace(Model).place({"up.*": "disk", "down.*": "disk", "*": "cpu"}).materialize(
            seed=0, checkpoint=path, offload_dir=folder
        )
    assert not folder.exists()


def test_what_a_rename_function_raises_comes_out_as_it_is() -> None:
    def rename(name: str) -> str:
        raise LookupError("up.bias")

    refused(state(), "up.bias", error=LookupError, rename=rename)


def test_the_traced_module_can_be_filled_after_a_failure(tmp_path: Path) -> None:
    path = saved("safetensors", tmp_path)
    good = path.read_bytes()
    module = gp.trace(Model).meta_module()
    path.write_bytes(good[:-1])
    with pytest.raises(gp.CheckpointError):
        gp.materialize(module, checkpoint=path)
    path.write_bytes(good)
    gp.materialize(module, checkpoint=path)
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in state().items())
