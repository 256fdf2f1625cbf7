"""Training rows: token ids and labels of prompt and response, their order, and batches."""

from __future__ import annotations

import hashlib
import json
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gradsafe._checks import fits, refuse
from gradsafe.finetuning.config import SafeGradConfig
from gradsafe.models import context_length, encode, pad_token_id
from gradsafe.models.encode import located
from gradsafe.models.inspection import input_vocabulary
from gradsafe.models.rows import pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # label of positions that are not predicted, as in transformers

Row = dict[str, list[int]]


def encode_rows(
    name: str,
    rows: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    options: SafeGradConfig | None = None,
    model: nn.Module | None = None,
    progress: bool = True,
) -> list[Row]:
    """Encodes rows in the formats of TRL to `input_ids` and `labels`; keeps tokenised rows.

    Without `max_length`, rows may have as many tokens as `model` can read. Errors name the row with
    `name` and its index, and do not quote it.
    """
    if not len(rows):
        raise ValueError(f"gradsafe.SafeGradTrainer: {name} is empty")
    options = options or SafeGradConfig()
    max_length = options.max_length
    if max_length is None and model is not None and tokenizer is not None:
        max_length = context_length(model, tokenizer)
    limits = token_limits(model)
    hidden = None if progress else True  # None: hidden if stderr is not a terminal
    encoded = []
    for index in tqdm(range(len(rows)), desc=f"encoding {name}", disable=hidden, leave=False):
        given = rows[index]
        where = f"gradsafe.SafeGradTrainer: {name}[{index}]"
        if hasattr(given, "where"):  # file and line
            where += f" ({given.where})"
        row = _encode(where, given, tokenizer, options)
        if not response_tokens(row):
            raise ValueError(
                f"{where} has no response token: every label after the first position is -100"
            )
        if max_length is not None and len(row["input_ids"]) > max_length:
            raise ValueError(
                f"{where} has {len(row['input_ids'])} tokens, max_length is {max_length}; shorten "
                "or remove it, rows are not truncated"
            )
        check_ids(where, row, limits)
        encoded.append(row)
    return encoded


def has_text(rows: Any) -> bool:
    """Whether `rows` is a sequence of rows of text, which must be encoded."""
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")) or not len(rows):
        return False
    return isinstance(rows[0], Mapping) and not {"prompt", "messages"}.isdisjoint(rows[0])


def response_tokens(row: Mapping[str, Any]) -> int:
    """Number of predicted tokens of a row; the first token is never predicted."""
    return sum(label != IGNORED for label in row["labels"][1:])


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 of encoded rows in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


def token_limits(model: Any) -> dict[str, float]:
    """How many token ids a model reads, and how many labels it predicts; Inf where unknown."""
    try:
        head = getattr(model, "get_output_embeddings", lambda: None)()
    except NotImplementedError:  # a model without such a layer
        head = None
    labels = getattr(getattr(head, "base_layer", head), "out_features", math.inf)
    return {"input_ids": input_vocabulary(model), "labels": labels}


def check_ids(where: str, row: Mapping[str, Any], limits: Mapping[str, float]) -> bool | None:
    """Checks token ids and labels; what does not hold them is left to the collator of the user.

    Returns:
        Whether the row has a label to predict; None if its labels cannot be told.

    Raises:
        ValueError: A token id or label is not a whole number, or out of range.
    """
    answered = None
    for key, limit in limits.items():
        given = row.get(key)
        if not isinstance(given, (list, tuple)) and not hasattr(given, "tolist"):
            continue
        try:
            values = torch.as_tensor(given).flatten()
            whole = not (values.is_floating_point() or values.dtype == torch.bool)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            whole = False
        if not (whole or given == []):
            raise ValueError(f"{where}: expected {key} to be whole numbers of at most 64 bits")
        wrong = (values < 0) | (values >= limit)
        if key == "labels":
            wrong &= values != IGNORED
            answered = bool((values[1:] != IGNORED).any())
        if wrong.any():
            place = wrong.nonzero()[0]
            most = "" if limit == math.inf else f" and below {limit} (the model's vocabulary)"
            raise ValueError(
                f"{where}: expected {key} of {'-100, or ' * (key == 'labels')}at least 0{most}, "
                f"got {values[place].item()} at position {place.item()}; encode the row "
                "with the tokenizer of the model"
            )
    return answered


def checked_fingerprint(
    name: str, rows: Any, model: Any, alignment: Sequence[Row] = ()
) -> str | None:
    """SHA-256 of the rows a trainer gets, after `check_ids` of each.

    Data sets of other classes than lists and `datasets.Dataset` are not read, since reading may
    draw random numbers: of them the number of rows, or None without a length. Warns if every
    alignment row is among the rows.
    """
    if not hasattr(rows, "__len__"):
        return None
    if not (isinstance(rows, (list, tuple)) or hasattr(rows, "column_names")):
        return f"{len(rows)} rows of {type(rows).__name__}"
    limits = token_limits(model)
    digest = hashlib.sha256()
    new = {json.dumps(row["input_ids"]) for row in alignment}
    answered = []
    for index, row in enumerate(rows.with_format(None) if hasattr(rows, "with_format") else rows):
        if isinstance(row, Mapping):
            where = f"gradsafe.SafeGradTrainer: {name}[{index}]"
            answered.append(check_ids(where, row, limits))
            if new:
                new.discard(json.dumps(row.get("input_ids"), default=_plain))
        digest.update(json.dumps(row, default=_plain).encode() + b"\n")
    if answered and not any(found is None or found for found in answered):
        raise ValueError(
            f"gradsafe.SafeGradTrainer: no row of {name} has a response token: every label after "
            "the first position is -100, so the user loss is always 0"
        )
    if alignment and not new:
        warnings.warn(
            f"gradsafe.SafeGradTrainer: every alignment row is also a row of {name}, so nothing "
            "shows the behaviour to keep; use other prompts with the model's own refusals",
            stacklevel=4,
        )
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors and arrays
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else type(value).__name__


