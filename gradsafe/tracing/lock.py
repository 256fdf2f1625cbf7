"""Keeps two builds out of one folder; the kernel forgets a lock when its holder dies."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gradsafe._io.processes import Processes

LOCK = ".lock"


class BusyFolderError(OSError):
    """Another build works in the folder."""


@contextmanager
def building_alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Holds a folder for one job of one or several processes; makes it if need be.

    The first process takes a lock that nobody shares, to see that the folder is free, and then
    lets its own job share it: a newcomer is refused as long as any process of the job lives.

    Args:
        folder: Its parent must exist.
        processes: The processes, all of which call this.

    Raises:
        FileNotFoundError: The parent folder does not exist.
        BusyFolderError: Another build holds it.
        OSError: The file system has no locks.
    """
    if not folder.resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot build {folder}: no such folder {folder.parent}")
    made = processes.first and not folder.exists()
    held = None
    try:
        if processes.first:
            folder.mkdir(exist_ok=True)
            held = _take(folder, fcntl.LOCK_EX)
            _lock(held, folder, fcntl.LOCK_SH)
        processes.wait("the folder is held")
        if held is None:
            held = _take(folder, fcntl.LOCK_SH)
        yield
        if not processes.first:
            _release(held, folder)
            held = None
        processes.leave("the folder")
    finally:
        if held is not None:
            _release(held, folder)
        if made and folder.is_dir() and not any(folder.iterdir()):  # nothing came of it
            folder.rmdir()


def _take(folder: Path, kind: int) -> IO[bytes]:
    while True:
        file = (folder / LOCK).open("a+b")
        try:
            _lock(file, folder, kind)
            if _is_there(file, folder):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # the holder before removed it while this process opened it


def _release(file: IO[bytes], folder: Path) -> None:
    """Whoever is the last removes the file, which a lock of the dead may leave."""
    with file:
        try:
            _lock(file, folder, fcntl.LOCK_EX)
        except BusyFolderError:
            return
        if _is_there(file, folder):
            (folder / LOCK).unlink()


def _lock(file: IO[bytes], folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BusyFolderError(
                f"another build works in {folder}: wait for its end, or build in another folder"
            ) from error
        raise OSError(
            f"cannot lock {folder / LOCK} ({error.strerror}): build on a file system with file "
            "locks and copy the index"
        ) from error


def _is_there(file: IO[bytes], folder: Path) -> bool:
    path = folder / LOCK
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())
