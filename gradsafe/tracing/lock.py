"""Keeps two builds out of one folder; the lock of a process that died is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from gradsafe._io.processes import Processes

LOCK = ".lock"  # begins the names of the lock files
WAIT = 0.2  # seconds; the holder may be removing its lock file


class BusyFolderError(OSError):
    """Another build uses the folder."""


@contextmanager
def building_alone(folder: Path, processes: Processes) -> Iterator[None]:
    """Reserves a folder for one job of one or several processes; creates it if needed.

    Each process holds a lock of its own. A new job is refused (BusyFolderError) while any process
    of an earlier one is alive, even if its first process has died.
    """
    if not folder.resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot build {folder}: no such folder {folder.parent}")
    made = processes.first and not folder.exists()
    own = LOCK if processes.first else f"{LOCK}-{processes.rank}"
    try:
        with ExitStack() as held:
            if processes.first:
                folder.mkdir(exist_ok=True)
                held.enter_context(_locked(folder, own))
                for left in folder.glob(f"{LOCK}-*"):
                    with _locked(folder, left.name):
                        pass
            processes.wait("the folder is locked")
            if not processes.first:
                held.enter_context(_locked(folder, own))
            yield
            if not processes.first:
                held.close()
            processes.leave("the folder")
    finally:
        if made and folder.is_dir() and not any(folder.iterdir()):  # the build failed at once
            folder.rmdir()


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    try:
        held = FileLock(folder / name).acquire(timeout=WAIT)
    except Timeout as error:
        raise BusyFolderError(
            f"another build uses {folder}: wait until it ends, or build in another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise OSError(
            f"cannot lock {folder / name} ({error}): build on a file system with file locks and "
            "copy the index"
        ) from error
    with held:
        try:
            yield
        finally:
            # Waiting processes take no lock of a file that is gone. Windows removes it afterwards.
            with suppress(OSError):
                (folder / name).unlink()