class AlignmentOrder:
    """Draws row numbers in epochs: every row once per epoch, each epoch in a new random order.

    The order depends only on the seed and on the number of rows drawn so far (`drawn`), so it
    resumes from a checkpoint and is the same in every process.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows, self.seed, self.drawn = rows, seed, 0

    def draw(self, count: int) -> list[int]:
        """Return the next `count` row numbers."""
        numbers: list[int] = []
        while len(numbers) < count:
            epoch, place = divmod(self.drawn, self.rows)
            taken = _shuffled(self.rows, self.seed, epoch)[place : place + count - len(numbers)]
            numbers += taken
            self.drawn += len(taken)
        return numbers


@lru_cache(maxsize=1)
def _shuffled(rows: int, seed: int, epoch: int) -> list[int]:
    order = list(range(rows))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class RowCollator:
    """Pads rows on the right to `input_ids`, `attention_mask` and `labels`, each `[B, T]` int64."""

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]], columns: int = 0) -> dict[str, Tensor]:
        """Pads rows to the longest of them, or to `columns` if that is more."""
        for row in rows:
            missing = {"input_ids", "labels"} - set(row)
            if missing:
                raise ValueError(
                    f"gradsafe.SafeGradTrainer: a row of the batch has no {min(missing)}, only "
                    f"{sorted(row)}; pass rows with prompt and response (or completion), messages, "
                    "or input_ids and labels, or your own data_collator"
                )
        width = max(columns, *(len(row["input_ids"]) for row in rows))
        fill = {"input_ids": self.pad_id, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for key, value in fill.items():
            batch[key] = torch.full((len(rows), width), value, dtype=torch.int64)
            for line, row in zip(batch[key], rows, strict=True):
                count = len(row["input_ids"])
                try:
                    values = torch.as_tensor(row.get(key, [1] * count))
                except (TypeError, ValueError, RuntimeError, OverflowError):
                    values = torch.empty(0)
                if values.shape != (count,):
                    expected = f"{key} of a row of the batch to be {count} whole numbers, as many"
                    got = list(values.shape) or type(row[key]).__name__
                    refuse("SafeGradTrainer", f"{expected} as its input_ids", got)
                line[:count] = values
        return batch


def row_collator(tokenizer: Any, model: Any) -> RowCollator:
    """Return a collator with the padding of the tokenizer."""
    return RowCollator(0 if tokenizer is None else pad_token_id(tokenizer, model))


def _encode(
    where: str, row: Any, tokenizer: PreTrainedTokenizerBase | None, options: SafeGradConfig
) -> Row:
    fields = set(row) if isinstance(row, Mapping) else set()
    if {"input_ids", "labels"} <= fields:
        ids, labels = _numbers(where, row, "input_ids"), _numbers(where, row, "labels")
        if len(ids) != len(labels):
            raise ValueError(
                f"{where}: expected one label for each of {len(ids)} input_ids, got {len(labels)}"
            )
        if row.get("attention_mask") is None:
            return {"input_ids": ids, "labels": labels}
        mask = _numbers(where, row, "attention_mask")
        if len(mask) != len(ids):
            raise ValueError(
                f"{where}: expected an attention_mask of {len(ids)} numbers, got {len(mask)}"
            )
        kept = [place for place, real in enumerate(mask) if real]  # without padding
        return {"input_ids": [ids[i] for i in kept], "labels": [labels[i] for i in kept]}
    if fields.isdisjoint({"prompt", "messages"}):
        raise ValueError(
            f"{where}: expected prompt and response (or completion), messages, or input_ids and "
            f"labels, got {sorted(fields) or type(row).__name__}"
        )
    prompt, response = pair(row, where)
    if tokenizer is None:
        raise ValueError(f"{where} is text; pass processing_class=tokenizer")
    with located(where):
        encoded = encode(tokenizer, prompt, response, options.encoding)
    labels = [IGNORED] * encoded.prompt_length + encoded.input_ids[encoded.prompt_length :]
    return {"input_ids": encoded.input_ids, "labels": labels}


def _numbers(where: str, row: Mapping[str, Any], key: str) -> list[int]:
    values = row[key].tolist() if hasattr(row[key], "tolist") else row[key]
    if not isinstance(values, Sequence) or not fits(tuple(values), tuple[int, ...]):
        raise ValueError(f"{where}: expected {key} to be a list of whole numbers")
    return [int(value) for value in values]
