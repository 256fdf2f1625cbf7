"""Folders of tensors, data and never code: safetensors and a JSON manifest with checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradsafe._version import __version__

FORMAT = "gradsafe"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "tensors.safetensors"

_SAMPLES = 1024  # values of one parameter that enter a model's fingerprint
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
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "gradsafe_version": __version__,
        "metadata": dict(metadata),
    }
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot save {path}: metadata is not JSON: {error}") from error
    ready = dict(ready_to_write(tensors, path))

    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with mode_of_the_umask(partial / TENSORS):
            save_file(ready, partial / TENSORS)
        manifest["files"] = {TENSORS: file_record(partial / TENSORS)}
        text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
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
    manifest = read_manifest(folder)
    if manifest["kind"] != kind:
        raise StorageError(f"{folder} is of kind {manifest['kind']!r}, expected {kind!r}")
    if manifest["format_version"] > FORMAT_VERSION:
        raise StorageError(
            f"{folder} has format version {manifest['format_version']} (written by gradsafe "
            f"{manifest.get('gradsafe_version')}), this gradsafe {__version__} reads up to "
            f"version {FORMAT_VERSION}: update gradsafe"
        )
    if TENSORS not in manifest["files"]:
        raise StorageError(f"{folder / MANIFEST} is malformed: it lists no {TENSORS}")
    for name, record in manifest["files"].items():
        verify_file(folder / name, record)
    try:
        return load_file(folder / TENSORS), manifest["metadata"]
    except SafetensorError as error:
        raise StorageError(f"{folder / TENSORS} is not a safetensors file: {error}") from error


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


def model_fingerprint(model: nn.Module, without: Collection[int] = ()) -> str:
    """SHA-256 of a model's weights: names, shapes, dtypes and at most 1,024 values of each.

    Weights are its parameters, and the buffers of its state dict, where quantised layers keep
    theirs. The values are evenly spaced, so the cost does not grow with the model, and they are
    compared as bytes, so the fingerprint is the same on every device.

    Args:
        model: Any module; weights tied under several names count once.
        without: `id` of weights that do not count.

    Returns:
        64 hexadecimal digits.

    Raises:
        ValueError: A weight is on the meta device, so it has no values to read.
    """
    digest = hashlib.sha256()
    saved = model.state_dict(keep_vars=True)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    for name, weight in sorted([*model.named_parameters(), *buffers], key=lambda item: item[0]):
        if id(weight) in without:
            continue
        _refuse_meta(weight, f"weight {name!r}", "load the weights before fingerprinting")
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}\n".encode())
        digest.update(_sampled_bytes(weight.detach()))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides how a tokenizer encodes a chat: template, vocabulary, specials.

    Args:
        tokenizer: A Hugging Face tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    facts = {
        "chat_template": getattr(tokenizer, "chat_template", None),
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special_tokens": tokenizer.special_tokens_map,
    }
    text = json.dumps(facts, sort_keys=True, default=str)  # str: AddedToken objects
    return hashlib.sha256(text.encode()).hexdigest()


def _sampled_bytes(values: Tensor) -> bytes:
    count = values.numel()
    if values.element_size() == 1:  # fp8 has no indexing kernel everywhere
        values = values.view(torch.uint8)
    picks = torch.arange(min(count, _SAMPLES), dtype=torch.int64)
    picks = picks * count // max(1, len(picks))
    if values.ndim:  # indexing by coordinates copies no parameter, whatever its strides
        where = torch.unravel_index(picks.to(values.device), tuple(values.shape))
        values = values[where]
    sample = values.reshape(-1).contiguous().cpu()
    return bytes(sample.view(torch.uint8).numpy())


def ready_to_write(
    tensors: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yields contiguous CPU tensors; safetensors refuses two names on one storage."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        _refuse_meta(tensor, f"cannot save {path}: tensor {name!r}", "compute it before saving")
        ready = tensor.detach().cpu().contiguous()
        if ready.untyped_storage().data_ptr() in seen:
            ready = ready.clone()
        seen.add(ready.untyped_storage().data_ptr())
        yield name, ready


def _refuse_meta(tensor: Tensor, what: str, advice: str) -> None:
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
