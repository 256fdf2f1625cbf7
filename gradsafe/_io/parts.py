"""One JSON Lines output that several processes write: a part for each, merged in input order.

The parts of `scores.jsonl` lie beside it as `scores.jsonl.part-0-of-2` and so on. A part holds any
records in any order, so the parts of a killed run serve a later one with any number of processes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gradsafe._io.records import Row, output_records, to_line


class PartWriter:
    """Appends records to one part, which is opened, without a line cut off, at the first of them.

    Args:
        path: The whole output.
        keys: One key per record of the whole output, see `record_key`.
        rank: Number of the process.
        count: How many there are.
    """

    def __init__(
        self, path: str | os.PathLike[str], keys: Sequence[Mapping[str, Any]], rank: int, count: int
    ) -> None:
        whole = Path(path)
        self.path = whole.with_name(f"{whole.name}.part-{rank}-of-{count}")
        self._keys = keys
        self._file: IO[bytes] | None = None

    def write(self, index: int, fields: Mapping[str, Any]) -> None:
        """Appends the record of this index: its key and `fields`; it is in the file on return."""
        if self._file is None:
            self._file = self._open()
        self._file.write(to_line({**self._keys[index], **fields}).encode())
        self._file.flush()

    def close(self) -> None:
        """Forces the file to disk and closes it; closing twice is harmless."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _open(self) -> IO[bytes]:
        if not self.path.exists():
            return self.path.open("xb")  # x: another run may start the same file
        file = self.path.open("r+b")
        file.truncate(file.read().rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        return file


def part_paths(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the parts of an output that exist, of any number of processes."""
    whole = Path(path)
    pattern = re.compile(re.escape(whole.name) + r"\.part-\d+-of-\d+")
    return sorted(entry for entry in whole.parent.iterdir() if pattern.fullmatch(entry.name))


def check_parts(path: str | os.PathLike[str], *, resume: bool, overwrite: bool) -> None:
    """Raises FileExistsError if parts of an earlier run exist and nothing says what to do."""
    parts = part_paths(path)
    if parts and not (resume or overwrite):
        raise FileExistsError(
            f"{parts[0]} was left by an interrupted run: choose resume, overwrite, or another file"
        )


def remove_parts(path: str | os.PathLike[str]) -> None:
    """Removes all parts of an output."""
    for part in part_paths(path):
        part.unlink()


def read_found(
    path: str | os.PathLike[str], keys: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[Row, bytes]]:
    """Reads what an output and its parts hold so far; no file is changed.

    Returns:
        Index to record and its line. Where two files hold a record, that of the output counts.

    Raises:
        ValueError: A record was not written for these keys.
    """
    found: dict[int, tuple[Row, bytes]] = {}
    whole = Path(path)
    for file in ([whole] if whole.exists() else []) + part_paths(path):
        for index, record, line in output_records(file, keys, in_order=file == whole):
            found.setdefault(index, (record, line))
    return found


def merge(path: str | os.PathLike[str], keys: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Puts an output and its parts together, and removes the parts once the whole is on disk.

    Returns:
        All records, in input order.

    Raises:
        ValueError: A record is missing, or was not written for these keys.
    """
    found = read_found(path, keys)
    if missing := len(keys) - len(found):
        raise ValueError(
            f"{path}: {missing} of {len(keys)} records are in no part: all processes must write to "
            "one shared folder"
        )
    whole = Path(path).resolve()  # a link stays a link
    merged = whole.with_name(f".{whole.name}.merged")
    try:
        with merged.open("wb") as file:
            file.writelines(found[index][1] for index in range(len(keys)))
            file.flush()
            os.fsync(file.fileno())
        merged.replace(whole)
    finally:
        merged.unlink(missing_ok=True)
    folder = os.open(whole.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    remove_parts(path)
    return [found[index][0] for index in range(len(keys))]
