"""Rows that a screener is made from must not be among the rows that it screens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gradsafe.models.rows import pair


def row_digest(row: Mapping[str, Any], where: str) -> bytes:
    """16 bytes that identify prompt and response of a row, in whatever format it has.

    Raises:
        TypeError, ValueError: As `pair`.
    """
    prompt, response = pair(row, where)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = json.dumps([turns, response], sort_keys=True, default=dict)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()


class Known:
    """The rows that a screener is made from, by name of their group."""

    def __init__(self, **groups: Sequence[Mapping[str, Any]] | None) -> None:
        self._places: dict[bytes, str] = {}
        for name, rows in groups.items():
            for index, row in enumerate(rows or ()):
                where = getattr(row, "where", None) or f"{name}[{index}]"
                self._places.setdefault(row_digest(row, where), f"the {name} row {where}")

    def check(self, digest: bytes, where: str) -> None:
        """Raise ValueError if a row to be screened is one of them."""
        if digest in self._places:
            raise ValueError(
                f"{where}: this row is also {self._places[digest]}: its score would say nothing; "
                "remove it from one of the two"
            )

    def checked(
        self, rows: Iterable[Mapping[str, Any]], name: str = "rows"
    ) -> Iterator[Mapping[str, Any]]:
        """Hand on rows one by one; raise ValueError at one of them."""
        for index, row in enumerate(rows):
            where = getattr(row, "where", None) or f"{name}[{index}]"
            if isinstance(row, Mapping):
                self.check(row_digest(row, where), where)
            yield row
