"""The folder of an index: what a malformed, damaged or half-used one is told apart by."""

from __future__ import annotations

import json
import os

import pytest
from trace_samples import QUERIES, build, files

from gradsafe import TraceIndex
from gradsafe._io.artifacts import MANIFEST, StorageError, write_manifest
from gradsafe._io.processes import Processes
from gradsafe.tracing.folder import IndexFolder
from gradsafe.tracing.lock import BusyFolderError, building_alone
from gradsafe.tracing.signature import NonFiniteSignatureError, SignaturePass


@pytest.fixture
def index(model, tokenizer, tmp_path):
    return build(model, tokenizer, tmp_path / "index")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("settings",), None),
        (("layer",), "2"),
        (("layer_curve",), 1),
        (("part_norm",), None),
        (("shard_samples",), 0),
        (("parts",), []),
        (("parts", 0), "all"),
        (("parts", 0, "count"), 0),
        (("settings", "encoding"), None),
        (("settings", "model"), 3),
    ],
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_malformed_manifest_is_a_storage_error(model, tokenizer, index, place, value, missing):
    manifest = json.loads((index.path / MANIFEST).read_text())
    entry = manifest["metadata"]
    for key in place[:-1]:
        entry = entry[key]
    if missing:
        del entry[place[-1]]
    else:
        entry[place[-1]] = value
    write_manifest(index.path, "trace-index", manifest["metadata"], manifest["files"])
    for use in (
        lambda: TraceIndex.load(index.path, model, tokenizer),
        lambda: TraceIndex.repair(index.path),
    ):
        with pytest.raises(StorageError, match=r"manifest\.json is malformed"):
            use()


def test_a_shard_that_goes_while_the_index_is_open_is_named(index):
    (index.path / "shard-000001.safetensors").write_bytes(b"no tensors")
    with pytest.raises(StorageError, match=r"shard-000001\.safetensors cannot be read"):
        index.query(QUERIES, 1)
    (index.path / "shard-000001.safetensors").unlink()
    for part_norm in ("none", "zscore"):
        with pytest.raises(StorageError, match=r"shard-000001\.safetensors cannot be read"):
            index.query(QUERIES, 1, part_norm=part_norm)


def test_saving_a_damaged_index_names_its_shard(index, tmp_path):
    shard = index.path / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StorageError, match=str(shard)):
        index.save(tmp_path / "copy")
    assert [entry.name for entry in tmp_path.iterdir()] == ["index"]


def test_saving_replaces_an_index_that_a_killed_build_left(index, tmp_path):
    index.save(tmp_path / "copy")
    before = files(tmp_path / "copy")
    (tmp_path / "copy" / ".lock").touch()
    (tmp_path / "copy" / ".work-shard-000009").mkdir()
    (tmp_path / "copy" / "shard-000009.safetensors.partial").touch()
    (tmp_path / "copy" / ".tmpA1b2C3").touch()  # how safetensors calls a file that it writes
    with (
        building_alone(tmp_path / "copy", Processes()),
        pytest.raises(BusyFolderError, match="another build uses"),
    ):
        index.save(tmp_path / "copy")
    (tmp_path / "copy" / ".lock").touch()
    index.save(tmp_path / "copy")
    assert files(tmp_path / "copy") == before
    (tmp_path / "copy" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match=r"also holds notes\.txt"):
        index.save(tmp_path / "copy")
    assert len(IndexFolder.open(tmp_path / "copy").present) == 3


def test_others_may_read_what_the_umask_lets_them(model, tokenizer, tmp_path):
    before = os.umask(0o027)
    try:
        index = build(model, tokenizer, tmp_path / "index")
        index.save(tmp_path / "copy")
    finally:
        os.umask(before)
    for folder in ("index", "copy"):
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / folder).iterdir()}
        assert modes == {0o640}


def test_an_index_does_not_follow_the_working_directory(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = build(model, tokenizer, "index")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(index.query(QUERIES, 2).ids) == 3
    assert index.path == tmp_path / "index"


def test_a_query_without_finite_signature_is_named(index, monkeypatch):
    batch = SignaturePass.batch

    def spoiled(self, items):
        return {layer: values * float("nan") for layer, values in batch(self, items).items()}

    monkeypatch.setattr(SignaturePass, "batch", spoiled)
    with pytest.raises(NonFiniteSignatureError, match=r"the signature of queries\[0\] holds NaN"):
        index.query(QUERIES[0], 1)
