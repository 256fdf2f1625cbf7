"""A whole training set in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from gradsafe._checks import refuse
from gradsafe.screening.overlap import Known
from gradsafe.screening.rows import Rows
from gradsafe.screening.scores import ScreenScores
from gradsafe.screening.screener import Screener


def screen(
    model: nn.Module,
    tokenizer: Any,
    rows: Iterable[Mapping[str, Any]],
    unsafe: Rows | None = None,
    safe: Rows | None = None,
    alignment: Rows | None = None,
    *,
    clean: Rows | None = None,
    max_fpr: float = 0.01,
    batch_tokens: int = 4096,
    progress: bool = True,
    **options: Any,
) -> ScreenScores:
    """Score every row of a training set before any training: would it harm the alignment?

    Args:
        model: The aligned model before training.
        tokenizer: Its tokenizer.
        rows: The training set: any iterable of rows, read once, a few rows at a time.
        unsafe: See `Screener.fit`.
        safe: See `Screener.fit`.
        alignment: See `Screener.fit`.
        clean: Rows known to be clean, which set the thresholds; see `Screener.calibrate`.
        max_fpr: Bound on the share of clean rows that are flagged.
        batch_tokens: Tokens per batch, padding included.
        progress: Show progress bars.
        **options: Fields of `ScreenConfig`; scale="adam" needs `Screener.fit`.

    Raises:
        ValueError: As `Screener.fit` and `Screener.score`; also a row that is an alignment or
            reference row, too, and an empty training set.
    """
    known = Known(unsafe=unsafe, safe=safe, alignment=alignment)
    screener = Screener.fit(
        model,
        tokenizer,
        *(unsafe, safe, alignment),
        batch_tokens=batch_tokens,
        progress=progress,
        **options,
    )
    if clean is not None:
        list(known.checked(clean, "clean"))
        screener.calibrate(screener.encode(clean, "clean"), max_fpr, batch_tokens, progress)
    found = list(screener.stream(known.checked(rows), batch_tokens))
    if not found:
        refuse("screen", "at least one row in rows", "none")

    def joined(name: str) -> Any:
        parts = [getattr(scores, name) for scores in found]
        return None if parts[0] is None else torch.cat(parts)

    names = ("alignment", "share", "nll", "tokens", "truncated")
    return replace(found[0], **{name: joined(name) for name in names})
