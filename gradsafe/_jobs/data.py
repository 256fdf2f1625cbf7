"""Rows of a job: from a file, or from a data set of the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradsafe._io.records import LABELS, Row, read_rows
from gradsafe.models.encoding import Prompt
from gradsafe.models.rows import pair, prompt_of

HUB = "hf:"  # begins the name of a data set: hf:ID, hf:ID:SPLIT or hf:ID,CONFIG:SPLIT


def read_data(source: str, limit: int | None = None) -> list[Row]:
    """Reads rows.

    Args:
        source: A JSON Lines file, a .txt file with one prompt per line, or `hf:ID[,CONFIG][:SPLIT]`
            for a data set of the Hub (package `datasets`; split "train" unless given).
        limit: Number of rows to read.

    Returns:
        The rows, at least one.

    Raises:
        FileNotFoundError: No such file.
        ValueError: The file is empty or malformed, or there is no such data set.
        ImportError: `datasets` is not installed.
    """
    rows = _from_hub(source, limit) if source.startswith(HUB) else read_rows(source, limit)
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def read_prompts(
    source: str | None, label: str | None = None, limit: int | None = None
) -> list[Row] | None:
    """Reads rows with a prompt each.

    Args:
        source: See `read_data`; None gives None.
        label: The label that rows must have if they have one: "safe" or "unsafe".
        limit: See `read_data`.

    Raises:
        ValueError: As `read_data`, a row has no prompt, or its label contradicts.
    """
    if source is None:
        return None
    rows = read_data(source, limit)
    other = {"safe": "unsafe", "unsafe": "safe"}.get(label or "")
    for row in rows:
        with as_value_error():
            prompt_of(row, row.where)
        if other is not None and row.get("label") in (other, LABELS[other]):
            raise ValueError(f"{row.where}: labelled {other}, expected {label} prompts")
    return rows


def read_pairs(source: str) -> list[Row]:
    """Reads rows with a prompt and a response each; raises as `read_data` and `pair`."""
    rows = read_data(source)
    for row in rows:
        with as_value_error():
            pair(row, row.where)
    return rows


def prompts_of(rows: Sequence[Row] | None) -> list[Prompt]:
    """The prompts of rows; none for None."""
    return [prompt_of(row, row.where) for row in rows or ()]


@contextmanager
def as_value_error() -> Iterator[None]:
    """A value of a wrong type in a file is a ValueError: the file is wrong, not the call."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


@contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place of a row before the message of a ValueError or TypeError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def refuse_inputs(option: str, path: str, inputs: Sequence[str | None]) -> None:
    """Raises ValueError if an output file is one of the input files."""
    if Path(path).resolve() in {Path(other).resolve() for other in inputs if other}:
        raise ValueError(f"{option} {path} is one of the input files: choose another name")


def _from_hub(source: str, limit: int | None) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{source} needs datasets ({error}): pip install datasets") from error
    name, _, split = source.removeprefix(HUB).partition(":")
    identifier, _, config = name.partition(",")
    try:
        data = datasets.load_dataset(identifier, config or None, split=split or "train")
    except Exception as error:  # datasets raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source}: no such data set in the local cache or on the Hub ({reason}); offline, "
            "download it before, or give a JSON Lines file"
        ) from error
    chosen = data if limit is None else data.select(range(min(limit, len(data))))
    read = ("prompt", "response", "completion", "messages", "label", "id", "source_id")
    names = [name for name in chosen.column_names if name in read]
    if not {"prompt", "messages"} & set(names):
        raise ValueError(
            f"{source}: expected a column 'prompt' or 'messages', got {chosen.column_names}"
        )
    chosen = chosen.select_columns(names)
    return [Row(row, f"{source}[{index}]", index + 1) for index, row in enumerate(chosen)]
