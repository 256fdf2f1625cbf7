"""Prompts in and scores out: JSON Lines with errors that name the line, and output that resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LABELS = {"safe": 0, "unsafe": 1}
_BOM = b"\xef\xbb\xbf"


class Row(dict[str, Any]):
    """One record of a file, which remembers its line for later error messages.

    Attributes:
        line: Line number in the file, from 1.
    """

    line: int

    def __init__(self, fields: Mapping[str, Any], line: int) -> None:
        super().__init__(fields)
        self.line = line


def read_jsonl(
    path: str | os.PathLike[str],
    required: Sequence[str] = ("prompt",),
    limit: int | None = None,
) -> list[Row]:
    """Reads a JSON Lines file: one object per line, blank lines skipped, a UTF-8 BOM tolerated.

    Args:
        path: The file.
        required: Fields that every record must have, as text that is not empty.
        limit: Stop after so many records; the lines behind them are not looked at.

    Returns:
        The records, each with its line number.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line is not a JSON object or lacks a required field; the message starts with
            `file:line:` and never quotes the line itself.
    """
    rows: list[Row] = []
    for number, text in _lines(path, limit):
        rows.append(_parse(text, f"{path}:{number}", number, required))
        if limit is not None and len(rows) >= limit:
            break
    return rows


def read_rows(path: str | os.PathLike[str], limit: int | None = None) -> list[Row]:
    """Reads records with a prompt from a JSON Lines file, or from a .txt file, one per line."""
    if Path(path).suffix.lower() != ".txt":
        return read_jsonl(path, limit=limit)
    rows: list[Row] = []
    for number, text in _lines(path, limit):
        rows.append(Row({"prompt": text}, number))
        if limit is not None and len(rows) >= limit:
            break
    return rows


def read_prompts(path: str | os.PathLike[str], limit: int | None = None) -> list[str]:
    """Reads only the prompts of `read_rows`."""
    return [row["prompt"] for row in read_rows(path, limit)]


def labels_of(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> list[int] | None:
    """Reads the field `label` of every record.

    Args:
        rows: Records of `read_jsonl`.
        path: Their file, for messages.

    Returns:
        1 for unsafe and 0 for safe, in order; None if no record has a label (null counts as none).

    Raises:
        ValueError: A label is not one of `"safe"`, `"unsafe"`, 0, 1, false, true, or only some
            records have one.
    """
    values = [row.get("label") for row in rows]
    if all(value is None for value in values):
        return None
    labels = []
    for index, value in enumerate(values):
        where = f"{path}:{getattr(rows[index], 'line', index + 1)}"
        if value is None:
            raise ValueError(f"{where}: no label, though other records have one: label all or none")
        if isinstance(value, str) and value in LABELS:
            labels.append(LABELS[value])
        elif isinstance(value, (bool, int)) and value in (0, 1):
            labels.append(int(value))
        else:
            shown = json.dumps(value)[:40]
            raise ValueError(
                f'{where}: label {shown} is not one of "safe", "unsafe", 0, 1, false, true'
            )
    return labels


def record_key(index: int, prompt: str, **settings: str) -> dict[str, Any]:
    """Builds what identifies an output record: its place, the hash of its prompt, the settings."""
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    return {"index": index, "prompt_sha256": digest, **settings}


class JsonlWriter:
    """Appends one JSON record per line to a file that a killed run can be resumed from.

    Every record starts with its key. When resuming, the records that are already there must carry
    the first keys, in order; a last line that was cut off half-way is removed. A new file appears,
    and an overwritten one goes, with the first record and not before.

    Attributes:
        existing: The records found when resuming.

    Args:
        path: The file; its folder must exist.
        keys: One key per record that the finished file will hold, see `record_key`.
        resume: Continue an existing file; a missing one is started.
        overwrite: Replace an existing file.

    Raises:
        FileNotFoundError: The folder does not exist.
        FileExistsError: The file exists and neither `resume` nor `overwrite` is set.
        PermissionError: The folder or the file is not writable.
        ValueError: The existing records were not written for these keys; the file stays as it is.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keys: Sequence[Mapping[str, Any]],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        check_output(path, resume=resume, overwrite=overwrite)
        self.path = Path(path)
        self.existing: list[dict[str, Any]] = []
        self._keys = keys
        self._mode = "wb" if overwrite else "xb"  # x: another run may start the same file
        self._file: IO[bytes] | None = None
        if resume and self.path.exists():
            intact = 0
            for _, record, line in output_records(self.path, keys):
                self.existing.append(record)
                intact += len(line)
            self._file = self.path.open("r+b")
            self._file.truncate(intact)
            self._file.seek(intact)
        self._written = len(self.existing)

    def __len__(self) -> int:
        """Counts the records, those found and those written."""
        return self._written

    def write(self, fields: Mapping[str, Any]) -> None:
        """Appends the next record: its key and `fields`; it is in the file on return."""
        line = to_line({**self._keys[self._written], **fields})
        if self._file is None:
            self._file = self.path.open(self._mode)
        self._file.write(line.encode())
        self._file.flush()
        self._written += 1

    def close(self) -> None:
        """Forces the file to disk and closes it; closing twice is harmless."""
        if self._file is not None and not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_output(
    path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False
) -> None:
    """Raises what `JsonlWriter` would raise about `path`, without touching any file."""
    path = Path(path)
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other: choose one")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {path}: no such folder {path.parent}, create it first"
        )
    if path.exists() and not path.is_file():
        raise FileExistsError(f"cannot write {path}: it is not a regular file")
    if path.exists() and not (resume or overwrite):
        raise FileExistsError(f"{path} exists: choose resume, overwrite, or another file")
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise PermissionError(f"cannot write {path}: no permission")


