"""Training rows with their own responses, as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gradsafe._checks import refuse
from gradsafe.detection.gradients import EncodedPrompts
from gradsafe.models import ContextOverflowError, Encoded, context_length, encode
from gradsafe.models.encode import located
from gradsafe.models.encoding import Prompt
from gradsafe.models.inspection import check_token_ids
from gradsafe.models.rows import pair
from gradsafe.screening.config import ScreenConfig

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TruncatedRow(Encoded):
    """A row whose response does not end where its text does."""


class RowEncoder:
    """Encodes rows for one model; errors name the row by `row.where`, or by name and index."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: ScreenConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        known = [config.max_length, context_length(model, tokenizer)]
        self.limit = min((length for length in known if length is not None), default=None)

    def __call__(self, rows: Rows, name: str, first: int = 0) -> EncodedPrompts:
        """Encode rows, of which the first has the number `first`.

        Raises:
            TypeError: `rows` is no list of rows, or a field is of another type.
            ValueError: No rows, or one without prompt or response.
            ContextOverflowError: A row is too long.
        """
        listed = isinstance(rows, Iterable) and hasattr(rows, "__len__")  # also a Dataset
        if isinstance(rows, (str, Mapping)) or not listed:
            got = type(rows).__name__
            refuse("Screener", f"{name} to be a list of rows", got, "pass a list", TypeError)
        if not rows:
            refuse("Screener", f"at least one row in {name}", "none")
        names = [place(row, name, first + index) for index, row in enumerate(rows)]
        items = []
        for row, where in zip(rows, names, strict=True):
            if not isinstance(row, Mapping):
                raise TypeError(f"{where}: expected a dict, got {type(row).__name__}")
            with located(where):
                items.append(self.one(*pair(row, where)))
        largest = [max(item.input_ids) for item in items]
        check_token_ids("Screener", self.model, largest, names)
        return EncodedPrompts(names, [[item] for item in items])

    def one(self, prompt: Prompt, response: str) -> Encoded:
        """Encode one row; see `ScreenConfig.overflow`."""
        item = encode(self.tokenizer, prompt, response, self.config.encoding)
        if self.limit is None or len(item) <= self.limit:
            return item
        cut = self.config.overflow == "truncate"
        if not cut or item.prompt_length >= self.limit:
            parts = f"{item.prompt_length} + {item.response_length}"
            raise ContextOverflowError(
                f"gradsafe.Screener: the row takes {len(item)} tokens ({parts}), and at most "
                f"{self.limit} fit; "
                + (
                    "its prompt alone leaves no room for a response: remove the row"
                    if cut
                    else 'remove or shorten it, or cut long responses with overflow="truncate"'
                )
            )
        return TruncatedRow(item.input_ids[: self.limit], item.prompt_length, item.control_tokens)


def place(row: object, name: str, index: int) -> str:
    """What messages call a row: its file and line, or else its number."""
    return getattr(row, "where", None) or f"{name}[{index}]"
