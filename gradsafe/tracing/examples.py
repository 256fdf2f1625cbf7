"""Training samples and queries: read, encoded, and told apart by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsafe._io.records import Prompt, Row, pair, read_jsonl
from gradsafe.models import (
    ContextOverflowError,
    Encoded,
    context_length,
    encode,
    encode_windows,
)
from gradsafe.tracing.config import Encoding

Id = str | int
Samples = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        id: Its id; its number among the samples if it has none.
        prompt: User text or conversation.
        response: The response that was trained on or observed.
        where: Its place in the source, for messages.
    """

    id: Id
    prompt: Prompt
    response: str
    where: str


class ExampleEncoder:
    """Encodes samples for one model; errors name the sample.

    Args:
        model: Its context length limits samples where the options do not.
        tokenizer: A transformers tokenizer.
        encoding: The options.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer = tokenizer
        known = [encoding.max_length, context_length(model, tokenizer)]
        self._options: dict[str, Any] = {
            "template": encoding.template,
            "system": encoding.system,
            "append_eos": encoding.append_eos,
            "max_length": min((n for n in known if n is not None), default=None),
        }
        windows = encoding.overflow == "window" and self._options["max_length"] is not None
        self._encode = encode_windows if windows else encode
        self._known: dict[str, list[tuple[array[int], int]]] = {}

    def __call__(self, example: Example) -> list[Encoded]:
        """Token ids of a sample: one item, or its windows.

        Raises:
            ValueError: No template, no token, or (as ContextOverflowError) too many.
        """
        if example.where in self._known:
            return [Encoded(ids.tolist(), prompt) for ids, prompt in self._known[example.where]]
        try:
            found = self._encode(
                self.tokenizer,
                example.prompt,  # type: ignore[arg-type]
                example.response,
                **self._options,
            )
        except ContextOverflowError as error:
            raise ContextOverflowError(f"{example.where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error
        return [found] if isinstance(found, Encoded) else found

    def check(self, examples: Iterable[Example]) -> None:
        """Encode samples now; their token ids are kept for the first use, 4 bytes each.

        Raises:
            ValueError: As `__call__`.
        """
        for example in examples:
            items = self(example)
            kept = [(array("i", item.input_ids), item.prompt_length) for item in items]
            self._known[example.where] = kept

    def all(self, examples: Iterable[Example]) -> tuple[list[Encoded], list[int]]:
        """Items of many samples, and for each the number of the sample it belongs to."""
        items: list[Encoded] = []
        owners: list[int] = []
        for index, example in enumerate(examples):
            found = self(example)
            self._known.pop(example.where, None)
            items.extend(found)
            owners.extend([index] * len(found))
        return items, owners


def read_examples(
    source: Samples,
    name: str = "examples",
    first: int = 0,
    taken: Sequence[Id] = (),
) -> list[Example]:
    """Read samples.

    Args:
        source: A JSON Lines file, or rows (a list of dicts, a `datasets.Dataset`) in one of the
            formats of `gradsafe._io.records.pair`, optionally with an id.
        name: What messages call the source.
        first: Number of the first sample, used as its id if it has none.
        taken: Ids that are in use already.

    Returns:
        The samples, at least one.

    Raises:
        FileNotFoundError: No such file.
        TypeError: The source or a sample is of the wrong type.
        ValueError: No sample, a prompt or response that is missing or empty, a line of a file with
            a value of the wrong type, or an id that occurs twice; the message names the sample.
    """
    if isinstance(source, (str, os.PathLike)):
        name, source = str(source), read_jsonl(source)
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"gradsafe.TraceIndex: expected {name} to be a path, a list of dicts or a Dataset, "
            f"got {type(source).__name__}"
        )
    examples: list[Example] = []
    seen: dict[Id, str] = dict.fromkeys(taken, "the index")
    for index, row in enumerate(source):
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


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of ids, prompts and responses, in order."""
    digest = hashlib.sha256()
    for example in examples:
        values = [example.id, example.prompt, example.response]
        digest.update(json.dumps(values, default=dict).encode() + b"\n")
    return digest.hexdigest()


def _example(row: Any, where: str, number: int) -> Example:
    if not isinstance(row, Mapping):
        raise TypeError(f"{where}: expected a dict, got {type(row).__name__}")
    given = number if row.get("id") is None else row["id"]
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise TypeError(f"{where}: the field 'id' must be text or an integer, got {given!r}")
    return Example(given, *pair(row, where), where)
