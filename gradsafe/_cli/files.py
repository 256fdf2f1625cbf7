"""The files of a command: what they say, and whether the results can be written."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradsafe._io.parts import check_parts
from gradsafe._io.records import LABELS, Row, check_output, labels_of, read_rows


@dataclass(frozen=True)
class References:
    """What the files say that a detector is fitted and calibrated with."""

    unsafe: list[Row] | None
    safe: list[Row] | None
    benign: list[Row] | None
    harmful: list[Row] | None


@dataclass(frozen=True)
class Inputs(References):
    """Everything that the files of `gradsafe detect` say."""

    rows: list[Row]
    labels: list[int] | None


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Reads every input file that the options name.

    Raises:
        FileNotFoundError: One does not exist.
        ValueError: One is empty or malformed, or labels contradict what the file is meant for.
    """
    rows = _rows(args.prompts, args.limit)
    references = read_references(args)
    return Inputs(
        references.unsafe,
        references.safe,
        references.benign,
        references.harmful,
        rows,
        labels_of(rows, args.prompts),
    )


def reference_files(args: argparse.Namespace) -> tuple[str | None, ...]:
    """Paths of the files behind `References`, in the order of its fields."""
    return args.unsafe, args.safe, args.calibrate, args.calibrate_unsafe


def read_references(args: argparse.Namespace) -> References:
    """Reads the reference and calibration prompts; raises like `read_inputs`."""
    return References(
        _only(args.unsafe, "unsafe", contrary="safe"),
        _only(args.safe, "safe", contrary="unsafe"),
        _only(args.calibrate, "harmless", contrary="unsafe"),
        _only(args.calibrate_unsafe, "unsafe", contrary="safe"),
    )


def read_line(path: str, line: int) -> Row:
    """Reads the prompt that stands in one line of a file, counted from 1.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is malformed, or the line is blank or beyond its end.
    """
    for row in _rows(path):
        if row.line == line:
            return row
    raise ValueError(f"{path}:{line}: no prompt in this line")


def _rows(path: str, limit: int | None = None) -> list[Row]:
    rows = read_rows(path, limit)
    if not rows:
        raise ValueError(f"{path}: no prompts in this file")
    return rows


def _only(path: str | None, expected: str, contrary: str) -> list[Row] | None:
    """Reads prompts of one kind; a label, where a record has one, must not say the contrary."""
    if path is None:
        return None
    rows = _rows(path)
    refused = (contrary, LABELS[contrary])
    for row in rows:
        if row.get("label") in refused:
            raise ValueError(f"{path}:{row.line}: labelled {contrary}, expected {expected} prompts")
    return rows


def texts(rows: list[Row] | None) -> list[str] | None:
    """Returns the prompts of records."""
    return None if rows is None else [row["prompt"] for row in rows]


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place of a prompt before the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def check_destinations(args: argparse.Namespace) -> None:
    """Refuses now what would only fail after the long work; touches no file.

    Raises:
        OSError: A destination exists, or its folder does not.
        ValueError: The output is one of the inputs, or `--detector` is no gradsafe folder.
    """
    if args.output:
        inputs = (args.prompts, *reference_files(args))
        _refuse_inputs("-o", args.output, inputs)
        check_output(args.output, resume=args.resume, overwrite=args.overwrite)
        check_parts(args.output, resume=args.resume, overwrite=args.overwrite)
    check_saved_detector(args.detector)
    if args.save_detector:
        from gradsafe._io.artifacts import check_destination

        check_destination(args.save_detector, "detector")


def check_new_file(option: str, path: str, inputs: Sequence[str | None], overwrite: bool) -> None:
    """Refuses now what `write_text` should not or cannot write; touches no file.

    Raises:
        OSError: The file exists and may not be replaced, or its folder does not exist.
        ValueError: It is one of the inputs.
    """
    _refuse_inputs(option, path, inputs)
    if Path(path).is_file() and not overwrite:
        raise FileExistsError(f"{option} {path} exists: give --overwrite or another file")
    check_output(path, overwrite=True)


def check_saved_detector(path: str | None) -> None:
    """Raises ValueError if `--detector` names no gradsafe folder."""
    if path:
        from gradsafe._io.artifacts import read_manifest

        read_manifest(path)


def _refuse_inputs(option: str, path: str, inputs: Sequence[str | None]) -> None:
    if Path(path).resolve() in {Path(other).resolve() for other in inputs if other}:
        raise ValueError(f"{option} {path} is one of the input files: choose another name")


def write_text(path: str, text: str) -> None:
    """Writes a UTF-8 file so that its name never stands for half of it."""
    target = Path(path).resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
