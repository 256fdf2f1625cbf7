"""The cache of models that are made on first use: its place, its checksums and its only writer."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gradsafe._io.artifacts import (
    PARTIAL,
    StorageError,
    file_record,
    flush_to_disk,
    read_manifest,
    replacing_folder,
    verify_file,
    write_manifest,
)

KIND = "model"


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """Returns the absolute path of the cache folder, which need not exist yet.

    Args:
        cache: Explicit folder. Default: ``$GRADSAFE_CACHE``, then ``$XDG_CACHE_HOME/gradsafe``,
            then ``~/.cache/gradsafe``.
    """
    if named := cache or os.environ.get("GRADSAFE_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification requires that a relative path is ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "gradsafe"


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a cached folder in one line, or None if it is complete."""
    try:
        files = read_manifest(folder, KIND)["files"]
        for name, record in files.items():
            verify_file(folder / name, record)
    except (StorageError, OSError) as error:
        return str(error)
    return None if files else "the manifest lists no files"


def ensure(folder: Path, fill: Callable[[Path], dict[str, Any]]) -> None:
    """Creates a cached folder unless it is there and complete; a damaged one is replaced.

    The folder appears complete or not at all. If several processes call this at the same time, the
    first one fills the folder and the others wait for it. The lock ends with its process, however
    that ends, and the next caller removes what the process left behind.

    Args:
        folder: The folder.
        fill: Writes files into the new folder and returns JSON values for its manifest.

    Raises:
        OSError: If the parent folder cannot be written.
    """
    if damage(folder) is None:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"another process is making {folder}; waiting for it")
        lock.acquire()
    try:
        problem = damage(folder)
        if problem is None:
            return
        if folder.exists():
            announce(f"{folder} is damaged ({problem}) and will be made again")
        for leftover in folder.parent.glob(f".{folder.name}.*{PARTIAL}"):
            shutil.rmtree(leftover, ignore_errors=True)
        with replacing_folder(folder) as scratch:
            facts = fill(scratch)
            files = sorted(scratch.iterdir())
            for path in files:
                flush_to_disk(path)
            write_manifest(scratch, KIND, facts, {path.name: file_record(path) for path in files})
    finally:
        lock.release()


def announce(message: str) -> None:
    """Prints a message to stderr."""
    print(f"gradsafe: {message}", file=sys.stderr, flush=True)
