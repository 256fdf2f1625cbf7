"""Files that appear whole or not at all, and folders of tensors with a checked manifest."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from gradsafe._version import __version__

if TYPE_CHECKING:  # the command line imports this file, and must not wait for torch
    from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_BYTES = 1 << 28  # larger ones are refused before they are read
TENSORS = "tensors.safetensors"
PARTIAL = ".partial"  # ends the name of everything that is still being written


T = TypeVar("T")

# The first use of a Struct type by two threads at once can end the process in msgspec 0.22: each
# builds the description of the type.
_convert_lock = threading.Lock()


def is_partial(name: str) -> bool:
    """Whether a file of this name was being written when its process was killed."""
    # safetensors writes to a file of the second kind first, and renames it.
    return name.endswith(PARTIAL) or re.fullmatch(r"\.tmp\w{6}", name) is not None


class FileRecord(msgspec.Struct, forbid_unknown_fields=True):
    """What a manifest says of one file."""

    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, msgspec.Meta(ge=0)]


class _Manifest(msgspec.Struct, forbid_unknown_fields=True):
    format: Literal["gradsafe"]
    kind: str
    format_version: Annotated[int, msgspec.Meta(ge=1)]
    gradsafe_version: str
    metadata: dict[str, Any]
    files: dict[str, FileRecord]
    digest: str


class StorageError(ValueError):
    """A file or folder cannot be used: missing, foreign, damaged, or written for something else."""


class _MissingFolderError(StorageError):
    """There is no such folder."""


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[Path]:
    """Yields a new file beside `path` that takes its place when the block ends without an error.

    Args:
        path: The file to write; a symbolic link stays a link to the new contents.
        durable: Force the file and its folder entry to disk.
    """
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode & 0o777  # of the umask; safetensors sets one of its own
        yield partial
        partial.chmod(mode)
        if durable:
            flush_to_disk(partial)
        partial.replace(target)
        if durable:
            flush_to_disk(target.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a UTF-8 file atomically."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    note: dict[str, str] | None = None,
    *,
    durable: bool = True,
) -> None:
    """Writes a safetensors file atomically.

    Args:
        path: The file.
        tensors: Name to tensor, of any device and dtype that safetensors supports.
        note: Metadata of the file.
        durable: See `atomic_path`.

    Raises:
        OSError: It cannot be written, for example because the disk is full.
        ValueError: A tensor has no values (meta device).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    ready: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        refuse_meta(tensor, f"cannot save {path}: tensor {name!r}", "compute it before saving")
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:  # safetensors refuses shared memory
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        ready[name] = plain
    try:
        with atomic_path(path, durable=durable) as partial:
            save_file(ready, partial, note)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def save_folder(
    path: str | os.PathLike[str],
    kind: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Writes tensors and metadata as one folder; a reader sees the old folder or the new one.

    Args:
        path: The folder to write; its parent must exist.
        kind: What the folder holds, for example `"detector"`.
        tensors: See `write_tensors`.
        metadata: JSON values; NaN and Inf are not JSON and are refused.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        FileExistsError: `path` exists and is not a gradsafe folder of this kind.
        ValueError: The metadata is not JSON, or a tensor has no values (meta device).
    """
    check_destination(path, kind)
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot save {path}: metadata is not JSON: {error}") from error
    with replacing_folder(path) as scratch:
        write_tensors(scratch / TENSORS, tensors)
        write_manifest(scratch, kind, metadata, {TENSORS: file_record(scratch / TENSORS)})


def load_folder(
    path: str | os.PathLike[str], kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a folder of `save_folder` after checking every byte against its manifest.

    A folder that is replaced meanwhile is read again.

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
    return _unless_replaced(folder, lambda: _read_folder(folder, kind))


def _read_folder(folder: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    manifest = read_manifest(folder, kind)
    if TENSORS not in manifest["files"]:
        raise StorageError(f"{folder / MANIFEST} is malformed: it lists no {TENSORS}")
    for name, record in manifest["files"].items():
        verify_file(folder / name, record)
    try:
        return load_file(folder / TENSORS), manifest["metadata"]
    except SafetensorError as error:
        raise StorageError(f"{folder / TENSORS} is not a safetensors file: {error}") from error


def write_manifest(
    folder: Path, kind: str, metadata: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes or replaces the manifest of a folder, atomically.

    Args:
        folder: The folder.
        kind: What it holds.
        metadata: JSON values.
        files: Name to `file_record` of every file.

    Raises:
        TypeError, ValueError: The metadata is not JSON.
    """
    manifest = {
        "format": "gradsafe",
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "gradsafe_version": __version__,
        "metadata": dict(metadata),
        "files": dict(files),
    }
    manifest["digest"] = _digest(manifest)
    text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder / MANIFEST, text + "\n")


