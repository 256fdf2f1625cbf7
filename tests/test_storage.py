"""Folders survive a round trip and every kind of damage is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from gradsafe._io import artifacts as storage
from gradsafe._io.artifacts import (
    StorageError,
    check_destination,
    load_folder,
    save_folder,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "saved"
    save_folder(path, "detector", {"a": torch.arange(6.0).reshape(2, 3)}, {"response": "Sure"})
    return path


def edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.update(changes)
    del manifest["digest"]
    if all(value is not None for value in changes.values()):
        manifest["digest"] = storage._digest(manifest)  # of one who knows how
    (folder / "manifest.json").write_text(json.dumps(manifest))


class TestRoundTrip:
    @pytest.mark.parametrize(
        "dtype",
        [
            *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
            *(torch.int64, torch.uint8, torch.bool),
        ],
    )
    def test_keeps_bits_dtype_and_shape(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensor = torch.randn(5, 7).to(dtype)
        save_folder(tmp_path / "x", "index", {"t": tensor}, {})
        loaded, _ = load_folder(tmp_path / "x", "index")
        assert loaded["t"].dtype == dtype
        assert torch.equal(loaded["t"].view(torch.uint8), tensor.view(torch.uint8))

    def test_keeps_metadata(self, folder: Path) -> None:
        assert load_folder(folder, "detector")[1] == {"response": "Sure"}

    def test_accepts_views_shared_storage_empty_tensors_and_gradients(self, tmp_path: Path) -> None:
        base = torch.randn(4, 6, requires_grad=True)
        tensors = {
            "transposed": base.t(),
            "again": base,
            "slice": base[1:3],
            "strided": base[:, ::2],
            "empty": torch.empty(0, 3),
            "empty too": torch.empty(0),
            "scalar": torch.tensor(2.5),
            "parameter": nn.Parameter(torch.ones(2)),
        }
        save_folder(tmp_path / "x", "index", tensors, {})
        loaded, _ = load_folder(tmp_path / "x", "index")
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor)

    def test_accepts_no_tensors(self, tmp_path: Path) -> None:
        save_folder(tmp_path / "x", "index", {}, {"n": 1})
        assert load_folder(tmp_path / "x", "index") == ({}, {"n": 1})

    def test_manifest_states_format_versions_and_files(self, folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        record = manifest["files"]["tensors.safetensors"]
        assert manifest["format"] == "gradsafe"
        assert manifest["kind"] == "detector"
        assert manifest["format_version"] == 1
        assert manifest["gradsafe_version"]
        assert record["bytes"] == (folder / "tensors.safetensors").stat().st_size
        assert len(record["sha256"]) == 64

    def test_folder_honours_the_umask(self, folder: Path) -> None:
        umask = os.umask(0)
        os.umask(umask)
        assert folder.stat().st_mode & 0o777 == 0o777 & ~umask


class TestReplacing:
    def test_replaces_a_folder_of_the_same_kind_and_leaves_no_traces(self, folder: Path) -> None:
        save_folder(folder, "detector", {"b": torch.zeros(1)}, {"new": True})
        tensors, metadata = load_folder(folder, "detector")
        assert list(tensors) == ["b"]
        assert metadata == {"new": True}
        assert os.listdir(folder.parent) == ["saved"]

    def test_refuses_another_kind(self, folder: Path) -> None:
        with pytest.raises(FileExistsError, match="saved: it is of kind 'detector', not 'index'"):
            save_folder(folder, "index", {}, {})

    def test_refuses_a_file_and_a_foreign_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "folder").mkdir()
        for name in ("file", "folder"):
            with pytest.raises(FileExistsError, match=f"refusing to replace .*{name}"):
                save_folder(tmp_path / name, "detector", {}, {})
        assert (tmp_path / "file").read_text() == "mine"

    def test_refuses_to_delete_what_others_put_inside(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("mine")
        with pytest.raises(FileExistsError, match=r"notes\.txt"):
            save_folder(folder, "detector", {}, {})
        assert (folder / "notes.txt").exists()

    def test_missing_parent_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no such folder .*nowhere"):
            check_destination(tmp_path / "nowhere" / "x", "detector")

    @pytest.mark.parametrize("failing", ["write_tensors", "flush_to_disk", "write_manifest"])
    def test_a_failing_save_keeps_the_former_folder(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(storage, failing, fail)
        with pytest.raises(OSError, match="disk full"):
            save_folder(folder, "detector", {"b": torch.zeros(1)}, {})
        assert list(load_folder(folder, "detector")[0]) == ["a"]
        assert os.listdir(folder.parent) == ["saved"]

    def test_a_failing_rename_puts_the_former_folder_back(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rename = Path.rename

        def fail_for_the_new_one(self: Path, target: Path) -> Path:
            if self.name.endswith(".partial"):
                raise OSError("no")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
        with pytest.raises(OSError, match="no"):
            save_folder(folder, "detector", {}, {})
        assert list(load_folder(folder, "detector")[0]) == ["a"]

    def test_a_crash_between_the_renames_is_explained(self, folder: Path) -> None:
        folder.rename(folder.with_name(".saved.previous-0a"))
        with pytest.raises(StorageError, match=r"interrupted save left .*\.saved\.previous-0a"):
            load_folder(folder, "detector")

    def test_follows_a_symbolic_link(self, folder: Path) -> None:
        link = folder.with_name("link")
        link.symlink_to(folder)
        save_folder(link, "detector", {"b": torch.zeros(1)}, {})
        assert link.is_symlink()
        assert list(load_folder(folder, "detector")[0]) == ["b"]

    def test_metadata_must_be_json(self, tmp_path: Path) -> None:
        for bad in ({"x": float("nan")}, {"x": object()}):
            with pytest.raises(ValueError, match="metadata is not JSON"):
                save_folder(tmp_path / "x", "detector", {}, bad)
        assert os.listdir(tmp_path) == []

    def test_meta_tensors_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="tensor 'w' is on the meta device"):
            save_folder(tmp_path / "x", "detector", {"w": torch.empty(2, device="meta")}, {})


class TestDamage:
    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"no such folder: .*gone"):
            load_folder(tmp_path / "gone", "detector")

    def test_foreign_folder(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match=r"not written by gradsafe: it has no manifest\.js"):
            load_folder(tmp_path, "detector")

    @pytest.mark.parametrize("text", ["{", "[" * 100_000, "\udc80", ""])
    def test_malformed_json(self, folder: Path, text: str) -> None:
        (folder / "manifest.json").write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(StorageError, match=r"manifest\.json is malformed"):
            load_folder(folder, "detector")

    @pytest.mark.parametrize("text", ["[]", "{}", "3", '{"format": "other"}'])
    def test_foreign_manifest(self, folder: Path, text: str) -> None:
        (folder / "manifest.json").write_text(text)
        with pytest.raises(StorageError, match="not written by gradsafe"):
            load_folder(folder, "detector")

    @pytest.mark.parametrize("key", ["kind", "format_version", "metadata", "files"])
    def test_incomplete_manifest(self, folder: Path, key: str) -> None:
        edit_manifest(folder, **{key: None})
        with pytest.raises(StorageError, match=rf"malformed: .*at `\$\.{key}`"):
            load_folder(folder, "detector")

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b"])
    def test_manifest_cannot_point_outside(self, folder: Path, name: str) -> None:
        edit_manifest(folder, files={name: {"sha256": "0" * 64, "bytes": 1}})
        with pytest.raises(StorageError, match="bad file entry"):
            load_folder(folder, "detector")

    def test_manifest_without_tensors(self, folder: Path) -> None:
        edit_manifest(folder, files={})
        with pytest.raises(StorageError, match="lists no tensors"):
            load_folder(folder, "detector")

    def test_other_kind(self, folder: Path) -> None:
        with pytest.raises(StorageError, match="saved is of kind 'detector', expected 'index'"):
            load_folder(folder, "index")

    def test_newer_format(self, folder: Path) -> None:
        edit_manifest(folder, format_version=2, gradsafe_version="9.0")
        with pytest.raises(StorageError, match=r"format version 2 .*gradsafe 9\.0.*update gradsaf"):
            load_folder(folder, "detector")

    def test_missing_file(self, folder: Path) -> None:
        (folder / "tensors.safetensors").unlink()
        with pytest.raises(StorageError, match=r"tensors\.safetensors is missing"):
            load_folder(folder, "detector")

    def test_truncated_file(self, folder: Path) -> None:
        file = folder / "tensors.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(StorageError, match=r"tensors\.safetensors is damaged: \d+ bytes, exp"):
            load_folder(folder, "detector")

    def test_altered_file(self, folder: Path) -> None:
        file = folder / "tensors.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(StorageError, match=r"tensors\.safetensors is damaged or altered"):
            load_folder(folder, "detector")

    def test_foreign_tensor_file_with_matching_checksum(self, folder: Path) -> None:
        file = folder / "tensors.safetensors"
        file.write_bytes(b"not tensors")
        edit_manifest(folder, files={file.name: storage.file_record(file)})
        with pytest.raises(StorageError, match="is not a safetensors file"):
            load_folder(folder, "detector")
