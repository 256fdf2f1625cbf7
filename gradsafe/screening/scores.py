"""Scores of training rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gradsafe.screening.config import ScoreName


@dataclass(frozen=True)
class ScreenScores:
    """Scores of n training rows, in input order; a higher score means more harmful.

    Attributes:
        alignment: `[n]` float32, minus the cosine (or dot product) of the row's gradient with the
            safety gradient; None without alignment rows.
        share: `[n]` float32 in [0, 1], GradCoo's unsigned share of the unsafe reference; None
            without reference rows.
        nll: `[n]` float32, mean negative log-likelihood of the row's own response, in nats.
        tokens: `[n]` int64, number of tokens of prompt and response.
        truncated: `[n]` bool, whether the end of the response was cut off.
        decide: The name of the score that flags.
        thresholds: The calibrated threshold of each score; empty before `Screener.calibrate`.
    """

    alignment: Tensor | None
    share: Tensor | None
    nll: Tensor
    tokens: Tensor
    truncated: Tensor
    decide: ScoreName
    thresholds: Mapping[ScoreName, float]

    def __len__(self) -> int:
        return len(self.nll)

    @property
    def values(self) -> Tensor:
        """The deciding score, `[n]` float32."""
        found: Tensor = getattr(self, self.decide)
        return found

    @property
    def flags(self) -> Tensor | None:
        """Which rows lie above the threshold of the deciding score, `[n]` bool; None without."""
        threshold = self.thresholds.get(self.decide)
        return None if threshold is None else self.values > threshold
