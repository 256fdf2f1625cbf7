"""Folders of tensors, data and never code: safetensors and a JSON manifest with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradsafe._version import __version__

FORMAT = "gradsafe"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_READ_BYTES = 1 << 22


class StorageError(ValueError):
    """A folder cannot be used: missing, foreign, damaged, or written for something else."""


def save_folder(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Writes tensors and metadata as one folder; a reader sees the old folder or the new one.

    Everything goes to a hidden sibling folder first, is forced to disk and then takes the place of
    `path`. A folder of the same kind is replaced; nothing else is ever overwritten.

    Args:
        path: The folder to write; its parent must exist.
        kind: What the folder holds, for example `"detector"`.
        tensors: Name to tensor, of any device and dtype that safetensors knows.
        metadata: JSON values; NaN and Inf are not JSON and are refused.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        FileExistsError: `path` exists and is not a gradsafe folder of this kind.
        ValueError: The metadata is not JSON, or a tensor has no data (meta device).
    """
    check_destination(path, kind)
    target = Path(path).resolve()
    try:
        manifest_text(kind, metadata, {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot save {path}: metadata is not JSON: {error}") from error
    ready = dict(ready_to_write(tensors, path))

    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with mode_of_the_umask(partial / TENSORS):
            save_file(ready, partial / TENSORS)
        text = manifest_text(kind, metadata, {TENSORS: file_record(partial / TENSORS)})
        (partial / MANIFEST).write_text(text, encoding="utf-8")
        for written in (partial / TENSORS, partial / MANIFEST, partial):
            flush_to_disk(written)
        swap_in(partial, target)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is left there after a swap


def load_folder(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a folder of `save_folder` after checking every byte against its manifest.

    Args:
        path: The folder.
        kind: The kind it must have.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        StorageError: The folder is missing, foreign, of another kind, from a newer version of
            gradsafe, or a file in it is missing, truncated or altered.
    """
    folder = Path(path)
    manifest = read_manifest_of(folder, kind)
    if TENSORS not in manifest["files"]:
        raise StorageError(f"{folder / MANIFEST} is malformed: it lists no {TENSORS}")
    for name, record in manifest["files"].items():
        verify_file(folder / name, record)
    try:
        return load_file(folder / TENSORS), manifest["metadata"]
    except SafetensorError as error:
        raise StorageError(f"{folder / TENSORS} is not a safetensors file: {error}") from error


def manifest_text(
    kind: str, metadata: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> str:
    """The manifest of a folder.

    Args:
        kind: What the folder holds.
        metadata: JSON values.
        files: Name to `file_record` of every file.

    Raises:
        TypeError, ValueError: The metadata is not JSON.
    """
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "gradsafe_version": __version__,
        "metadata": dict(metadata),
        "files": dict(files),
    }
    return json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest_of(folder: Path, kind: str) -> dict[str, Any]:
    """`read_manifest` of a folder that must be of one kind and no newer than this gradsafe.

    Raises:
        StorageError: As `read_manifest`, or another kind, or a newer version.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != kind:
        raise StorageError(f"{folder} is of kind {manifest['kind']!r}, expected {kind!r}")
    if manifest["format_version"] > FORMAT_VERSION:
        raise StorageError(
            f"{folder} has format version {manifest['format_version']} (written by gradsafe "
            f"{manifest.get('gradsafe_version')}), this gradsafe {__version__} reads up to "
            f"version {FORMAT_VERSION}: update gradsafe"
        )
    return manifest


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks the manifest of a gradsafe folder of any kind; its files stay untouched.

    Raises:
        StorageError: No such folder, no manifest, or a malformed one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        rescued = _previous(folder.resolve())
        hint = f" (an interrupted save left the former one in {rescued})" * rescued.is_dir()
        raise StorageError(f"no such folder: {folder}{hint}")
    path = folder / MANIFEST
    if not path.is_file():
        raise StorageError(f"{folder} was not written by gradsafe: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is malformed: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StorageError(f"{folder} was not written by gradsafe: {MANIFEST} says otherwise")
    expected = {"kind": str, "format_version": int, "metadata": dict, "files": dict}
    for key, type_ in expected.items():
        if not isinstance(manifest.get(key), type_):
            raise StorageError(f"{path} is malformed: {key!r} must be of type {type_.__name__}")
    for name, record in manifest["files"].items():
        # A manifest must not be able to point out of its folder.
        if Path(name).name != name or not isinstance(record, dict):
            raise StorageError(f"{path} is malformed: bad file entry {name!r}")
    return manifest


def check_destination(
    path: str | os.PathLike[str], kind: str, is_ours: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises what `save_folder` would raise about `path`; call it before long work.

    Args:
        path: The folder to write.
        kind: What it is to hold.
        is_ours: Says of a name in a folder of this kind that gradsafe left it there, and that it
            may go although the manifest does not list it.
    """
    target = Path(path)
    parent = target.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot save {target}: no such folder {parent}, create it first")
    if not target.exists():
        return
    advice = "choose another path or remove it"
    try:
        manifest = read_manifest(target)
    except StorageError as error:
        raise FileExistsError(f"refusing to replace {target}: {error}; {advice}") from error
    if manifest["kind"] != kind:
        raise FileExistsError(
            f"refusing to replace {target}: it is of kind {manifest['kind']!r}, not {kind!r}; "
            f"{advice}"
        )
    names = {entry.name for entry in target.iterdir()} - {MANIFEST, *manifest["files"]}
    strangers = {name for name in names if not is_ours(name)}
    if strangers:
        raise FileExistsError(
            f"refusing to replace {target}: it also holds {sorted(strangers)[0]}, which gradsafe "
            f"did not write; {advice}"
        )


def ready_to_write(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields contiguous CPU tensors; safetensors refuses two names on one storage."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        refuse_meta(tensor, f"cannot save {path}: tensor {name!r}", "compute it before saving")
        ready = tensor.detach().cpu().contiguous()
        if ready.untyped_storage().data_ptr() in seen:
            ready = ready.clone()
        seen.add(ready.untyped_storage().data_ptr())
        yield name, ready


def refuse_meta(tensor: Tensor, what: str, advice: str) -> None:
    """Raises ValueError for a tensor without data."""
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values: {advice}")


def file_record(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file, as a manifest lists them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


@contextmanager
def mode_of_the_umask(path: Path) -> Iterator[None]:
    """Gives a file that safetensors writes in the block, for its owner alone, the usual mode."""
    path.touch()
    mode = path.stat().st_mode
    yield
    path.chmod(stat.S_IMODE(mode))


def verify_file(path: Path, record: Mapping[str, Any]) -> None:
    """Raises StorageError where a file is not what its record says."""
    if not path.is_file():
        raise StorageError(f"{path} is missing although {MANIFEST} lists it")
    size = path.stat().st_size
    if size != record.get("bytes"):
        raise StorageError(f"{path} is damaged: {size} bytes, expected {record.get('bytes')}")
    if file_record(path)["sha256"] != record.get("sha256"):
        raise StorageError(f"{path} is damaged or altered: its SHA-256 is not the manifest's")


def swap_in(partial: Path, target: Path) -> None:
    """Puts a finished folder in the place of `target`, which may exist."""
    # A folder cannot be renamed over a full one, so the former one steps aside under a known name
    # for an instant; a crash in between loses nothing and load_folder says where it is.
    previous = _previous(target)
    if target.exists():
        shutil.rmtree(previous, ignore_errors=True)
        target.rename(previous)
    try:
        partial.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    flush_to_disk(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def flush_to_disk(path: Path) -> None:
    """Forces a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
