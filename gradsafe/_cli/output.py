"""Where the records of `gradsafe detect` go: standard output, a file, or parts of a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gradsafe._io.parts import PartWriter, merge, part_paths, read_found, remove_parts
from gradsafe._io.processes import Processes
from gradsafe._io.records import JsonlWriter, to_line

Record = Mapping[str, Any]


class Output(Protocol):
    """Takes records, and hands back all of them in input order."""

    def found(self) -> set[int]:
        """Indices of the records of an earlier run."""

    def begin(self) -> None:
        """Called by each process before any of them writes."""

    def write(self, index: int, fields: Record) -> None:
        """Takes a record; one that is there already may be left as it is."""

    def saved(self) -> str:
        """Says what a run that resumes will find; empty if it finds nothing."""

    def finish(self) -> Sequence[Record]:
        """Returns all records, called by the first process when all have written theirs."""

    def close(self) -> None:
        """Closes this process's file."""


class StandardOutput:
    """Prints records."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def found(self) -> set[int]:
        """Nothing: what was printed is gone."""
        return set()

    def begin(self) -> None:
        """Nothing to prepare."""

    def write(self, index: int, fields: Record) -> None:
        """Prints one record at once."""
        print(to_line({"index": index, **fields}), end="", flush=True)
        self._records.append(fields)

    def saved(self) -> str:
        """Nothing."""
        return ""

    def finish(self) -> Sequence[Record]:
        """Returns what was printed."""
        return self._records

    def close(self) -> None:
        """Does nothing: the stream belongs to the process."""


class WholeFile:
    """Appends records in input order, as a process alone does."""

    def __init__(self, args: argparse.Namespace, keys: Sequence[Record]) -> None:
        self._writer = JsonlWriter(args.output, keys, resume=args.resume, overwrite=args.overwrite)
        self._records: list[Record] = list(self._writer.existing)
        self._expected = len(keys)
        self._overwrite = args.overwrite

    def found(self) -> set[int]:
        """The first ones."""
        return set(range(len(self._records)))

    def begin(self) -> None:
        """Removes the parts of a run that is being overwritten, lest a later one use them."""
        if self._overwrite:
            remove_parts(self._writer.path)

    def write(self, index: int, fields: Record) -> None:
        """Appends a record that is not there yet."""
        if index == len(self._records):
            self._writer.write(fields)
            self._records.append(fields)

    def saved(self) -> str:
        """Counts the records."""
        count = len(self._writer)
        return f"{count} of {self._expected} scores are in {self._writer.path}" if count else ""

    def finish(self) -> Sequence[Record]:
        """Returns found and written ones."""
        return self._records

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


class Parts:
    """Appends records to this process's part of the file; in the end the parts are merged."""

    def __init__(
        self, args: argparse.Namespace, keys: Sequence[Record], processes: Processes
    ) -> None:
        self._path = args.output
        self._keys = keys
        self._resume = args.resume
        self._overwrite = args.overwrite
        self._first = processes.first
        self._writer = PartWriter(args.output, keys, processes.rank, processes.count)

    def found(self) -> set[int]:
        """Those in the file and in all parts."""
        return set(read_found(self._path, self._keys)) if self._resume else set()

    def begin(self) -> None:
        """Removes a file that is being overwritten, with its parts: they would be merged."""
        if self._first and self._overwrite:
            Path(self._path).unlink(missing_ok=True)
            remove_parts(self._path)

    def write(self, index: int, fields: Record) -> None:
        """Appends a record."""
        self._writer.write(index, fields)

    def saved(self) -> str:
        """Names the parts."""
        return f"the scores so far are in {self._path}.part-*" if part_paths(self._path) else ""

    def finish(self) -> Sequence[Record]:
        """Merges the parts."""
        return merge(self._path, self._keys)

    def close(self) -> None:
        """Closes the part."""
        self._writer.close()


def open_output(
    args: argparse.Namespace, keys: Sequence[Record], processes: Processes
) -> StandardOutput | WholeFile | Parts:
    """Chooses by the options: a process alone writes parts only where it goes on with parts."""
    if not args.output:
        return StandardOutput()
    if processes.count > 1 or (args.resume and part_paths(args.output)):
        return Parts(args, keys, processes)
    return WholeFile(args, keys)