def read_manifest(folder: str | os.PathLike[str], kind: str | None = None) -> dict[str, Any]:
    """Reads and checks the manifest of a gradsafe folder; the other files are not read.

    Args:
        folder: The folder.
        kind: The kind it must have; None for any.

    Raises:
        StorageError: No such folder, no manifest, a malformed one, another kind, or a newer version
            of the format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        rescued = sorted(folder.resolve().parent.glob(f".{folder.resolve().name}.previous-*"))
        hint = f" (an interrupted save left the former one in {rescued[-1]})" if rescued else ""
        raise _MissingFolderError(f"no such folder: {folder}{hint}")
    path = folder / MANIFEST
    if not path.is_file():
        raise StorageError(f"{folder} was not written by gradsafe: it has no {MANIFEST}")
    if path.stat().st_size > MANIFEST_BYTES:
        raise StorageError(f"{path} is malformed: larger than {MANIFEST_BYTES} bytes")
    try:
        manifest = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StorageError(f"{path} is malformed: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != "gradsafe":
        raise StorageError(f"{folder} was not written by gradsafe: {MANIFEST} says otherwise")
    checked(path, manifest, _Manifest)
    if manifest["digest"] != _digest({k: v for k, v in manifest.items() if k != "digest"}):
        raise StorageError(f"{path} is damaged or altered: its contents do not fit its digest")
    for name in manifest["files"]:
        if Path(name).name != name:  # a manifest must not point out of its folder
            raise StorageError(f"{path} is malformed: bad file entry {name!r}")
    if kind is not None and manifest["kind"] != kind:
        raise StorageError(f"{folder} is of kind {manifest['kind']!r}, expected {kind!r}")
    if kind is not None and manifest["format_version"] > FORMAT_VERSION:
        raise StorageError(
            f"{folder} has format version {manifest['format_version']} (written by gradsafe "
            f"{manifest.get('gradsafe_version')}), this gradsafe {__version__} reads up to "
            f"version {FORMAT_VERSION}: update gradsafe"
        )
    return manifest


def check_destination(
    path: str | os.PathLike[str], kind: str, is_ours: Callable[[str], bool] = lambda name: False
) -> None:
    """Raises what writing a folder to `path` would raise; call it before long work.

    Args:
        path: The folder to write.
        kind: What it will hold.
        is_ours: Whether gradsafe wrote a file of this name into the folder that is there, although
            its manifest does not list it.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        FileExistsError: `path` exists and is not a gradsafe folder of this kind, or it holds files
            that gradsafe did not write.
    """
    target = Path(path)
    parent = target.resolve().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"cannot save {target}: no such folder {parent}, create it first")
    if not target.exists():
        return
    advice = "choose another path or remove it"

    def contents() -> tuple[dict[str, Any], set[str]]:
        manifest = read_manifest(target)
        names = {entry.name for entry in target.iterdir()}
        return manifest, names - {MANIFEST, *manifest["files"]}

    try:
        manifest, names = _unless_replaced(target, contents)
    except (StorageError, FileNotFoundError) as error:
        missed = isinstance(error, _MissingFolderError) and target.is_dir()
        if missed or not target.exists():  # another thread or process is replacing it
            return
        raise FileExistsError(f"refusing to replace {target}: {error}; {advice}") from error
    if manifest["kind"] != kind:
        raise FileExistsError(
            f"refusing to replace {target}: it is of kind {manifest['kind']!r}, not {kind!r}; "
            f"{advice}"
        )
    strangers = sorted(name for name in names if not is_ours(name))
    if strangers:
        raise FileExistsError(
            f"refusing to replace {target}: it also holds {strangers[0]}, which gradsafe did not "
            f"write; {advice}"
        )


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a new folder that takes the place of `path` when the block ends without an error."""
    target = Path(path).resolve()
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    scratch.mkdir()
    try:
        yield scratch
        flush_to_disk(scratch)
        # A folder cannot be renamed over a full one, so the former one is renamed first. If the
        # process dies in between, nothing is lost, and `read_manifest` says where it is.
        previous = target.with_name(f".{target.name}.previous-{secrets.token_hex(4)}")
        while True:  # other threads and processes may save the same folder
            with suppress(FileNotFoundError):
                target.rename(previous)
            try:
                scratch.rename(target)
                break
            except BaseException as error:
                if getattr(error, "errno", None) in (errno.ENOTEMPTY, errno.EEXIST):
                    shutil.rmtree(previous, ignore_errors=True)
                    continue
                if previous.exists():
                    previous.rename(target)
                raise
        flush_to_disk(target.parent)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def file_record(path: Path) -> dict[str, Any]:
    """SHA-256 and size of a file, as a manifest lists them."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def verify_file(path: Path, record: Mapping[str, Any]) -> None:
    """Raises StorageError if a file differs from its record."""
    if not path.is_file():
        raise StorageError(f"{path} is missing although {MANIFEST} lists it")
    size = path.stat().st_size
    if size != record.get("bytes"):
        raise StorageError(f"{path} is damaged: {size} bytes, expected {record.get('bytes')}")
    if file_record(path)["sha256"] != record.get("sha256"):
        raise StorageError(f"{path} is damaged or altered: its SHA-256 is not the manifest's")


def refuse_meta(tensor: Tensor, what: str, advice: str) -> None:
    """Raises ValueError for a tensor without values."""
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device and has no values: {advice}")


def flush_to_disk(path: Path) -> None:
    """Forces a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checked(where: object, value: Any, kind: type[T]) -> T:
    """Converts JSON values of a file to a type of msgspec.

    Raises:
        StorageError: A value is missing, of another type, or out of range; the message names it.
    """
    try:
        with _convert_lock:
            return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise StorageError(f"{where} is malformed: {error}") from error


def _unless_replaced(folder: Path, read: Callable[[], T]) -> T:
    """Calls `read` again for as long as another thread or process replaced the folder meanwhile."""
    while True:
        before = _identity(folder)
        try:
            found = read()
        except (StorageError, OSError, RuntimeError):
            if before is None:
                time.sleep(0.05)  # the other may be between the two renames of a save
            if _identity(folder) == before:
                raise
            continue
        if _identity(folder) == before:
            return found


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _digest(manifest: Mapping[str, Any]) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
