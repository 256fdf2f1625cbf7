"""JSON Lines: rows read with errors that name the line, and output that can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gradsafe._io.artifacts import atomic_path, flush_to_disk
from gradsafe._io.processes import Processes

LABELS = {"safe": 0, "unsafe": 1}
_BOM = b"\xef\xbb\xbf"
_ADVICE = "it cannot be resumed: choose overwrite or another file"


class Row(dict[str, Any]):
    """One row of a data set, and where it was read.

    Attributes:
        where: `file:line`, or `data set[index]`, for error messages.
        line: Line number in the file, from 1; index + 1 for a data set.
    """

    def __init__(self, fields: Mapping[str, Any], where: str, line: int) -> None:
        super().__init__(fields)
        self.where = where
        self.line = line


def read_jsonl(path: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """Reads a JSON Lines file: one object per line; blank lines and a UTF-8 BOM are skipped.

    Args:
        path: The file.
        limit: Number of rows to read; the lines behind them are not parsed.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line is not a JSON object; the message starts with `file:line:` and does not
            quote the line.
    """
    return _rows(path, limit, parse_line)


def read_rows(path: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """Reads a JSON Lines file, or a .txt file with one prompt per line."""
    if Path(path).suffix.lower() != ".txt":
        return read_jsonl(path, limit)
    return _rows(path, limit, lambda text, where, line: Row({"prompt": text}, where, line))


def labels_of(rows: Sequence[Row]) -> list[int] | None:
    """The field `label` of every row.

    Returns:
        1 for unsafe and 0 for safe, in order; None if no row has a label (null is none).

    Raises:
        ValueError: A label is not one of `"safe"`, `"unsafe"`, 0, 1, false, true, or only some rows
            have one.
    """
    values = [row.get("label") for row in rows]
    if all(value is None for value in values):
        return None
    labels = []
    for row, value in zip(rows, values, strict=True):
        if value is None:
            raise ValueError(f"{row.where}: no label, but other rows have one: label all or none")
        if isinstance(value, str) and value in LABELS:
            labels.append(LABELS[value])
        elif isinstance(value, (bool, int)) and value in (0, 1):
            labels.append(int(value))
        else:
            raise ValueError(
                f'{row.where}: label {json.dumps(value)[:40]} is not one of "safe", "unsafe", 0, '
                "1, false, true"
            )
    return labels


def record_key(index: int, prompt: Any, run: str) -> dict[str, Any]:
    """What identifies an output record: its index, the hash of its prompt, that of the settings."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt)
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return {"index": index, "prompt_sha256": digest, "run": run}


def to_line(record: Mapping[str, Any]) -> str:
    """Formats a record as one line of strict ASCII JSON; NaN and Inf raise ValueError."""
    return json.dumps(record, allow_nan=False) + "\n"


