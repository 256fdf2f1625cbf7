"""The folder of the trained testbed: where it lies, when it is whole, how it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gradsafe._io.artifacts import file_record, flush_to_disk

MANIFEST = "manifest.json"
# Training takes about a minute: a temporary folder this old belongs to a process that died.
STALE_SECONDS = 3600.0


def cache_root(cache: str | os.PathLike[str] | None = None) -> Path:
    """Returns the cache folder of the package, which need not exist yet.

    Args:
        cache: Explicit folder. Without it ``$GRADSAFE_CACHE``, then ``$XDG_CACHE_HOME/gradsafe``,
            then ``~/.cache/gradsafe``.

    Returns:
        An absolute path.
    """
    if cache is not None:
        return Path(cache).expanduser().absolute()
    if named := os.environ.get("GRADSAFE_CACHE"):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "gradsafe"


def _digest(path: Path) -> str:
    digest: str = file_record(path)["sha256"]
    return digest


def seal(folder: Path, facts: dict[str, object]) -> None:
    """Writes the manifest, which lists every file with its checksum, and forces all to disk.

    Args:
        folder: Folder with all files in place.
        facts: JSON values to keep beside the checksums.
    """
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        flush_to_disk(path)


def damage(folder: Path) -> str | None:
    """Says what is wrong with a cached folder, or None if it is whole.

    Args:
        folder: A folder written through ``publish``.

    Returns:
        One line for the user, or None.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        if not files:
            return f"{MANIFEST} names no files"
        for name, expected in files.items():
            if _digest(folder / name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def _sweep(root: Path, name: str) -> None:
    """Removes temporary folders that killed processes left behind."""
    for path in root.glob(f".{name}-*.tmp"):
        with suppress(FileNotFoundError):  # another process may be faster
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _renamed(temporary: Path, target: Path) -> bool:
    """Renames a folder into place; False where a folder that holds files is in the way."""
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def publish(target: Path, write: Callable[[Path], None]) -> None:
    """Fills a folder beside ``target`` and renames it into place; ``target`` is never half full.

    Of two processes that race, the first to finish wins and the other throws its folder away.
    A damaged ``target`` is replaced.

    Args:
        target: The folder to appear.
        write: Fills the folder it is given and seals it.

    Raises:
        OSError: If the parent folder cannot be written.
    """
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root, target.name)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=root))
    try:
        write(temporary)
        # mkdtemp makes private folders; a cache may be shared.
        temporary.chmod(0o755)
        # A rename cannot replace a folder that holds files. Whoever finds one in the way leaves it
        # if it is whole, and else moves it aside and tries again. Another process may put its own
        # there in between, so one try is not enough; but each such failure is one process done.
        while not _renamed(temporary, target) and damage(target) is not None:
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=root))
            with suppress(FileNotFoundError):  # another process may just have done the same
                target.rename(aside / "damaged")
            shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def announce(message: str) -> None:
    """Tells the user something on stderr."""
    print(f"benchmarks.testbed: {message}", file=sys.stderr, flush=True)
