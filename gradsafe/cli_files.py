"""The files of `gradsafe detect`: what they say, and whether the results can be written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from gradsafe.jsonl import LABELS, Row, check_output, labels_of, read_rows
from gradsafe.jsonl_parts import check_parts


@dataclass(frozen=True)
class Inputs:
    """Everything that the files of the command line say."""

    rows: list[Row]
    labels: list[int] | None
    unsafe: list[Row] | None
    safe: list[Row] | None
    benign: list[Row] | None


def read_inputs(args: argparse.Namespace) -> Inputs:
    """Reads every input file that the options name.

    Raises:
        FileNotFoundError: One does not exist.
        ValueError: One is empty or malformed, or labels contradict what the file is meant for.
    """
    rows = _rows(args.prompts, args.limit)
    return Inputs(
        rows,
        labels_of(rows, args.prompts),
        _only(args.unsafe, "unsafe", contrary="safe"),
        _only(args.safe, "safe", contrary="unsafe"),
        _only(args.calibrate, "harmless", contrary="unsafe"),
    )


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


def check_destinations(args: argparse.Namespace) -> None:
    """Refuses now what would only fail after the long work; touches no file.

    Raises:
        OSError: A destination exists, or its folder does not.
        ValueError: The output is one of the inputs, or `--detector` is no gradsafe folder.
    """
    if args.output:
        inputs = (args.prompts, args.unsafe, args.safe, args.calibrate)
        if Path(args.output).resolve() in {Path(path).resolve() for path in inputs if path}:
            raise ValueError(f"-o {args.output} is one of the input files: choose another name")
        check_output(args.output, resume=args.resume, overwrite=args.overwrite)
        check_parts(args.output, resume=args.resume, overwrite=args.overwrite)
    if args.detector or args.save_detector:
        from gradsafe.storage import check_destination, read_manifest

        if args.detector:
            read_manifest(args.detector)
        if args.save_detector:
            check_destination(args.save_detector, "detector")
