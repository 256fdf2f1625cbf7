"""Screening of training rows: what would a step on them do to a model's alignment?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gradsafe._lazy import lazy_names

if TYPE_CHECKING:
    from gradsafe.screening.config import ScreenConfig
    from gradsafe.screening.scores import ScreenScores
    from gradsafe.screening.screener import Screener
    from gradsafe.screening.training_set import screen

__all__ = ["ScreenConfig", "ScreenScores", "Screener", "screen"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ScreenConfig": "config",
        "ScreenScores": "scores",
        "Screener": "screener",
        "screen": "training_set",
    },
)
