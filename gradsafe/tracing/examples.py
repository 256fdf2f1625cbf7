"""Training samples and queries: read, encoded, and told apart by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gradsafe._io.records import Row, read_jsonl
from gradsafe.models import Encoded, Encoding, Prompt, context_length, encode, encode_windows
from gradsafe.models.encode import located
from gradsafe.models.encoding import expect_text
from gradsafe.models.inspection import check_token_ids
from gradsafe.models.rows import pair

Id = str | int
Samples = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One sample: its id (or else its number), prompt, response, and place for messages."""

    id: Id
    prompt: Prompt
    response: str
    where: str


class ExampleEncoder:
    """Encodes samples for one model, whose context limits them; errors name the sample."""

    def __init__(self, model: nn.Module, tokenizer: Any, encoding: Encoding) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._cut = encoding.overflow == "window"
        known = [encoding.max_length, context_length(model, tokenizer)]
        longest = min((length for length in known if length is not None), default=None)
        self.encoding = replace(encoding, max_length=longest)
        self._kept: dict[str, list[tuple[array[int], int]]] = {}

    def __call__(self, example: Example) -> list[Encoded]:
        """Token ids of a sample: one item, or its windows."""
        if example.where in self._kept:
            return [Encoded(ids.tolist(), prompt) for ids, prompt in self._kept[example.where]]
        parts = self.tokenizer, example.prompt, example.response, self.encoding
        with located(example.where):
            items = encode_windows(*parts) if self._cut else [encode(*parts)]
        largest = max(max(item.input_ids) for item in items)
        check_token_ids("TraceIndex", self.model, [largest], [example.where])
        return items

    def keep(self, examples: Iterable[Example]) -> None:
        """Encode samples before hours of work; the ids take 4 bytes each until they are used."""
        for example in examples:
            items = self(example)
            kept = [(array("i", item.input_ids), item.prompt_length) for item in items]
            self._kept[example.where] = kept

    def all(self, examples: Iterable[Example]) -> tuple[list[Encoded], list[int]]:
        """Items of many samples, and for each the number of the sample it belongs to."""
        items: list[Encoded] = []
        owners: list[int] = []
        for index, example in enumerate(examples):
            found = self(example)
            self._kept.pop(example.where, None)
            items.extend(found)
            owners.extend([index] * len(found))
        return items, owners


def read_examples(
    source: Samples, name: str = "examples", first: int = 0, taken: Sequence[Id] = ()
) -> list[Example]:
    """Read samples from a JSON Lines file or from rows; errors name the sample.

    `first` is the number of the first sample, which is its id if it has none; `taken` are ids that
    are in use already; `name` is what messages call rows without a place of their own.
    """
    rows = read_jsonl(source) if isinstance(source, (str, os.PathLike)) else source
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise TypeError(
            f"gradsafe.TraceIndex: expected {name} to be a path, a list of dicts or a Dataset, "
            f"got {type(rows).__name__}"
        )
    examples: list[Example] = []
    seen: dict[Id, str] = dict.fromkeys(taken, "the index")
    for index, row in enumerate(rows):
        where = row.where if isinstance(row, Row) else f"{name}[{index}]"
        try:
            example = _example(row, where, first + index)
        except TypeError as error:
            if isinstance(row, Row):  # a wrong value in a file, not a wrong argument
                raise ValueError(str(error)) from error
            raise
        if example.id in seen:
            raise ValueError(
                f"{where}: id {example.id!r} already belongs to {seen[example.id]}; ids must differ"
            )
        seen[example.id] = where
        examples.append(example)
    if not examples:
        raise ValueError(f"gradsafe.TraceIndex: expected at least one sample in {name}, got none")
    return examples


def _example(row: Any, where: str, number: int) -> Example:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected a dict, got {type(row).__name__}")
    name = number if row.get("id") is None else row["id"]
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise TypeError(f"{where}: the field 'id' must be text or an integer, got {name!r}")
    if isinstance(name, str):
        with located(where):
            expect_text("the field 'id'", name)
    return Example(name, *pair(row, where), where)


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of ids, prompts and responses, in order."""
    digest = hashlib.sha256()
    for example in examples:
        values = [example.id, example.prompt, example.response]
        digest.update(json.dumps(values, default=dict).encode() + b"\n")
    return digest.hexdigest()