def to_line(record: Mapping[str, Any]) -> str:
    """Renders a record as one line of strict JSON in ASCII; NaN and Inf raise ValueError."""
    return json.dumps(record, allow_nan=False) + "\n"


def _lines(path: str | os.PathLike[str], limit: int | None) -> Iterator[tuple[int, str]]:
    """Yields number and text of the lines that are not blank."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if number == 1:
                raw = raw.removeprefix(_BOM)
            try:
                text = raw.decode().strip()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not UTF-8: {error.reason}") from error
            if text:
                yield number, text


def _parse(text: str, where: str, number: int, required: Sequence[str]) -> Row:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{where}: not valid JSON: {reason}") from error
    except (ValueError, RecursionError) as error:  # integers and nesting beyond the parser
        raise ValueError(f"{where}: not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    for name in required:
        if name not in value:
            raise ValueError(f"{where}: the field {name!r} is missing")
        if not isinstance(value[name], str):
            found = type(value[name]).__name__
            raise ValueError(f"{where}: the field {name!r} must be text, got {found}")
        if not value[name]:
            raise ValueError(f"{where}: the field {name!r} is empty")
        try:
            value[name].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: the field {name!r} holds half a surrogate pair") from error
    return Row(value, number)


def output_records(
    path: Path, keys: Sequence[Mapping[str, Any]], *, in_order: bool = True
) -> Iterator[tuple[int, Row, bytes]]:
    """Yields index, record and line of the complete records of an output file.

    Args:
        path: The file; a last line that was cut off is left out.
        keys: One key per record of the finished output.
        in_order: The first record has the first key and so on; else each has that of its index.

    Raises:
        ValueError: A record was not written for these keys.
    """
    advice = "it cannot be resumed: choose overwrite or another file"
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                break
            where = f"{path}:{number}"
            try:
                record = _parse(raw.decode(), where, number, ())
            except ValueError as error:  # undecodable bytes too
                raise ValueError(f"{where}: not a record of an earlier run; {advice}") from error
            index = number - 1 if in_order else record.get("index")
            if type(index) is not int or index < 0:
                raise ValueError(f"{where}: not a record of an earlier run; {advice}")
            if index >= len(keys):
                raise ValueError(f"{where}: more records than the {len(keys)} expected; {advice}")
            for name, expected in keys[index].items():
                if record.get(name) != expected:
                    raise ValueError(
                        f"{where}: {name} is {json.dumps(record.get(name))}, expected "
                        f"{json.dumps(expected)}: the run that wrote it had other prompts or "
                        f"settings; {advice}"
                    )
            yield index, record, raw