class Records:
    """The records of one run, one line of JSON each: on standard output, or in a file.

    Every process appends to a part of the file, `FILE.part-RANK-of-COUNT`; at the end the first
    process merges them in input order. A part holds any records in any order, so an interrupted run
    can be resumed with any number of processes. Each record starts with its key: parts of other
    prompts or settings are refused.

    As a context manager it closes its file, and says how to continue if the work was interrupted.

    Args:
        path: The file; None for standard output.
        keys: One per record of the complete output, see `record_key`.
        processes: The processes.
        resume: Keep the records that exist.
        overwrite: Replace an existing file.
        unit: What a record is, for messages.

    Attributes:
        found: Index to record, of an earlier run; empty unless `resume`.

    Raises:
        ValueError: An existing record was not written for these keys; the files are not changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        keys: Sequence[Mapping[str, Any]],
        processes: Processes,
        *,
        resume: bool = False,
        overwrite: bool = False,
        unit: str = "records",
    ) -> None:
        self.path = None if path is None else Path(path)
        self._keys = keys
        self._overwrite = overwrite
        self._processes = processes
        self._unit = unit
        self._suffix = f".part-{processes.rank}-of-{processes.count}"
        self._file: IO[bytes] | None = None
        self._printed: list[Row] = []
        self.found = self._read() if resume and processes.first else {}

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            hint = self._how_to_resume() if kind else ""
            if kind is KeyboardInterrupt:
                raise KeyboardInterrupt(hint) from None
            if kind and issubclass(kind, Exception) and hint and self._processes.claim_last_word():
                print(f"gradsafe: {hint}", file=sys.stderr)
        finally:
            self.close()

    def begin(self) -> None:
        """Removes old parts that are overwritten; called before any process writes.

        The old file itself stays until the new one is complete.
        """
        if self.path is not None and self._processes.first and self._overwrite:
            for part in part_paths(self.path):
                part.unlink()

    def write(self, index: int, fields: Mapping[str, Any]) -> None:
        """Appends one record: its key and `fields`; it is in the file on return."""
        record = {**self._keys[index], **fields}
        if self.path is None:
            print(to_line(record), end="", flush=True)
            self._printed.append(Row(record, "", index + 1))
            return
        if self._file is None:
            self._file = self._open(self.path.with_name(self.path.name + self._suffix))
        self._file.write(to_line(record).encode())
        self._file.flush()

    def finish(self) -> list[Row]:
        """Merges the parts; the first process calls it when all have written.

        Returns:
            All records, in input order.

        Raises:
            ValueError: A record is missing.
        """
        if self.path is None:
            return self._printed
        self.close()
        found = self._read()
        if missing := len(self._keys) - len(found):
            raise ValueError(
                f"{self.path}: {missing} of {len(self._keys)} records are in no part: all "
                "processes must write to one shared folder"
            )
        records = [found[index] for index in range(len(self._keys))]
        if parts := part_paths(self.path):
            with atomic_path(self.path) as partial:
                partial.write_text("".join(map(to_line, records)), encoding="ascii")
            for part in parts:
                part.unlink()
        return records

    def close(self) -> None:
        """Forces this process's part to disk and closes it; closing twice is harmless."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def _how_to_resume(self) -> str:
        """For messages; empty if a resumed run would find nothing."""
        if self.path is None or not (parts := part_paths(self.path)):
            return ""
        count = sum(part.read_bytes().count(b"\n") for part in parts)
        saved = f"{count} of {len(self._keys)} {self._unit} are in {self.path}.part-*"
        option = "--resume" + " in place of --overwrite" * self._overwrite
        return f"{saved}; run the same command with {option} to continue"

    def _open(self, part: Path) -> IO[bytes]:
        """Opens a part for appending; a last line that is incomplete is removed."""
        if not part.exists():
            part.touch(exist_ok=False)  # another run may start the same file
            flush_to_disk(part.resolve().parent)
        else:
            with part.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        return part.open("ab")  # a second run at the same time overwrites nothing

    def _read(self) -> dict[int, Row]:
        """The records of the file and of all parts; the file has priority."""
        assert self.path is not None
        found: dict[int, Row] = {}
        parts = part_paths(self.path)
        if self.path.exists() and not self._overwrite:
            try:
                found = {row["index"]: row for row in self._complete(self.path)}
            except ValueError:
                if not parts:  # else a run that overwrites this file was interrupted
                    raise
        for part in parts:
            for row in self._complete(part):
                found.setdefault(row["index"], row)
        return found

    def _complete(self, path: Path) -> Iterator[Row]:
        """The complete records of a file, checked against their keys."""
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    return
                where = f"{path}:{number}"
                try:
                    row = parse_line(raw.decode(), where, number)
                except ValueError as error:  # also bytes that are not UTF-8
                    raise ValueError(
                        f"{where}: not a record of an earlier run; {_ADVICE}"
                    ) from error
                index = row.get("index")
                if type(index) is not int or index < 0:
                    raise ValueError(f"{where}: not a record of an earlier run; {_ADVICE}")
                if index >= len(self._keys):
                    raise ValueError(
                        f"{where}: more records than the {len(self._keys)} expected; {_ADVICE}"
                    )
                for name, expected in self._keys[index].items():
                    if row.get(name) != expected:
                        raise ValueError(
                            f"{where}: {name} is {json.dumps(row.get(name))}, expected "
                            f"{json.dumps(expected)}: the run that wrote it had other prompts or "
                            f"settings; {_ADVICE}"
                        )
                yield row


def part_paths(path: str | os.PathLike[str]) -> list[Path]:
    """The existing parts of an output file, of any number of processes."""
    whole = Path(path)
    pattern = re.compile(re.escape(whole.name) + r"\.part-\d+-of-\d+")
    return sorted(entry for entry in whole.parent.iterdir() if pattern.fullmatch(entry.name))


def check_output(
    path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> None:
    """Raises what writing an output file would raise; no file is touched.

    Raises:
        FileNotFoundError: Its folder does not exist.
        FileExistsError: It, or a part of it, exists, and neither `resume` nor `overwrite` is set.
        PermissionError: The folder or the file is not writable.
        ValueError: Both are set.
    """
    path = Path(path)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: choose one")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: no such folder {path.parent}, create it first"
        )
    if path.exists() and not path.is_file():
        raise FileExistsError(f"cannot write {path}: it is not a regular file")
    if not (resume or overwrite):
        if path.exists():
            raise FileExistsError(f"{path} exists: choose resume, overwrite, or another file")
        if parts := part_paths(path):
            raise FileExistsError(
                f"{parts[0]} was left by an interrupted run: choose resume, overwrite, or another "
                "file"
            )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission")


def _rows(path: str | os.PathLike[str], limit: int | None, parse: Any) -> list[Row]:
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    rows: list[Row] = []
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}:{number}"
            try:
                text = raw.removeprefix(_BOM if number == 1 else b"").decode().strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8: {error.reason}") from error
            if text:
                rows.append(parse(text, where, number))
            if limit is not None and len(rows) >= limit:
                break
    return rows


def parse_line(text: str, where: str, line: int) -> Row:
    """The row of one line; ValueError, with its place, if it is no JSON object."""
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_number, parse_constant=_number
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{where}: not valid JSON: {reason}") from error
    except (ValueError, RecursionError) as error:  # integers and nesting beyond the parser
        raise ValueError(f"{where}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return Row(value, where, line)


def _object(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is given twice")
    return found


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value
