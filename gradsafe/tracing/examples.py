"""Training samples and queries: pairs of prompt and response, each with an id of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from gradsafe._io.records import read_jsonl
from gradsafe.models import (
    ContextOverflowError,
    Encoded,
    context_length,
    encode,
    encode_windows,
)

Id = str | int
Samples = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
FIELDS = ("prompt", "response")


@dataclass(frozen=True)
class Example:
    """One sample.

    Attributes:
        id: Its name; the number of the sample where it brought none.
        prompt: User text.
        response: The response that was trained on, or that was observed.
        where: Its place in the source, for messages.
    """

    id: Id
    prompt: str
    response: str
    where: str


@dataclass(frozen=True)
class Encoding:
    """How samples become token ids; saved with an index, so that queries are encoded alike.

    Attributes:
        template: See `gradsafe.models.encode`.
        system: See `gradsafe.models.encode`.
        append_eos: Close responses with EOS; the published procedure does not.
        overflow: Samples beyond `max_length`: "error", or "window" for overlapping windows of the
            prompt, of which the most similar one counts. Nothing is ever truncated.
        max_length: Tokens of prompt and response together; None for the model's context.
    """

    template: str | None = None
    system: str | None = None
    append_eos: bool = False
    overflow: Literal["error", "window"] = "error"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.overflow not in ("error", "window"):
            raise ValueError(
                f'gradsafe.TraceIndex: expected overflow="error" or "window", got {self.overflow!r}'
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `Encoding(**values)` restores the record."""
        return asdict(self)


class ExampleEncoder:
    """Encodes samples for one model; errors name the sample.

    Args:
        model: Its context bounds the length where the options do not.
        tokenizer: A transformers tokenizer.
        encoding: The options.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        known = [encoding.max_length, context_length(model, tokenizer)]
        self.max_length = min((n for n in known if n is not None), default=None)

    def __call__(self, example: Example) -> list[Encoded]:
        """Token ids of a sample: one item, or its windows.

        Raises:
            ValueError: No template, no token, or (as ContextOverflowError) too many.
        """
        options = self.encoding
        shared: dict[str, Any] = {
            "template": options.template,
            "system": options.system,
            "append_eos": options.append_eos,
            "max_length": self.max_length,
        }
        try:
            if options.overflow == "window" and self.max_length is not None:
                return encode_windows(self.tokenizer, example.prompt, example.response, **shared)
            return [encode(self.tokenizer, example.prompt, example.response, **shared)]
        except ContextOverflowError as error:
            raise ContextOverflowError(f"{example.where}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from error

    def all(self, examples: Iterable[Example]) -> tuple[list[Encoded], list[int]]:
        """Items of many samples, and for each the number of the sample it belongs to."""
        items: list[Encoded] = []
        owners: list[int] = []
        for index, example in enumerate(examples):
            found = self(example)
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
        source: A JSON Lines file, or dicts (a list, a `datasets.Dataset`) with prompt, response
            and optionally id.
        name: What to call them in messages.
        first: Number of the first sample, the id of one that brings none.
        taken: Ids that are in use already.

    Returns:
        The samples, at least one.

    Raises:
        FileNotFoundError: No such file.
        TypeError: The source or a sample is of the wrong type.
        ValueError: No sample, a prompt or response that is missing or empty, a line of a file whose
            id is neither text nor integer, or an id that occurs twice; the message names the
            sample.
    """
    # What a file holds is a value; its type is the caller's only where the caller made the dicts.
    wrong_type = ValueError if isinstance(source, (str, os.PathLike)) else TypeError
    examples: list[Example] = []
    seen: dict[Id, str] = dict.fromkeys(taken, "the index")
    for where, row in _rows(source, name):
        given = row.get("id")
        if given is None:
            given = first + len(examples)
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise wrong_type(f"{where}: the field 'id' must be text or an integer, got {given!r}")
        if given in seen:
            raise ValueError(f"{where}: id {given!r} is taken by {seen[given]}; ids must differ")
        seen[given] = where
        examples.append(Example(given, row["prompt"], row["response"], where))
    if not examples:
        raise ValueError(f"gradsafe.TraceIndex: expected at least one sample in {name}, got none")
    return examples


def examples_fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 of ids, prompts and responses, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.prompt, example.response]).encode() + b"\n")
    return digest.hexdigest()


def _rows(source: Samples, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(source, (str, os.PathLike)):
        for line in read_jsonl(source, FIELDS):
            yield f"{source}:{line.line}", line
        return
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise TypeError(
            f"gradsafe.TraceIndex: expected {name} to be a path, a list of dicts or a Dataset, "
            f"got {type(source).__name__}"
        )
    for index, row in enumerate(source):
        where = f"{name}[{index}]"
        if not isinstance(row, Mapping):
            raise TypeError(f"{where}: expected a dict, got {type(row).__name__}")
        for field in FIELDS:
            if field not in row or row[field] is None:
                raise ValueError(f"{where}: the field {field!r} is missing")
            if not isinstance(row[field], str):
                found = type(row[field]).__name__
                raise TypeError(f"{where}: the field {field!r} must be text, got {found}")
            if not row[field]:
                raise ValueError(f"{where}: the field {field!r} is empty")
        yield where, row
