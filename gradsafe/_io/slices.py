"""JSON Lines files of any size: read slice by slice, each when it is needed."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from gradsafe._io.records import Row, parse_line

_BOM = b"\xef\xbb\xbf"


class Slices:
    """The rows of a JSON Lines file in slices of `size`; only one slice is in memory at a time.

    Making it reads the whole file once, so that errors are found before long work; about 40 bytes
    are kept per slice.

    Args:
        path: The file; blank lines and a UTF-8 BOM are skipped.
        size: Rows per slice; the last one may be shorter.
        check: Called with every row; raises what is wrong with it.

    Attributes:
        path: The file.
        rows: Number of rows.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file has no rows, or a line is not a JSON object; the message starts with
            `file:line:` and does not quote the line.
    """

    def __init__(
        self, path: str | os.PathLike[str], size: int, check: Callable[[Row], None]
    ) -> None:
        self.path, self.size, self.rows = Path(path), size, 0
        if not self.path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        self._starts, self._lines = array("q"), array("q")
        self._digests: list[bytes] = []
        digest = hashlib.sha256()
        for start, line, raw in self._raw():
            check(self._row(raw, line))
            if self.rows % size == 0:
                self._starts.append(start)
                self._lines.append(line)
                if self.rows:
                    self._digests.append(digest.digest()[:16])
                digest = hashlib.sha256()
            digest.update(raw)
            self.rows += 1
        if not self.rows:
            raise ValueError(f"{path}: no rows")
        self._digests.append(digest.digest()[:16])

    def __len__(self) -> int:
        """Number of slices."""
        return len(self._starts)

    def digest(self, number: int) -> str:
        """What identifies the contents of a slice."""
        return self._digests[number].hex()

    def count(self, number: int) -> int:
        """Number of rows of a slice."""
        return min(self.size, self.rows - number * self.size)

    def read(self, number: int) -> list[Row]:
        """The rows of a slice; ValueError if the file has changed."""
        found = islice(self._raw(self._starts[number], self._lines[number]), self.count(number))
        raws = [(raw, line) for _, line, raw in found]
        self._check(number, [raw for raw, _ in raws])
        return [self._row(raw, line) for raw, line in raws]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of every line that holds a row; ValueError if the file has changed."""
        found = self._raw()
        for number in range(len(self) + 1):  # nothing after the last slice
            part = [(line, raw) for _, line, raw in islice(found, self.size)]
            self._check(number, [raw for _, raw in part])
            yield from part

    def _check(self, number: int, raws: list[bytes]) -> None:
        digest = hashlib.sha256(b"".join(raws)).digest()[:16] if raws else None
        if digest != (self._digests[number] if number < len(self) else None):
            raise ValueError(
                f"{self.path}: the file changed while it was read: start again with --overwrite"
            )

    def _raw(self, start: int = 0, line: int = 1) -> Iterator[tuple[int, int, bytes]]:
        """Offset, number and bytes of the lines with rows from a place on."""
        with self.path.open("rb") as file:
            file.seek(start)
            for number, raw in enumerate(file, start=line):
                begin, start = start, start + len(raw)
                own = raw.removeprefix(_BOM) if number == 1 else raw
                if own.strip():
                    yield begin, number, own

    def _row(self, raw: bytes, line: int) -> Row:
        where = f"{self.path}:{line}"
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8: {error.reason}") from error
        return parse_line(text.strip(), where, line)
