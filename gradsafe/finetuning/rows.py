"""Training rows: prompt and response to ids and labels, and batches of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gradsafe.models import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of what is not predicted, as everywhere in transformers

Row = dict[str, list[int]]


def encode_rows(
    name: str,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    template: str | None = None,
    system: str | None = None,
    append_eos: bool = True,
    max_length: int | None = None,
    progress: bool = True,
) -> list[Row]:
    """Encodes rows with a prompt and a response; tokenised rows are checked and kept.

    Args:
        name: What the rows are, for messages.
        rows: Anything with a length and rows: mappings with the text fields `prompt` and
            `response`, or with `input_ids` and `labels` of one length, -100 outside the response.
        tokenizer: For rows of text.
        template: As in `gradsafe.models.encode`.
        system: As in `gradsafe.models.encode`.
        append_eos: As in `gradsafe.models.encode`.
        max_length: Longest row allowed, in tokens.
        progress: Show a progress bar on a terminal.

    Returns:
        `input_ids` and `labels` of every row.

    Raises:
        ValueError: No rows, or one without response tokens, too long, or with other fields; the
            message names the row and never quotes it.
        TypeError: A prompt or response is not text.
    """
    from tqdm import tqdm

    if not len(rows):
        raise ValueError(f"gradsafe.SafeGradTrainer: {name} is empty")
    options = {"template": template, "system": system, "append_eos": append_eos}
    hidden = None if progress else True  # None: hidden where stderr is no terminal
    encoded = []
    for index in tqdm(range(len(rows)), desc=f"encoding {name}", disable=hidden, leave=False):
        given = rows[index]
        line = getattr(given, "line", None)
        where = f"{name}[{index}]" + ("" if line is None else f" (line {line})")
        row = _encode(where, given, tokenizer, options)
        if not response_tokens(row):
            raise ValueError(
                f"gradsafe.SafeGradTrainer: {where} has no response token: every label after the "
                "first position is -100"
            )
        if max_length is not None and len(row["input_ids"]) > max_length:
            raise ValueError(
                f"gradsafe.SafeGradTrainer: {where} has {len(row['input_ids'])} tokens, "
                f"max_length is {max_length}; shorten or drop it, rows are never cut silently"
            )
        encoded.append(row)
    return encoded


def has_text(rows: Any) -> bool:
    """Whether rows can be counted and hold a prompt, so that they must be encoded."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or not len(rows):
        return False
    return isinstance(rows[0], Mapping) and "prompt" in rows[0]


def response_tokens(row: Mapping[str, Any]) -> int:
    """Tokens of a row that are predicted; nothing predicts the first."""
    return sum(label != IGNORED for label in row["labels"][1:])


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of encoded rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


class RowCollator:
    """Pads rows on the right to `input_ids`, `attention_mask` and `labels`, each `[B, T]` int64.

    Args:
        pad_id: Token id of the padding; it is masked.
    """

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]], columns: int = 0) -> dict[str, Tensor]:
        """Collates rows to the longest of them, or to `columns` if that is more.

        Raises:
            ValueError: A row has no `input_ids` or `labels`.
        """
        for row in rows:
            missing = {"input_ids", "labels"} - set(row)
            if missing:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: a row of the batch has no {min(missing)}, only "
                    f"{sorted(row)}; give rows with prompt and response, or with input_ids and "
                    "labels, or your own data_collator"
                )
        width = max(columns, *(len(row["input_ids"]) for row in rows))
        fill: dict[str, int] = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {
            key: torch.full((len(rows), width), value, dtype=torch.int64)
            for key, value in fill.items()
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["attention_mask"][index, :length] = 1
            for key in fill:
                if key in row:
                    batch[key][index, :length] = torch.as_tensor(row[key])
        return batch


def _encode(
    where: str,
    row: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    options: Mapping[str, Any],
) -> Row:
    fields = set(row) if isinstance(row, Mapping) else set()
    if {"input_ids", "labels"} <= fields:
        ids, labels = (_integers(row[key]) for key in ("input_ids", "labels"))
        if len(ids) != len(labels):
            raise ValueError(
                f"gradsafe.SafeGradTrainer: expected {where} to have one label for each of "
                f"{len(ids)} input_ids, got {len(labels)}"
            )
        return {"input_ids": ids, "labels": labels}
    if not {"prompt", "response"} <= fields:
        raise ValueError(
            f"gradsafe.SafeGradTrainer: expected {where} to have prompt and response, or input_ids "
            f"and labels, got {sorted(fields) or type(row).__name__}"
        )
    if tokenizer is None:
        raise ValueError(
            f"gradsafe.SafeGradTrainer: {where} is text: pass processing_class=tokenizer"
        )
    try:
        encoded = encode(tokenizer, row["prompt"], row["response"], **options)
    except (ValueError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"gradsafe.SafeGradTrainer: {where}: {error}") from error
    return {
        "input_ids": encoded.input_ids,
        "labels": [IGNORED] * encoded.prompt_length + encoded.input_ids[encoded.prompt_length :],
    }


def _integers(values: Any) -> list[int]:
    return values.tolist() if hasattr(values, "tolist") else [int(value) for value in values]
