"""What a build or an extension that failed leaves: nothing that forbids the corrected call."""

from __future__ import annotations

import pytest
from trace_samples import EXAMPLES, QUERIES, build, files

from gradsafe import TraceIndex
from gradsafe._io.processes import Processes
from gradsafe.tracing import IncompleteIndexWarning
from gradsafe.tracing.signature import NonFiniteSignatureError, SignaturePass


def spoil(patch, after: int) -> None:
    """Signatures are NaN after so many batches."""
    batch, left = SignaturePass.batch, [after]

    def spoiled(self, items):
        left[0] -= 1
        return {
            layer: values * (float("nan") if left[0] < 0 else 1)
            for layer, values in batch(self, items).items()
        }

    patch.setattr(SignaturePass, "batch", spoiled)


def test_a_build_refused_for_a_sample_leaves_the_folder_to_the_corrected_one(
    model, tokenizer, tmp_path
):
    long = {"id": "long", "prompt": "x" * 100, "response": "y"}
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        with pytest.raises(ValueError, match=r"examples\[23\]"):
            build(model, tokenizer, tmp_path / name, [*EXAMPLES, long])
        assert not (tmp_path / name / "manifest.json").exists()
        build(model, tokenizer, tmp_path / name)
    assert files(tmp_path / "new") == files(tmp_path / "there")


def test_two_builds_of_the_same_processes_are_both_complete(model, tokenizer, tmp_path):
    alone = Processes()
    for name in ("a", "b"):
        index = build(model, tokenizer, tmp_path / name, EXAMPLES[:16], processes=alone)
        index.extend(EXAMPLES[16:], batch_tokens=200, progress=False, processes=alone)
        assert len(index) == 23
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("batches", [0, 1])
def test_an_extension_that_met_nan_can_be_dropped(model, tokenizer, tmp_path, monkeypatch, batches):
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:8])
    before = files(index.path)
    with monkeypatch.context() as patch:
        spoil(patch, batches)
        with pytest.raises(NonFiniteSignatureError):
            index.extend(EXAMPLES[8:], batch_tokens=100, progress=False)
    with pytest.raises(ValueError, match=r"is incomplete.*TraceIndex\.repair"):
        index.extend(EXAMPLES[9:], progress=False)
    dropped = ["shard-000001.safetensors", "shard-000002.safetensors"]
    assert TraceIndex.repair(index.path) == dropped
    assert files(index.path) == before
    assert TraceIndex.repair(index.path) == []
    index.extend(EXAMPLES[9:], batch_tokens=200, progress=False)
    whole = build(model, tokenizer, tmp_path / "b", EXAMPLES[:8])
    whole.extend(EXAMPLES[9:], batch_tokens=200, progress=False)
    assert files(index.path) == files(whole.path)
    assert index.query(QUERIES, 3).ids == whole.query(QUERIES, 3).ids


def test_repair_keeps_what_is_complete_or_of_the_build(model, tokenizer, tmp_path, monkeypatch):
    index = build(model, tokenizer, tmp_path / "a", EXAMPLES[:8])
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        with pytest.raises(NonFiniteSignatureError):
            index.extend(EXAMPLES[8:], batch_tokens=200, progress=False)
    assert (index.path / "shard-000001.safetensors").exists()
    before = files_only(index.path)
    assert TraceIndex.repair(index.path) == []
    assert files_only(index.path) == before
    with pytest.warns(IncompleteIndexWarning, match="has 16 of 23"):
        TraceIndex.load(index.path, model, tokenizer)
    with monkeypatch.context() as patch:
        spoil(patch, 0)
        with pytest.raises(NonFiniteSignatureError):
            build(model, tokenizer, tmp_path / "b")
    assert TraceIndex.repair(tmp_path / "b") == []
    build(model, tokenizer, tmp_path / "b")
    index.extend(EXAMPLES[8:], batch_tokens=200, progress=False)
    assert len(index) == 23


def files_only(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
